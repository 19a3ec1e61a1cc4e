"""A Vision Transformer for gridded fields: states in, the next state out, on any grid and any patch size.

After Dosovitskiy et al. 2021 (ICLR, "An Image is Worth 16x16 Words"), pre-norm, with a linear head that turns
every token back into its patch. The sizes include those of the NERSC tutorial "Deep Learning at Scale".

Legend of shape suffixes:
    B batch, X input channels, Y output channels, K = X/Y states in the input, H × W grid (latitude ×
    longitude), R × S patches (rows × columns), P × Q pixels of a patch, V values of a patch (all channels),
    T = R·S tokens, or this rank's part of them, E embedding
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commlayer import Group, Mesh, balanced_sizes
from parallel.attention import SequenceShards
from parallel.mappings import gather_from_region, scatter_to_region
from parallel.placement import initialise, mark_replicated
from parallel.recompute import checkpoint
from parallel.rng import Dropout, DropPath, Stream, Streams
from parallel.tensor import ColumnParallelLinear, RowParallelLinear
from parallel.transformer import ParallelAttention, ParallelMLP


@dataclass(frozen=True)
class ViTConfig:
    """Everything a :class:`ViT` is built from.

    - ``patch`` need not divide ``grid``: the grid is padded (with 0, the mean of normalised fields) and the
      output cropped.
    - ``position``: ``learned`` or ``sincos``.
    - ``skip``: what the network's output is added to. ``none``: it predicts the state itself, as the tutorial
      does. ``last``: the newest state, the first ``out_channels`` of the input; it predicts the tendency, and
      starts as the persistence forecast. ``mean``: the mean of the input states.
    - ``centre``: take the mean of the input states off the input. With a skip, a drift of the climate beyond
      everything in the training data then does no harm: departures look the same in a warmer world.
    """

    grid: tuple[int, int]
    in_channels: int
    out_channels: int
    patch: int | tuple[int, int] = 8
    embed: int = 384
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    position: str = "learned"
    skip: str = "none"
    centre: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if self.embed % self.heads:
            raise ValueError(f"heads: must divide embed {self.embed}, got {self.heads}")
        if self.position not in ("learned", "sincos"):
            raise ValueError(f"position: expected 'learned' or 'sincos', got {self.position!r}")
        if self.position == "sincos" and self.embed % 4:
            raise ValueError(f"embed: must be a multiple of 4 for position 'sincos', got {self.embed}")
        if self.skip not in ("none", "last", "mean"):
            raise ValueError(f"skip: expected 'none', 'last' or 'mean', got {self.skip!r}")
        if self.skip != "none" and (self.in_channels % self.out_channels or not self.in_channels):
            raise ValueError(
                f"skip: '{self.skip}' needs whole states as input, a multiple of out_channels "
                f"{self.out_channels}; got in_channels {self.in_channels}"
            )
        if self.centre and self.skip == "none":
            raise ValueError("centre: needs a skip; without one nothing tells the level of the forecast")
        sizes = {"in_channels": self.in_channels, "out_channels": self.out_channels, "depth": self.depth}
        sizes |= {
            "grid": min(self.grid),
            "patch": min(self.patches),
            "embed": self.embed,
            "heads": self.heads,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a probability in [0, 1), got {getattr(self, name)}")

    @property
    def patches(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return (self.patch, self.patch) if isinstance(self.patch, int) else (self.patch[0], self.patch[1])

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows and columns of patches, the padded ones included."""
        (H, W), (P, Q) = self.grid, self.patches
        return -(-H // P), -(-W // Q)

    @classmethod
    def named(cls, name: str, **changes: Any) -> ViTConfig:
        """One of :data:`SIZES`, with ``changes``: the data's ``grid``, ``in_channels``, ``out_channels``."""
        if name not in SIZES:
            raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {name!r}")
        return cls(**{**SIZES[name], **changes})


_ERA5 = {"grid": (360, 720), "in_channels": 20, "out_channels": 20, "patch": 8, "depth": 12, "heads": 8}

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"patch": 8, "embed": 32, "depth": 2, "heads": 2},  # for tests
    "demo": {"patch": 4, "embed": 64, "depth": 4, "heads": 4},  # for laptops
    "era5": {**_ERA5, "embed": 384},  # the tutorial's
    "era5-mp": {**_ERA5, "embed": 1536},  # and its `mp` model, too large for one 40 GB device with Adam
}


