"""A group's place at the control channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from commlayer.control.client import Event


class Control(Protocol):
    """A rank's end of the control channel; ranks are those of the world."""

    gone: str

    def tell(self, event: Event) -> None: ...

    def bye(self, generation: int, ends: dict[str, int]) -> None: ...

    def where(self, group: str, ranks: Sequence[int], within: float) -> dict[int, Any]: ...

    def here(self, token: int, at: Any) -> None: ...

    def meet(self, key: str, ranks: Sequence[int], payload: bytes, timeout: float) -> list[bytes]: ...


class Seat:
    """The ranks of one group, by their place in the world. ``label`` names the group, the same on all of them."""

    def __init__(self, control: Control, generation: int, label: str, ranks: Sequence[int]) -> None:
        self.control, self.generation, self.label, self.ranks = control, generation, label, tuple(ranks)
        self._shared = 0

    def meet(self, what: str, payload: bytes, timeout: float) -> list[bytes]:
        """Everybody's payload, once everybody is here with the same ``what``."""
        return self.control.meet(f"{self.generation}/{self.label}/{what}", self.ranks, payload, timeout)

    def share(self, value: bytes, timeout: float) -> list[bytes]:
        """Every rank's value; called by all, in the same order."""
        self._shared += 1
        return self.meet(f"share {self._shared}", value, timeout)
