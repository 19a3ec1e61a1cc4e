"""Every function against NumPy on thread ranks: ops, dtypes, layouts, splits, groups, profiles, disabled sets."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import commlayer as c
from commlayer.capability import REDUCING
from tests.contracts import layouts
from tests.contracts.cases import FUNCTIONS, SPLITTING, Case, cases, disabled, profiles
from tests.contracts.checks import (
    assert_alike,
    check,
    check_halves,
    check_inference,
    check_objects,
    check_order,
    make_group,
)

EXAMPLES = int(os.environ.get("COMMLAYER_TEST_EXAMPLES", "800"))


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    report_multiple_bugs=False,
)
@given(
    todo=st.lists(cases(), min_size=1, max_size=6),
    ranks=st.integers(1, 5),
    profile=profiles,
    disable=disabled(),
)
def test_every_function_equals_numpy(todo, ranks, profile, disable):
    def program():
        for case in todo:
            group = make_group(c.world(), case.group)
            result = check(case, group)
            if group.is_member:
                assert_alike(group._comm.share(result), str(case))

    c.run_local(program, ranks, profile=profile, disable=disable, timeout=5)


@pytest.mark.parametrize("op", [op for op in FUNCTIONS if op != "messages"])
@pytest.mark.parametrize("profile", [None, "only-send-recv"])
def test_every_layout(op, profile):
    """Every layout of the input with every layout of out, in place and overlapping too."""
    given = [*layouts.WRITABLE, layouts.EXPANDED, layouts.CONJ, layouts.NEG]
    wanted = [("view", layout) for layout in given if layout != layouts.EXPANDED]
    wanted += [("same", layouts.PLAIN), ("overlap", layouts.PLAIN), ("none", layouts.PLAIN)]
    reduce = "sum" if op in REDUCING else None

    def program():
        for layout in given:
            for number, (out, out_layout) in enumerate(wanted):
                dtype = {layouts.CONJ: "complex64", layouts.NEG: "float32"}.get(out_layout, "float64")
                dtype = {layouts.CONJ: "complex128", layouts.NEG: "float32"}.get(layout, dtype)
                if not layouts.fits(out_layout, dtype, "values"):
                    continue
                for dim in (0, 1) if op in SPLITTING else (0,):
                    splits = "uneven" if op in SPLITTING and number % 2 else "even"
                    case = Case(op, dtype, (2, 3), number, reduce, dim, splits, 1, layout, "values", out, out_layout)
                    check(case, c.world())

    c.run_local(program, 3, profile=profile, timeout=10)


PROFILES = [None, "only-all-reduce", "only-send-recv", "xccl-2.7", "gloo-2.13", "mpi-4"]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_means_of_halves(profile, ranks):
    c.run_local(lambda: check_halves(c.world()), ranks, profile=profile, timeout=10)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("ranks", [1, 4])
def test_objects(profile, ranks):
    c.run_local(lambda: check_objects(c.world()), ranks, profile=profile, timeout=10)


@pytest.mark.parametrize("profile", PROFILES)
def test_inference_mode(profile):
    c.run_local(lambda: check_inference(c.world()), 3, profile=profile, timeout=10)


@pytest.mark.parametrize("profile", PROFILES)
def test_many_at_once(profile):
    c.run_local(lambda: check_order(c.world()), 4, profile=profile, timeout=10)


def test_reductions_of_nan_are_alike():
    """Different NaN payloads on every rank: a sum keeps one of them, the same on all."""

    def program():
        bits = torch.tensor([0x7FC00001 + c.world().rank, -(1 + c.world().rank)], dtype=torch.int32)
        for op in ("sum", "avg", "product", "min", "max"):
            result = c.all_reduce(bits.view(torch.float32), op)
            assert result.isnan().all()
            assert_alike(c.world()._comm.share(result.numpy().tobytes()), op)

    for profile in PROFILES:
        c.run_local(program, 4, profile=profile, timeout=10)
