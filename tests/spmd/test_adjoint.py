"""Gradients between processes, on the backend and profile of the environment."""

import pytest

from commlayer import run_local, world
from tests.contracts import adjoint

NAMES = list(run_local(lambda: list(adjoint.operations(world())), ranks=1)[0])


@pytest.mark.parametrize("name", NAMES)
def test_adjoint(everyone, agreed, name):
    agreed(lambda: adjoint.check_adjoint(name, everyone))


@pytest.mark.parametrize("name", ["all_reduce avg", "reduce sum", "gather uneven", "all_to_all splits", "broadcast"])
def test_second_derivative(everyone, agreed, name):
    agreed(lambda: adjoint.check_second_derivative(name, everyone))


@pytest.mark.parametrize(
    "check", [adjoint.check_complex_adjoint, adjoint.check_asynchronous, adjoint.check_no_gradient]
)
def test_gradients(everyone, agreed, check):
    agreed(lambda: check(everyone))
