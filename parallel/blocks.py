"""Attention of some queries to some of the keys: its output, its log-sum-exp, and its share of the gradients.

The softmax over all keys is put together from blocks of them (Milakov and Gimelshein 2018, arXiv:1805.02867): each
block gives an output of its own and the log-sum-exp (lse) of its scores, by which outputs are weighted. In backward
each block is given the output and lse of all of them, and yields its exact share (Dao 2023, arXiv:2307.08691,
algorithm 2). The kernels are torch's own: flash attention on CPUs, and on CUDA for half types without a mask;
elsewhere plain matrix products, a bounded number of rows at a time.

Legend of shape suffixes:
    B batch, N heads, M key-value heads of N/M heads each, T queries, R some of them, S keys, D channels of a head
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
SCORES = 2**24  # how many the plain kernel holds at a time


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over blocks are kept in: float32 at the least."""
    return torch.promote_types(dtype, torch.float32)


def additive(mask: Tensor | None, q_BNTD: Tensor, keys: int, causal: bool) -> Tensor:
    """What to add to the scores of ``q`` and of ``keys`` keys: 0 or the mask's own number, -inf for what is hidden.

    ``mask`` is bool (True: attend) or additive, and broadcasts. Under ``causal`` the last query sees every key, and
    each one before it one less.
    """
    bias = q_BNTD.new_zeros(())
    if mask is not None:
        bias = torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else mask.to(q_BNTD.dtype)
    if causal:
        queries = q_BNTD.shape[2]
        seen_TS = torch.ones(queries, keys, dtype=torch.bool, device=q_BNTD.device).tril(keys - queries)
        bias = torch.where(seen_TS, bias, -math.inf)
    return bias


