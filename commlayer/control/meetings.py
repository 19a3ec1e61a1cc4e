"""Meetings: ranks that wait for each other, each with a payload for all. Plain bookkeeping; the hub carries answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Whom to answer, the number of its request, the header, the body.
Answers = list[tuple[int, int, dict[str, Any], bytes]]


@dataclass
class _Meeting:
    ranks: tuple[int, ...]
    payloads: dict[int, bytes] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)

    def missing(self) -> list[int]:
        return [rank for rank in self.ranks if rank not in self.payloads]


class Meetings:
    """All meetings of a job. What cannot happen any more is answered so, also to who comes late."""

    def __init__(self) -> None:
        self._open: dict[str, _Meeting] = {}
        self._cancelled: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def join(
        self,
        key: str,
        rank: int,
        number: int,
        ranks: Sequence[int],
        payload: bytes,
        gone: dict[int, str],
    ) -> Answers:
        """A rank has come; the answers that this allows. ``gone``: who will never come, and why."""
        if key in self._cancelled:
            return [(rank, number, self._cancelled[key], b"")]
        meeting = self._open.setdefault(key, _Meeting(tuple(ranks)))
        meeting.payloads[rank], meeting.numbers[rank] = payload, number
        if len(meeting.payloads) == len(meeting.ranks):
            del self._open[key]
            rows = [meeting.payloads[member] for member in meeting.ranks]
            header: dict[str, Any]
            if rows.count(rows[0]) == len(rows):  # the common case, and in large jobs it makes all the difference
                header, body = {"same": len(rows)}, rows[0]
            else:
                header, body = {"sizes": [len(row) for row in rows]}, b"".join(rows)
            return [(member, asked, header, body) for member, asked in meeting.numbers.items()]
        for member, why in gone.items():
            if member in meeting.ranks and member not in meeting.payloads:
                return self._cancel(key, {"lost": member, "why": why})
        return []

    def give_up(self, key: str, rank: int) -> Answers:
        """One of them will not wait any longer."""
        meeting = self._open.get(key)
        if meeting is None or rank not in meeting.payloads:
            return []
        return self._cancel(key, {"missing": meeting.missing()})

    def absent(self, rank: int, why: str, prefix: str = "") -> Answers:
        """A rank will come to no meeting (whose key begins so)."""
        answers: Answers = []
        for key, meeting in list(self._open.items()):
            if key.startswith(prefix) and rank in meeting.missing():
                answers += self._cancel(key, {"lost": rank, "why": why})
        return answers

    def _cancel(self, key: str, header: dict[str, Any]) -> Answers:
        meeting = self._open.pop(key)
        self._cancelled[key] = header
        return [(rank, number, header, b"") for rank, number in meeting.numbers.items()]

    def stuck(self) -> set[str]:
        """Meetings that wait for each other, since their ranks came to them in different orders.

        A meeting can still happen if everybody it misses is free, or is in a meeting that can happen.
        """
        stuck = dict(self._open) if len(self._open) > 1 else {}
        while True:
            waiting = {rank for meeting in stuck.values() for rank in meeting.numbers}
            hopeful = [key for key, meeting in stuck.items() if not waiting.intersection(meeting.missing())]
            if not hopeful:
                return set(stuck)
            for key in hopeful:
                del stuck[key]

    def untie(self, keys: set[str]) -> Answers:
        """Cancel these, which wait for each other, and tell their ranks what each of them brought."""
        meetings = [self._open[key] for key in keys]
        brought = {
            str(rank): payload.decode(errors="replace")
            for meeting in meetings
            for rank, payload in meeting.payloads.items()
        }
        answers: Answers = []
        for key in keys:
            answers += self._cancel(key, {"knot": brought})
        return answers
