"""Cross entropy of logits whose vocabulary is cut over a group, as the head of a language model makes them.

After Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, section 3): the ranks exchange a few numbers per token, never
logits. Here one all_gather brings each rank's maximum, its sum of exponentials, and the target's logit; the gradient,
softmax - target, then needs nothing of the others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from commlayer import Group, balanced_sizes
from parallel import operators
from parallel.derivatives import first_derivative


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    group: Group,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """F.cross_entropy of the ranks' logits concatenated along the last dim; the same on every rank.

    The mean over no tokens is NaN, as in torch. To average over tokens that are spread over ranks or micro-batches,
    divide ``reduction="sum"`` by the global count of targets: means of means would weigh tokens unequally.

    Args:
        logits: ... × this rank's entries of the vocabulary. Half types are computed with, and give a loss, in float32.
        target: ..., an entry of the vocabulary or ``ignore_index``; the same on all ranks.
        vocab_size: true entries. They are balanced over the ranks, or padded at the end to equal parts: padding stays
            out of the softmax, and has no gradient. By default all are true, and the ranks have equally many.

    Raises:
        ValueError, TypeError: for arguments that do not fit together.
        IndexError: for a target outside of the vocabulary, on CPU. On a GPU, and in compiled graphs, its loss is
            infinite; shares of the vocabulary that do not fit together give NaN.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    if logits.ndim == 0 or target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target: expected the shape of logits without its last dim, logits are {tuple(logits.shape)}, target is "
            f"{tuple(target.shape)}"
        )
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"target: expected indices (integers), got {target.dtype}")
    first, true, total = _share(logits.shape[-1], vocab_size, group)
    valid = target != ignore_index
    strict = logits.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a look costs a wait
    if strict and bool((wrong := valid & ((target < 0) | (target >= total))).any()):
        raise IndexError(f"target: expected 0 to {total - 1} or {ignore_index}, got {int(target[wrong][0])}")
    losses: Tensor = _Losses.apply(logits, target.long() - first, first, true, total, label_smoothing, strict, group)
    losses = losses.masked_fill(~valid, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / valid.sum()


def _share(entries: int, vocab_size: int | None, group: Group) -> tuple[int, int, int]:
    """This rank's first entry of the vocabulary, how many of its entries are true, and how many there are in all."""
    rank, size = group.rank, group.size
    if entries == 0:
        raise ValueError(f"logits: no entry of the vocabulary on rank {rank} of {size}")
    if vocab_size is None:
        return rank * entries, entries, size * entries
    shares = balanced_sizes(vocab_size, size)
    if entries == shares[rank]:
        return sum(shares[:rank]), entries, vocab_size
    if entries * size < vocab_size:
        raise ValueError(
            f"logits: {entries} entries on rank {rank}, but {vocab_size} are {shares} if balanced over {size} ranks, "
            f"and at least {shares[0]} on each if padded to equal parts"
        )
    return rank * entries, min(max(vocab_size - rank * entries, 0), entries), vocab_size


class _Losses(Function):
    """The loss of every token; ``local`` is the target counted from this rank's first entry."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        local: Tensor,
        first: int,
        true: int,
        total: int,
        smoothing: float,
        strict: bool,
        group: Group,
    ) -> Tensor:
        x = _wide(logits.narrow(-1, 0, true))
        lowest = torch.finfo(x.dtype).min  # for a rank without true entries, or with -inf alone
        top = x.amax(-1).clamp(min=lowest) if true else x.new_full(local.shape, lowest)
        picked = _wide(logits.gather(-1, _place(local, logits)).squeeze(-1))
        rows = [top, (x - top.unsqueeze(-1)).exp_().sum(-1), picked.masked_fill(~_mine(local, true), -math.inf)]
        if smoothing:
            rows.append(x.sum(-1))
        start, extent = (x.new_full((1,), value) for value in (first, logits.shape[-1]))
        row = torch.cat([*(row.flatten() for row in rows), start, extent]).unsqueeze(0)
        everyone = operators.all_gather(row, 0, [1] * group.size, group)
        each, starts, extents = everyone[:, :-2], everyone[:, -2], everyone[:, -1]
        tops, exps, targets, *sums = each.unflatten(1, (len(rows), *local.shape)).unbind(1)
        top = tops.amax(0)
        log_sum = (exps * (tops - top).exp()).sum(0).log()  # apart from top, beside which it would be rounded
        losses = (1 - smoothing) * (top - targets.amax(0) + log_sum)
        if smoothing:
            losses += smoothing * (top - sums[0].sum(0) / total + log_sum)
        adjoining = (starts == extents.cumsum(0) - extents).all()
        if strict and not adjoining:
            raise ValueError(
                f"logits: the ranks have {extents.int().tolist()} entries, from {starts.int().tolist()} on; "
                "give vocab_size where they are not equal"
            )
        ctx.save_for_backward(logits, local, top, log_sum)
        ctx.true, ctx.total, ctx.smoothing = true, total, smoothing
        return losses.masked_fill_(~adjoining, math.nan)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        logits, local, top, log_sum = ctx.saved_tensors
        found = (_wide(logits) - top.unsqueeze(-1)).sub_(log_sum.unsqueeze(-1)).exp_()
        if ctx.smoothing:
            found -= ctx.smoothing / ctx.total
        targets = _mine(local, ctx.true).to(found.dtype).unsqueeze(-1)
        found.scatter_add_(-1, _place(local, logits), targets * (ctx.smoothing - 1))
        found.narrow(-1, ctx.true, logits.shape[-1] - ctx.true).zero_()
        return found.mul_(grad.unsqueeze(-1)).to(logits.dtype), *[None] * 7


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mine(local: Tensor, true: int) -> Tensor:
    return (local >= 0) & (local < true)


def _place(local: Tensor, logits: Tensor) -> Tensor:
    """Where to look, which is anywhere for a target of another rank."""
    return local.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
