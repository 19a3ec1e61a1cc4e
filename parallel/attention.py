"""Context parallelism: attention over a sequence of which every rank of a group holds some of the tokens.

======================  =====================================  ==========================================
method                  what travels                           good for
======================  =====================================  ==========================================
``ring``                K and V, from rank to rank, while the  long sequences: memory does not grow with
                        previous ones are computed with        the ranks, and transfers are hidden
``all_gather``          K and V, to all ranks at once          few key-value heads, short sequences
``ulysses``             Q, K, V and the output: whole          fast networks, at least as many heads as
                        sequences of some of the heads         ranks; one plain attention on each
======================  =====================================  ==========================================

All three give what attention over the whole sequence on one rank would give, and its gradients.

Legend of shape suffixes, as in torch's scaled_dot_product_attention:
    B batch, N heads, M key-value heads, T tokens of this rank, L of the whole sequence, D channels of a head
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from commlayer import Group, UnsupportedOperation, balanced_sizes
from parallel.amp import as_autocast
from parallel.blocks import additive
from parallel.mappings import all_gather_from_region, all_to_all_region, gather_from_region
from parallel.ring import Ring, ring_attention
from parallel.shards import SequenceShards

__all__ = ["SequenceShards", "context_attention"]

METHODS = ("ring", "all_gather", "ulysses")


def context_attention(
    q_BNTD: Tensor,
    k_BMTD: Tensor,
    v_BMTD: Tensor,
    *,
    group: Group,
    shards: SequenceShards | None = None,
    method: str = "ring",
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks: B N T D, the part of this rank.

    Args:
        q_BNTD, k_BMTD, v_BMTD: this rank's tokens. M divides N: query head n uses key-value head n // (N/M).
        shards: who holds which tokens; by default as many on every rank, contiguous. Give ``zigzag`` for causal.
        causal: no query sees keys after it in the sequence.
        mask: bool (True: attend) or a float to add to the scores; 2 to 4 dims that broadcast to B N T L. Its rows are
            this rank's queries (or one row for all), its columns all keys in the order of the sequence. With
            ``causal``, both count.
        scale: of the scores, by default 1/√D.
        dropout: probability of dropping an attention weight, from torch's default generator; not for ``ring``.

    A query that may attend to nothing gets 0. On a group of one rank this is scaled_dot_product_attention. Raises
    ValueError for shapes that do not fit, UnsupportedOperation for a mask that requires grad.
    """
    q, k, v = as_autocast(q_BNTD, k_BMTD, v_BMTD)
    _check_shapes(q, k, v)
    if shards is None:
        shards = SequenceShards(q.shape[2] * group.size, group.size)
    _check(q, k, mask, group, shards, method, dropout)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    if group.size == 1:
        return _attention(q, k, v, mask, causal, scale, dropout)
    if method == "ring":
        scale = q.shape[3] ** -0.5 if scale is None else scale
        return ring_attention(q, k, v, mask, Ring(group, shards, causal, scale))
    run = _all_gather if method == "all_gather" else _ulysses
    return run(q, k, v, mask, causal, scale, dropout, shards, group)


def _attention(
    q_BNTD: Tensor,
    k_BMLD: Tensor,
    v_BMLD: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """On one rank; under ``causal`` the last query sees all keys."""
    bias = None
    if mask is not None or (causal and q_BNTD.shape[2] != k_BMLD.shape[2]):
        bias = additive(mask, q_BNTD, k_BMLD.shape[2], causal)
    grouped = False
    if q_BNTD.shape[1] != k_BMLD.shape[1]:  # in a graph with symbolic sizes the comparison alone is no bool
        grouped = True
    return F.scaled_dot_product_attention(
        q_BNTD,
        k_BMLD,
        v_BMLD,
        bias,
        dropout,
        is_causal=causal and bias is None,
        scale=scale,
        enable_gqa=grouped,
    )


def _all_gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout: float,
    shards: SequenceShards,
    group: Group,
) -> Tensor:
    # The sequence first, so that what arrives lies one after the other without a copy.
    kv_T2BMD = torch.stack([x.movedim(2, 0) for x in (k, v)], 1)
    kv_L2BMD = shards.in_order(all_gather_from_region(kv_T2BMD, 0, group, shards.sizes), 0)
    k, v = (x.movedim(0, 2) for x in kv_L2BMD.unbind(1))
    if not causal:
        return _attention(q, k, v, mask, False, scale, dropout)
    parts, begin = [], 0
    # A rank without tokens goes through it as well, to be there when gradients are reduced.
    for start, stop in shards.intervals(group.rank) or [(0, 0)]:
        rows = slice(begin, begin := begin + stop - start)
        part = mask
        if mask is not None:
            part = (mask if mask.shape[2] == 1 else mask[:, :, rows])[..., :stop]
        parts.append(_attention(q[:, :, rows], k[:, :, :stop], v[:, :, :stop], part, True, scale, dropout))
    return torch.cat(parts, 2)


