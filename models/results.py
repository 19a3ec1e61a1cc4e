"""What a run leaves behind: its metrics, configuration and whole model, and what its task has to show."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import commlayer
from models import config as configuration
from models.memory import of_all_ranks
from models.trainer import Trainer
from parallel.checkpoint import full_state_dict
from parallel.placement import full_shape


def metrics(trainer: Trainer, scores: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What metrics.json gets, the same on every rank; ``seconds``: of the whole run. Collective."""
    marks = of_all_ranks(trainer.memory, trainer.world)
    return {
        "config": trainer.config.name,
        "ranks": trainer.world.size,
        "mesh": repr(trainer.mesh),
        "backend": trainer.world.backend,
        **trainer.task.metrics(scores),
        "training_samples": len(trainer.task.data),
        "validation_samples": len(trainer.task.validation),
        "parameters": sum(math.prod(full_shape(p)) for p in trainer.model.parameters()),
        "memory_bytes": {name: {"max": max(values), "ranks": values} for name, values in marks.items()},
        **trainer.speed,
        "seconds": seconds,
        "history": trainer.history,
        "curve": trainer.curve,
    }


@torch.no_grad()
def write(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """The output folder, by rank 0; all ranks take part, since it needs the whole model, and what it says."""
    whole = full_state_dict(trainer.parallel)  # on rank 0: the others have no room for it, and no use
    folder = None
    if trainer.world.rank == 0:
        folder = Path(trainer.config.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(configuration.dump(trainer.config))
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        torch.save(whole, folder / "model.pt")
    # Single samples: where blocks are compiled, a graph for these alone is not worth its making.
    with torch.compiler.set_stance("force_eager") if trainer.config.compile else nullcontext():
        trainer.task.write(folder, metrics)
    commlayer.barrier(group=trainer.world)  # nobody leaves, and ends the job, while rank 0 writes
