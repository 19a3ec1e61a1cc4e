"""Train a ViT to forecast gridded fields, on any number of ranks::

    python -m models.train --config demo                              # one process
    mpiexec -n 2 python -m models.train --config demo epochs=10       # or torchrun, srun, …

Writes into the output folder: loss.png, forecast.png, metrics.json, config.yaml, model.pt.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import commlayer
from commlayer import Group
from models import config as configuration
from models.config import Config
from models.data.era5 import era5_pairs
from models.data.fields import FieldPairs, netcdf_pairs
from models.data.sampling import ShardedBatches
from models.metrics import cell_weights, rivals, rmse
from models.optimizer import adamw, cosine
from models.report import Reporter, save
from models.vit import SIZES, ViT, ViTConfig
from parallel.data import DataParallel

SOURCES: dict[str, Callable[..., tuple[FieldPairs, FieldPairs]]] = {
    "netcdf": netcdf_pairs,
    "era5": era5_pairs,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Its exit status: 0, 1 without skill where it is required, 2 for a wrong set-up."""
    parser = argparse.ArgumentParser(
        prog="python -m models.train",
        description="Train a ViT to forecast gridded fields, on any number of ranks.",
    )
    parser.add_argument("--config", default="demo", help="a YAML file, or the name of a shipped configuration")
    parser.add_argument("--output", help="folder for the results")
    parser.add_argument("--require-skill", action="store_true", help="exit status 1 unless it beats persistence")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. epochs=5 optimizer.lr=1e-3")
    options = parser.parse_args(arguments)
    ours = not commlayer.is_initialized()
    group = commlayer.init()
    status = _run(options, group)
    # Not in a `finally`: after an error on one rank, the layer has yet to tell the others.
    if ours:
        commlayer.finalize()
    return status


def _run(options: argparse.Namespace, group: Group) -> int:
    problem = None
    try:
        config = configuration.load(options.config, options.overrides)
        config.output = options.output or config.output
        config.require_skill = config.require_skill or options.require_skill
        data = load_data(config)
        vit = build_model(config, data[0])
    except (ValueError, OSError, ImportError) as error:
        problem = str(error)
    # Agreed on, so that a file missing on one node stops all ranks, with one message.
    problems = [text for text in commlayer.all_gather_object(problem, group=group) if text]
    if problems:
        if group.rank == 0:
            print("\n".join(f"error: {text}" for text in dict.fromkeys(problems)), file=sys.stderr)
        return 2
    metrics = train(config, vit, *data, group)
    if metrics["skill"] > 0 or not config.require_skill:
        return 0
    if group.rank == 0:
        print("error: the forecast does not beat persistence", file=sys.stderr)
    return 1


def load_data(config: Config) -> tuple[FieldPairs, FieldPairs]:
    """The training and the validation pairs that ``config.data`` describes."""
    settings = dict(config.data)
    source = settings.pop("source", None)
    if source not in SOURCES:
        raise ValueError(f"data.source: expected one of {', '.join(SOURCES)}, got {source!r}")
    parameters = inspect.signature(SOURCES[source]).parameters.values()
    known = {p.name: None if p.default is p.empty else p.default for p in parameters}
    settings = configuration.section(settings, known | {"workers": 0}, "data.")
    settings.pop("workers", None)
    for p in parameters:
        if p.default is p.empty and p.name not in settings:
            raise ValueError(f"data.{p.name}: missing; source {source} needs it")
    train, validation = SOURCES[source](**settings)
    if config.variable and config.variable not in train.channels:
        raise ValueError(f"variable: expected one of {', '.join(train.channels)}, got {config.variable!r}")
    return train, validation


def build_model(config: Config, data: FieldPairs) -> ViT:
    """The ViT that ``config.model`` describes, for these data; the same on every rank."""
    shape = {"grid": data.grid, "in_channels": data.in_channels, "out_channels": len(data.channels)}
    known = {field.name: field.default for field in dataclasses.fields(ViTConfig) if field.name not in shape}
    settings = configuration.section(config.model, known | {"size": "", "patch": None}, "model.")
    size = settings.pop("size", "demo")
    if size not in SIZES:
        raise ValueError(f"model.size: expected one of {', '.join(SIZES)}, got {size!r}")
    torch.manual_seed(config.seed)
    return ViT(ViTConfig.named(size, **settings, **shape))


