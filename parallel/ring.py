"""Ring attention: keys and values go round the ranks, and each attends to whatever passes.

Liu et al. 2023, arXiv:2310.01889. While a rank computes with the keys and values of one rank, those of the next are
on their way. In backward they go round once more, with their gradients one step behind them, which the last hop
takes home. Outputs and gradients are summed in float32 at the least.

Legend of shape suffixes:
    B batch, N heads, M key-value heads, T tokens of this rank, S tokens of another, L of the whole sequence,
    D channels of a head, 2 a pair such as keys and values
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from commlayer import Group, Work, sendrecv
from parallel.blocks import additive, block_backward, block_forward, merge_, unseen_to_inf, wide
from parallel.derivatives import first_derivative
from parallel.notes import kept
from parallel.operators import operator
from parallel.shards import SequenceShards


class Block(NamedTuple):
    """These queries of this rank and the first ``keys`` keys of another; ``causal`` where both are its own."""

    queries: slice
    keys: int
    causal: bool


class Ring(NamedTuple):
    """Who holds what, and what attends to what."""

    group: Group
    shards: SequenceShards
    causal: bool
    scale: float

    def source(self, step: int) -> int:
        """The rank whose keys are here at ``step``."""
        return (self.group.rank - step) % self.group.size

    def blocks(self, source: int) -> list[Block]:
        """What this rank computes with the keys of ``source``.

        Intervals of two ranks never overlap, so a query sees all keys of another rank's interval or none, and of its
        intervals the first few: no mask is needed. Neighbours that see the same make one block.
        """
        mine, theirs = self.shards.intervals(self.group.rank), self.shards.intervals(source)
        if not mine or not theirs:
            return []
        sizes = self.shards.sizes
        if source == self.group.rank or not self.causal:
            return [Block(slice(0, sizes[self.group.rank]), sizes[source], self.causal)]
        found: list[Block] = []
        begin = 0
        for start, stop in mine:
            end = begin + stop - start
            keys = sum(b - a for a, b in theirs if b <= start)
            if found and found[-1].keys == keys:
                found[-1] = Block(slice(found[-1].queries.start, end), keys, False)
            elif keys:
                found.append(Block(slice(begin, end), keys, False))
            begin = end
        return found

    def bias(self, mask_BNTL: Tensor | None, q_BNTD: Tensor, source: int, block: Block) -> Tensor | None:
        """The part of the mask that belongs to a block of these queries."""
        if mask_BNTL is None:
            return None
        parts = [mask_BNTL[..., start:stop] for start, stop in self.shards.intervals(source)]
        mask_BNTS = torch.cat(parts, -1)[..., : block.keys]
        if mask_BNTS.shape[2] > 1:
            mask_BNTS = mask_BNTS[:, :, block.queries]
        return additive(mask_BNTS, q_BNTD, block.keys, block.causal)


def ring_attention(q_BNTD: Tensor, k_BMTD: Tensor, v_BMTD: Tensor, mask_BNTL: Tensor | None, ring: Ring) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks; dims of the mask but the last may be 1."""
    out_BNTD: Tensor = _RingAttention.apply(q_BNTD, k_BMTD, v_BMTD, mask_BNTL, ring)
    return out_BNTD


