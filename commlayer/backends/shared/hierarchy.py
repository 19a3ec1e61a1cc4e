"""Collectives over several hosts: shared memory inside of each, the backend between them.

Every host has the same number of ranks. Those with the same place on their hosts are a *rail*: they exchange, over the
network, what their hosts have reduced or still have to spread. So every byte crosses the network once for each host
that needs it, over all rails at once. (Hierarchical collectives of MPI libraries and of NCCL do the same.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from commlayer.backends.base import Collectives, Communicator, Counts
from commlayer.backends.shared.channel import Shared
from commlayer.backends.shared.in_order import InOrder
from commlayer.control.seat import Seat
from commlayer.reduce_op import ReduceOp
from commlayer.work import Work

NEVER = 86400.0  # seconds: a thread has no limit of its own, but backends want one


def grid(places: Sequence[int]) -> list[list[int]] | None:
    """The ranks of each host, from the number of each rank's host; None where hosts have one or not equally many."""
    hosts = [[rank for rank, place in enumerate(places) if place == host] for host in dict.fromkeys(places)]
    return hosts if len(hosts) > 1 and {*map(len, hosts)} == {len(hosts[0])} and len(hosts[0]) > 1 else None


class Neighbours:
    """Of a communicator, the ranks of this host, as far as their channel needs to know."""

    synchronous = True  # what is done here is a step of an operation of all hosts, which has its turn

    def __init__(self, comm: Communicator, ranks: Sequence[int], seat: Seat) -> None:
        self._comm, self._seat = comm, seat
        self.rank, self.size = list(ranks).index(comm.rank), len(ranks)
        self.device, self.threads = comm.device, comm.threads
        self.end = 0.0  # of the operation under way, by time.perf_counter()

    @property
    def failure(self) -> Any:
        return self._comm.failure

    def limit(self, timeout: float | None) -> float:
        return max(self.end - time.perf_counter(), 1e-3) if timeout is None else timeout

    def progress(self) -> None:
        self._comm.progress()

    def share(self, value: bytes) -> list[bytes]:
        return self._seat.share(value, self._comm.timeout)


class Hierarchy:
    """The flat operations that gain by it; ``rail`` are the ranks with this one's place on their hosts, in order."""

    def __init__(
        self, comm: Communicator, hosts: Sequence[Sequence[int]], near: Neighbours, local: Shared, rail: Collectives
    ) -> None:
        self.rank, self.size, self.device = comm.rank, comm.size, comm.device
        self._comm, self._hosts, self._near, self._local, self._rail = comm, hosts, near, local, rail
        self._place = {rank: (h, place) for h, host in enumerate(hosts) for place, rank in enumerate(host)}
        self._queue = InOrder(comm, self)
        self.end: float | None = None
        self.progress = True

    def all_reduce(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> Work:
        size, count = self._local.size, x.numel()
        counts = [count * (place + 1) // size - count * place // size for place in range(size)]

        def steps() -> None:
            piece = x.new_empty(counts[self._local.rank])
            self._local.reduce_scatter(piece, x, op, counts).wait()
            if piece.numel():
                self._wait(self._rail.all_reduce(piece, piece, op))
            self._local.all_gather(out, piece, counts).wait()

        return self._run(steps, (out, x))

    def broadcast(self, x: torch.Tensor, src: int) -> Work:
        host, place = self._place[src]

        def steps() -> None:
            if self._local.rank == place:
                self._wait(self._rail.broadcast(x, host))
            self._local.broadcast(x, place).wait()

        return self._run(steps, (x,))

    def all_gather(self, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
        assert counts is None

        def steps() -> None:
            column, rows = x.new_empty(x.numel() * self._rail.size), torch.empty_like(out)
            self._wait(self._rail.all_gather(column, x, None))
            self._local.all_gather(rows, column, None).wait()
            for place, rank in zip(out.view(self.size, -1), range(self.size), strict=True):
                place.copy_(rows.view(self.size, -1)[self._index(rank)])

        return self._run(steps, (out, x))

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor, op: ReduceOp, counts: Counts) -> Work:
        assert counts is None

        def steps() -> None:
            rows, column = torch.empty_like(x), out.new_empty(out.numel() * self._rail.size)
            for rank, block in enumerate(x.view(self.size, -1)):
                rows.view(self.size, -1)[self._index(rank)].copy_(block)
            self._local.reduce_scatter(column, rows, op, None).wait()
            self._wait(self._rail.reduce_scatter(out, column, op, None))

        return self._run(steps, (out, x))

    def close(self, end: float) -> None:
        self._queue.close(end)
        self._local.close(end)
        for part in self._comm.parts:
            part.close(end)

    def _index(self, rank: int) -> int:
        """Of a rank's block, where those of one rail stand together."""
        host, place = self._place[rank]
        return place * len(self._hosts) + host

    def _run(self, steps: Callable[[], None], tensors: Any) -> Work:
        def action() -> None:
            now = time.perf_counter()
            self._near.end = now + self._comm.limit(None) if self.end is None else min(self.end, now + NEVER)
            with torch.inference_mode():  # it may write into inference tensors
                steps()

        return self._queue.run(action, tensors)

    def _wait(self, work: Work) -> None:
        work.wait(self._near.limit(None))
