"""A Vision Transformer in plain torch, written apart from models.vit: what the parallel one is compared with.

The same parameter names and shapes, but patches by ``unfold`` and ``fold``, attention by its formula, no layer of ours.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class PlainViT(nn.Module):
    """``config`` is a models.vit.ViTConfig; learned positions, no skip, no dropout."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        embed, pixels = config.embed, math.prod(config.patches)
        self.embed = nn.Linear(config.in_channels * pixels, embed)
        self.position = nn.Parameter(torch.zeros(math.prod(config.tokens), embed))
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(embed, eps=1e-6)
        self.head = nn.Linear(embed, config.out_channels * pixels)

    def forward(self, x):
        (H, W), patches = self.config.grid, self.config.patches
        padded = [n * p for n, p in zip(self.config.tokens, patches, strict=True)]
        x = F.pad(x, (0, padded[1] - W, 0, padded[0] - H))
        tokens = self.embed(F.unfold(x, patches, stride=patches).mT) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return F.fold(self.head(self.norm(tokens)).mT, padded, patches, stride=patches)[..., :H, :W]


class PlainBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        embed, hidden = config.embed, int(config.embed * config.mlp_ratio)
        self.heads = config.heads
        self.norm1, self.norm2 = (nn.LayerNorm(embed, eps=1e-6) for _ in range(2))
        self.attention = nn.ModuleDict({"qkv": nn.Linear(embed, 3 * embed), "out": nn.Linear(embed, embed)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(embed, hidden), "down": nn.Linear(hidden, embed)})

    def forward(self, x):
        heads = []
        for rows in self.attention["qkv"](self.norm1(x)).chunk(self.heads, -1):
            q, k, v = rows.chunk(3, -1)
            heads.append(torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v)
        x = x + self.attention["out"](torch.cat(heads, -1))
        return x + self.mlp["down"](F.gelu(self.mlp["up"](self.norm2(x))))
