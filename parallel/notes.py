"""What a checkpoint remembers of its forward, for the recomputation to read instead of doing it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from contextvars import ContextVar, Token
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Value = TypeVar("Value")
Tensors = TypeVar("Tensors", Tensor, tuple[Tensor, ...])

_MISSING = object()


class _Pass:
    """A context: one pass through a checkpointed function, the forward or, with ``values`` to read, a recomputation."""

    def __init__(self, values: list[Any], again: bool, products: bool) -> None:
        self.values, self.again, self.products = values, again, products

    def __enter__(self) -> None:
        self.reader: Iterator[Any] = iter(self.values)
        self.outer = _CURRENT.get()
        self.hides: bool = self.products or (self.outer is not None and self.outer.hides)
        self.token: Token[_Pass | None] = _CURRENT.set(self)

    def __exit__(self, *error: object) -> None:
        _CURRENT.reset(self.token)

    def value_of(self, action: Callable[[], Value], *, nested: bool) -> Value:
        """Written, or read. ``nested``: also by checkpoints around this one, whose recomputation is a forward of it."""
        if self.again:
            found = next(self.reader, _MISSING)
            if found is _MISSING:
                raise RuntimeError("checkpoint: the recomputation took another way through the function than forward")
            return found  # type: ignore[return-value]
        around = self.outer if nested else None
        value = self.run(action) if around is None else around.value_of(action, nested=True)
        self.values.append(value)
        return value

    def run(self, action: Callable[[], Value]) -> Value:
        """Unseen by torch's selective checkpoint, which counts each operator's calls in forward and recomputation."""
        token = _CURRENT.set(None)  # what the action does in turn is no note of its own
        try:
            with _disable_current_modes() if self.hides else nullcontext():
                return action()
        finally:
            _CURRENT.reset(token)


class Notes:
    """Of one call of a checkpoint: a context for its forward, and one for every recomputation."""

    def __init__(self, products: bool) -> None:
        values: list[Any] = []
        self.writing, self.reading = (_Pass(values, again, products) for again in (False, True))


class _Kept:
    """Tensors, as long as nobody writes into them."""

    def __init__(self, found: Tensor | tuple[Tensor, ...]) -> None:
        self.single = isinstance(found, Tensor)
        self.tensors = [each.detach() for each in ([found] if isinstance(found, Tensor) else found)]
        self.versions = [each._version for each in self.tensors]

    def hand_out(self) -> Any:
        """Other tensors of the same values: autograd writes into the very ones that a Function returns."""
        if self.versions != [each._version for each in self.tensors]:
            raise RuntimeError(
                'checkpoint: a result that keep="products" kept was changed in place; change a copy, or keep nothing'
            )
        handed = [each.detach() for each in self.tensors]
        return handed[0] if self.single else tuple(handed)


_CURRENT: ContextVar[_Pass | None] = ContextVar("notes", default=None)


def once(action: Callable[[], Value]) -> Value:
    """``action()``, which carries no gradient; in a recomputation what it returned in the forward.

    For decisions that must not change between the two, such as where tokens go.
    """
    notes = _CURRENT.get()
    return action() if notes is None else notes.value_of(action, nested=True)


def kept(action: Callable[[], Tensors]) -> Tensors:
    """``action()``, tensors made within an autograd.Function; in a recomputation that keeps products, the same again.

    For what is dear: communication, and large products.
    """
    notes = _CURRENT.get()
    if notes is None or not notes.products:
        return unseen(action)
    found: Tensors = notes.value_of(lambda: _Kept(action()), nested=False).hand_out()
    return found


def unseen(action: Callable[[], Value]) -> Value:
    """``action()``, hidden from checkpoints that keep products: to communicate takes tensor operations of its own."""
    notes = _CURRENT.get()
    return action() if notes is None else notes.run(action)


def replays_kept() -> bool:
    """Whether :func:`kept` will find its result already there."""
    notes = _CURRENT.get()
    return notes is not None and notes.products and notes.again