def _ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout: float,
    shards: SequenceShards,
    group: Group,
) -> Tensor:
    repeats, heads, kv_heads = _heads(q.shape[1], k.shape[1], group.size)
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    # One message: the query, key and value heads of rank 0, those of rank 1, …
    parts = zip(q.split(heads, 1), k.split(kv_heads, 1), v.split(kv_heads, 1), strict=True)
    together = torch.cat([x for part in parts for x in part], 1)
    counts = [n + 2 * m for n, m in zip(heads, kv_heads, strict=True)]
    together = shards.in_order(all_to_all_region(together, 1, 2, group, counts, shards.sizes), 2)
    n, m = heads[group.rank], kv_heads[group.rank]
    q, k, v = together.split([n, m, m], 1)
    if mask is not None:
        mask = _of_my_heads(mask, heads, shards, group)
    out = _attention(q, k, v, mask, causal, scale, dropout)
    return all_to_all_region(shards.by_rank(out, 2), 2, 1, group, shards.sizes, heads)


def _heads(N: int, M: int, ranks: int) -> tuple[int, list[int], list[int]]:
    """How often to repeat the key-value heads, and how many query and key-value heads each rank then gets.

    As seldom as it leaves no rank without a key-value head, and none with more query heads than it must have.
    """
    most = balanced_sizes(N, ranks)[0]
    for repeats in (r for r in range(1, N // M + 1) if N // M % r == 0):
        kv_heads = balanced_sizes(M * repeats, ranks)
        heads = [n * N // (M * repeats) for n in kv_heads]
        if kv_heads[-1] and heads[0] == most:
            break
    return repeats, heads, kv_heads


def _of_my_heads(mask: Tensor, heads: list[int], shards: SequenceShards, group: Group) -> Tensor:
    """The rows of all queries, in order, for the heads of this rank."""
    # One row stands for all queries, unless some rank has a single query: then it cannot know what others have.
    if mask.shape[2] == 1 and 1 not in shards.sizes:
        return mask if mask.shape[1] == 1 else mask.split(heads, 1)[group.rank]
    mask = mask.expand(-1, -1, shards.sizes[group.rank], -1)
    if mask.shape[1] == 1:
        mask = gather_from_region(mask, 2, group, shards.sizes)
    else:
        mask = all_to_all_region(mask, 1, 2, group, heads, shards.sizes)
    return shards.in_order(mask, 2)


# Input ----------------------------------------------------------------------------------------------------


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"got shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k, v: expected B N T D, B M T D and B M T D, {shapes}")
    (B, N, T, D), (_, M, _, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape != (B, M, T, D):
        raise ValueError(f"q, k, v: expected B N T D, B M T D and B M T D with the same B, T and D, {shapes}")
    if not M or N % M:
        raise ValueError(f"k: the {M} key-value heads must divide the {N} query heads; {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise TypeError(f"q, k, v: expected one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def check_method(method: str, heads: int, group: Group, dropout: float) -> None:
    """Raise ValueError where ``method`` cannot do so many query heads, or dropout, on the ranks of ``group``."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    if method == "ring" and dropout and group.size > 1:
        raise ValueError(f"dropout: ring attention has none, got {dropout}; use method='all_gather' or 'ulysses'")
    if method == "ulysses" and group.size > heads:
        raise ValueError(
            f"method: 'ulysses' gives each of {group.size} ranks some of the heads, but there are {heads}; use 'ring'"
        )


def _check(
    q: Tensor, k: Tensor, mask: Tensor | None, group: Group, shards: SequenceShards, method: str, dropout: float
) -> None:
    B, N, T, _ = q.shape
    check_method(method, N, group, dropout)
    if shards.parts != group.size or shards.sizes[group.rank] != T:
        raise ValueError(f"shards: {shards} does not fit {group.size} ranks with {T} tokens on rank {group.rank}")
    if mask is not None:
        _check_mask(mask, (B, N, T, shards.length))


def _check_mask(mask: Tensor, full: tuple[int, int, int, int]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask: expected bool or a floating-point dtype, got {mask.dtype}")
    if mask.requires_grad and torch.is_grad_enabled():
        raise UnsupportedOperation("mask: requires grad, but context_attention has no gradient for it; detach it")
    fits = 2 <= mask.ndim <= 4 and mask.shape[-1] == full[-1]
    extents = zip(reversed(mask.shape[:-1]), reversed(full[:-1]), strict=False)
    if not fits or not all(extent in (1, wanted) for extent, wanted in extents):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, which does not broadcast to B N T L = {full}")
