"""Ranks as threads of one process: for notebooks, doctests and fast tests.

The ranks of a group meet in a shared ``Room``. A collective is computed by whoever arrives last, from
everybody's arguments, so nothing is copied twice and differing calls are noticed at once.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from commlayer.arithmetic import combine, premultiplied
from commlayer.backends.base import Communicator, Counts, Message, pieces
from commlayer.control.seat import Seat
from commlayer.errors import CollectiveMismatch, CommError, CommTimeout
from commlayer.reduce_op import ReduceOp
from commlayer.work import Work, gather_works

# Moves or reduces: (arguments of every rank in rank order) -> None.
Compute = Callable[[list[Any]], None]


class Room:
    """Where the ranks of one group meet. All rooms of one ``run_local`` share one lock."""

    def __init__(self, changed: threading.Condition, ranks: tuple[int, ...]) -> None:
        self.changed = changed
        self.ranks = ranks
        self.meetings: dict[int, Meeting] = {}
        # Letters are numbered per (src, dst, tag), so that they match receives in the order of posting.
        self.mail: dict[tuple[int, int, int, int], torch.Tensor] = {}
        self.sent: Counter[tuple[int, int, int]] = Counter()
        self.asked: Counter[tuple[int, int, int]] = Counter()
        self.children: dict[tuple[int, ...], Room] = {}


class Meeting:
    """One collective call: the arguments brought so far, and how it ended."""

    def __init__(self, key: tuple[Any, ...]) -> None:
        self.key = key
        self.arguments: dict[int, Any] = {}
        self.finished = False
        self.error: Exception | None = None


class _Arrived(Work):
    __slots__ = ("_comm", "_meeting")

    def __init__(self, comm: Threads, meeting: Meeting) -> None:
        super().__init__()
        self._comm, self._meeting = comm, meeting

    def done(self) -> bool:
        return self._meeting.finished

    def wait(self, timeout: float | None = None) -> Any:
        meeting = self._meeting
        if not meeting.finished:
            self._comm.wait_for(lambda: meeting.finished, timeout, str(meeting.key[0]))
        if meeting.error is not None:
            raise meeting.error
        return self.result


class _Letter(Work):
    __slots__ = ("_comm", "_key", "_out", "_taken")

    def __init__(self, comm: Threads, key: tuple[int, int, int, int], out: torch.Tensor) -> None:
        super().__init__()
        self._comm, self._key, self._out, self._taken = comm, key, out, False

    def done(self) -> bool:
        return self._taken or self._key in self._comm.room.mail

    def wait(self, timeout: float | None = None) -> Any:
        if self._taken:
            return None
        mail = self._comm.room.mail
        self._comm.wait_for(lambda: self._key in mail, timeout, f"recv from rank {self._key[0]}")
        letter = mail.pop(self._key)
        # A letter that does not fit stays taken: the message is gone on every backend.
        if letter.dtype != self._out.dtype or letter.numel() != self._out.numel():
            raise CollectiveMismatch(
                f"recv: expected {self._out.numel()} elements of {self._out.dtype}, "
                f"rank {self._key[0]} sent {letter.numel()} of {letter.dtype}"
            )
        with torch.inference_mode() if self._out.is_inference() else torch.no_grad():
            self._out.copy_(letter)
        self._taken = True
        return None


class Threads(Communicator):
    """One rank's seat in a room."""

    name = "threads"
    device = torch.device("cpu")

    def __init__(self, room: Room, rank: int, timeout: float) -> None:
        self.room = room
        self.rank = rank
        self.size = len(room.ranks)
        self.timeout = timeout
        self._calls = 0
        self._children: Counter[tuple[int, ...]] = Counter()

    def _meet(self, key: tuple[Any, ...], argument: Any, compute: Compute) -> Work:
        number, self._calls = self._calls, self._calls + 1
        with self.room.changed:
            meeting = self.room.meetings.setdefault(number, Meeting(key))
            meeting.arguments[self.rank] = argument
            if meeting.key != key and meeting.error is None:
                meeting.error = CollectiveMismatch(f"rank {self.rank} called {key}, another rank called {meeting.key}")
            if len(meeting.arguments) == self.size:
                del self.room.meetings[number]
                if meeting.error is None:
                    try:
                        with torch.inference_mode():  # may write into other ranks' inference tensors
                            compute([meeting.arguments[rank] for rank in range(self.size)])
                    except (RuntimeError, ValueError) as error:
                        meeting.error = CollectiveMismatch(f"{key[0]}: arguments do not fit together: {error}")
                meeting.arguments.clear()
                meeting.finished = True
                self.room.changed.notify_all()
        return _Arrived(self, meeting)

    def all_reduce(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> Work:
        def compute(ranks: list[Any]) -> None:
            total = combine([row for _, row in ranks], op.name)
            for target, _ in ranks:
                target.copy_(total)

        return self._meet(("all_reduce", op.name, x.dtype, x.numel()), (out, _scaled(x, op)), compute)

    def reduce(self, out: torch.Tensor | None, x: torch.Tensor, op: ReduceOp, dst: int) -> Work:
        def compute(ranks: list[Any]) -> None:
            ranks[dst][0].copy_(combine([row for _, row in ranks], op.name))

        return self._meet(("reduce", op.name, x.dtype, x.numel(), dst), (out, _scaled(x, op)), compute)

    def broadcast(self, x: torch.Tensor, src: int) -> Work:
        def compute(ranks: list[Any]) -> None:
            for rank, target in enumerate(ranks):
                if rank != src:
                    target.copy_(ranks[src])

        return self._meet(("broadcast", x.dtype, x.numel(), src), x, compute)

    def all_gather(self, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
        def compute(ranks: list[Any]) -> None:
            for target, _ in ranks:
                for piece, (_, row) in zip(pieces(target, counts, self.size), ranks, strict=True):
                    _fill(piece, row)

        return self._meet(("all_gather", x.dtype, _tuple(counts)), (out, x), compute)

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp, counts: Counts) -> Work:
        def compute(ranks: list[Any]) -> None:
            total = combine([row for _, row in ranks], op.name)
            for (target, _), piece in zip(ranks, pieces(total, counts, self.size), strict=True):
                _fill(target, piece)

        key = ("reduce_scatter", op.name, x.dtype, x.numel(), _tuple(counts))
        return self._meet(key, (out, _scaled(x, op)), compute)

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor, out_counts: Counts, in_counts: Counts) -> Work:
        def compute(ranks: list[Any]) -> None:
            outgoing = [pieces(row, counts, self.size) for _, row, _, counts in ranks]
            for rank, (target, _, counts, _) in enumerate(ranks):
                for src, piece in enumerate(pieces(target, counts, self.size)):
                    if piece.numel() != outgoing[src][rank].numel():
                        raise ValueError(
                            f"rank {src} sends {outgoing[src][rank].numel()} elements to rank {rank}, "
                            f"which expects {piece.numel()}"
                        )
                    piece.copy_(outgoing[src][rank])

        key = ("all_to_all", x.dtype, "even" if in_counts is None else "uneven")
        return self._meet(key, (out, x, out_counts, in_counts), compute)

    def gather(self, out: torch.Tensor | None, x: torch.Tensor, dst: int, counts: Counts) -> Work:
        def compute(ranks: list[Any]) -> None:
            for piece, (_, row) in zip(pieces(ranks[dst][0], counts, self.size), ranks, strict=True):
                _fill(piece, row)

        return self._meet(("gather", x.dtype, _tuple(counts), dst), (out, x), compute)

    def scatter(self, out: torch.Tensor, x: torch.Tensor | None, src: int, counts: Counts) -> Work:
        def compute(ranks: list[Any]) -> None:
            for (target, _), piece in zip(ranks, pieces(ranks[src][1], counts, self.size), strict=True):
                _fill(target, piece)

        return self._meet(("scatter", out.dtype, _tuple(counts), src), (out, x), compute)

    def send(self, x: torch.Tensor, dst: int, tag: int) -> Work:
        room, route = self.room, (self.rank, dst, tag)
        with room.changed:
            room.mail[(*route, room.sent[route])] = x.clone()
            room.sent[route] += 1
            room.changed.notify_all()
        return Work()

    def recv(self, x: torch.Tensor, src: int, tag: int) -> Work:
        room, route = self.room, (src, self.rank, tag)
        with room.changed:
            number = room.asked[route]
            room.asked[route] += 1
        return _Letter(self, (*route, number), x)

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], tag: int) -> Work:
        for x, dst in sends:
            self.send(x, dst, tag)
        return gather_works([self.recv(x, src, tag) for x, src in recvs])

    def post(self, x: torch.Tensor, dst: int, tag: int) -> Work:
        return self.send(x, dst, ~tag)  # negative tags are the control channel's

    def fetch(self, x: torch.Tensor, src: int, tag: int) -> Work:
        return self.recv(x, src, ~tag)

    def barrier(self) -> Work:
        return self._meet(("barrier",), None, lambda ranks: None)

    def subgroup(self, ranks: Sequence[int], seat: Seat) -> Threads:
        # Members alone call this, so they meet in a child room, found under its ranks and a count of
        # how often each member has asked for just these.
        members = tuple(self.room.ranks[rank] for rank in ranks)
        with self.room.changed:
            self._children[members] += 1
            key = (self._children[members], *members)
            child = self.room.children.setdefault(key, Room(self.room.changed, members))
        made = Threads(child, list(ranks).index(self.rank), self.timeout)
        made.seat = seat
        return made

    def wait_for(self, ready: Callable[[], bool], timeout: float | None, what: str) -> None:
        limit = self.limit(timeout)
        changed = self.room.changed
        with changed:
            changed.wait_for(lambda: self.failure is not None or ready(), limit)
            if not ready():
                raise self.failure or CommTimeout(f"{what}: not finished after {limit:g} s")

    def fail(self, error: CommError) -> None:
        with self.room.changed:
            self.failure = error
            self.room.changed.notify_all()


def new_world(size: int, timeout: float) -> list[Threads]:
    """The seats of a fresh set of thread ranks."""
    room = Room(threading.Condition(), tuple(range(size)))
    return [Threads(room, rank, timeout) for rank in range(size)]


def _scaled(x: torch.Tensor, op: ReduceOp) -> torch.Tensor:
    return premultiplied(x, op) if op.factor is not None else x


def _fill(target: torch.Tensor, source: torch.Tensor) -> None:
    """copy_ without its broadcasting."""
    if target.numel() != source.numel():
        raise ValueError(f"{source.numel()} elements for a place of {target.numel()}")
    target.copy_(source)


def _tuple(counts: Counts) -> tuple[int, ...] | None:
    return None if counts is None else tuple(counts)
