"""all_gather by padding, broadcasts, sums of disjoint slots, or a ring of messages."""

from __future__ import annotations

import torch

from commlayer.arithmetic import SIGNED_OF_WIDTH
from commlayer.backends.base import INTERNAL_TAG, Collectives, Counts, offsets, pieces
from commlayer.capability import Request
from commlayer.fallbacks.registry import Use, fallback
from commlayer.reduce_op import SUM
from commlayer.work import Work, gather_works

TAG = INTERNAL_TAG + 2
INTEGERS = frozenset({torch.uint8, *SIGNED_OF_WIDTH.values()})


def _even(request: Request, size: int) -> list[Use] | None:
    return [Use(request.to("all_gather"), 1, 1.5)] if request.layout == "uneven" else None


@fallback("all_gather", needs=_even, passes=2)
def padded_rows(g: Collectives, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
    """Rows padded to the longest, gathered evenly, the padding dropped."""
    assert counts is not None
    width = max(counts)
    row = x.new_empty(width)
    row[: x.numel()] = x
    rows = x.new_empty(g.size, width)

    def unpad() -> None:
        for piece, padded in zip(pieces(out, counts, g.size), rows, strict=True):
            piece.copy_(padded[: piece.numel()])

    return g.all_gather(rows.view(-1), row, None).then(unpad)


def _broadcasts(request: Request, size: int) -> list[Use]:
    return [Use(request.to("broadcast"), size, 1 / size)]


@fallback("all_gather", needs=_broadcasts, passes=0.1)
def broadcasts(g: Collectives, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
    """Every rank broadcasts its share into everybody's result."""
    shares = pieces(out, counts, g.size)
    shares[g.rank].copy_(x)
    return gather_works([g.broadcast(share, src) for src, share in enumerate(shares) if share.numel()])


def _sum(request: Request, size: int) -> list[Use] | None:
    return [Use(request.to("all_reduce", "sum"))] if request.dtype in INTEGERS else None


@fallback("all_gather", needs=_sum, passes=1)
def disjoint_slots(g: Collectives, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
    """A sum in which everybody is zero outside its own slot: exact, since it adds integers' bits to zeros."""
    begin = g.rank * x.numel() if counts is None else offsets(counts)[g.rank]
    out.zero_()
    out[begin : begin + x.numel()] = x
    return g.all_reduce(out, out, SUM)


def _messages(request: Request, size: int) -> list[Use]:
    return [Use(request.to(op), size - 1, 1 / size) for op in ("send", "recv")]


@fallback("all_gather", needs=_messages, passes=0.1)
def ring(g: Collectives, out: torch.Tensor, x: torch.Tensor, counts: Counts) -> Work:
    """Each rank hands what it got last to its right-hand neighbour (Thakur et al. 2005, section 4.1)."""
    shares = pieces(out, counts, g.size)
    shares[g.rank].copy_(x)
    right, left = (g.rank + 1) % g.size, (g.rank - 1) % g.size
    work = Work()
    for step in range(g.size - 1):
        work.wait()
        outgoing, incoming = shares[(g.rank - step) % g.size], shares[(g.rank - step - 1) % g.size]
        sends = [(outgoing, right)] if outgoing.numel() else []
        recvs = [(incoming, left)] if incoming.numel() else []
        work = g.exchange(sends, recvs, TAG)
    return work
