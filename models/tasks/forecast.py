"""To forecast gridded fields with a ViT, better than persistence does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from commlayer import Mesh
from models import config as configuration
from models import metrics as measures
from models import plots
from models.config import Config
from models.data.era5 import era5_pairs
from models.data.fields import FieldPairs, netcdf_pairs
from models.data.loading import LOADING, Batch
from models.data.synthetic import synthetic_pairs
from models.metrics import Forecast, Score, cell_weights
from models.tasks.task import Loss, Task
from models.vit import SIZES, ViT, ViTConfig
from parallel.rng import Streams

SOURCES: dict[str, Callable[..., tuple[FieldPairs, FieldPairs]]] = {
    "netcdf": netcdf_pairs,
    "era5": era5_pairs,
    "synthetic": synthetic_pairs,
}

RECOMPUTE = {"none": False, "full": True}


def load_data(config: Config) -> tuple[FieldPairs, FieldPairs]:
    """The training and the validation pairs that ``config.data`` describes."""
    settings = {key: value for key, value in config.data.items() if key != "source"}
    source = config.data.get("source", "netcdf")
    if source not in SOURCES:
        raise ValueError(f"data.source: expected one of {', '.join(SOURCES)}, got {source!r}")
    train, validation = SOURCES[source](**configuration.arguments(SOURCES[source], settings, "data.", LOADING))
    if config.variable and config.variable not in train.channels:
        raise ValueError(f"variable: expected one of {', '.join(train.channels)}, got {config.variable!r}")
    return train, validation


def build_model(config: Config, data: FieldPairs, mesh: Mesh | None = None, streams: Streams | None = None) -> ViT:
    """The ViT that ``config.model`` describes, for these data: this rank's part of it on a mesh.

    All parts together are the same model as without a mesh, bit for bit.
    """
    shape = {"grid": data.grid, "in_channels": data.in_channels, "out_channels": len(data.channels)}
    known = {field.name: field.default for field in dataclasses.fields(ViTConfig) if field.name not in shape}
    settings = configuration.section(config.model, known | {"size": "", "patch": None}, "model.")
    size = settings.pop("size", "demo")
    if size not in SIZES:
        raise ValueError(f"model.size: expected one of {', '.join(SIZES)}, got {size!r}")
    made = ViTConfig.named(size, **settings, **shape)
    if config.compile and made.dropout:
        raise ValueError(f"compile: with model.dropout {made.dropout} it cannot be; model.drop_path can")
    if config.recompute not in RECOMPUTE:
        raise ValueError(f"recompute: the ViT knows {', '.join(RECOMPUTE)}, got {config.recompute!r}")
    torch.manual_seed(config.seed)
    return ViT(
        made,
        mesh,
        streams=streams,
        sequence_parallel=config.sequence_parallel,
        context=config.context,
        recompute=RECOMPUTE[config.recompute],
    )


class Forecasting(Task):
    """The state of an atmosphere from those before it; ``x`` and ``y`` as :class:`FieldPairs` has them."""

    name, unit, summed_over = "ViT", "samples", "dp"
    no_skill = "the forecast does not beat persistence"

    model: ViT
    data: FieldPairs
    validation: FieldPairs

    load = staticmethod(load_data)

    def __init__(
        self, config: Config, data: tuple[FieldPairs, FieldPairs], mesh: Mesh, experts: Mesh, streams: Streams
    ) -> None:
        super().__init__(config, data, mesh, experts, streams)
        self.weights = cell_weights(self.data.latitudes, config.latitude_weighted).to(self.device)
        self.shown = self.data.channels.index(config.variable or self.data.channels[0])  # the channel of headlines
        unit = self.data.units[self.shown]
        self._in_unit = f" {unit}" if unit else ""

    def build(self, mesh: Mesh, experts: Mesh, streams: Streams) -> ViT:
        return build_model(self.config, self.data, mesh, streams)

    def begin(self, batches: Iterable[Batch]) -> dict[str, Score]:
        return self._scores(measures.rivals(self.validation, self.device), batches)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        x, y = batch
        forecast = self.run(model, x).float()
        return Loss(((forecast - y).square() * self.weights).mean((1, 2, 3)).sum())

    def compilable(self) -> Sequence[nn.Module]:
        # They stay what `recompute` repeats, and gradients are reduced while backward goes on.
        return list(self.model.blocks)

    def forecast(self, x: Tensor) -> Tensor:
        """What the model makes of ``x``, without a gradient; collective along cp and tp."""
        self.model.eval()
        with torch.no_grad():
            return self.run(self.model, x).float()

    def score(self, batches: Iterable[Batch]) -> Score:
        return self._scores({self.name: self.forecast}, batches)[self.name]

    def _scores(self, forecasts: dict[str, Forecast], batches: Iterable[Batch]) -> dict[str, Score]:
        return measures.scores(forecasts, batches, self.validation, self.weights, self.group)

    def entry(self, score: Score) -> dict[str, Any]:
        return {"validation_loss": score.loss, "rmse": score.rmse[self.shown]}

    def describe(self) -> str:
        grid = " × ".join(map(str, self.data.grid))
        return f"{grid} points, {len(self.data)} training and {len(self.validation)} validation samples"

    def line(self, entry: dict[str, Any], rivals: dict[str, Score]) -> str:
        persistence = rivals["persistence"].rmse[self.shown]
        return f"RMSE {entry['rmse']:.3f}{self._in_unit} (persistence {persistence:.3f})"

    def scalars(self, score: Score) -> dict[str, float]:
        names = zip(self.data.channels, self.data.units, score.rmse, strict=True)
        return {f"RMSE/{name} [{unit}]" if unit else f"RMSE/{name}": value for name, unit, value in names}

    def metrics(self, scores: dict[str, Score]) -> dict[str, Any]:
        channels = self.data.channels
        headline = {name: score.rmse[self.shown] for name, score in scores.items()}
        return {
            "variable": channels[self.shown],
            "unit": self.data.units[self.shown],
            "rmse": headline,
            "skill": 1 - headline[self.name] / headline["persistence"],
            "rmse_by_channel": {name: dict(zip(channels, score.rmse, strict=True)) for name, score in scores.items()},
            "validation_loss": {name: score.loss for name, score in scores.items()},
        }

    def table(self, metrics: dict[str, Any]) -> Table:
        """RMSE of each forecast, and its skill 1 - RMSE / RMSE of persistence."""
        title = f"Forecasts of {metrics['variable']}, {metrics['validation_samples']} validation samples"
        table = Table(title=title, title_justify="left")
        table.add_column("forecast")
        table.add_column("RMSE", justify="right")
        table.add_column("better than persistence by", justify="right")
        for name, value in metrics["rmse"].items():
            skill = "" if name == "persistence" else f"{1 - value / metrics['rmse']['persistence']:+.1%}"
            table.add_row(name, f"{value:.3f}{self._in_unit}", skill, style="bold" if name == self.name else None)
        return table

    def write(self, folder: Path | None, metrics: dict[str, Any]) -> None:
        index, states, errors = self._typical()
        if folder is None:
            return
        name, unit = metrics["variable"], metrics["unit"]
        rivals = {key: value for key, value in metrics["rmse"].items() if key != self.name}
        plots.loss_curve(
            folder / "loss.png",
            metrics["curve"],
            metrics["history"],
            rivals,
            key="rmse",
            name=self.name,
            loss="loss (normalised)",
            label=f"RMSE [{unit}]" if unit else "RMSE",
        )
        year = self.validation.windows[index].year
        when = f"validation sample {index}" if year is None else f"year {int(year)}"
        plots.forecast_map(
            folder / "forecast.png",
            states,
            errors,
            self.validation.latitudes,
            self.validation.longitudes,
            title=f"{name.replace('_', ' ')}, {when}: the case of median improvement",
            unit=unit,
        )

    def _typical(self) -> tuple[int, dict[str, np.ndarray], dict[str, float]]:
        """The sample of median RMSE relative to persistence among 49 or less: neither the best nor the worst."""
        data, weights = self.validation, self.weights.cpu()
        cases = []
        for index in range(0, len(data), -(-len(data) // 49)):
            x, y = data[index]
            forecast = self.forecast(x[None].to(self.device))[0].cpu()
            found = {"truth": y, self.name: forecast, "persistence": x[: len(y)]}
            states: dict[str, Tensor] = {key: data.denormalise(state)[self.shown] for key, state in found.items()}
            errors = {
                key: ((states[key] - states["truth"]).square() * weights).mean().sqrt().item()
                for key in (self.name, "persistence")
            }
            cases.append((errors[self.name] / errors["persistence"], index, states, errors))
        cases.sort(key=lambda case: case[:2])
        _, index, states, errors = cases[len(cases) // 2]
        return index, {key: state.numpy() for key, state in states.items()}, errors
