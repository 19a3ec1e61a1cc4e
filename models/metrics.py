"""How good forecasts are: area-weighted RMSE in physical units, over all ranks, against simple rivals.

Legend: B batch, C channels, X = history · C input channels, H × W grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

import commlayer
from commlayer import Group
from models.data.fields import FieldPairs

Forecast = Callable[[Tensor], Tensor]  # x_BXHW → y_BCHW, normalised


def cell_weights(latitudes: np.ndarray, weighted: bool = True) -> Tensor:
    """Area of a grid cell relative to the mean one, H × 1: proportional to cos(latitude)."""
    cosine = torch.as_tensor(np.cos(np.deg2rad(latitudes)).clip(min=0), dtype=torch.float32)[:, None]
    return cosine / cosine.mean() if weighted else torch.ones_like(cosine)


def rivals(data: FieldPairs, device: torch.device) -> dict[str, Forecast]:
    """The forecasts that need no training: what a network has to beat."""
    C = len(data.channels)
    found: dict[str, Forecast] = {"persistence": lambda x: x[:, :C]}
    if data.climatology is not None:
        state = ((data.climatology - data.mean) / data.std).to(device)
        found["climatology"] = lambda x: state.expand(len(x), -1, -1, -1)
    if data.history > 1:
        found[f"mean of last {data.history}"] = lambda x: x.unflatten(1, (-1, C)).mean(1)
    return found


@torch.no_grad()
def rmse(
    forecasts: dict[str, Forecast],
    batches: Iterable[tuple[Tensor, Tensor]],
    data: FieldPairs,
    weights: Tensor,
    group: Group,
) -> dict[str, list[float]]:
    """Root mean square error of each forecast, per channel, in physical units.

    The mean is over all samples of all ranks, so it does not depend on how they were dealt out.
    """
    sums = torch.zeros(len(forecasts), len(data.channels), dtype=torch.float64, device=group.device)
    count = torch.zeros(1, dtype=torch.float64, device=group.device)
    std = data.std.to(group.device)
    for x, y in batches:
        x, y = x.to(group.device), y.to(group.device)
        count += len(x)
        for i, forecast in enumerate(forecasts.values()):
            errors_BCHW = (forecast(x) - y) * std
            sums[i] += (errors_BCHW.double().square() * weights).mean((2, 3)).sum(0)
    total = commlayer.all_reduce(torch.cat([sums.flatten(), count]), group=group)
    result = (total[:-1] / total[-1]).sqrt().view(sums.shape).tolist()
    return dict(zip(forecasts, result, strict=True))
