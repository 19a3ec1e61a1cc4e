"""The collectives with values known beforehand: a call either raises, or is checked against them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import commlayer
from commlayer import MAX, SUM, Group

PER_RANK = 60  # elements of a rank's share: divisible by every number of ranks used here


class WrongAnswer(Exception):
    """The one thing that must never happen in silence."""


def data(rank: int, size: int, seed: int, length: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What ``rank`` brings: small whole numbers, exact in every dtype, that differ by rank and seed."""
    values = torch.arange(length * size) * (rank + 1) + 7 * seed + rank
    return (values % 31).to(dtype)


def other_splits(g: Group, n: int = PER_RANK) -> list[int]:
    """Splits of an all_to_all that this rank alone would give: as ever to itself, but not to two others."""
    splits = [n] * g.size
    first, second = [rank for rank in range(g.size) if rank != g.rank][:2]
    splits[first], splits[second] = n - 20, n + 20
    return splits


def check(name: str, got: Any, expected: Any) -> None:
    if (got is None) != (expected is None) or (got is not None and not torch.equal(got, expected)):
        raise WrongAnswer(f"{name}: got {got}, expected {expected}")


# Each takes a group, a call's number, elements per rank, and what may deviate on one rank; and checks what it gets.
def all_reduce(g: Group, seed: int, n: int = PER_RANK, *, dtype: Any = torch.float64, op: Any = SUM, **k: Any) -> None:
    every = [data(r, g.size, seed, n, dtype) for r in range(g.size)]
    got = commlayer.all_reduce(every[g.rank], op, group=g, **k)
    check("all_reduce", got, torch.stack(every).amax(0) if op == MAX else sum(every))


def reduce(g: Group, seed: int, n: int = PER_RANK, *, root: int = 0, **k: Any) -> None:
    every = [data(r, g.size, seed, n) for r in range(g.size)]
    got = commlayer.reduce(every[g.rank], dst=root, group=g, **k)
    check("reduce", got, sum(every) if g.rank == root else None)


def broadcast(g: Group, seed: int, n: int = PER_RANK, *, root: int = 0, **k: Any) -> None:
    got = commlayer.broadcast(data(g.rank, g.size, seed, n), src=root, group=g, **k)
    check("broadcast", got, data(root, g.size, seed, n))


def all_gather(g: Group, seed: int, n: int = PER_RANK, **k: Any) -> None:
    every = [data(r, g.size, seed, n) for r in range(g.size)]
    check("all_gather", commlayer.all_gather(every[g.rank], group=g, **k), torch.cat(every))


def reduce_scatter(g: Group, seed: int, n: int = PER_RANK, **k: Any) -> None:
    every = [data(r, g.size, seed, n) for r in range(g.size)]
    got = commlayer.reduce_scatter(every[g.rank], group=g, **k)
    check("reduce_scatter", got, sum(every).chunk(g.size)[g.rank])


def all_to_all(g: Group, seed: int, n: int = PER_RANK, *, splits: list[int] | None = None, **k: Any) -> None:
    every = [data(r, g.size, seed, n) for r in range(g.size)]
    got = commlayer.all_to_all(
        every[g.rank], input_splits=splits or [n] * g.size, output_splits=[n] * g.size, group=g, **k
    )
    check("all_to_all", got, torch.cat([x.split(n)[g.rank] for x in every]))


def gather(g: Group, seed: int, n: int = PER_RANK, *, root: int = 0, **k: Any) -> None:
    every = [data(r, g.size, seed, n) for r in range(g.size)]
    got = commlayer.gather(every[g.rank], dst=root, group=g, **k)
    check("gather", got, torch.cat(every) if g.rank == root else None)


def scatter(g: Group, seed: int, n: int = PER_RANK, *, root: int = 0, **k: Any) -> None:
    got = commlayer.scatter(data(g.rank, g.size, seed, n), src=root, group=g, **k)
    check("scatter", got, data(root, g.size, seed, n).chunk(g.size)[g.rank])


def barrier(g: Group, seed: int, n: int = PER_RANK, **k: Any) -> None:
    commlayer.barrier(group=g, **k)


def send_recv(g: Group, seed: int, n: int = PER_RANK, **k: Any) -> None:
    """A message around the ring of ranks: each waits for the one before it."""
    after, before = (g.rank + 1) % g.size, (g.rank - 1) % g.size
    mine, theirs = data(g.rank, g.size, seed, n), data(before, g.size, seed, n)
    if g.rank == 0:
        commlayer.send(mine, after, group=g, **k)
    got = commlayer.recv(torch.empty_like(theirs), before, group=g, **k)
    if g.rank != 0:
        commlayer.send(mine, after, group=g, **k)
    check("recv", got, theirs)


def sendrecv(g: Group, seed: int, n: int = PER_RANK, **k: Any) -> None:
    after, before = (g.rank + 1) % g.size, (g.rank - 1) % g.size
    got = commlayer.sendrecv(data(g.rank, g.size, seed, n), dst=after, src=before, group=g, **k)
    check("sendrecv", got, data(before, g.size, seed, n))


OPERATIONS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        all_reduce, reduce, broadcast, all_gather, reduce_scatter, all_to_all,
        gather, scatter, barrier, send_recv, sendrecv,
    )
}  # fmt: skip
