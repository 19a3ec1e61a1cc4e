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
from models import checkpoint
from models.config import Config
from models.data.loading import LOADING, Batch, Feed, Samples
from models.data.sampling import ShardedBatches
from models.mean import Mean
from models.memory import high_water
from models.optimizer import adamw, learning_rate
from models.setup import CHECKPOINTS
from models.tasks.task import Task
from parallel.amp import GradScaler
from parallel.clip import clip_grad_norm_
from parallel.data import DataParallel
from parallel.rng import Streams

COUNTS = ("step", "history", "curve")  # what a Trainer keeps of itself as it is
PARTS = ("epoch_loss", "recent_loss", "streams", "task")  # and by their state dicts, each rank its own,
ALIKE = ("model", "optimizer", "scaler")  # or alike along dp, but for experts that are spread over it


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
        self.parallel = DataParallel(
            self.model, mesh=mesh, experts=experts, bucket_mb=config.bucket_mb, sync_buffers=False
        )  # they are constant, or the same on all ranks by themselves
        if config.compile:
            _compile(task.compilable())
        self.optimizer = adamw(self.model, config.optimizer)
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
        norm = clip_grad_norm_(self.model, self.config.optimizer.clip or math.inf, mesh=self.mesh)
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

    def save(self) -> None:
        """A checkpoint of this very moment."""
        alike, own = self._kept()
        checkpoint.save(
            Path(self.config.output) / CHECKPOINTS,
            self.step,
            self.mesh,
            {"mesh": repr(self.mesh), "config": asdict(self.config)},
            shared={name: getattr(self, name).state_dict() for name in alike},
            own={
                **{name: getattr(self, name) for name in COUNTS},
                **{name: getattr(self, name).state_dict() for name in own},
            },
            keep=self.config.keep,
        )

    def resume(self, path: Path) -> None:
        """Go on from there with the same bits. ValueError where the checkpoint is of something else."""
        shared, own = checkpoint.load(path, self.mesh)
        try:
            for state, names in zip((shared, own), self._kept(), strict=True):
                for name in names:
                    getattr(self, name).load_state_dict(state[name])
            for name in COUNTS:
                setattr(self, name, own[name])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"resume: {path} does not fit: {error}") from None

    def _kept(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What has a state dict: alike along dp, or on each rank its own."""
        spread = self.experts.size("ep-etp") > 1
        return ((), PARTS + ALIKE) if spread else (ALIKE, PARTS)


def _compile(modules: Sequence[nn.Module]) -> None:
    """Each in place."""
    # They share their code, but not the rate of their DropPath: torch makes a graph for each, up to this many.
    limit = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, 8 * len(modules))
    for module in modules:
        module.compile(fullgraph=True)
