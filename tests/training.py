"""Small training runs for tests."""

import tempfile
import threading

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import commlayer
from models import config as configuration
from models.setup import TASKS, build_meshes, find_checkpoint
from models.train import train
from models.trainer import Trainer
from parallel.rng import Streams

_building = threading.Lock()


SMALL = ["epochs=1", "batch=60", "model.size=tiny", "model.drop_path=0"]
MADE_UP = [
    "model.size=tiny",
    "data={source: synthetic, samples: 14, validation_samples: 5, channels: 2, grid: [10, 18]}",
]


def real(folder, *overrides):
    """A run of a second on real temperatures; nothing in it is random but the start and the order of samples."""
    return configuration.load("demo", [f"output={folder}", *SMALL, *overrides])


def made_up(folder, *overrides):
    """A shorter one, on 14 samples of two channels on 10 × 18 points, which is 2 × 3 patches."""
    return configuration.load("vit_synthetic", [f"output={folder}", *MADE_UP, *overrides])


TINY = ["model.size=tiny", "data.seq_len=16", "data.validation=0.5", "data.max_bytes=300_000"]


def small_text(folder):
    """20 documents, made here unless they are there; not in several threads."""
    text = folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        for i in range(20):
            (text / f"{i}.txt").write_text(f"def add_{i}(x):\n    return x + {i}\n" * (3 + i % 5))
    return text


def language(folder, *overrides):
    """A decoder with experts in one of two layers, on a small text."""
    text = small_text(folder)
    given = [f"output={folder}", f"data.root={text}", "steps=3", "batch=5", "log_every=1", "validate_steps=2"]
    return configuration.load("text_demo", [*given, *TINY, *overrides])


def trainer_of(config, data=None):
    """As the command builds it, on this rank of run_local."""
    mesh, experts = build_meshes(config, commlayer.world())
    for axis in ("dp", "cp", "tp", "dp-cp"):
        mesh[axis]  # collective
    for axis in ("ep", "etp-ep-edp"):
        experts[axis]
    kind = TASKS[config.task]
    data = data or kind.load(config)
    streams = Streams(config.seed, mesh)
    with _building:  # models start from torch's default generator, which threads share
        task = kind(config, data, mesh, experts, streams)
    return Trainer(config, task, mesh, experts, streams)


def state_of(folder, step, rank):
    """All that a checkpoint of a run has for a rank, the tensors whole."""
    path = folder / f"checkpoints/step-{step:08}"
    with tempfile.TemporaryDirectory() as there:
        dcp_to_torch_save(path, f"{there}/all.pt")
        whole = torch.load(f"{there}/all.pt", weights_only=True)
    return {**whole, "shared": torch.load(path / "shared.pt"), "own": torch.load(path / f"own-{rank:05}.pt")}


def same(a, b):
    """Of any tree of tensors and numbers, without what depends on the clock, or on other threads."""
    if isinstance(a, dict):
        keys = a.keys() - {"samples_per_second", "tokens_per_second", "default"}
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def run(config):
    """As the command does, on a rank of run_local."""
    trainer = trainer_of(config)
    if (path := find_checkpoint(config, trainer.world)) is not None:
        trainer.resume(path)
    return train(trainer)
