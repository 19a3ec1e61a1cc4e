"""What a run leaves behind: its metrics, pictures, configuration, and the whole model."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import commlayer
from models import config as configuration
from models import plots
from models.memory import of_all_ranks
from models.metrics import Score
from models.trainer import Trainer
from parallel.placement import full_shape, gather_full


def metrics(trainer: Trainer, scores: dict[str, Score], seconds: float) -> dict[str, Any]:
    """What metrics.json gets, the same on every rank; ``seconds``: of the whole run. Collective."""
    channels = trainer.data.channels
    headline = {name: score.rmse[trainer.shown] for name, score in scores.items()}
    marks = of_all_ranks(trainer.memory, trainer.world)
    return {
        "config": trainer.config.name,
        "ranks": trainer.world.size,
        "mesh": repr(trainer.mesh),
        "backend": trainer.world.backend,
        "variable": channels[trainer.shown],
        "unit": trainer.data.units[trainer.shown],
        "rmse": headline,
        "skill": 1 - headline["ViT"] / headline["persistence"],
        "rmse_by_channel": {name: dict(zip(channels, score.rmse, strict=True)) for name, score in scores.items()},
        "validation_loss": {name: score.loss for name, score in scores.items()},
        "training_samples": len(trainer.data),
        "validation_samples": len(trainer.validation),
        "parameters": sum(math.prod(full_shape(p)) for p in trainer.vit.parameters()),
        "memory_bytes": {name: {"max": max(values), "ranks": values} for name, values in marks.items()},
        "samples_per_second": trainer.samples_per_second,
        "seconds": seconds,
        "history": trainer.history,
        "curve": trainer.curve,
    }


@torch.no_grad()
def write(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """The output folder, by rank 0; all ranks take part, since it needs the whole model, and forecasts."""
    whole = {}
    for name, t in trainer.vit.state_dict(keep_vars=True).items():
        full = gather_full(t, t)
        if trainer.world.rank == 0:  # the others have no room for it, and no use
            whole[name] = full.cpu()
    # Single samples: where blocks are compiled, a graph for these alone is not worth its making.
    with torch.compiler.set_stance("force_eager") if trainer.config.compile else nullcontext():
        index, states, errors = _typical(trainer)
    if trainer.world.rank == 0:
        folder, data = Path(trainer.config.output), trainer.validation
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(configuration.dump(trainer.config))
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        torch.save(whole, folder / "model.pt")
        name, unit = metrics["variable"], metrics["unit"]
        rivals = {key: value for key, value in metrics["rmse"].items() if key != "ViT"}
        plots.loss_curve(folder / "loss.png", trainer.curve, trainer.history, rivals, unit)
        year = data.windows[index].year
        when = f"validation sample {index}" if year is None else f"year {int(year)}"
        plots.forecast_map(
            folder / "forecast.png",
            states,
            errors,
            data.latitudes,
            data.longitudes,
            title=f"{name.replace('_', ' ')}, {when}: the case of median improvement",
            unit=unit,
        )
    commlayer.barrier(group=trainer.world)  # nobody leaves, and ends the job, while rank 0 writes


def _typical(trainer: Trainer) -> tuple[int, dict[str, np.ndarray], dict[str, float]]:
    """The sample of median RMSE relative to persistence among 49 or less: neither the best nor the worst."""
    data, weights = trainer.validation, trainer.weights.cpu()
    cases = []
    for index in range(0, len(data), -(-len(data) // 49)):
        x, y = data[index]
        forecast = trainer.forecast(x[None].to(trainer.device))[0].cpu()
        found = {"truth": y, "ViT": forecast, "persistence": x[: len(y)]}
        states: dict[str, Tensor] = {key: data.denormalise(state)[trainer.shown] for key, state in found.items()}
        errors = {
            key: ((states[key] - states["truth"]).square() * weights).mean().sqrt().item()
            for key in ("ViT", "persistence")
        }
        cases.append((errors["ViT"] / errors["persistence"], index, states, errors))
    cases.sort(key=lambda case: case[:2])
    _, index, states, errors = cases[len(cases) // 2]
    return index, {key: state.numpy() for key, state in states.items()}, errors
