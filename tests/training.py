"""Small training runs for tests."""

import threading

import commlayer
from models import config as configuration
from models.setup import build_mesh, build_model, load_data
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


def trainer_of(config, data=None):
    """As the command builds it, on this rank of run_local."""
    mesh = build_mesh(config, commlayer.world())
    for axis in ("dp", "cp", "tp", "dp-cp"):
        mesh[axis]  # collective
    data = data or load_data(config)
    streams = Streams(config.seed, mesh)
    with _building:  # models start from torch's default generator, which threads share
        vit = build_model(config, data[0], mesh, streams)
    return Trainer(config, vit, mesh, streams, *data)
