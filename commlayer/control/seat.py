"""A group's place at the control channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from commlayer.control.client import Event


class Control(Protocol):
    """A rank's end of the control channel; ranks are those of the world."""

    gone: str

    def tell(self, event: Event) -> None: ...

    def bye(self, generation: int, ends: dict[str, int]) -> None: ...

    def where(self, group: str, ranks: Sequence[int], within: float) -> dict[int, Any]: ...

    def here(self, token: int, at: Any) -> None: ...

    def set(self, key: str, value: bytes) -> None: ...

    def get(
        self,
        keys: Sequence[str],
        timeout: float,
        ranks: Sequence[int] = (),
        idle: Callable[[], None] | None = None,
        take: bool = False,
    ) -> list[bytes]: ...

    def meet(
        self, key: str, ranks: Sequence[int], payload: bytes, timeout: float, idle: Callable[[], None] | None = None
    ) -> list[bytes]: ...


class Seat:
    """The ranks of one group, by their place in the world. ``label`` names the group, the same on all of them.

    ``idle`` is called while this rank waits: a backend's messages may move on only then.
    """

    def __init__(
        self, control: Control, generation: int, label: str, ranks: Sequence[int], idle: Callable[[], None]
    ) -> None:
        self.control, self.generation, self.label, self.ranks = control, generation, label, tuple(ranks)
        self._idle = idle
        self._shared = 0

    def meet(self, what: str, payload: bytes, timeout: float) -> list[bytes]:
        """Everybody's payload, once everybody is here with the same ``what``."""
        key = f"{self.generation}/{self.label}/{what}"
        return self.control.meet(key, self.ranks, payload, timeout, self._idle)

    def set(self, key: str, value: bytes) -> None:
        self.control.set(f"{self.generation}/{self.label}/{key}", value)

    def take(self, key: str, rank: int, timeout: float) -> bytes:
        """The value that another rank of the group sets, once it is there; it is gone then."""
        name = f"{self.generation}/{self.label}/{key}"
        return self.control.get([name], timeout, [self.ranks[rank]], self._idle, take=True)[0]

    def share(self, value: bytes, timeout: float) -> list[bytes]:
        """Every rank's value; called by all, in the same order."""
        self._shared += 1
        return self.meet(f"share {self._shared}", value, timeout)
