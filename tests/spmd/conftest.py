"""One world for the whole session, on whatever backend the environment chooses.

``mpiexec -n 4 python -m pytest --with-mpi tests/spmd``, or ``torchrun --nproc-per-node 4 -m pytest tests/spmd``.
"""

import os
import tempfile
from pathlib import Path

import pytest

import commlayer
from commlayer.launch import discover

# Which emulations the parallel modules are run with: what they ask of the layer is in the other files, with all.
ON_PARALLEL = ("xccl-2.7", "only-send-recv")
PARALLEL = (
    *("test_attention", "test_moe", "test_reloading", "test_rng_clip_amp", "test_tensor", "test_torch_backend"),
    *("test_train", "test_vit", "test_zero"),
)


def pytest_collection_modifyitems(items):
    launch = discover()
    backend, profile = os.environ.get("COMMLAYER_BACKEND"), os.environ.get("COMMLAYER_PROFILE")
    if profile and (backend == "mpi" or profile not in ON_PARALLEL):
        skip(items, PARALLEL, f"run with {' and '.join(ON_PARALLEL)} on gloo, and natively on every backend")
    if launch.launcher == "torchrun" and backend == "gloo":
        skip(items, PARALLEL, "run on gloo under mpiexec, and another launcher changes only the launch")
    if launch.launcher == "none" or launch.size == 1:
        skip(items, None, "need several processes: mpiexec -n 4 python -m pytest --with-mpi tests/spmd, or torchrun")


def skip(items, names, why):
    """The tests in these files; None: in all."""
    for item in items:
        if "spmd" in item.path.parts and (names is None or item.path.stem in names):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def everyone():
    """The group of all ranks; 20 seconds are enough for any single operation here."""
    return commlayer.init(timeout=20)


@pytest.fixture(scope="session")
def control(everyone):
    """Another group, to agree on failures: a rank that failed at once waits here for those that time out."""
    group = everyone.new_group(list(range(everyone.size)))
    group._comm.timeout *= 4
    if hasattr(group._comm, "_timedelta"):
        group._comm._timedelta *= 4
    return group


@pytest.fixture
def shared_folder(everyone):
    """One temporary folder for all ranks; pytest's own, made by many at once, would race when old ones are removed."""
    own = tempfile.TemporaryDirectory() if everyone.rank == 0 else None
    yield Path(commlayer.broadcast_object(own.name if own else None, group=everyone))
    commlayer.barrier(group=everyone)
    if own:
        own.cleanup()


@pytest.fixture
def agreed(control):
    """Run something on every rank; if it fails on one, all raise together, and none goes on alone."""

    def agree(action, what=""):
        error = None
        try:
            result = action()
        except Exception as raised:
            error = raised
        text = "" if error is None else f"rank {control.rank}: {type(error).__name__}: {error}"
        texts = [part.decode() for part in control._comm.share(text.encode())]
        if any(texts):
            raise AssertionError("\n".join([what, *filter(None, texts)])) from error
        return result

    return agree
