"""context_attention on this rank's tokens against plain attention over the whole sequence, in float64.

Every rank knows the whole sequence, so that the expected values need no communication.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from parallel.attention import METHODS, SequenceShards, context_attention

__all__ = ["MASKS", "METHODS", "Case", "check", "gradients", "serial", "whole"]

MASKS = ("none", "padding", "padding of heads", "bool", "float")


@dataclass(frozen=True)
class Case:
    length: int = 13
    method: str = "ring"
    causal: bool = False
    zigzag: bool = False
    mask: str = "none"
    heads: tuple[int, int] = (4, 4)


def strided(x):
    """The same values in another memory order: not even the channels lie side by side."""
    return x.mT.contiguous().mT


def whole(case, seed=0):
    """q, k, v, the gradient of the output, and the mask, of the whole sequence."""
    generator = torch.Generator().manual_seed(seed)
    (N, M), L, B, D = case.heads, case.length, 2, 8
    q, k, v, grad = (torch.randn(B, heads, L, D, dtype=torch.float64, generator=generator) for heads in (N, M, M, N))
    if case.mask == "padding":
        mask = torch.rand(B, 1, 1, L, generator=generator) > 0.3
    elif case.mask == "padding of heads":
        mask = torch.rand(N, 1, L, generator=generator) > 0.3
    elif case.mask == "bool":
        mask = torch.rand(N, L, L, generator=generator) > 0.5
        mask[:, L // 2] = False  # a query that may attend to nothing
    elif case.mask == "float":
        mask = torch.randn(L, L, dtype=torch.float64, generator=generator)
        mask[:, L // 2 :] = -math.inf  # keys that nobody sees: whole blocks for some ranks
    else:
        mask = None
    return q, k, v, grad, mask


def serial(q, k, v, mask=None, causal=False):
    """Attention by matrix products and a softmax."""
    bias = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)
    if mask is not None:
        bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask
    if causal:
        bias = bias.masked_fill(torch.ones(bias.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)


def gradients(attention, q, k, v, grad):
    """The output, and the gradients of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in inputs)]


def check(case, group, compiled=False, seed=0):
    q, k, v, grad, mask = whole(case, seed)
    wanted = gradients(lambda q, k, v: serial(q, k, v, mask, case.causal), q, k, v, grad)
    shards = SequenceShards(case.length, group.size, case.zigzag)
    mine = shards.positions(group.rank)
    my_mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., mine, :]

    def attention(q, k, v):
        return context_attention(
            q, k, v, group=group, shards=shards, method=case.method, causal=case.causal, mask=my_mask
        )

    if compiled:
        attention = torch.compile(attention, fullgraph=True, backend="aot_eager")
    got = gradients(attention, *(strided(x[:, :, mine]) for x in (q, k, v, grad)))
    for name, a, b in zip(("output", "q", "k", "v"), got, wanted, strict=True):
        assert not a.isnan().any(), (name, case)
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(
            a / scale, b[:, :, mine] / scale, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n} of {case}: {m}"
        )
