"""A Vision Transformer for gridded fields: states in, the next state out, on any grid and any patch size.

After Dosovitskiy et al. 2021 (ICLR, "An Image is Worth 16x16 Words"), pre-norm, with a linear head that turns
every token back into its patch. The sizes include those of the NERSC tutorial "Deep Learning at Scale".

Legend of shape suffixes:
    B batch, X input channels, Y output channels, K = X/Y states in the input, H × W grid (latitude ×
    longitude), R × S patches (rows × columns), P × Q pixels of a patch, V values of a patch (all channels),
    T = R·S tokens, E embedding, N heads, D = E/N channels of a head, F hidden channels of the MLP
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """Maps x_BXHW to y_BYHW.

    Initialisation: weights of linear layers and learned positions from a normal of σ = 0.02 (cut off at ±2,
    as in the reference implementations), biases 0, norms 1. With a skip the head is 0, so that training
    starts from the skip's own forecast.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        P, Q = config.patches
        R, S = config.tokens
        self.embed = nn.Linear(config.in_channels * P * Q, config.embed)
        position_TE = torch.zeros(R * S, config.embed)
        if config.position == "learned":
            self.position = nn.Parameter(position_TE)
        else:
            self.register_buffer("position", sincos_positions(R, S, config.embed), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        # Stochastic depth grows linearly with depth (Huang et al. 2016).
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList([Block(config, rate) for rate in rates])
        self.norm = nn.LayerNorm(config.embed, eps=1e-6)
        self.head = nn.Linear(config.embed, config.out_channels * P * Q)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
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
        tokens_BTE = self.dropout(self.embed(self.to_patches(x_BXHW)) + self.position)
        for block in self.blocks:
            tokens_BTE = block(tokens_BTE)
        return skipped_BYHW + self.from_patches(self.head(self.norm(tokens_BTE)))

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

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed, eps=1e-6)
        self.attention = Attention(config.embed, config.heads, config.dropout)
        self.norm2 = nn.LayerNorm(config.embed, eps=1e-6)
        self.mlp = MLP(config.embed, int(config.embed * config.mlp_ratio), config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BTE: Tensor) -> Tensor:
        x_BTE = x_BTE + self.drop_path(self.attention(self.norm1(x_BTE)))
        return x_BTE + self.drop_path(self.mlp(self.norm2(x_BTE)))


class Attention(nn.Module):
    """Multi-head self-attention over all tokens.

    The rows of ``qkv`` are ordered head by head (q, k, v of head 0, then of head 1, …), so that a slice of
    whole heads is contiguous: what tensor parallelism will cut.
    """

    def __init__(self, embed: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(embed, 3 * embed)
        self.out = nn.Linear(embed, embed)
        self.dropout = dropout

    def forward(self, x_BTE: Tensor) -> Tensor:
        B, T, E = x_BTE.shape
        qkv_BTN3D = self.qkv(x_BTE).reshape(B, T, self.heads, 3, E // self.heads)
        q_BNTD, k_BNTD, v_BNTD = qkv_BTN3D.permute(3, 0, 2, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0  # the function, unlike a module, does not know
        y_BNTD = F.scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, dropout_p=dropout)
        y_BTE = y_BNTD.transpose(1, 2).reshape(B, T, E)
        return F.dropout(self.out(y_BTE), self.dropout, self.training)


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, embed: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(embed, hidden)
        self.down = nn.Linear(hidden, embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTE: Tensor) -> Tensor:
        hidden_BTF = self.dropout(F.gelu(self.up(x_BTE)))
        return self.dropout(self.down(hidden_BTF))


class DropPath(nn.Module):
    """Stochastic depth: training drops a sample's branch with probability ``rate`` and scales the rest."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


def sincos_positions(rows: int, columns: int, embed: int) -> Tensor:
    """Fixed 2-D positions, T × E: half the channels for rows, half for columns (MAE, He et al. 2022)."""
    quarter = embed // 4
    frequency = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    parts = []
    for position in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"):
        angle = position.reshape(-1, 1) * frequency
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()
