"""reduce_scatter by all_to_all and a local reduction, by reducing everything, or by padding."""

from __future__ import annotations

import torch

from commlayer.arithmetic import combine
from commlayer.backends.base import Collectives, Counts, offsets, pieces
from commlayer.capability import Request
from commlayer.fallbacks.registry import Use, fallback, same
from commlayer.reduce_op import ReduceOp
from commlayer.work import Work


def _exchange(request: Request, size: int) -> list[Use] | None:
    # A factor belongs to the rank that brings it; premul_sum is scaled before it gets here.
    if request.reduce == "premul_sum":
        return None
    return [Use(request.to("all_to_all", layout=request.layout))]


@fallback("reduce_scatter", needs=_exchange, passes=1.5)
def exchange_and_reduce(g: Collectives, out: torch.Tensor, x: torch.Tensor, op: ReduceOp, counts: Counts) -> Work:
    """An all_to_all, then each rank reduces what it received."""
    rows = x.new_empty(g.size, out.numel())
    splits = None if counts is None else [out.numel()] * g.size

    def reduce() -> None:
        out.copy_(combine(list(rows), op.name))

    return g.all_to_all(rows.view(-1), x, splits, counts).then(reduce)


@fallback("reduce_scatter", needs=["all_reduce"], passes=1)
def all_reduce_and_slice(g: Collectives, out: torch.Tensor, x: torch.Tensor, op: ReduceOp, counts: Counts) -> Work:
    """An all_reduce, of which each rank keeps its share."""
    total = torch.empty_like(x)
    begin = g.rank * out.numel() if counts is None else offsets(counts)[g.rank]

    def keep() -> None:
        out.copy_(total[begin : begin + out.numel()])

    return g.all_reduce(total, x, op).then(keep)


def _rooted(request: Request, size: int) -> list[Use]:
    return [Use(same(request, "reduce")), Use(request.to("scatter", layout=request.layout))]


@fallback("reduce_scatter", needs=_rooted, passes=0.1)
def reduce_and_scatter(g: Collectives, out: torch.Tensor, x: torch.Tensor, op: ReduceOp, counts: Counts) -> Work:
    """A reduce to rank 0, which scatters the result."""
    total = torch.empty_like(x) if g.rank == 0 else None
    g.reduce(total, x, op, 0).wait()
    return g.scatter(out, total, 0, counts)


def _even(request: Request, size: int) -> list[Use] | None:
    if request.layout == "even":
        return None
    return [Use(same(request, "reduce_scatter"), 1, 1.5)]


@fallback("reduce_scatter", needs=_even, passes=2)
def padded_shares(g: Collectives, out: torch.Tensor, x: torch.Tensor, op: ReduceOp, counts: Counts) -> Work:
    """Shares padded to the longest, reduced and scattered evenly, the padding dropped."""
    assert counts is not None
    width = max(counts)
    rows = x.new_zeros(g.size, width)
    for row, piece in zip(rows, pieces(x, counts, g.size), strict=True):
        row[: piece.numel()] = piece
    mine = x.new_empty(width)

    def unpad() -> None:
        out.copy_(mine[: out.numel()])

    return g.reduce_scatter(mine, rows.view(-1), op, None).then(unpad)
