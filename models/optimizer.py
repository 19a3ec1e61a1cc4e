"""AdamW and its learning rate: linear warm-up, then a cosine (Loshchilov & Hutter 2017 and 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn
from torch.optim import AdamW

from models.config import Optimizer

FUSED = ("cpu", "cuda", "xpu")  # devices where torch has the whole update as one kernel


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
    fused = all(p.device.type in FUSED for p in model.parameters())
    return AdamW(groups, lr=settings.lr, betas=(settings.betas[0], settings.betas[1]), fused=fused)


def learning_rate(settings: Optimizer, steps: int, batch: int) -> Callable[[int], float]:
    """The rate of each step 0, 1, … of a run of ``steps``, whose global batch is ``batch``.

    The rate of Adam grows with the square root of the batch (Malladi et al. 2022, NeurIPS, "On the SDEs and Scaling
    Rules for Adaptive Gradient Algorithms"), where ``reference_batch`` asks for it.
    """
    peak = settings.lr * (math.sqrt(batch / settings.reference_batch) if settings.reference_batch else 1)
    warmup = max(1, round(settings.warmup * steps))

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return peak * (settings.final + (1 - settings.final) * (1 + math.cos(math.pi * progress)) / 2)

    return rate
