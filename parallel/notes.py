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


class _Pass:
    """A context: one pass through a checkpointed function, the forward or, with ``values`` to read, a recomputation."""

    def __init__(self, values: list[Any], again: bool, products: bool) -> None:
        self.values, self.again, self.products = values, again, products

    def __enter__(self) -> None:
        self.reader: Iterator[Any] = iter(self.values)
        self.outer = _CURRENT.get()
        self.token: Token[_Pass | None] = _CURRENT.set(self)

    def __exit__(self, *error: object) -> None:
        _CURRENT.reset(self.token)

    def value_of(self, action: Callable[[], Value]) -> Value:
        if self.again:
            found: Value = next(self.reader)
            return found
        # Unseen by torch's selective checkpoint, which counts the calls of each operator in forward and recomputation.
        with _disable_current_modes() if self.products else nullcontext():
            value = action()
        self.values.append(value)
        return value


class Notes:
    """Of one call of a checkpoint: a context for its forward, and one for every recomputation."""

    def __init__(self, products: bool) -> None:
        values: list[Any] = []
        self.writing, self.reading = (_Pass(values, again, products) for again in (False, True))


_CURRENT: ContextVar[_Pass | None] = ContextVar("notes", default=None)


def once(action: Callable[[], Value]) -> Value:
    """``action()``, which carries no gradient; in a recomputation what it returned in the forward.

    For decisions that must not change between the two, such as where tokens go.
    """
    notes = _CURRENT.get()
    if notes is None:
        return action()
    outer = notes.outer  # a recomputation of that one makes this one's forward again
    return notes.value_of(action if outer is None else lambda: outer.value_of(action))


def kept(action: Callable[[], Tensors]) -> Tensors:
    """``action()``, tensors made within an autograd.Function; in a recomputation that keeps products, the same again.

    For what is dear: communication, and large products.
    """
    notes = _CURRENT.get()
    if notes is None or not notes.products:
        return action()
    return _detached(notes.value_of(lambda: _detached(action())))


def _detached(found: Tensors) -> Tensors:
    """Other tensors of the same values: autograd writes into the very ones that a Function returns."""
    return found.detach() if isinstance(found, Tensor) else tuple(each.detach() for each in found)
