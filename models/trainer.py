"""What is trained, and how a step goes; all that changes meanwhile, which is what a checkpoint holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import commlayer
from commlayer import Mesh
from models.config import Config
from models.data.loading import LOADING, Batch, Feed, Samples
from models.data.sampling import ShardedBatches
from models.mean import Mean
from models.memory import high_water
from models.optimizer import adamw, learning_rate
from models.setup import CHECKPOINTS
from models.tasks.task import Task
from parallel import checkpoint
from parallel.amp import DTYPES, GradScaler
from parallel.checkpoint import Saving
from parallel.clip import clip_grad_norm_
from parallel.data import DataParallel
from parallel.rng import Streams
from parallel.zero import ZeRO

# What a checkpoint has beside the model and the optimiser: as it is, by state dicts, and what ranks have different.
COUNTS = ("step", "history", "curve")
STATES = ("scaler", "task")
MEANS = ("epoch_loss", "recent_loss")


class Trainer:
    """One run of one task on one mesh; made and used on all ranks alike.

    Each rank takes its share of the samples by its coordinate on dp, so that ranks which share a model see the same.

    Args:
        task: with this rank's part of the model.
        experts: the mesh folded for experts.
        streams: the random numbers that the model draws from.
    """

    def __init__(self, config: Config, task: Task, mesh: Mesh, experts: Mesh, streams: Streams) -> None:
        self.config, self.task, self.mesh, self.experts, self.streams = config, task, mesh, experts, streams
        self.world, self.dp = commlayer.world(), mesh["dp"]
        self.device = self.world.device
        self.model = task.model
        # In this order: compiled blocks had no gradients where the optimizer was made after them, and
        # ZeRO puts its hooks around what is compiled.
        self.optimizer = adamw(self.model, config.optimizer)
        if config.compile:
            _compile(task.compilable())
        self.parallel = self._wrapped()
        self._saving: Saving | None = None
        self.scaler = GradScaler(mesh, self.device.type, enabled=config.amp == "fp16")
        self.feed = self._feed(task.data, config.batch, accumulate=config.accumulate, seed=config.seed)
        # Not more samples at once than in training.
        self.validation_feed = self._feed(task.validation, -(-config.batch // config.accumulate), shuffle=False)
        self.steps = config.steps or config.epochs * self.feed.steps
        self.rate = learning_rate(config.optimizer, self.steps, config.batch)
        self.memory: dict[str, int] = {}
        self._mark_memory("scaffold")

        self.step = 0
        self.epoch_loss, self.recent_loss = Mean(task.group), Mean(task.group)
        self.history: list[dict[str, Any]] = []  # an entry per validation
        self.curve: list[dict[str, float]] = []  # one per logged step

    @property
    def epoch(self) -> int:
        """The one that the last step belongs to, counted from 1; 0 before the first step."""
        return -(-self.step // self.feed.steps)

    @property
    def speed(self) -> dict[str, float]:
        """Of the median over the curve, so that neither compilation nor a hiccup counts."""
        return self.task.rates(statistics.median(entry[f"{self.task.unit}_per_second"] for entry in self.curve))

    def _wrapped(self) -> DataParallel | ZeRO:
        config = self.config
        # Buffers are constant, or the same on all ranks by themselves.
        options: dict[str, Any] = {"mesh": self.mesh, "experts": self.experts, "sync_buffers": False}
        options["bucket_mb"] = config.bucket_mb
        if not config.zero:
            return DataParallel(self.model, **options)
        return ZeRO(
            self.model,
            self.optimizer,
            stage=config.zero,
            replicas=config.replicas,
            dtype=DTYPES[config.amp],
            offload=config.offload,
            folder=Path(config.output) / "offload" if config.offload == "disk" else None,
            **options,
        )

    def _feed(self, data: Samples, batch: int, **settings: Any) -> Feed:
        shares = ShardedBatches(len(data), batch, rank=self.dp.rank, size=self.dp.size, **settings)
        return Feed(data, shares, self.device, **{key: self.config.data.get(key, LOADING[key]) for key in LOADING})

    def train_step(self, micro_batches: Iterable[Batch], size: int) -> Tensor:
        """One step on a global batch of ``size`` samples; returns the norm of the gradient."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        count = size * self.task.per_sample
        sizes = self.feed.shares.micro_sizes(size)
        for i, (batch, samples) in enumerate(zip(micro_batches, sizes, strict=True), start=1):
            with nullcontext() if i == self.config.accumulate else self.parallel.no_sync():
                loss = self.task.loss(self.parallel, batch)
                self._mark_memory("forward")
                # DataParallel takes the mean over dp, so the sum · dp / global count makes it the mean over all that is
                # counted, also where ranks and micro-batches have unequal shares, or none.
                mean = loss.total * (self.dp.size / count)
                if loss.part is not None:
                    mean = mean + loss.part * (self.dp.size * samples / size)
                self.scaler.scale(mean).backward()
                total += loss.total.detach()
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.parallel, self.config.optimizer.clip or math.inf, mesh=self.mesh)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.task.stepped()
        self._mark_memory("step")
        for mean_loss in (self.epoch_loss, self.recent_loss):
            mean_loss.add(total, count)
        self.step += 1
        return norm

    def _mark_memory(self, name: str) -> None:
        """The high-water mark at the first time. (That of a process may fall by some pages: Linux counts roughly.)"""
        if name not in self.memory:
            self.memory[name] = max(high_water(self.device), *self.memory.values(), 0)

    def save(self, *, wait: bool = True) -> None:
        """A checkpoint of this very moment; without ``wait`` it is written while training goes on, if memory allows."""
        self.saved()
        self._saving = checkpoint.save(
            Path(self.config.output) / CHECKPOINTS,
            self.step,
            self.parallel,
            self.optimizer,
            shared={
                **{name: getattr(self, name) for name in COUNTS},
                **{name: getattr(self, name).state_dict() for name in STATES},
                **{name: getattr(self, name).whole() for name in MEANS},
                "streams": self.streams.state_dict(),
            },
            own={
                **{name: getattr(self, name).state_dict() for name in MEANS},
                "streams": self.streams.state_dict(),
            },
            keep=self.config.keep,
            background=not wait and self.config.offload != "disk",  # it begins with a copy of everything
            about={"mesh": self._place(), "config": asdict(self.config)},
        )

    def saved(self) -> None:
        """Wait for the last checkpoint; OSError on all ranks where it could not be written."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.wait()

    def resume(self, path: Path) -> None:
        """Go on from there: on the same mesh with the same bits. ValueError where it is of something else.

        ``path``: of a checkpoint that was verified.
        """
        loaded = checkpoint.load(path, self.parallel, self.optimizer, verify=False)
        shared, own = loaded.shared, loaded.own if loaded.about["mesh"] == self._place() else None
        try:
            for name in COUNTS:
                setattr(self, name, shared[name])
            for name in STATES:
                getattr(self, name).load_state_dict(shared[name])
            for name in MEANS:
                mean = getattr(self, name)
                mean.load_whole(shared[name]) if own is None else mean.load_state_dict(own[name])
            self.streams.load_state_dict((own or shared)["streams"], moved=own is None)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"resume: {path} does not fit: {error}") from None

    def _place(self) -> str:
        """What decides which rank draws which random numbers, and has which samples."""
        return f"{self.mesh!r} {self.experts!r}"


def _compile(modules: Sequence[nn.Module]) -> None:
    """Each in place."""
    # They share their code, but not the rate of their DropPath: torch makes a graph for each, up to this many.
    limit = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, 8 * len(modules))
    for module in modules:
        module.compile(fullgraph=True)
