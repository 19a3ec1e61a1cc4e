"""What is trained, and how a step goes; all that changes meanwhile, which is what a checkpoint holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import commlayer
from commlayer import Mesh
from models import checkpoint
from models.config import Config
from models.data.fields import FieldPairs
from models.data.loading import Batch, Feed
from models.data.sampling import ShardedBatches
from models.memory import high_water
from models.metrics import Forecast, Mean, Score, cell_weights, scores
from models.optimizer import adamw, learning_rate
from models.setup import CHECKPOINTS, LOADING
from models.vit import ViT
from parallel.amp import GradScaler, autocast
from parallel.clip import clip_grad_norm_
from parallel.data import DataParallel
from parallel.rng import Streams

COUNTS = ("step", "history", "curve")  # what a Trainer keeps of itself as it is
PARTS = ("epoch_loss", "recent_loss", "streams")  # and by their state dicts, each rank its own,
ALIKE = ("vit", "optimizer", "scaler")  # or alike along dp


class Trainer:
    """One run of one model on one mesh; made and used on all ranks alike.

    Args:
        vit: this rank's part of the model.
        streams: the random numbers that it draws from.
        data, validation: the same on all ranks. Each takes its share by its coordinate on dp, so that ranks which
            share a model see the same samples.
    """

    def __init__(
        self, config: Config, vit: ViT, mesh: Mesh, streams: Streams, data: FieldPairs, validation: FieldPairs
    ) -> None:
        self.config, self.mesh, self.streams = config, mesh, streams
        self.data, self.validation = data, validation
        self.world, self.dp = commlayer.world(), mesh["dp"]
        self.device = self.world.device
        self.vit = vit.to(self.device)
        self.model = DataParallel(
            self.vit, mesh=mesh, bucket_mb=config.bucket_mb, sync_buffers=False
        )  # it has constant ones alone
        if config.compile:
            _compile(self.vit)
        self.optimizer = adamw(self.vit, config.optimizer)
        self.scaler = GradScaler(mesh, self.device.type, enabled=config.amp == "fp16")
        self.feed = self._feed(data, config.batch, accumulate=config.accumulate, seed=config.seed)
        # Not more samples at once than in training.
        self.validation_feed = self._feed(validation, -(-config.batch // config.accumulate), shuffle=False)
        self.steps = config.steps or config.epochs * self.feed.steps
        self.rate = learning_rate(config.optimizer, self.steps, config.batch)
        self.weights = cell_weights(data.latitudes, config.latitude_weighted).to(self.device)
        self.shown = data.channels.index(config.variable or data.channels[0])  # the channel of headlines
        self.memory: dict[str, int] = {}
        self._mark_memory("scaffold")

        self.step = 0
        self.epoch_loss, self.recent_loss = Mean(self.dp), Mean(self.dp)
        self.history: list[dict[str, float]] = []  # an entry per validation
        self.curve: list[dict[str, float]] = []  # one per logged step

    @property
    def epoch(self) -> int:
        """The one that the last step belongs to, counted from 1; 0 before the first step."""
        return -(-self.step // self.feed.steps)

    @property
    def samples_per_second(self) -> float:
        """The median over the curve, so that neither compilation nor a hiccup counts."""
        return statistics.median(entry["samples_per_second"] for entry in self.curve)

    def _feed(self, data: FieldPairs, batch: int, **settings: Any) -> Feed:
        shares = ShardedBatches(len(data), batch, rank=self.dp.rank, size=self.dp.size, **settings)
        return Feed(data, shares, self.device, **{key: self.config.data.get(key, LOADING[key]) for key in LOADING})

    def train_step(self, micro_batches: Iterable[Batch], size: int) -> Tensor:
        """One step on a global batch of ``size`` samples; returns the norm of the gradient."""
        self.vit.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for i, (x, y) in enumerate(micro_batches, start=1):
            with nullcontext() if i == self.config.accumulate else self.model.no_sync():
                with autocast(self.config.amp, self.device.type):
                    forecast = self.model(x)
                self._mark_memory("forward")
                loss = ((forecast.float() - y).square() * self.weights).mean((1, 2, 3)).sum()
                # DataParallel takes the mean over dp, so the sum · dp / global size makes it the mean over samples,
                # also where ranks and micro-batches have unequal shares, or none.
                self.scaler.scale(loss * (self.dp.size / size)).backward()
                total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.vit, self.config.optimizer.clip or math.inf, mesh=self.mesh)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._mark_memory("step")
        for mean in (self.epoch_loss, self.recent_loss):
            mean.add(total, size)
        self.step += 1
        return norm

    def _mark_memory(self, name: str) -> None:
        """The high-water mark at the first time. (That of a process may fall by some pages: Linux counts roughly.)"""
        if name not in self.memory:
            self.memory[name] = max(high_water(self.device), *self.memory.values(), 0)

    def forecast(self, x: Tensor) -> Tensor:
        """What the model makes of ``x``, without a gradient; collective along cp and tp."""
        self.vit.eval()
        with torch.no_grad(), autocast(self.config.amp, self.device.type):
            return self.vit(x).float()

    def scores(self, forecasts: dict[str, Forecast]) -> dict[str, Score]:
        """How good forecasts are on the validation samples."""
        return scores(forecasts, self.validation_feed, self.validation, self.weights, self.dp)

    def save(self) -> None:
        """A checkpoint of this very moment."""
        checkpoint.save(
            Path(self.config.output) / CHECKPOINTS,
            self.step,
            self.mesh,
            {"mesh": repr(self.mesh), "config": asdict(self.config)},
            shared={name: getattr(self, name).state_dict() for name in ALIKE},
            own={
                **{name: getattr(self, name) for name in COUNTS},
                **{name: getattr(self, name).state_dict() for name in PARTS},
            },
            keep=self.config.keep,
        )

    def resume(self, path: Path) -> None:
        """Go on from there with the same bits. ValueError where the checkpoint is of something else."""
        shared, own = checkpoint.load(path, self.mesh)
        try:
            for state, names in ((shared, ALIKE), (own, PARTS)):
                for name in names:
                    getattr(self, name).load_state_dict(state[name])
            for name in COUNTS:
                setattr(self, name, own[name])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"resume: {path} does not fit: {error}") from None


def _compile(vit: ViT) -> None:
    """Each block in place: they stay what ``recompute`` repeats, and gradients are reduced while backward goes on."""
    # Blocks share their code, but not the rate of their DropPath: torch makes a graph for each, up to this many.
    limit = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, 8 * len(vit.blocks))
    for block in vit.blocks:
        block.compile(fullgraph=True)
