"""What a run shows while it goes: progress on the terminal of rank 0, and curves for TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from models.metrics import Score
from models.trainer import Trainer
from parallel.placement import full_shape


class Reporter:
    """A live bar on a terminal, else a line per validation; silent on every rank but 0.

    ``others``: the scores of the forecasts that need no training.
    """

    def __init__(self, trainer: Trainer, others: dict[str, Score]) -> None:
        self.trainer = trainer
        self.first = trainer.world.rank == 0
        self.console = Console(quiet=not self.first)
        self.persistence = others["persistence"].rmse[trainer.shown]
        unit = trainer.data.units[trainer.shown]
        self.unit = f" {unit}" if unit else ""
        self.curves: Any = None
        self._bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.first or not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=trainer.steps, completed=trainer.step)

    def __enter__(self) -> Reporter:
        self.say(_headline(self.trainer))
        if self.first:
            self.curves = _curves(Path(self.trainer.config.output), self.trainer.step)
            if self.curves is None:
                self.say("no curves for TensorBoard: pip install commlayer[train]")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self.curves is not None:
            self.curves.close()

    def step(self) -> None:
        self._bar.advance(self._task)

    def logged(self) -> None:
        """The last entry of the curve."""
        trainer, entry = self.trainer, self.trainer.curve[-1]
        values = {
            "loss/training": entry["loss"],
            "training/learning rate": trainer.rate(trainer.step - 1),
            "training/gradient norm": entry["gradient_norm"],
            "training/samples per second": entry["samples_per_second"],
        }
        if trainer.scaler.is_enabled():
            values["training/loss scale"] = trainer.scaler.get_scale()
        self._scalars(values)

    def validated(self, score: Score) -> None:
        """The last entry of the history, and the score that it comes from."""
        trainer, entry = self.trainer, self.trainer.history[-1]
        text = f"RMSE {entry['rmse']:.3f}{self.unit} (persistence {self.persistence:.3f})"
        rate = f"{trainer.samples_per_second:.0f} samples/s" if trainer.step else ""
        if self.console.is_terminal:
            self._bar.update(self._task, description=f"{text} {rate}")
        elif trainer.step:
            self.say(f"epoch {entry['epoch']}  loss {entry['loss']:.4f}  {text}  {rate}")
        else:
            self.say(f"before training: {text}")
        names = zip(trainer.data.channels, trainer.data.units, score.rmse, strict=True)
        values = {f"RMSE/{name} [{unit}]" if unit else f"RMSE/{name}": value for name, unit, value in names}
        self._scalars({"loss/validation": score.loss, **values})

    def memory(self, marks: dict[str, list[int]]) -> None:
        """High-water marks of all ranks: the highest of each."""
        parts = [f"{max(values) / 2**30:.2f} GiB after {name}" for name, values in marks.items()]
        self.say(f"memory of a rank at most: {', '.join(parts)}")

    def finished(self, metrics: dict[str, Any]) -> None:
        """RMSE of each forecast, and its skill 1 - RMSE / RMSE of persistence."""
        title = f"Forecasts of {metrics['variable']}, {metrics['validation_samples']} validation samples"
        table = Table(title=title, title_justify="left")
        table.add_column("forecast")
        table.add_column("RMSE", justify="right")
        table.add_column("better than persistence by", justify="right")
        for name, value in metrics["rmse"].items():
            skill = "" if name == "persistence" else f"{1 - value / metrics['rmse']['persistence']:+.1%}"
            table.add_row(name, f"{value:.3f}{self.unit}", skill, style="bold" if name == "ViT" else None)
        self.console.print(table)
        self.say(
            f"{metrics['samples_per_second']:.0f} training samples/s, {metrics['seconds']:.0f} s in all; "
            f"pictures and metrics in {self.trainer.config.output}/"
        )

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _scalars(self, values: dict[str, float]) -> None:
        if self.curves is not None:
            for name, value in values.items():
                self.curves.add_scalar(name, value, self.trainer.step)


def _headline(trainer: Trainer) -> str:
    size, config = trainer.world.size, trainer.config
    axes = " ".join(f"{axis}={extent}" for axis, extent in trainer.mesh.sizes.items() if extent > 1)
    parameters = sum(math.prod(full_shape(p)) for p in trainer.vit.parameters())
    return (
        f"{config.name}: {size} rank{'s' * (size > 1)} {f'({axes}) ' if axes else ''}on {trainer.world.backend} "
        f"({trainer.device}), ViT of {parameters / 1e6:.2f} M parameters on "
        f"{' × '.join(map(str, trainer.data.grid))} points, {len(trainer.data)} training and "
        f"{len(trainer.validation)} validation samples{f', from step {trainer.step}' if trainer.step else ''}"
    )


def _curves(folder: Path, step: int) -> Any:
    """A writer of TensorBoard's, which hides what an earlier try wrote after ``step``; None without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
