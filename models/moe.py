"""A decoder language model with a mixture of experts in some of its layers, on one process or on any mesh.

Pre-norm with RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), attention with grouped key-value heads and rotary
positions, gated MLPs (SwiGLU), no biases: as in Llama; in every k-th layer experts in place of the MLP.
``python -m models.moe`` prints how many parameters each named size has.

Legend of shape suffixes:
    B batch, T tokens of a sequence, or this rank's part of them, E embed, V entries of the vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from commlayer import Group, Mesh, balanced_sizes
from models.moe_sizes import SIZES, LanguageModelConfig
from parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel.expert import Load, MoE
from parallel.experts import Experts
from parallel.mappings import gather_from_region
from parallel.placement import initialise, initialise_each, mark_replicated, recall_marks
from parallel.recompute import checkpoint
from parallel.rotary import rotary_tables
from parallel.shards import SequenceShards
from parallel.tensor import ColumnParallelLinear, VocabParallelEmbedding
from parallel.transformer import ParallelAttention, ParallelMLP

__all__ = ["SIZES", "LanguageModel", "LanguageModelConfig", "Output", "Parameters", "parameters"]

RECOMPUTE = {"none": "", "selective": "products", "full": "nothing"}  # what is kept of each block


class Output(NamedTuple):
    """``loss``: the sum of the cross entropy of this context rank's tokens. ``loads``: of each layer with experts."""

    loss: Tensor
    loads: tuple[Load, ...]