def train(config: Config, vit: ViT, train_data: FieldPairs, validation: FieldPairs, group: Group) -> dict[str, Any]:
    """Run the whole training; returns what is written to metrics.json, the same on every rank."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device, started = group.device, time.perf_counter()
    shown = train_data.channels.index(config.variable or train_data.channels[0])
    model = DataParallel(vit.to(device), group, bucket_mb=config.bucket_mb)
    torch.manual_seed(config.seed + 1 + group.rank)  # dropout differs between ranks
    batches, loader = _loader(config, train_data, group, shuffle=True)
    _, validation_loader = _loader(config, validation, group, shuffle=False)
    steps = config.steps or config.epochs * len(batches)
    optimizer = adamw(model, config.optimizer)
    schedule = cosine(optimizer, config.optimizer, steps)
    weights = cell_weights(train_data.latitudes, config.latitude_weighted).to(device)

    def validate() -> dict[str, list[float]]:
        model.eval()
        return rmse({"ViT": model.module}, validation_loader, validation, weights, group)

    others = rmse(rivals(validation, device), validation_loader, validation, weights, group)
    persistence = others["persistence"][shown]
    scores = validate() | others
    history: list[dict[str, float]] = [{"epoch": 0, "step": 0, "rmse": scores["ViT"][shown]}]
    step, samples, seconds = 0, 0, 0.0
    with Reporter(group.rank, steps, train_data.units[shown]) as report:
        report.say(
            f"{config.name}: {group.size} rank{'s' * (group.size > 1)} on {group.backend} ({device}), "
            f"ViT of {sum(p.numel() for p in vit.parameters()) / 1e6:.2f} M parameters on "
            f"{' × '.join(map(str, train_data.grid))} points, {len(train_data)} training and "
            f"{len(validation)} validation samples"
        )
        report.validated(history[0], persistence, 0)
        while step < steps:
            epoch = step // len(batches) + 1
            batches.set_epoch(epoch)
            model.train()
            tick, seen, total = time.perf_counter(), 0, torch.zeros((), device=device)
            for (x, y), size in zip(loader, batches.global_sizes(), strict=True):
                total += size * _step(config, model, x.to(device), y.to(device), weights, size, optimizer)
                schedule.step()
                report.step()
                seen += size
                step += 1
                if step == steps:
                    break
            # The mean over ranks of what they minimised is the mean over samples: see _step.
            loss = (commlayer.all_reduce(total, commlayer.AVG, group=group) / seen).item()
            seconds += time.perf_counter() - tick
            samples += seen
            if epoch % config.validate_every == 0 or step == steps:
                scores = validate() | others
                history.append({"epoch": epoch, "step": step, "loss": loss, "rmse": scores["ViT"][shown]})
                report.validated(history[-1], persistence, samples / seconds)

    headline = {name: values[shown] for name, values in scores.items()}
    metrics = {
        "config": config.name,
        "ranks": group.size,
        "backend": group.backend,
        "variable": train_data.channels[shown],
        "unit": train_data.units[shown],
        "rmse": headline,
        "skill": 1 - headline["ViT"] / headline["persistence"],
        "rmse_by_channel": {n: dict(zip(validation.channels, v, strict=True)) for n, v in scores.items()},
        "training_samples": len(train_data),
        "validation_samples": len(validation),
        "parameters": sum(p.numel() for p in vit.parameters()),
        "samples_per_second": samples / seconds,
        "seconds": time.perf_counter() - started,
        "history": history,
    }
    if group.rank == 0:
        report.table(f"Forecasts of {metrics['variable']}, {len(validation)} validation samples", headline)
        save(config, vit, validation, metrics, weights, shown, device)
        report.say(
            f"{metrics['samples_per_second']:.0f} training samples/s, {metrics['seconds']:.0f} s in all; "
            f"pictures and metrics in {config.output}/"
        )
    commlayer.barrier(group=group)  # nobody leaves, and ends the job, while rank 0 writes
    return metrics


def _step(
    config: Config,
    model: DataParallel,
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    size: int,
    optimizer: torch.optim.Optimizer,
) -> Tensor:
    """One optimiser step on this rank's share of a global batch of ``size`` samples; returns its loss."""
    # DataParallel takes the mean over ranks, so sum · ranks / global size makes it the mean over samples,
    # also where ranks have unequal shares, or none.
    loss = ((model(x) - y).square() * weights).mean((1, 2, 3)).sum() * (model.group.size / size)
    optimizer.zero_grad()
    loss.backward()
    if config.optimizer.clip:  # gradients are alike on all ranks by now, and so is their norm
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
    optimizer.step()
    return loss.detach()


def _loader(config: Config, data: FieldPairs, group: Group, *, shuffle: bool) -> tuple[ShardedBatches, DataLoader[Any]]:
    batches = ShardedBatches(
        len(data), config.batch, rank=group.rank, size=group.size, shuffle=shuffle, seed=config.seed
    )
    workers = config.data.get("workers", 0)
    loader = DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=data.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=group.device.type == "cuda",
    )
    return batches, loader


if __name__ == "__main__":
    sys.exit(main())