def block_forward(
    q_BNTD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The output (B N T D) and the lse (B N T, ``wide``; -inf for queries that see nothing) of one block.

    ``causal`` goes with as many keys as queries, and a ``bias`` beside it hides as much.
    """
    if not q_BNTD.numel() or not k_BMSD.numel():
        nothing_BNT = q_BNTD.new_full(q_BNTD.shape[:3], -math.inf, dtype=wide(q_BNTD.dtype))
        return torch.zeros_like(q_BNTD), nothing_BNT
    k_BNSD, v_BNSD = _repeated(k_BMSD, q_BNTD), _repeated(v_BMSD, q_BNTD)
    with torch.autocast(q_BNTD.device.type, enabled=False):  # sums are wide whatever it wants
        return _kernel(q_BNTD, bias).forward(*_aligned(q_BNTD, k_BNSD, v_BNSD), bias, causal, scale)


def block_backward(
    grad_BNTD: Tensor,
    q_BNTD: Tensor,
    k_BMSD: Tensor,
    v_BMSD: Tensor,
    out_BNTD: Tensor,
    lse_BNT: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of the gradients of q, k and v.

    ``out`` and ``lse`` are those of all blocks together, with lse +inf for queries that see nothing in any of them:
    exp(score - lse) is then 0, and so is whatever comes of it.
    """
    if not q_BNTD.numel() or not k_BMSD.numel():
        return torch.zeros_like(q_BNTD), torch.zeros_like(k_BMSD), torch.zeros_like(v_BMSD)
    k_BNSD, v_BNSD = _repeated(k_BMSD, q_BNTD), _repeated(v_BMSD, q_BNTD)
    known = _aligned(q_BNTD, k_BNSD, v_BNSD, out_BNTD)
    with torch.autocast(q_BNTD.device.type, enabled=False):
        dq, dk, dv = _kernel(q_BNTD, bias).backward(grad_BNTD, *known, lse_BNT, bias, causal, scale)
    kv_heads = k_BMSD.shape[1]
    if kv_heads < q_BNTD.shape[1]:
        dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def merge_(out_BNTD: Tensor, lse_BNT: Tensor, more_BNTD: Tensor, more_lse_BNT: Tensor) -> None:
    """Add the output and lse of another block to those of the blocks before it, in place.

    Scores enter as differences inside a logistic function alone, so nothing can overflow.
    """
    weight_BNT = torch.sigmoid(more_lse_BNT - lse_BNT).nan_to_num_(0.0)  # inf - inf: nothing was seen in either
    out_BNTD.lerp_(more_BNTD.to(out_BNTD.dtype), weight_BNT[..., None])
    torch.logaddexp(lse_BNT, more_lse_BNT, out=lse_BNT)


def _repeated(x_BMSD: Tensor, q_BNTD: Tensor) -> Tensor:
    """Each key-value head once for each of its heads."""
    repeats = q_BNTD.shape[1] // x_BMSD.shape[1]
    return x_BMSD if repeats == 1 else x_BMSD.repeat_interleave(repeats, 1)


def _aligned(*tensors: Tensor) -> Iterator[Tensor]:
    """With the channels side by side: the kernels know all other strides, but take this one for granted."""
    return (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


# Kernels --------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _kernel(q_BNTD: Tensor, bias: Tensor | None) -> Kernel:
    if q_BNTD.device.type == "cpu":
        return CPU
    half, channels = q_BNTD.dtype in (torch.float16, torch.bfloat16), q_BNTD.shape[3]
    if q_BNTD.device.type == "cuda" and half and bias is None and channels % 8 == 0 and channels <= 256:
        return CUDA
    return PLAIN


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if bias is not None:  # where it hides everything, the kernel says 0, which any other block would take for a weight
        lse = lse.masked_fill((bias == -math.inf).all(-1), -math.inf)
    return out, lse


def _cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> Any:
    flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return flash(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, bias: None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: None, causal: bool, scale: float
) -> Any:
    flash = aten._scaled_dot_product_flash_attention_backward
    random = torch.empty(0, dtype=torch.uint64, device=q.device)  # the state of dropout, of which there is none
    lse = lse.contiguous()  # the kernel ignores its strides
    return flash(grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, random, random, scale=scale)


def _plain_forward(
    q_BNTD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = [], []
    v = v_BNSD.to(wide(q_BNTD.dtype))
    for _, scores_BNRS in _scores(q_BNTD, k_BNSD, bias, causal, scale):
        lse_BNR = scores_BNRS.logsumexp(-1)
        lse.append(lse_BNR)
        out.append(scores_BNRS.sub_(unseen_to_inf(lse_BNR)[..., None]).exp_() @ v)
    return torch.cat(out, 2).to(q_BNTD.dtype), torch.cat(lse, 2)


def _plain_backward(
    grad_BNTD: Tensor,
    q_BNTD: Tensor,
    k_BNSD: Tensor,
    v_BNSD: Tensor,
    out_BNTD: Tensor,
    lse_BNT: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out = (x.to(wide(x.dtype)) for x in (grad_BNTD, q_BNTD, k_BNSD, v_BNSD, out_BNTD))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta_BNT1 = (grad * out).sum(-1, keepdim=True)
    for rows, scores_BNRS in _scores(q, k, bias, causal, scale):
        p_BNRS = scores_BNRS.sub_(lse_BNT[:, :, rows, None]).exp_()
        dv += p_BNRS.mT @ grad[:, :, rows]
        ds_BNRS = (grad[:, :, rows] @ v.mT).sub_(delta_BNT1[:, :, rows]).mul_(p_BNRS).mul_(scale)
        dq[:, :, rows] = ds_BNRS @ k
        dk += ds_BNRS.mT @ q[:, :, rows]
    return dq, dk, dv


def _scores(
    q_BNTD: Tensor, k_BNSD: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and their scores, -inf where hidden."""
    B, N, T, _ = q_BNTD.shape
    S = k_BNSD.shape[2]
    k_BNDS = k_BNSD.to(wide(q_BNTD.dtype)).mT
    step = max(1, SCORES // (B * N * S))
    for start in range(0, T, step):
        rows = slice(start, min(start + step, T))
        scores_BNRS = (q_BNTD[:, :, rows].to(k_BNDS.dtype) @ k_BNDS).mul_(scale)
        if causal:
            hidden_RS = torch.ones(rows.stop - start, S, dtype=torch.bool, device=q_BNTD.device).triu(start + 1)
            scores_BNRS.masked_fill_(hidden_RS, -math.inf)
        if bias is not None:
            scores_BNRS += bias if bias.ndim < 2 or bias.shape[-2] == 1 else bias[..., rows, :]
        yield rows, scores_BNRS


def unseen_to_inf(lse: Tensor) -> Tensor:
    """``lse`` with +inf for the -inf of queries that see nothing."""
    return lse.masked_fill(lse == -math.inf, math.inf)


CPU = Kernel(_cpu_forward, _cpu_backward)
CUDA = Kernel(_cuda_forward, _cuda_backward)
PLAIN = Kernel(_plain_forward, _plain_backward)
