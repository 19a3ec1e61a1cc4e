"""The two branches of a transformer block, cut over a tensor-parallel group: MLP and attention.

Each is a column-parallel layer, work on this rank's own channels or heads, and a row-parallel layer, so that it
communicates once in forward and once in backward (Shoeybi et al. 2019, arXiv:1909.08053, section 3). With sequence
parallelism x and y are this rank's tokens alone (Korthikanti et al. 2022, arXiv:2205.05198).

Dropout inside draws other numbers on every rank, dropout of the output the same on all that hold it: several ranks need
``streams`` for that. With streams, attention weights are not dropped inside compiled functions (see Stream.fork).

Legend of shape suffixes:
    B batch, T tokens, E embed, F hidden channels of this rank, N heads and M key-value heads of this rank, G = N/M,
    D channels of a head
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from commlayer import Group, balanced_sizes
from parallel.attention import SequenceShards, check_method, context_attention
from parallel.rng import Dropout, Stream, Streams
from parallel.rotary import rotate
from parallel.tensor import ColumnParallelLinear, RowParallelLinear


class ParallelMLP(nn.Module):
    """Linear, activation, linear.

    Args:
        group: the tensor-parallel ranks, by default this one alone; ``axis`` is what the mesh calls them.
        gated: activation(gate) · value in place of activation (Shazeer 2020, arXiv:2002.05202; SwiGLU with F.silu).
            The rows of ``up`` are then pairs, gate 0, value 0, gate 1, value 1, …, which are never cut.
        dropout: of hidden channels and of the output.

    Raises:
        ValueError: for dropout on several ranks without ``streams``.
    """

    def __init__(
        self,
        embed: int,
        hidden: int,
        *,
        group: Group | None = None,
        axis: str = "tp",
        activation: Callable[[Tensor], Tensor] = F.gelu,
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        sequence_parallel: bool = False,
        streams: Streams | None = None,
    ) -> None:
        super().__init__()
        group = Group.alone() if group is None else group
        self.activation, self.gated = activation, gated
        place: dict[str, Any] = {"group": group, "axis": axis, "sequence_parallel": sequence_parallel}
        sizes = [(1 + gated) * size for size in balanced_sizes(hidden, group.size)]
        self.up = ColumnParallelLinear(embed, sum(sizes), bias, out_sizes=sizes, **place)
        self.down = RowParallelLinear(hidden, embed, bias, **place)
        inside, outside = _streams(group, dropout, streams, sequence_parallel)
        self.hidden_dropout, self.output_dropout = Dropout(dropout, inside), Dropout(dropout, outside)

    def forward(self, x_BTE: Tensor, *, sizes: Sequence[int] | None = None) -> Tensor:
        """``sizes``: tokens of each rank under sequence parallelism, by default equally many."""
        hidden_BTF = self.up(x_BTE, sizes)
        if self.gated:
            gate_BTF, value_BTF = hidden_BTF.unflatten(-1, (hidden_BTF.shape[-1] // 2, 2)).unbind(-1)
            hidden_BTF = self.activation(gate_BTF) * value_BTF
        else:
            hidden_BTF = self.activation(hidden_BTF)
        y_BTE: Tensor = self.output_dropout(self.down(self.hidden_dropout(hidden_BTF), sizes))
        return y_BTE


class ParallelAttention(nn.Module):
    """Self-attention, with as many key-value heads as heads, or fewer (Ainslie et al. 2023, arXiv:2305.13245).

    The rows of ``qkv`` are ordered by key-value heads: the queries that share it, its key, its value, and so on to the
    next one; so ranks hold whole heads, and q, k and v have one reduction in backward between them.

    Args:
        group: the tensor-parallel ranks, by default this one alone; ``axis`` is what the mesh calls them.
        context: the context-parallel ranks, which hold other tokens; ``method`` is as in ``context_attention``.
        dropout: of attention weights (not with ``ring`` over several ranks) and of the output.

    Raises:
        ValueError: for heads that do not divide; for dropout on several tensor-parallel ranks without ``streams``.
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        group: Group | None = None,
        axis: str = "tp",
        context: Group | None = None,
        method: str = "ring",
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        sequence_parallel: bool = False,
        streams: Streams | None = None,
    ) -> None:
        super().__init__()
        group = Group.alone() if group is None else group
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or embed % heads:
            raise ValueError(f"heads: must divide embed {embed}, got {heads}")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads: must divide heads {heads}, got {kv_heads}")
        if kv_heads % group.size:
            which = "heads" if kv_heads == heads else "kv_heads"
            raise ValueError(f"{which}: must be a multiple of the {group.size} ranks of {axis}, got {kv_heads}")
        # Of a key-value head with its queries: channels for each, and how many there are on this rank.
        self.head_dim, self.queries, self.kv_heads = embed // heads, heads // kv_heads, kv_heads // group.size
        self.context = Group.alone() if context is None else context
        self.method, self.causal, self.dropout = method, causal, dropout
        check_method(method, heads // group.size, self.context, dropout)
        place: dict[str, Any] = {"group": group, "axis": axis, "sequence_parallel": sequence_parallel}
        self.qkv = ColumnParallelLinear(embed, (heads + 2 * kv_heads) * self.head_dim, bias, **place)
        self.out = RowParallelLinear(embed, embed, bias, **place)
        self.stream, outside = _streams(group, dropout, streams, sequence_parallel)
        self.output_dropout = Dropout(dropout, outside)

    def forward(
        self,
        x_BTE: Tensor,
        *,
        mask: Tensor | None = None,
        shards: SequenceShards | None = None,
        sizes: Sequence[int] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``mask`` (for this rank's heads, if it differs between them) and ``shards`` are as in ``context_attention``.

        ``rotary``: positions of this context rank's tokens, from ``rotary_tables``.
        ``sizes``: under sequence parallelism the tokens of each tensor-parallel rank, by default equally many.
        """
        rows_BTMRD = self.qkv(x_BTE, sizes).unflatten(-1, (self.kv_heads, self.queries + 2, self.head_dim))
        q_BTMGD, k_BTM1D, v_BTM1D = rows_BTMRD.split([self.queries, 1, 1], 3)
        q_BNTD, k_BMTD, v_BMTD = (part.flatten(2, 3).transpose(1, 2) for part in (q_BTMGD, k_BTM1D, v_BTM1D))
        if rotary is not None:
            q_BNTD, k_BMTD = rotate(q_BNTD, *rotary), rotate(k_BMTD, *rotary)
        dropout = self.dropout if self.training else 0.0
        with self.stream.fork() if dropout and self.stream else nullcontext():
            y_BNTD = context_attention(
                q_BNTD,
                k_BMTD,
                v_BMTD,
                group=self.context,
                shards=shards,
                method=self.method,
                causal=self.causal,
                mask=mask,
                dropout=dropout,
            )
        y_BTE: Tensor = self.output_dropout(self.out(y_BNTD.transpose(1, 2).flatten(2), sizes))
        return y_BTE


def _streams(
    group: Group, dropout: float, streams: Streams | None, sequence_parallel: bool
) -> tuple[Stream | None, Stream | None]:
    """Where dropout draws from inside the region, and for the output."""
    if streams is None:
        if dropout and group.size > 1:
            raise ValueError(f"dropout: {dropout} on {group.size} ranks needs streams=, see parallel.rng.Streams")
        return None, None
    inside = streams.along("dp-cp-tp")
    return inside, inside if sequence_parallel else streams.along("dp-cp")
