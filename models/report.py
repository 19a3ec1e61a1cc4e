"""What a run shows while it goes: progress on the terminal of rank 0, and curves for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.trainer import Trainer
from parallel.placement import full_shape


class Reporter:
    """A live bar on a terminal, else a line per validation; silent on every rank but 0.

    ``rivals``: the scores of what needs no training.
    """

    def __init__(self, trainer: Trainer, rivals: dict[str, Any]) -> None:
        self.trainer, self.rivals = trainer, rivals
        self.first = trainer.world.rank == 0
        self.console = Console(quiet=not self.first)
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
        rates = trainer.task.rates(entry[f"{trainer.task.unit}_per_second"])
        values = {
            "loss/training": entry["loss"],
            "training/learning rate": trainer.rate(trainer.step - 1),
            "training/gradient norm": entry["gradient_norm"],
            **{f"training/{name.replace('_', ' ')}": rate for name, rate in rates.items()},
        }
        if trainer.scaler.is_enabled():
            values["training/loss scale"] = trainer.scaler.get_scale()
        self._scalars(values)

    def validated(self, score: Any) -> None:
        """The last entry of the history, and the score that it comes from."""
        trainer, entry = self.trainer, self.trainer.history[-1]
        text = trainer.task.line(entry, self.rivals)
        rate = self._speed() if trainer.step else ""
        place = f"step {entry['step']}" if trainer.config.validate_steps else f"epoch {entry['epoch']}"
        if self.console.is_terminal:
            self._bar.update(self._task, description=f"{text} {rate}")
        elif trainer.step:
            self.say(f"{place}  loss {entry['loss']:.4f}  {text}  {rate}")
        else:
            self.say(f"before training: {text}")
        self._scalars({"loss/validation": entry["validation_loss"], **trainer.task.scalars(score)})
        if self.curves is not None:
            for name, counts in trainer.task.histograms().items():
                _histogram(self.curves, name, counts, trainer.step)

    def memory(self, marks: dict[str, list[int]]) -> None:
        """High-water marks of all ranks: the highest of each."""
        parts = [f"{max(values) / 2**30:.2f} GiB after {name}" for name, values in marks.items()]
        self.say(f"memory of a rank at most: {', '.join(parts)}")

    def finished(self, metrics: dict[str, Any]) -> None:
        """The scores side by side, and how long it took."""
        self.console.print(self.trainer.task.table(metrics))
        self.say(
            f"{self._speed('training ')}, {metrics['seconds']:.0f} s in all; "
            f"pictures and metrics in {self.trainer.config.output}/"
        )

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _speed(self, what: str = "") -> str:
        rates, unit = self.trainer.speed, self.trainer.task.unit
        used = f", MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
        return f"{rates[f'{unit}_per_second']:.0f} {what}{unit}/s{used}"

    def _scalars(self, values: dict[str, float]) -> None:
        if self.curves is not None:
            for name, value in values.items():
                self.curves.add_scalar(name, value, self.trainer.step)


def _headline(trainer: Trainer) -> str:
    size, config = trainer.world.size, trainer.config
    sizes = {**trainer.mesh.sizes, "ep": trainer.experts.size("ep"), "etp": trainer.experts.size("etp")}
    axes = " ".join(f"{axis}={extent}" for axis, extent in sizes.items() if extent > 1)
    parameters = sum(math.prod(full_shape(p)) for p in trainer.model.parameters())
    return (
        f"{config.name}: {size} rank{'s' * (size > 1)} {f'({axes}) ' if axes else ''}on {trainer.world.backend} "
        f"({trainer.device}), {trainer.task.name} of {parameters / 1e6:.2f} M parameters on "
        f"{trainer.task.describe()}{f', from step {trainer.step}' if trainer.step else ''}"
    )


def _curves(folder: Path, step: int) -> Any:
    """A writer of TensorBoard's, which hides what an earlier try wrote after ``step``; None without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)


def _histogram(writer: Any, name: str, counts: Sequence[int], step: int) -> None:
    """``counts[i]``: how often i came up."""
    numbers = range(len(counts))
    writer.add_histogram_raw(
        name,
        min=0,
        max=len(counts) - 1,
        num=sum(counts),
        sum=sum(i * count for i, count in zip(numbers, counts, strict=True)),
        sum_squares=sum(i * i * count for i, count in zip(numbers, counts, strict=True)),
        bucket_limits=[i + 0.5 for i in numbers],
        bucket_counts=list(counts),
        global_step=step,
    )
