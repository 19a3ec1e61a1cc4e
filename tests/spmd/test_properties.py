"""Every function against NumPy, between processes, on the backend and profile of the environment.

All ranks draw the same examples, tell each other through the control channel how each one ended, and fail together.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import commlayer as c
from tests.contracts.cases import cases
from tests.contracts.checks import (
    assert_alike,
    check,
    check_halves,
    check_inference,
    check_objects,
    check_order,
    make_group,
    without_payloads,
)

EXAMPLES = int(os.environ.get("COMMLAYER_TEST_EXAMPLES", "200"))


@pytest.fixture(scope="module")
def groups(everyone):
    """Made once: groups cost connections."""
    return {name: make_group(everyone, name) for name in ("world", "reversed", "odd", "last", "split")}


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking would run on after a failure left messages behind
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    report_multiple_bugs=False,
)
@given(todo=st.lists(cases(), min_size=2, max_size=4))
def test_every_function_equals_numpy(everyone, groups, agreed, todo):
    def run():
        for case in todo:
            group = groups[case.group]
            result = check(case, group)
            if group.is_member:
                assert_alike(group._comm.share(result), str(case))

    agreed(run, str(todo))


@pytest.mark.parametrize("function", [check_halves, check_inference, check_objects, check_order])
def test_by_hand(everyone, groups, agreed, function):
    agreed(lambda: function(everyone))
    agreed(lambda: function(groups["split"]))


def test_reductions_of_nan_are_alike(everyone, agreed):
    """Different NaN payloads on every rank: a sum keeps one of them, the same on all, but for MPI's own sums."""

    def run():
        bits = torch.tensor([0x7FC00001 + everyone.rank, -(1 + everyone.rank)] * 8, dtype=torch.int32)
        for op in ("sum", "avg", "product", "min", "max"):
            result = c.all_reduce(bits.view(torch.float32), op, group=everyone)
            assert result.isnan().all()
            text = result.numpy().tobytes()
            if everyone.backend == "mpi" and op in ("sum", "avg", "product"):
                text = without_payloads(result.double())
            assert_alike(everyone._comm.share(text), op)

    agreed(run)