class _RingAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ring: Ring) -> Tensor:
        if torch.compiler.is_compiling():
            out_BTND, lse = _forward_operator(q, k, v, mask, *_as_numbers(ring))
            out = out_BTND.transpose(1, 2)
        else:
            out, lse = kept(lambda: _forward(q, k, v, mask, ring))
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        if torch.compiler.is_compiling():
            gradients = _backward_operator(grad, q, k, v, mask, out, lse, *_as_numbers(ctx.ring))
        else:
            gradients = _backward(grad, q, k, v, mask, out, lse, ctx.ring)
        return *gradients, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ring: Ring) -> tuple[Tensor, Tensor]:
    """The output, and the lse that ``block_backward`` takes."""
    out_BNTD = torch.empty_like(q, dtype=wide(q.dtype))
    lse_BNT = torch.empty_like(out_BNTD[..., 0])
    for source, (k_BMSD, v_BMSD) in _travelling(k, v, ring):
        for block in ring.blocks(source):
            q_block, keys = q[:, :, block.queries], slice(0, block.keys)
            bias = ring.bias(mask, q_block, source, block)
            kv = k_BMSD[:, :, keys], v_BMSD[:, :, keys]
            part = block_forward(q_block, *kv, bias, block.causal, ring.scale)
            if source == ring.group.rank:  # the first, with all queries in one block
                out_BNTD, lse_BNT = part[0].to(out_BNTD.dtype), part[1]
            else:
                merge_(out_BNTD[:, :, block.queries], lse_BNT[:, :, block.queries], *part)
    return out_BNTD.to(q.dtype), unseen_to_inf(lse_BNT)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, ring: Ring
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    dq_BNTD = torch.zeros_like(q, dtype=wide(q.dtype))
    gradients = _Messages(k, wide(k.dtype), ring)
    gradients.at(0).zero_()
    arriving = Work()
    for step, (source, (k_BMSD, v_BMSD)) in enumerate(_travelling(k, v, ring)):
        shares = []
        for block in ring.blocks(source):
            here, keys = (slice(None), slice(None), block.queries), slice(0, block.keys)
            bias = ring.bias(mask, q[here], source, block)
            kv = k_BMSD[:, :, keys], v_BMSD[:, :, keys]
            share = block_backward(grad[here], q[here], *kv, out[here], lse[here], bias, block.causal, ring.scale)
            shares.append((block, share))
        arriving.wait()  # what the ranks before this one found for the same keys, while this one was computing
        dk_BMSD, dv_BMSD = gradients.at(step)
        for block, (dq, dk, dv) in shares:
            dq_BNTD[:, :, block.queries] += dq
            dk_BMSD[:, :, : block.keys] += dk
            dv_BMSD[:, :, : block.keys] += dv
        arriving = gradients.pass_on(step)
    arriving.wait()
    dk_BMTD, dv_BMTD = gradients.at(ring.group.size)
    return dq_BNTD.to(q.dtype), dk_BMTD.to(k.dtype), dv_BMTD.to(v.dtype)


def _travelling(k: Tensor, v: Tensor, ring: Ring) -> Iterator[tuple[int, Tensor]]:
    """Each rank and its keys and values, this rank's first; while they are used, the next arrive."""
    messages = _Messages(k, k.dtype, ring)
    torch.stack((k, v), out=messages.at(0))
    for step in range(ring.group.size):
        arriving = messages.pass_on(step) if step < ring.group.size - 1 else Work()
        yield ring.source(step), messages.at(step)
        arriving.wait()


class _Messages:
    """A pair of tensors like ``k`` for each rank's tokens, that go round the ring in two buffers.

    At each step one is here and leaves, while the next arrives in the other.
    """

    def __init__(self, k_BMTD: Tensor, dtype: torch.dtype, ring: Ring) -> None:
        self.ring, self.sizes = ring, ring.shards.sizes
        self.B, self.M, _, self.D = k_BMTD.shape
        self.buffers = k_BMTD.new_empty(2, 2 * self.B * self.M * max(self.sizes) * self.D, dtype=dtype)

    def at(self, step: int) -> Tensor:
        shape = (2, self.B, self.M, self.sizes[self.ring.source(step)], self.D)
        return self.buffers[step % 2, : math.prod(shape)].view(shape)

    def pass_on(self, step: int) -> Work:
        """Start to send what is here at ``step``, and to receive what will be at the next."""
        group, arriving = self.ring.group, self.at(step + 1)
        work: Work = sendrecv(
            self.at(step),
            dst=(group.rank + 1) % group.size,
            src=(group.rank - 1) % group.size,
            like=arriving,
            out=arriving,
            group=group,
            async_op=True,
        )
        return work


# In graphs ------------------------------------------------------------------------------------------------


def _as_numbers(ring: Ring) -> tuple[int, int, bool, bool, float]:
    return ring.group.handle, ring.shards.length, ring.shards.zigzag, ring.causal, ring.scale


def _from_numbers(group: int, length: int, zigzag: bool, causal: bool, scale: float) -> Ring:
    members = Group.of(group)
    return Ring(members, SequenceShards(length, members.size, zigzag), causal, scale)


def _forward_real(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    group: int,
    length: int,
    zigzag: bool,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = _forward(q, k, v, mask, _from_numbers(group, length, zigzag, causal, scale))
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _backward_real(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    group: int,
    length: int,
    zigzag: bool,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    ring = _from_numbers(group, length, zigzag, causal, scale)
    dq, dk, dv = _backward(grad, q, k, v, mask, out, lse, ring)
    return dq.contiguous(), dk.clone(), dv.clone()  # two halves of one buffer, which an operator may not return


def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, N, T, D = q.shape
    return q.new_empty(B, T, N, D), q.new_empty(B, N, T, dtype=wide(q.dtype))


_forward_operator = operator("ring_attention", _forward_fake, _forward_real)
_backward_operator = operator(
    "ring_attention_backward",
    lambda grad, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    _backward_real,
)
