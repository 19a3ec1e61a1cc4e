"""What a run shows and leaves behind: progress on rank 0, a table of scores, pictures, metrics, weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from models import config as configuration
from models import plots
from models.config import Config
from models.data.fields import FieldPairs


class Reporter:
    """A live bar on a terminal, else a line per validation; silent on every rank but 0."""

    def __init__(self, rank: int, steps: int, unit: str) -> None:
        self.console = Console(quiet=rank != 0)
        self.unit = f" {unit}" if unit else ""
        self._bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=rank != 0 or not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self) -> None:
        self._bar.advance(self._task)

    def validated(self, entry: dict[str, float], persistence: float, rate: float) -> None:
        """Show one entry of the history; ``rate`` is in training samples per second."""
        score = f"RMSE {entry['rmse']:.3f}{self.unit} (persistence {persistence:.3f})"
        if self.console.is_terminal:
            speed = f" {rate:.0f} samples/s" if entry["step"] else ""
            self._bar.update(self._task, description=score + speed)
        elif entry["step"]:
            self.say(f"epoch {entry['epoch']}  loss {entry['loss']:.4f}  {score}  {rate:.0f} samples/s")
        else:
            self.say(f"before training: {score}")

    def table(self, title: str, scores: dict[str, float]) -> None:
        """RMSE of each forecast, and its skill 1 - RMSE / RMSE of persistence."""
        table = Table(title=title, title_justify="left")
        table.add_column("forecast")
        table.add_column("RMSE", justify="right")
        table.add_column("better than persistence by", justify="right")
        for name, value in scores.items():
            skill = "" if name == "persistence" else f"{1 - value / scores['persistence']:+.1%}"
            table.add_row(name, f"{value:.3f}{self.unit}", skill, style="bold" if name == "ViT" else None)
        self.console.print(table)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@torch.no_grad()
def save(
    config: Config,
    model: nn.Module,
    data: FieldPairs,
    metrics: dict[str, Any],
    weights: Tensor,
    shown: int,
    device: torch.device,
) -> None:
    """Write the output folder; ``shown`` is the channel in the pictures."""
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(configuration.dump(config))
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    torch.save(model.state_dict(), folder / "model.pt")
    name, unit = data.channels[shown], data.units[shown]
    rivals = {key: value for key, value in metrics["rmse"].items() if key != "ViT"}
    plots.loss_curve(folder / "loss.png", metrics["history"], rivals, unit)
    index, states, errors = _typical(model, data, weights.cpu(), shown, device)
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


def _typical(
    model: nn.Module, data: FieldPairs, weights: Tensor, shown: int, device: torch.device
) -> tuple[int, dict[str, np.ndarray], dict[str, float]]:
    """The sample of median RMSE relative to persistence among 49 or less: neither the best nor the worst."""
    cases = []
    for index in range(0, len(data), -(-len(data) // 49)):
        x, y = data[index]
        found = {"truth": y, "ViT": model(x[None].to(device))[0].cpu(), "persistence": x[: len(y)]}
        states = {key: data.denormalise(state)[shown] for key, state in found.items()}
        errors = {
            key: ((states[key] - states["truth"]).square() * weights).mean().sqrt().item()
            for key in ("ViT", "persistence")
        }
        cases.append((errors["ViT"] / errors["persistence"], index, states, errors))
    cases.sort(key=lambda case: case[:2])
    _, index, states, errors = cases[len(cases) // 2]
    return index, {key: state.numpy() for key, state in states.items()}, errors