class LanguageModel(nn.Module):
    """Maps ids_BT to the logits of what comes next, logits_BTV, or with targets to their cross entropy.

    All ranks of a model-parallel group (cp × tp) pass the same ids. Inside, the tokens are cut over ``cp`` in zigzag,
    heads, hidden channels and the vocabulary over ``tp``, with ``sequence_parallel`` the tokens between them over
    ``tp`` too, and experts over ``ep`` and ``etp``; T need not divide by anything. Parameters have the same names and,
    at the same seed, the same values as on one process. What is replicated while its tokens are cut is marked, so that
    ``parallel.DataParallel(model, mesh=mesh, experts=experts)`` makes the gradients whole.

    A model made under ``torch.device("meta")`` has no memory; ``to_empty(device=…)`` and ``reset_parameters()`` then
    give the values that it would have had at once.

    Args:
        mesh: with axes ``cp`` and ``tp``, as far as it has them; None: one process.
        experts: the same ranks folded, ``mesh.fold("ep=4")``; by default every rank has all experts.
        sequence_parallel: cut the tokens over tp outside of attention, MLPs and experts.
        context: how attention sees the tokens of other cp ranks: ``ring``, ``all_gather`` or ``ulysses``.
        recompute: what of a block is computed again in backward: ``none``, ``full``, or ``selective``: all but matrix
            products, attention and communication.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        mesh: Mesh | None = None,
        experts: Mesh | None = None,
        *,
        sequence_parallel: bool = False,
        context: str = "ring",
        recompute: str = "none",
    ) -> None:
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute: expected one of {', '.join(RECOMPUTE)}, got {recompute!r}")
        if mesh is None and experts is not None:
            raise ValueError(f"experts: {experts!r} is the fold of a mesh, which is missing")
        if mesh is not None and experts is None and config.every:
            experts = mesh.fold("ep=1")
        self.config, self.mesh, self.recompute = config, mesh, recompute
        self.tp, self.cp = (
            mesh[axis] if mesh is not None and axis in mesh.axes else Group.alone() for axis in ("tp", "cp")
        )
        self.sequence_parallel = sequence_parallel and self.tp.size > 1
        place = {"group": self.tp, "sequence_parallel": self.sequence_parallel}
        device = torch.get_default_device()
        with torch.device("meta"):  # reset_parameters draws all numbers, whether at once or later
            self.embed = VocabParallelEmbedding(config.vocab_size, config.embed, **place)
            self.blocks = nn.ModuleList(
                Block(config, layer, place, self.cp, context, experts) for layer in range(config.depth)
            )
            self.norm = nn.RMSNorm(config.embed, eps=config.norm_eps)
            self.head = ColumnParallelLinear(config.embed, config.vocab_size, bias=False, **place)
        if config.tied:
            self.head.weight = self.embed.weight
        for module in self.modules():
            if self.cp.size > 1 and not isinstance(module, Experts):
                mark_replicated(module, ("cp",), recurse=False)
            if self.sequence_parallel and isinstance(module, nn.RMSNorm):
                mark_replicated(module, ("tp",))
        self.to_empty(device=device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As GPT-2: normal, σ = 0.02, on the way out of a residual branch over √(2 · depth); norms 1."""
        for name, param in self.named_parameters():
            if param.ndim == 1:
                nn.init.ones_(param)
            else:
                out = name.endswith(("attention.out.weight", "down.weight", "experts.down"))
                std = 0.02 / math.sqrt(2 * self.config.depth) if out else 0.02
                draw = initialise_each if param.ndim == 3 else initialise  # experts, one after the other
                draw(param, partial(nn.init.normal_, std=std))
        for bias in self.buffers():  # of the routers, the only ones
            nn.init.zeros_(bias)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor | Output:
        """Targets of -100 do not count. The logits are whole on all ranks."""
        self._check(ids_BT, targets_BT)
        shards = SequenceShards(ids_BT.shape[1], self.cp.size, zigzag=self.cp.size > 1)
        positions_T = shards.positions(self.cp.rank)
        # Between the parallel layers this rank's tokens are cut once more, or not at all.
        sizes = balanced_sizes(len(positions_T), self.tp.size) if self.sequence_parallel else None
        x_BTE = self.embed(shards.shard(ids_BT, 1, self.cp), sizes)
        channels = self.config.embed // self.config.heads
        rotary = rotary_tables(positions_T, channels, like=x_BTE, theta=self.config.rope_theta)
        loads = []
        for block in self.blocks:
            if self.recompute != "none" and torch.is_grad_enabled():
                x_BTE, load = checkpoint(block, x_BTE, rotary, shards, sizes, keep=RECOMPUTE[self.recompute])
            else:
                x_BTE, load = block(x_BTE, rotary, shards, sizes)
            loads += [] if load is None else [load]
        logits_BTV = self.head(self.norm(x_BTE), sizes)
        if targets_BT is None:
            return shards.unshard(gather_from_region(logits_BTV, -1, self.tp, self.head.sizes), 1, self.cp)
        targets_BT = shards.shard(targets_BT, 1, self.cp)
        vocab = {"group": self.tp, "vocab_size": self.config.vocab_size}
        return Output(vocab_parallel_cross_entropy(logits_BTV, targets_BT, reduction="sum", **vocab), tuple(loads))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        super()._apply(fn, recurse)
        # Parameters are new where the model moved off the meta device.
        if self.config.tied:
            self.head.weight = self.embed.weight
        recall_marks(self)
        return self

    def _check(self, ids: Tensor, targets: Tensor | None) -> None:
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"ids: expected integers, batch × tokens, got {ids.dtype} of shape {tuple(ids.shape)}")
        if targets is not None and targets.shape != ids.shape:
            raise ValueError(f"targets: expected the shape of ids, {tuple(ids.shape)}, got {tuple(targets.shape)}")


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP or experts, each on a residual branch."""

    def __init__(
        self,
        config: LanguageModelConfig,
        layer: int,
        place: dict[str, Any],
        cp: Group,
        context: str,
        experts: Mesh | None,
    ) -> None:
        super().__init__()
        embed, norm = config.embed, partial(nn.RMSNorm, config.embed, eps=config.norm_eps)
        seen = {"context": cp, "method": context, "causal": True}
        self.norm1 = norm()
        self.attention = ParallelAttention(embed, config.heads, config.kv_heads, bias=False, **seen, **place)
        self.norm2 = norm()
        gated: dict[str, Any] = {"activation": F.silu, "gated": True, **place}
        if config.has_experts(layer):
            assert config.routing is not None
            self.moe = MoE(embed, config.expert_hidden, config.routing, mesh=experts, shared=config.shared, **gated)
        else:
            self.mlp = ParallelMLP(embed, config.hidden, bias=False, **gated)

    def forward(
        self, x_BTE: Tensor, rotary: tuple[Tensor, Tensor], shards: SequenceShards, sizes: list[int] | None
    ) -> tuple[Tensor, Load | None]:
        x_BTE = x_BTE + self.attention(self.norm1(x_BTE), rotary=rotary, shards=shards, sizes=sizes)
        if hasattr(self, "mlp"):
            return x_BTE + self.mlp(self.norm2(x_BTE), sizes=sizes), None
        y_BTE, load = self.moe(self.norm2(x_BTE), sizes)
        return x_BTE + y_BTE, load


class Parameters(NamedTuple):
    """``total``: of the whole model. ``active``: those that one token uses, its embedding and its experts among them.

    ``multiplied``: of the active, those that its forward multiplies with: the lookup of the embedding does not.
    """

    total: int
    active: int
    multiplied: int


def parameters(config: LanguageModelConfig) -> Parameters:
    """How many there are, counted on the very model, which gets no memory."""
    with torch.device("meta"):
        model = LanguageModel(config)
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for module in model.modules():
        if isinstance(module, Experts):
            assert config.routing is not None
            of_one = sum(p.numel() for p in module.parameters()) // config.routing.experts
            idle += of_one * (config.routing.experts - config.routing.top_k)
    looked_up = 0 if config.tied else model.embed.weight.numel()
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    return Parameters(total, total - idle, total - idle - looked_up - norms)


def table() -> Table:
    """All named sizes."""
    made = Table(box=None, padding=(0, 1, 0, 0), caption="state: parameters, gradients and AdamW's moments, in float32")
    for name in ("size", "embed", "depth", "heads", "experts", "every", "total", "active", "state"):
        made.add_column(name, justify="left" if name == "size" else "right", no_wrap=True)
    for name, config in SIZES.items():
        count, routing = parameters(config), config.routing
        heads = f"{config.heads}" if config.heads == config.kv_heads else f"{config.heads}/{config.kv_heads}"
        shared = f"+{config.shared}" if config.shared else ""
        experts = [f"{routing.top_k}{shared} of {routing.experts}", f"{config.every}"] if routing else ["", ""]
        sizes = [_short(count.total), _short(count.active), f"{_short(16 * count.total)}B"]
        made.add_row(name, f"{config.embed}", f"{config.depth}", heads, *experts, *sizes)
    return made


def _short(number: int) -> str:
    """In three digits: 49.2 G."""
    power = (len(f"{number}") - 1) // 3
    return f"{number / 1000**power:.3g} {' kMGT'[power]}"


if __name__ == "__main__":
    Console().print(table())
