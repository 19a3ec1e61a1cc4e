"""Every function against NumPy, and every adjoint, with tensors on the GPU."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import commlayer as c
from commlayer.capability import REDUCING
from tests.contracts import adjoint
from tests.contracts.cases import FUNCTIONS, cases
from tests.contracts.checks import (
    assert_alike,
    check,
    check_halves,
    check_inference,
    check_objects,
    check_order,
    make_group,
)
from tests.contracts.oracle import DTYPES, reductions
from tests.gpu.collectives import check_messages, check_refusals, check_sizes, every_reduction, without_tags

ADJOINTS = list(c.run_local(lambda: list(adjoint.operations(c.world())), ranks=1)[0])


@pytest.fixture(scope="module")
def groups(everyone):
    return {name: make_group(everyone, name) for name in ("world", "reversed", "odd", "last", "split")}


def run(case, group):
    result = check(case, group)
    if group.is_member:
        assert_alike(group._comm.share(result), str(case))


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, d) for op in FUNCTIONS if op != "messages" for d in DTYPES if op not in REDUCING or reductions(d)],
)
def test_every_op_and_dtype(everyone, agreed, op, dtype):
    def all_of_it():
        with torch.device(everyone.device):
            for case in every_reduction(op, dtype):
                run(case, everyone)

    agreed(all_of_it)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking would run on after a failure left messages behind
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    report_multiple_bugs=False,
)
@given(todo=st.lists(cases().filter(lambda case: case.op != "messages").map(without_tags), min_size=2, max_size=4))
def test_layouts_splits_and_groups(everyone, groups, agreed, todo):
    def all_of_them():
        with torch.device(everyone.device):
            for case in todo:
                run(case, groups[case.group])

    agreed(all_of_them, str(todo))


@pytest.mark.parametrize("function", [check_halves, check_inference, check_objects, check_order])
def test_by_hand(everyone, groups, agreed, function):
    def both():
        with torch.device(everyone.device):
            function(everyone)
            function(groups["split"])

    agreed(both)


@pytest.mark.parametrize("function", [check_messages, check_refusals, check_sizes])
def test_what_nccl_does_its_own_way(several, agreed, function):
    agreed(lambda: function(several))


@pytest.mark.parametrize("name", ADJOINTS)
def test_adjoint(everyone, agreed, name):
    def run():
        with torch.device(everyone.device):
            adjoint.check_adjoint(name, everyone)

    agreed(run)


@pytest.mark.parametrize("name", ["all_reduce avg", "reduce sum", "gather uneven", "all_to_all splits", "broadcast"])
def test_second_derivative(everyone, agreed, name):
    def run():
        with torch.device(everyone.device):
            adjoint.check_second_derivative(name, everyone)

    agreed(run)


@pytest.mark.parametrize(
    "function", [adjoint.check_complex_adjoint, adjoint.check_asynchronous, adjoint.check_no_gradient]
)
def test_gradients(everyone, agreed, function):
    def run():
        with torch.device(everyone.device):
            function(everyone)

    agreed(run)
