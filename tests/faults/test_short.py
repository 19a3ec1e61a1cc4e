"""The short form of ``make test-faults``: some faults, and some random schedules, on every backend."""

from __future__ import annotations

import pytest

from tests.faults import measure, schedules
from tests.faults.job import BACKENDS, zygote

ON = [f"on {backend}" for backend in BACKENDS]  # pytest-mpi takes the bare id "mpi" for its marker

FAULTS = [
    "SIGKILL in all_to_all",
    "SIGKILL in all_reduce emulated by messages",
    "early return",
    "exception in one rank",
    "sleep past the timeout",
    "different root, COMMLAYER_DEBUG=1",
    "different splits, COMMLAYER_DEBUG=1",
    "NaN sent, COMMLAYER_CHECK_NAN=1",
]


@pytest.fixture(scope="module")
def here():
    with zygote() as process:
        yield process


@pytest.mark.parametrize("backend", BACKENDS, ids=ON)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_becomes_a_clear_error_on_every_rank(here, name, backend):
    row = measure.by_a_rank(here, name, backend)
    assert not row.wrong, "\n".join([*row.wrong, str(row.outcome)])


@pytest.mark.parametrize(("backend", "examples"), [("gloo", 15), ("mpi", 8)])
def test_random_schedules_of_faults_neither_hang_nor_lie(here, backend, examples):
    if backend not in BACKENDS:
        pytest.skip("no mpiexec beside this interpreter")
    schedules.play_all(here, backend, examples)
