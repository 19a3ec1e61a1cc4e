"""One world for the whole session, on whatever backend the environment chooses.

``mpiexec -n 4 python -m pytest --with-mpi tests/spmd``, or ``torchrun --nproc-per-node 4 -m pytest tests/spmd``.
"""

import commlayer
import pytest
from commlayer.launch import discover


def pytest_collection_modifyitems(items):
    launch = discover()
    if launch.launcher == "none" or launch.size == 1:
        why = "needs several processes: mpiexec -n 4 python -m pytest --with-mpi tests/spmd, or torchrun"
        for item in items:
            if "spmd" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def everyone():
    """The group of all ranks; 60 seconds are enough for any single operation."""
    return commlayer.init(timeout=60)


@pytest.fixture
def agreed(everyone):
    """Run something on every rank; if it fails on one, all raise together, and none goes on alone."""
    return lambda action, what="": agree(everyone, action, what)


def agree(world, action, what=""):
    error = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    text = "" if error is None else f"rank {world.rank}: {type(error).__name__}: {error}"
    texts = [part.decode() for part in world._comm.share(text.encode())]
    if any(texts):
        raise AssertionError("\n".join([what, *filter(None, texts)])) from error
    return result
