"""Train a ViT to forecast gridded fields, or a language model on text, on any number of ranks::

    python -m models.train --config demo                                       # one process
    mpiexec -n 2 python -m models.train --config demo epochs=10                # or torchrun, srun, …
    mpiexec -n 2 python -m models.train --config text_demo --experts ep=2      # a mixture of experts, spread over ranks
    mpiexec -n 2 python -m models.train --config text_demo --zero 3 --save-every 50   # everything shared out over dp
    srun python -m models.train --config vit_mp --mesh "dp=-1 tp=4" --amp bf16 --compile --resume

Writes into the output folder: metrics.json, config.yaml, model.pt (the whole model, whatever the mesh), loss.png and
other pictures, sample.txt of a language model, tensorboard/ and checkpoints/.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

import commlayer
from commlayer import Group
from models import arguments as command_line
from models import config as configuration
from models import results
from models.arguments import Arguments
from models.interruption import sigterm_on
from models.memory import of_all_ranks
from models.report import Reporter
from models.setup import TASKS, build_meshes, find_checkpoint
from models.trainer import Trainer
from parallel.rng import Streams

Result = TypeVar("Result")

STOPPED = 143  # as the status of a process that SIGTERM ended


class SetupError(Exception):
    """The configuration does not fit; raised on every rank alike."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status: 0; 1 without skill where it is required; 2 for a wrong set-up; 143 after SIGTERM."""
    given = command_line.parse(arguments)
    ours = not commlayer.is_initialized()
    group = commlayer.init()
    try:
        trainer = set_up(given, group)
    except SetupError as error:
        if group.rank == 0:
            print(error, file=sys.stderr)
        status = 2
    else:
        metrics = train(trainer)
        if metrics is not None:
            results.write(trainer, metrics)
        status = _status(trainer, metrics)
    # Not in a `finally`: after an error on one rank, the layer has yet to tell the others.
    if ours:
        commlayer.finalize()
    return status


def _status(trainer: Trainer, metrics: dict[str, Any] | None) -> int:
    if metrics is None:
        return STOPPED
    if metrics["skill"] > 0 or not trainer.config.require_skill:
        return 0
    if trainer.world.rank == 0:
        print(f"error: {trainer.task.no_skill}", file=sys.stderr)
    return 1


def set_up(given: Arguments, group: Group) -> Trainer:
    """All that the command line asks for, at the point where the run begins or goes on."""
    config = _agreed(lambda: configuration.load(*given), group)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.tf32 and group.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    mesh, experts = _agreed(lambda: build_meshes(config, group), group)
    path = commlayer.broadcast_object(_agreed(lambda: find_checkpoint(config, group), group), group=group)
    kind = TASKS[config.task]
    data = _agreed(lambda: kind.load(config), group)
    streams = Streams(config.seed, mesh)
    task = _agreed(lambda: kind(config, data, mesh, experts, streams), group)
    trainer = _agreed(lambda: Trainer(config, task, mesh, experts, streams), group)
    if path is not None:
        _agreed(lambda: trainer.resume(path), group)
    return trainer


def _agreed(action: Callable[[], Result], group: Group) -> Result:
    """What ``action`` returns. If it refuses something on one rank (a file is missing on one node), all stop."""
    problem = None
    try:
        result = action()
    except (ValueError, OSError, ImportError) as error:
        problem = f"error: {error}"
    problems = [text for text in commlayer.all_gather_object(problem, group=group) if text]
    if problems:
        raise SetupError("\n".join(dict.fromkeys(problems)))
    return result


def train(trainer: Trainer) -> dict[str, Any] | None:
    """Train to the end; returns what goes into metrics.json, the same on every rank.

    None, if SIGTERM came before the end: then there is a checkpoint to go on from.
    """
    config, task, started, first = trainer.config, trainer.task, time.perf_counter(), trainer.step + 1
    pace, period = f"{task.unit}_per_second", config.validate_steps or trainer.feed.steps
    rivals = task.begin(trainer.validation_feed)
    with Reporter(trainer, rivals) as report, sigterm_on(trainer.world) as sigterm:
        score = None if trainer.history else _validate(trainer, report)
        steps = trainer.feed.steps_from(trainer.step)
        samples, seconds = 0, 0.0  # since the last entry of the curve
        while trainer.step < trainer.steps:
            tick = time.perf_counter()
            size, micro_batches = next(steps)
            norm = trainer.train_step(micro_batches, size)
            last = trainer.step == trainer.steps
            ends = last or trainer.step % period == 0
            logs = ends or trainer.step % config.log_every == 0
            loss = trainer.recent_loss.take() if logs else 0.0  # waits for a GPU, so that the time is right
            samples, seconds = samples + size, seconds + time.perf_counter() - tick
            report.step()
            if trainer.step == first:
                report.memory(of_all_ranks(trainer.memory, trainer.world))
            if logs:
                entry = {"loss": loss, "gradient_norm": norm.item(), pace: samples * task.per_sample / seconds}
                trainer.curve.append({"step": trainer.step, **entry})
                samples, seconds = 0, 0.0
                report.logged()
            if ends:
                loss = trainer.epoch_loss.take()
                if last or trainer.step // period % config.validate_every == 0:
                    score = _validate(trainer, report, loss=loss)
            stop = logs and not last and sigterm()
            if stop or (config.save_every and (last or trainer.step % config.save_every == 0)):
                trainer.save(wait=stop or last)
            if stop:
                report.say(f"SIGTERM: saved step {trainer.step} of {trainer.steps}; --resume goes on from there")
                return None
        score = score or task.score(trainer.validation_feed)  # resumed at its very end
        metrics = results.metrics(trainer, {task.name: score} | rivals, time.perf_counter() - started)
        report.finished(metrics)
    return metrics


def _validate(trainer: Trainer, report: Reporter, **entry: Any) -> Any:
    """The score of the model, of which the history gets an entry; ``entry``: what else to put there."""
    score = trainer.task.score(trainer.validation_feed)
    entry |= trainer.task.entry(score)
    trainer.history.append({"epoch": trainer.epoch, "step": trainer.step, **entry})
    report.validated(score)
    return score


if __name__ == "__main__":
    sys.exit(main())
