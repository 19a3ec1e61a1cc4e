"""AdamW and its learning rate: linear warm-up, then a cosine (Loshchilov & Hutter 2017 and 2019)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from models.config import Optimizer


def adamw(model: nn.Module, settings: Optimizer) -> AdamW:
    """Weight decay on matrices alone: not on biases, norms and positions."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (plain if p.ndim < 2 or name.endswith("position") else decayed).append(p)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=settings.lr, betas=(settings.betas[0], settings.betas[1]))


def cosine(optimizer: torch.optim.Optimizer, settings: Optimizer, steps: int) -> LambdaLR:
    """The schedule over a run of ``steps``; step it after every optimiser step."""
    warmup = max(1, round(settings.warmup * steps))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return settings.final + (1 - settings.final) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, rate)
