"""reduce, broadcast, gather and scatter from operations without a root, or from messages."""

from __future__ import annotations

import torch

from commlayer.arithmetic import combine
from commlayer.backends.base import INTERNAL_TAG, Collectives, Counts, offsets, pieces
from commlayer.capability import Request
from commlayer.fallbacks.all_gather import INTEGERS
from commlayer.fallbacks.registry import Use, fallback, same
from commlayer.reduce_op import SUM, ReduceOp
from commlayer.work import Work

TAG = INTERNAL_TAG + 4


@fallback("reduce", needs=["all_reduce"])
def all_reduce_and_drop(g: Collectives, out: torch.Tensor | None, x: torch.Tensor, op: ReduceOp, dst: int) -> Work:
    """An all_reduce, whose result the others drop."""
    return g.all_reduce(torch.empty_like(x) if out is None else out, x, op)


def _gather(request: Request, size: int) -> list[Use] | None:
    if request.reduce == "premul_sum":
        return None  # a factor belongs to its rank: scaled before it gets here
    return [Use(request.to("gather"), 1, size)]


@fallback("reduce", needs=_gather, passes=3)
def gather_and_reduce(g: Collectives, out: torch.Tensor | None, x: torch.Tensor, op: ReduceOp, dst: int) -> Work:
    """The root gathers all rows and reduces them in rank order."""
    if out is None:
        return g.gather(None, x, dst, None)
    rows = x.new_empty(g.size, x.numel())

    def reduce() -> None:
        out.copy_(combine(list(rows), op.name))

    return g.gather(rows.view(-1), x, dst, None).then(reduce)


def _tree(request: Request, size: int) -> list[Use]:
    depth = max(1, (size - 1).bit_length())
    return [Use(request.to(op), depth) for op in ("send", "recv")]


@fallback("broadcast", needs=_tree)
def binomial_tree(g: Collectives, x: torch.Tensor, src: int) -> Work:
    """Who has the value passes it on, so that holders double every round."""
    place = (g.rank - src) % g.size
    distance = 1
    while distance <= place:
        distance *= 2
    if place:
        parent = place - distance // 2
        g.recv(x, (parent + src) % g.size, TAG).wait()
    sends = []
    while place + distance < g.size:
        sends.append((x, (place + distance + src) % g.size))
        distance *= 2
    return g.exchange(sends, [], TAG) if sends else Work()


def _sum(request: Request, size: int) -> list[Use] | None:
    return [Use(request.to("all_reduce", "sum"))] if request.dtype in INTEGERS else None


@fallback("broadcast", needs=_sum, passes=0.5)
def sum_with_zeros(g: Collectives, x: torch.Tensor, src: int) -> Work:
    """A sum to which all but the root bring zeros: exact, since it adds integers' bits to zeros."""
    if g.rank != src:
        x.zero_()
    return g.all_reduce(x, x, SUM)


def _all_rows(request: Request, size: int) -> list[Use]:
    return [Use(request.to("all_gather"), 1, size)]


@fallback("broadcast", needs=_all_rows, passes=1)
def gather_and_pick(g: Collectives, x: torch.Tensor, src: int) -> Work:
    """An all_gather of everybody's buffer, of which the root's row counts."""
    rows = x.new_empty(g.size, x.numel())

    def pick() -> None:
        x.copy_(rows[src])

    return g.all_gather(rows.view(-1), x, None).then(pick)


def _to_root(request: Request, size: int) -> list[Use]:
    return [Use(request.to(op), size - 1, 1 / size) for op in ("send", "recv")]


@fallback("gather", needs=_to_root, passes=0.1)
def messages_to_root(g: Collectives, out: torch.Tensor | None, x: torch.Tensor, dst: int, counts: Counts) -> Work:
    """Everybody sends its share to the root."""
    if out is None:
        return g.exchange([(x, dst)], [], TAG) if x.numel() else Work()
    shares = pieces(out, counts, g.size)
    shares[g.rank].copy_(x)
    recvs = [(share, src) for src, share in enumerate(shares) if src != g.rank and share.numel()]
    return g.exchange([], recvs, TAG) if recvs else Work()


def _all_gather(request: Request, size: int) -> list[Use]:
    return [Use(request.to("all_gather", layout=request.layout))]


@fallback("gather", needs=_all_gather)
def all_gather_and_drop(g: Collectives, out: torch.Tensor | None, x: torch.Tensor, dst: int, counts: Counts) -> Work:
    """An all_gather, whose result the others drop."""
    total = x.numel() * g.size if counts is None else sum(counts)
    return g.all_gather(x.new_empty(total) if out is None else out, x, counts)


def _even(request: Request, size: int) -> list[Use] | None:
    return None if request.layout == "even" else [Use(same(request, request.op), 1, 1.5)]


@fallback("gather", needs=_even, passes=2)
def padded_gather(g: Collectives, out: torch.Tensor | None, x: torch.Tensor, dst: int, counts: Counts) -> Work:
    """Shares padded to the longest, gathered evenly, the padding dropped."""
    assert counts is not None
    row = x.new_empty(max(counts))
    row[: x.numel()] = x
    if out is None:
        return g.gather(None, row, dst, None)
    rows = x.new_empty(g.size, max(counts))

    def unpad() -> None:
        for piece, padded in zip(pieces(out, counts, g.size), rows, strict=True):
            piece.copy_(padded[: piece.numel()])

    return g.gather(rows.view(-1), row, dst, None).then(unpad)


@fallback("scatter", needs=_to_root, passes=0.1)
def messages_from_root(g: Collectives, out: torch.Tensor, x: torch.Tensor | None, src: int, counts: Counts) -> Work:
    """The root sends everybody its share."""
    if x is None:
        return g.exchange([], [(out, src)], TAG) if out.numel() else Work()
    shares = pieces(x, counts, g.size)
    out.copy_(shares[g.rank])
    sends = [(share, dst) for dst, share in enumerate(shares) if dst != g.rank and share.numel()]
    return g.exchange(sends, [], TAG) if sends else Work()


@fallback("scatter", needs=["broadcast"], passes=1)
def broadcast_and_slice(g: Collectives, out: torch.Tensor, x: torch.Tensor | None, src: int, counts: Counts) -> Work:
    """A broadcast of everything, of which each rank keeps its share."""
    total = out.numel() * g.size if counts is None else sum(counts)
    everything = out.new_empty(total) if x is None else x.clone()
    begin = g.rank * out.numel() if counts is None else offsets(counts)[g.rank]

    def keep() -> None:
        out.copy_(everything[begin : begin + out.numel()])

    return g.broadcast(everything, src).then(keep)


@fallback("scatter", needs=_even, passes=2)
def padded_scatter(g: Collectives, out: torch.Tensor, x: torch.Tensor | None, src: int, counts: Counts) -> Work:
    """Shares padded to the longest, scattered evenly, the padding dropped."""
    assert counts is not None
    rows = None
    if x is not None:
        rows = x.new_empty(g.size, max(counts))
        for row, piece in zip(rows, pieces(x, counts, g.size), strict=True):
            row[: piece.numel()] = piece
    mine = out.new_empty(max(counts))

    def unpad() -> None:
        out.copy_(mine[: out.numel()])

    return g.scatter(mine, None if rows is None else rows.view(-1), src, None).then(unpad)
