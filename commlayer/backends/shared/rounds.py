"""How ranks of one host move and reduce what lies in each other's memory.

Ordinary tensors are staged. Every rank has a *slot* that all map, of two halves; it copies the next stretch of its
input into one half while the others still read the other. A half that was filled before one meeting is read before
the next, and filled again after that, so one meeting a round is all it takes. Symmetric tensors are read where they
are, in one round, with a meeting at the end instead, since their owner may change them then.

What is reduced is divided into a block for each rank, which alone reduces it, from all ranks' inputs in rank order: so
every rank has the same bits. In an all_reduce it passes its block on, through a slot for results or, between
symmetric tensors, straight into those of the others.

Before the first meeting of an operation each rank writes a note: what it calls, and where its tensors are. The ranks
compare them, and an operation that is not everywhere the same is an error, with nothing written.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from commlayer.backends.shared.meeting import LINE, Meeting
from commlayer.backends.shared.memory import Memory
from commlayer.backends.shared.sums import Sum
from commlayer.backends.shared.symmetric import Symmetric
from commlayer.errors import CollectiveMismatch

# Bytes of half a slot: small enough to stay in a core's cache, large enough to be worth a meeting; where ranks share
# cores, a meeting costs a change of context each.
HALF, HALF_CROWDED = 1 << 20, 1 << 21
SMALL = 1 << 16  # bytes, of all ranks together, up to which each reduces all of it by itself: one meeting less

_NOTE = struct.Struct("7q")  # what it calls and how many bytes, the longest block, its places of input and output
Copy = Callable[[int, int, int], Any]  # to an address, from an address, so many bytes
_copy: Copy = ctypes.memmove
LARGE = 1 << 23  # bytes from which on what is moved does not stay in the caches


Block = tuple[int, int]  # address and bytes


class Notes(NamedTuple):
    """What every rank has told of its operation, by rank; addresses are as this process maps them."""

    longest: list[int]  # bytes, of the blocks that it stages
    sources: list[int]  # where its input is, 0 where that is staged
    targets: list[int]  # where its output is, 0 where that is no symmetric tensor


def space(size: int, half: int) -> int:
    """Bytes that the ranks of one host share for this."""
    return _slots(size) + size * 4 * half


def _slots(size: int) -> int:
    """Where slots begin: after the lines of meetings, and two notes a rank."""
    return -(-(LINE * size + 2 * size * _row(size)) // 4096) * 4096


def _row(size: int) -> int:
    """Of a note, which has room for a size and an offset for each rank."""
    return -(-(_NOTE.size + 16 * size) // 64) * 64


class Rounds:
    """The memory that the ranks of one host share for their collectives, and the ways through it."""

    def __init__(
        self, memory: Memory, half: int, meeting: Meeting, symmetric: Symmetric, copy_past: Copy | None
    ) -> None:
        self.rank, self.size = meeting.rank, meeting.size
        self._memory, self._meeting, self._symmetric, self._half = memory, meeting, symmetric, half
        self._row = _row(self.size)
        notes = (ctypes.c_char * (2 * self.size * self._row)).from_address(memory.address + LINE * self.size)
        self._notes = memoryview(notes).cast("B")
        self._slots = [memory.address + _slots(self.size) + rank * 4 * half for rank in range(self.size)]
        self._places = [[(2 * rank + half) * self._row for rank in range(self.size)] for half in (0, 1)]
        self._copy_past = copy_past or _copy
        self._turn = 0  # of the halves of slots
        self._calls = 0  # of the halves of notes
        self.end: float | None = None  # of the operation under way, by time.perf_counter(); None: as the ranks limit it
        self.progress = True  # whether the thread in here may call the backend

    def meet(self) -> None:
        self._meeting.meet(self.end, self.progress)

    def move(
        self,
        call: int,
        size: int,
        x: int,
        sends: Sequence[Block],
        receives: Sequence[Block],
        mine: int | None,
        common: bool,
    ) -> None:
        """Bring ``sends[r]`` of this rank to ``receives[this rank]`` of each rank r.

        ``x`` is where the input begins, of ``size`` bytes on every rank. ``mine``: where in the others' inputs the
        block for this rank is, in bytes; None where only they know, and sizes differ. ``common``: what each rank sends
        is the same for all.
        """
        told = sends if mine is None else ()
        window = self._half if common else self._half // self.size & ~63
        others = [rank % self.size for rank in range(self.rank + 1, self.rank + self.size)]
        longest = max(sends[rank][1] for rank in others)
        direct = self._write(call, size, longest, x, 0, told)

        def stage(k: int) -> None:
            half = self._half_of(self.rank, self._turn + k)
            for rank in others[:1] if common else others:
                address, length = sends[rank]
                here = min(window, length - k * window)
                if here > 0:
                    _copy(half + (0 if common else rank * window), address + k * window, here)

        if not direct:
            stage(0)
        self.meet()
        notes = self._read(call, size)
        incoming = [self._block_for_me(rank, receives[rank][1]) if mine is None else mine for rank in range(self.size)]
        place = self._copy_past if sum(length for _, length in receives) >= LARGE else _copy
        if receives[self.rank][1] and receives[self.rank][0] != sends[self.rank][0]:
            place(receives[self.rank][0], *sends[self.rank])
        staged = [longest for longest, source in zip(notes.longest, notes.sources, strict=True) if not source]
        rounds = max([1, *(-(-longest // window) for longest in staged)])
        for k in range(rounds):
            if k + 1 < rounds and not direct:
                stage(k + 1)
            for rank in others:
                address, length = receives[rank]
                source = notes.sources[rank]
                if source and k == 0 and length:
                    place(address, source + incoming[rank], length)
                here = min(window, length - k * window)
                if not source and here > 0:
                    half = self._half_of(rank, self._turn + k)
                    place(address + k * window, half + (0 if common else self.rank * window), here)
            if k + 1 < rounds:
                self.meet()
        self._turn += rounds
        if any(notes.sources):
            self.meet()

    def reduce_small(self, call: int, size: int, x: int, out: int, add: Sum) -> None:
        """The whole of it on each rank that has an ``out``, the address of its output, else 0."""
        self._write(call, size, 0, 0, 0, ())
        _copy(self._half_of(self.rank, self._turn), x, size)
        self.meet()
        self._read(call, size)
        if out:
            add([out], [x if r == self.rank else self._half_of(r, self._turn) for r in range(self.size)], size)
        self._turn += 1

    def reduce(
        self, call: int, size: int, x: int, out: int, add: Sum, bounds: Sequence[int], takers: Sequence[int] | None
    ) -> None:
        """Reduce block r, the bytes from ``bounds[r]`` on, of ``size`` bytes at ``x`` of every rank, on rank r.

        ``takers``: the ranks that then get all blocks, into the same places of their ``out``; None where each rank
        keeps its own, at ``out``.
        """
        rank, ranks = self.rank, range(self.size)
        taking = takers is not None and rank in takers
        lengths = [bounds[r + 1] - bounds[r] for r in ranks]
        direct = self._write(call, size, max(lengths), x, out if taking else 0, ())
        step = self._half // self.size & ~63

        def stage(k: int, window: int) -> None:
            half = self._half_of(rank, self._turn + k)
            for r in ranks:
                here = min(window, lengths[r] - k * window)
                if r != rank and here > 0:
                    _copy(half + r * window, x + bounds[r] + k * window, here)

        if not direct:
            stage(0, step)
        self.meet()
        notes = self._read(call, size)
        # Where the sums of this rank go: to its own output, and to the others' or where they fetch them.
        targets = [notes.targets[r] for r in takers] if takers is not None else []
        straight = all(targets)
        results = takers is not None and not straight
        whole = not results and all(notes.sources)
        window = max(*lengths, 64) if whole else step
        rounds = max(1, -(-max(lengths) // window))
        for k in range(rounds + results):
            if k + 1 < rounds and not direct:
                stage(k + 1, window)
            at, here = bounds[rank] + k * window, min(window, lengths[rank] - k * window)
            if k < rounds and here > 0:
                staged = [self._half_of(r, self._turn + k) + rank * window for r in ranks]
                sources = [start + at if start else half for start, half in zip(notes.sources, staged, strict=True)]
                sources[rank] = x + at
                if takers is None:
                    add([out + k * window], sources, here)
                elif straight:
                    add([target + at for target in targets], sources, here)
                else:
                    add([*([out + at] if taking else []), self._result_of(rank, self._turn + k)], sources, here)
            if results and k and taking:
                for r in ranks:
                    here = min(window, lengths[r] - (k - 1) * window)
                    if r != rank and here > 0:
                        _copy(out + bounds[r] + (k - 1) * window, self._result_of(r, self._turn + k - 1), here)
            if k + 1 < rounds + results:
                self.meet()
        self._turn += rounds
        if any(notes.sources) or (straight and targets):
            self.meet()

    def _half_of(self, rank: int, turn: int) -> int:
        return self._slots[rank] + (turn & 1) * self._half

    def _result_of(self, rank: int, turn: int) -> int:
        return self._slots[rank] + (2 + (turn & 1)) * self._half

    # Notes

    def _write(self, call: int, size: int, longest: int, x: int, out: int, blocks: Sequence[Block]) -> bool:
        """Whether the others can read ``x`` where it is. ``blocks``: what goes to each rank, where they cannot know."""
        self._calls ^= 1
        at = self._places[self._calls][self.rank]
        source, target = self._symmetric.place(x), self._symmetric.place(out)
        _NOTE.pack_into(self._notes, at, call, size, longest, *source, *target)
        if blocks:
            values = [number for address, length in blocks for number in (length, address - x)]
            struct.pack_into(f"{len(values)}q", self._notes, at + _NOTE.size, *values)
        return source[0] >= 0

    def _read(self, call: int, size: int) -> Notes:
        """Everybody's, after the first meeting. Raises CollectiveMismatch."""
        notes = Notes([], [], [])
        for rank, at in enumerate(self._places[self._calls]):
            called, brought, longest, source, source_at, target, target_at = _NOTE.unpack_from(self._notes, at)
            if called != call:
                raise CollectiveMismatch(f"rank {rank} of this host called something else than rank {self.rank}")
            if brought != size:
                raise CollectiveMismatch(f"rank {rank} of this host brought {brought} bytes, rank {self.rank} {size}")
            notes.longest.append(longest)
            notes.sources.append(self._symmetric.address(rank, source, source_at) if source >= 0 else 0)
            notes.targets.append(self._symmetric.address(rank, target, target_at) if target >= 0 else 0)
        return notes

    def _block_for_me(self, rank: int, expected: int) -> int:
        """Where it is in that rank's input, in bytes."""
        at = self._places[self._calls][rank] + _NOTE.size + 16 * self.rank
        length, offset = struct.unpack_from("2q", self._notes, at)
        if length != expected:
            raise CollectiveMismatch(
                f"rank {rank} of this host sends {length} bytes here, where {expected} are expected"
            )
        return offset
