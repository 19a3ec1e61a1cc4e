"""The control channel of ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from commlayer.control.client import Event
from commlayer.control.ranks import named
from commlayer.errors import CommTimeout, PeerLost


class Board:
    """What the ranks share."""

    def __init__(self, size: int) -> None:
        self.changed = threading.Condition()
        self.listeners: dict[int, Callable[[Event], None]] = {}
        self.meetings: dict[str, dict[int, bytes]] = {}
        self.answers: dict[int, Any] = {}
        self.values: dict[str, bytes] = {}
        self.ended: dict[int, str] = {}  # ranks that come to no meeting any more, and why
        self.seats = [Local(self, rank) for rank in range(size)]


class Local:
    """One rank's end. Events are delivered in the thread that causes them."""

    gone = ""

    def __init__(self, board: Board, rank: int) -> None:
        self._board, self.rank, self.job = board, rank, str(id(board))

    def listen(self, on_event: Callable[[Event], None]) -> None:
        self._board.listeners[self.rank] = on_event

    def tell(self, event: Event) -> None:
        if event["event"] == "failed":
            self._end(event["why"])
        self._deliver({**event, "from": self.rank})

    def bye(self, generation: int, ends: dict[str, int]) -> None:
        self._end("it has left the job")
        self._deliver({"event": "left", "rank": self.rank, "generation": generation, "ends": ends})

    def _end(self, why: str) -> None:
        with self._board.changed:
            self._board.ended.setdefault(self.rank, why)
            self._board.changed.notify_all()

    def _deliver(self, event: Event) -> None:
        for rank, listener in list(self._board.listeners.items()):
            if rank != self.rank:
                listener(event)

    def clock_offset(self) -> int:
        return 0

    def where(self, group: str, ranks: Sequence[int], within: float) -> dict[int, Any]:
        answers = {}
        for rank in ranks:
            if rank in self._board.listeners:
                self._board.listeners[rank]({"event": "where", "group": group, "token": rank})
                answers[rank] = self._board.answers.pop(rank, None)
        return answers

    def here(self, token: int, at: Any) -> None:
        self._board.answers[token] = at

    def set(self, key: str, value: bytes) -> None:
        with self._board.changed:
            self._board.values[key] = value
            self._board.changed.notify_all()

    def get(
        self,
        keys: Sequence[str],
        timeout: float,
        ranks: Sequence[int] = (),
        idle: Callable[[], None] | None = None,
        take: bool = False,
    ) -> list[bytes]:
        values = self._board.values
        with self._board.changed:
            if not self._board.changed.wait_for(lambda: all(key in values for key in keys), timeout):
                raise CommTimeout(f"waiting for {keys[0]}: no answer after {timeout:g} s")
            return [values.pop(key) if take else values[key] for key in keys]

    def meet(
        self, key: str, ranks: Sequence[int], payload: bytes, timeout: float, idle: Callable[[], None] | None = None
    ) -> list[bytes]:
        board = self._board
        with board.changed:
            payloads = board.meetings.setdefault(key, {})
            payloads[self.rank] = payload
            board.changed.notify_all()

            def lost() -> list[int]:
                return [rank for rank in ranks if rank in board.ended and rank not in payloads]

            board.changed.wait_for(lambda: len(payloads) == len(ranks) or lost(), timeout)
            if len(payloads) == len(ranks):
                board.meetings.pop(key, None)
                return [payloads[rank] for rank in ranks]
            if lost():
                raise PeerLost(f"{key}: rank {lost()[0]} is lost: {board.ended[lost()[0]]}")
            missing = [rank for rank in ranks if rank not in payloads]
            raise CommTimeout(f"{key}: not finished after {timeout:g} s; {named(missing)} never came")