class ViT(nn.Module):
    """Maps x_BXHW to y_BYHW, on one process or on any mesh of dp, cp and tp.

    Every rank of a model-parallel group (cp × tp) passes the same x and gets the same, whole y. Inside, the tokens are
    cut over ``cp``, heads and hidden channels over ``tp``, and with ``sequence_parallel`` the tokens between them over
    ``tp`` too; neither the tokens nor the hidden channels have to divide evenly. Parameters have the same names and,
    at the same seed, the same values as on one process. What is replicated while its tokens are cut is marked, so that
    ``parallel.DataParallel(model, mesh=mesh)`` makes the gradients whole.

    Initialisation: weights of linear layers and learned positions from a normal of σ = 0.02 (cut off at ±2,
    as in the reference implementations), biases 0, norms 1. With a skip the head is 0, so that training
    starts from the skip's own forecast.

    Args:
        mesh: with axes ``cp`` and ``tp``, as far as it has them; None: one process.
        streams: random numbers for dropout; None: those of torch's default generators, for one process.
        sequence_parallel: cut the tokens over tp outside of attention and MLP.
        context: how attention sees the tokens of other cp ranks: ``ring``, ``all_gather`` or ``ulysses``.
        recompute: keep only the input of each block, and compute the rest again in backward.
    """

    def __init__(
        self,
        config: ViTConfig,
        mesh: Mesh | None = None,
        *,
        streams: Streams | None = None,
        sequence_parallel: bool = False,
        context: str = "ring",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.streams, self.recompute = config, streams, recompute
        self.tp, self.cp = (
            mesh[axis] if mesh is not None and axis in mesh.axes else Group.alone() for axis in ("tp", "cp")
        )
        if streams is None and self.tp.size * self.cp.size > 1 and (config.dropout or config.drop_path):
            raise ValueError("streams: needed for dropout and drop_path on a mesh, see parallel.Streams")
        P, Q = config.patches
        R, S = config.tokens
        self.shards = SequenceShards(R * S, self.cp.size)
        # Between the parallel layers the tokens of this rank's part are cut once more, or not at all.
        self.sequence_parallel = sequence_parallel and self.tp.size > 1
        mine = self.shards.sizes[self.cp.rank]
        self.sizes = balanced_sizes(mine, self.tp.size) if self.sequence_parallel else None
        self.embed = nn.Linear(config.in_channels * P * Q, config.embed)
        position_TE = torch.zeros(R * S, config.embed)
        if config.position == "learned":
            self.position = nn.Parameter(position_TE)
        else:
            self.register_buffer("position", sincos_positions(R, S, config.embed), persistent=False)
        self.dropout = Dropout(config.dropout, _along(streams, "dp-cp-tp" if self.sequence_parallel else "dp-cp"))
        # Stochastic depth grows linearly with depth (Huang et al. 2016).
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        options = {"group": self.tp, "sequence_parallel": self.sequence_parallel, "streams": streams}
        self.blocks = nn.ModuleList([Block(config, rate, options, self.cp, context) for rate in rates])
        self.norm = nn.LayerNorm(config.embed, eps=1e-6)
        self.head = nn.Linear(config.embed, config.out_channels * P * Q)
        self.reset_parameters()
        if self.cp.size > 1:
            mark_replicated(self, ("cp",))
        if self.sequence_parallel:
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.LayerNorm)):
                    mark_replicated(module, ("tp",))
            mark_replicated(self, ("tp",), recurse=False)  # the positions

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, ColumnParallelLinear, RowParallelLinear)):
                initialise(module.weight, lambda weight: nn.init.trunc_normal_(weight, std=0.02))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if self.config.position == "learned":
            nn.init.trunc_normal_(self.position, std=0.02)
        if self.config.skip != "none":
            nn.init.zeros_(self.head.weight)

    def forward(self, x_BXHW: Tensor) -> Tensor:
        expected = (self.config.in_channels, *self.config.grid)
        if x_BXHW.ndim != 4 or x_BXHW.shape[1:] != expected:
            raise ValueError(f"x: expected B × {' × '.join(map(str, expected))}, got {tuple(x_BXHW.shape)}")
        skipped_BYHW, x_BXHW = self.split_off(x_BXHW)
        position_TE = self.position[self.own_tokens()]
        tokens_BTE = self.dropout(self.embed(self.cut(self.to_patches(x_BXHW))) + position_TE)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                tokens_BTE = checkpoint(block, tokens_BTE, self.shards, self.sizes, streams=self.streams)
            else:
                tokens_BTE = block(tokens_BTE, self.shards, self.sizes)
        return skipped_BYHW + self.from_patches(self.join(self.head(self.norm(tokens_BTE))))

    def own_tokens(self) -> slice:
        """Which tokens this rank has between the parallel layers."""
        start, count = sum(self.shards.sizes[: self.cp.rank]), self.shards.sizes[self.cp.rank]
        if self.sizes is not None:
            start, count = start + sum(self.sizes[: self.tp.rank]), self.sizes[self.tp.rank]
        return slice(start, start + count)

    def cut(self, whole_BTV: Tensor) -> Tensor:
        """This rank's tokens of a whole sequence."""
        part_BTV = self.shards.shard(whole_BTV, 1, self.cp)
        return part_BTV if self.sizes is None else scatter_to_region(part_BTV, 1, self.tp, self.sizes)

    def join(self, part_BTV: Tensor) -> Tensor:
        """The whole sequence again, on all ranks, which from here on do the same."""
        if self.sizes is not None:
            part_BTV = gather_from_region(part_BTV, 1, self.tp, self.sizes)
        return self.shards.unshard(part_BTV, 1, self.cp)

    def split_off(self, x_BXHW: Tensor) -> tuple[Tensor | float, Tensor]:
        """What bypasses the network, and what goes in."""
        if self.config.skip == "none":
            return 0.0, x_BXHW
        states_BKYHW = x_BXHW.unflatten(1, (-1, self.config.out_channels))
        mean_BKYHW = states_BKYHW.mean(1, keepdim=True)
        skipped_BYHW = (mean_BKYHW if self.config.skip == "mean" else states_BKYHW)[:, 0]
        if self.config.centre:
            x_BXHW = (states_BKYHW - mean_BKYHW).flatten(1, 2)
        return skipped_BYHW, x_BXHW

    def to_patches(self, x_BXHW: Tensor) -> Tensor:
        """Pad to whole patches and flatten each: B × T × (X·P·Q)."""
        B, X, H, W = x_BXHW.shape
        (R, S), (P, Q) = self.config.tokens, self.config.patches
        x = F.pad(x_BXHW, (0, S * Q - W, 0, R * P - H))
        return x.reshape(B, X, R, P, S, Q).permute(0, 2, 4, 1, 3, 5).reshape(B, R * S, X * P * Q)

    def from_patches(self, patches_BTV: Tensor) -> Tensor:
        """The inverse for the output channels, cropped to the grid."""
        (R, S), (P, Q), (H, W) = self.config.tokens, self.config.patches, self.config.grid
        B, Y = patches_BTV.shape[0], self.config.out_channels
        y = patches_BTV.reshape(B, R, S, Y, P, Q).permute(0, 3, 1, 4, 2, 5).reshape(B, Y, R * P, S * Q)
        return y[..., :H, :W]


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each on a residual branch."""

    def __init__(self, config: ViTConfig, drop_path: float, options: dict[str, Any], cp: Group, context: str) -> None:
        super().__init__()
        options = options | {"dropout": config.dropout}
        self.norm1 = nn.LayerNorm(config.embed, eps=1e-6)
        self.attention = ParallelAttention(config.embed, config.heads, context=cp, method=context, **options)
        self.norm2 = nn.LayerNorm(config.embed, eps=1e-6)
        self.mlp = ParallelMLP(config.embed, int(config.embed * config.mlp_ratio), **options)
        self.drop_path = DropPath(drop_path, _along(options["streams"], "dp"))

    def forward(self, x_BTE: Tensor, shards: SequenceShards, sizes: list[int] | None) -> Tensor:
        x_BTE = x_BTE + self.drop_path(self.attention(self.norm1(x_BTE), shards=shards, sizes=sizes))
        return x_BTE + self.drop_path(self.mlp(self.norm2(x_BTE), sizes=sizes))


def _along(streams: Streams | None, axes: str) -> Stream | None:
    return None if streams is None else streams.along(axes)


def sincos_positions(rows: int, columns: int, embed: int) -> Tensor:
    """Fixed 2-D positions, T × E: half the channels for rows, half for columns (MAE, He et al. 2022)."""
    quarter = embed // 4
    frequency = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    parts = []
    for position in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"):
        angle = position.reshape(-1, 1) * frequency
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()
