"""How good forecasts are: area-weighted errors in physical units, over all ranks, against simple rivals.

Legend: B batch, C channels, X = history · C input channels, H × W grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

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


class Score(NamedTuple):
    """``rmse`` of each channel in physical units; ``loss``: the mean square error that training minimises."""

    rmse: list[float]
    loss: float


@torch.no_grad()
def scores(
    forecasts: dict[str, Forecast],
    batches: Iterable[tuple[Tensor, Tensor]],
    data: FieldPairs,
    weights: Tensor,
    group: Group,
) -> dict[str, Score]:
    """How far each forecast is off the truth, over the samples of all ranks of ``group``.

    The mean is over samples, so it does not depend on how they were dealt out.
    """
    C = len(data.channels)
    sums = torch.zeros(len(forecasts), C + 1, dtype=torch.float64, device=group.device)
    count = torch.zeros(1, dtype=torch.float64, device=group.device)
    std = data.std.to(group.device)
    for x, y in batches:
        count += len(x)
        for i, forecast in enumerate(forecasts.values()):
            errors_BCHW = forecast(x) - y
            sums[i, :C] += ((errors_BCHW * std).double().square() * weights).mean((2, 3)).sum(0)
            sums[i, C] += (errors_BCHW.double().square() * weights).mean((1, 2, 3)).sum()
    total = commlayer.all_reduce(torch.cat([sums.flatten(), count]), group=group)
    means = (total[:-1] / total[-1]).view(sums.shape)
    rows = zip(forecasts, means[:, :C].sqrt().tolist(), means[:, C].tolist(), strict=True)
    return {name: Score(rmse, loss) for name, rmse, loss in rows}
