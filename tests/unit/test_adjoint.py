"""Gradients on thread ranks, natively and emulated."""

import pytest

from commlayer import run_local, world
from tests.contracts import adjoint

PROFILES = [None, "only-all-reduce", "only-send-recv", "xccl-2.7"]
NAMES = list(run_local(lambda: list(adjoint.operations(world())), ranks=1)[0])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", NAMES)
def test_adjoint(name, profile):
    for ranks in (1, 3, 4):
        run_local(lambda: adjoint.check_adjoint(name, world()), ranks, profile=profile, timeout=20)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivative(name):
    run_local(lambda: adjoint.check_second_derivative(name, world()), 3, timeout=20)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    "check", [adjoint.check_complex_adjoint, adjoint.check_asynchronous, adjoint.check_no_gradient]
)
def test_gradients(check, profile):
    run_local(lambda: check(world()), 3, profile=profile, timeout=20)
