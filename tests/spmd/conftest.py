"""One world for the whole session, on whatever backend the environment chooses.

``mpiexec -n 4 python -m pytest --with-mpi tests/spmd``, or ``torchrun --nproc-per-node 4 -m pytest tests/spmd``.
"""

import pytest

import commlayer
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
