"""The collectives of ranks that share a host, through memory that all of them map."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from commlayer.backends.base import Closed, Counts, offsets
from commlayer.backends.shared import memory
from commlayer.backends.shared.in_order import InOrder
from commlayer.backends.shared.ranks import Ranks
from commlayer.backends.shared.rounds import SMALL, Block, Rounds
from commlayer.backends.shared.sums import Sum, reducer
from commlayer.backends.shared.symmetric import Symmetric, space
from commlayer.reduce_op import ReduceOp
from commlayer.work import Work

_NOTHING: Block = (0, 0)


class Shared:
    """The flat operations of ``backends.base.Collectives`` but messages; ``comm`` has the same ranks, on one host."""

    def __init__(self, comm: Ranks, rounds: Rounds, symmetric: Symmetric, library: Any | None) -> None:
        self.rank, self.size, self.device = comm.rank, comm.size, comm.device
        self.kernel = library is not None
        self._comm, self._library = comm, library
        self._rounds: Any = rounds
        self._symmetric: Any = symmetric
        self._queue = InOrder(comm, rounds)
        self._numbers: dict[tuple[Any, ...], int] = {}  # of what is called, the same on all ranks
        self._sums: dict[tuple[str, torch.dtype], Sum] = {}

    def all_reduce(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> Work:
        return self._reduce("all_reduce", out, x, op, range(self.size))

    def reduce(self, out: torch.Tensor | None, x: torch.Tensor, op: ReduceOp, dst: int) -> Work:
        return self._reduce("reduce", out, x, op, (dst,))

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp, counts: Counts) -> Work:
        return self._reduce("reduce_scatter", out, x, op, None, self._bounds(x, counts), counts)

    def broadcast(self, x: torch.Tensor, src: int) -> Work:
        block, nowhere = (x.data_ptr(), x.nbytes), [_NOTHING] * self.size
        if self.rank == src:
            sends, receives = [block] * self.size, nowhere
        else:
            sends, receives = nowhere, [block if rank == src else _NOTHING for rank in range(self.size)]
        return self._move(("broadcast", x.dtype, src), x.nbytes, x, None, sends, receives, 0, True)

    def all_gather(self, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
        sends = [(x.data_ptr(), x.nbytes)] * self.size
        receives = self._blocks(out, counts)
        return self._move(("all_gather", x.dtype), out.nbytes, x, out, sends, receives, 0, True, counts)

    def gather(self, out: torch.Tensor | None, x: torch.Tensor, dst: int, counts: Counts) -> Work:
        whole = x.nbytes * self.size if counts is None else sum(counts) * x.itemsize
        own, block = (x.data_ptr(), x.nbytes), (x.data_ptr(), 0 if out is not None else x.nbytes)
        sends = [own if rank == self.rank else block for rank in range(self.size)]
        receives = [_NOTHING] * self.size if out is None else self._blocks(out, counts)
        return self._move(("gather", x.dtype, dst), whole, x, out, sends, receives, 0, True, counts)

    def scatter(self, out: torch.Tensor, x: torch.Tensor | None, src: int, counts: Counts) -> Work:
        whole = out.nbytes * self.size if counts is None else sum(counts) * out.itemsize
        sends = [_NOTHING] * self.size if x is None else self._blocks(x, counts)
        receives = [(out.data_ptr(), out.nbytes) if rank == src else _NOTHING for rank in range(self.size)]
        mine = self.rank * out.nbytes if counts is None else sum(counts[: self.rank]) * out.itemsize
        return self._move(("scatter", out.dtype, src), whole, x, out, sends, receives, mine, False, counts)

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor, out_counts: Counts, in_counts: Counts) -> Work:
        sends, receives = self._blocks(x, in_counts), self._blocks(out, out_counts)
        if in_counts is None:
            mine = x.nbytes // self.size * self.rank
            return self._move(("all_to_all", x.dtype), x.nbytes, x, out, sends, receives, mine, False)
        return self._move(("all_to_all uneven", x.dtype), 0, x, out, sends, receives, None, False)

    def barrier(self) -> Work:
        nowhere = [_NOTHING] * self.size
        return self._move(("barrier",), 0, None, None, nowhere, nowhere, 0, True)

    def empty_symmetric(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | str:
        """A tensor of this rank, in memory that all ranks map; why not, where one of them cannot. Called by all."""
        self._symmetric.sweep()
        made = memory.common(self._comm, space(self.size, shape, dtype))
        return made if isinstance(made, str) else self._symmetric.add(made, shape, dtype)

    def close(self, end: float) -> None:
        """Give the memory back, but that of symmetric tensors that are still there."""
        if self._queue.close(end):
            self._rounds = self._symmetric = Closed()

    def _reduce(
        self,
        name: str,
        out: torch.Tensor | None,
        x: torch.Tensor,
        op: ReduceOp,
        takers: Sequence[int] | None,
        bounds: Sequence[int] | None = None,
        counts: Counts = None,
    ) -> Work:
        key = op.name, x.dtype
        try:
            add = self._sums[key]
        except KeyError:
            add = self._sums[key] = reducer(self._library, *key)
        call = self._number((name, *key, None if takers is None else len(takers) == 1 and takers[0]), counts)
        size, source, target = x.nbytes, x.data_ptr(), 0 if out is None else out.data_ptr()
        action: Callable[[], None]
        if bounds is None and size * self.size <= SMALL:
            action = partial(self._rounds.reduce_small, call, size, source, target, add)
        else:
            bounds = self._shares(size) if bounds is None else bounds
            action = partial(self._rounds.reduce, call, size, source, target, add, bounds, takers)
        return self._queue.run(action, (out, x))

    def _move(
        self,
        key: tuple[Any, ...],
        size: int,
        x: torch.Tensor | None,
        out: torch.Tensor | None,
        sends: Sequence[Block],
        receives: Sequence[Block],
        mine: int | None,
        common: bool,
        counts: Counts = None,
    ) -> Work:
        start = 0 if x is None else x.data_ptr()
        action = partial(self._rounds.move, self._number(key, counts), size, start, sends, receives, mine, common)
        return self._queue.run(action, (out, x))

    def _number(self, key: tuple[Any, ...], counts: Counts) -> int:
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = zlib.crc32(repr(key).encode())
        return number if counts is None else zlib.crc32(array("q", counts).tobytes(), number)

    def _blocks(self, x: torch.Tensor, counts: Counts) -> list[Block]:
        """Each rank's share of a flat tensor."""
        bounds, start = self._bounds(x, counts), x.data_ptr()
        return [(start + bounds[rank], bounds[rank + 1] - bounds[rank]) for rank in range(self.size)]

    def _bounds(self, x: torch.Tensor, counts: Counts) -> list[int]:
        if counts is None:
            share = x.nbytes // self.size
            return [rank * share for rank in range(self.size + 1)]
        return [place * x.itemsize for place in offsets(counts)]

    def _shares(self, size: int) -> list[int]:
        """For each rank a block to reduce, in whole cache lines."""
        share = -(-size // self.size // 64) * 64
        return [min(rank * share, size) for rank in range(self.size + 1)]
