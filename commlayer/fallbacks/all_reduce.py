"""all_reduce by its two halves, through a root, or by gathering; and barrier, its smallest case."""

from __future__ import annotations

import torch

from commlayer.arithmetic import combine
from commlayer.backends.base import INTERNAL_TAG, Collectives
from commlayer.capability import Request
from commlayer.fallbacks.registry import Use, fallback
from commlayer.reduce_op import SUM, ReduceOp
from commlayer.work import Work

TAG = INTERNAL_TAG + 3
WORKSPACE = 64 << 20  # bytes


@fallback("all_reduce", needs=["reduce_scatter", "all_gather"], passes=1)
def reduce_scatter_and_all_gather(g: Collectives, out: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> Work:
    """Each rank reduces one share, then all gather the shares (Rabenseifner 2004)."""
    share = -(-x.numel() // g.size)
    total = share * g.size
    padded = x
    if total != x.numel():
        padded = x.new_zeros(total)
        padded[: x.numel()] = x
    mine = x.new_empty(share)
    g.reduce_scatter(mine, padded, op, None).wait()
    result = out if total == out.numel() else x.new_empty(total)

    def unpad() -> None:
        if result is not out:
            out.copy_(result[: out.numel()])

    return g.all_gather(result, mine, None).then(unpad)


@fallback("all_reduce", needs=["reduce", "broadcast"])
def reduce_and_broadcast(g: Collectives, out: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> Work:
    """A reduce to rank 0, which broadcasts the result."""
    total = None
    if g.rank == 0:
        total = torch.empty_like(x) if out.data_ptr() == x.data_ptr() else out
    g.reduce(total, x, op, 0).wait()
    if total is not None and total is not out:
        out.copy_(total)
    return g.broadcast(out, 0)


def _gathers(request: Request, size: int) -> list[Use] | None:
    if request.reduce == "premul_sum":
        return None  # a factor belongs to its rank: scaled before it gets here
    return [Use(request.to("all_gather"), 1, size)]


@fallback("all_reduce", needs=_gathers, passes=3)
def gather_and_reduce(g: Collectives, out: torch.Tensor, x: torch.Tensor, op: ReduceOp) -> Work:
    """Everybody gathers everything, in slices, and reduces it in rank order."""
    width = max(1, WORKSPACE // (g.size * x.element_size()))
    for start in range(0, x.numel(), width):
        part = x[start : start + width]
        rows = x.new_empty(g.size, part.numel())
        g.all_gather(rows.view(-1), part, None).wait()
        out[start : start + width].copy_(combine(list(rows), op.name))
    return Work()


def _token(request: Request, size: int) -> list[Use]:
    return [Use(Request("all_reduce", "sum", torch.int32, request.device))]


@fallback("barrier", needs=_token)
def sum_of_nothing(g: Collectives) -> Work:
    """An all_reduce of one number."""
    token = torch.zeros(1, dtype=torch.int32, device=g.device)
    return g.all_reduce(token, token, SUM)


def _messages(request: Request, size: int) -> list[Use]:
    rounds = max(1, (size - 1).bit_length())
    return [Use(Request(op, None, torch.uint8, request.device), rounds) for op in ("send", "recv")]


@fallback("barrier", needs=_messages)
def dissemination(g: Collectives) -> Work:
    """In round k everybody tells the rank 2^k further on (Hensgen, Finkel and Manber 1988)."""
    token = torch.zeros(1, dtype=torch.uint8, device=g.device)
    heard = torch.empty_like(token)
    work, distance = Work(), 1
    while distance < g.size:
        work.wait()
        to, source = (g.rank + distance) % g.size, (g.rank - distance) % g.size
        work = g.exchange([(token, to)], [(heard, source)], TAG)
        distance *= 2
    return work
