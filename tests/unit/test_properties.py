"""Every function against NumPy, on thread ranks: ops, dtypes, layouts, splits, groups, profiles, missing capabilities."""

from commlayer import run_local, world
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.contracts.cases import cases, disabled, profiles
from tests.contracts.checks import assert_alike, check, make_group


@settings(max_examples=int(__import__("os").environ.get("N","600")), deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False, phases=(Phase.explicit, Phase.generate, Phase.shrink))
@given(
    todo=st.lists(cases(), min_size=1, max_size=6),
    ranks=st.integers(1, 5),
    profile=profiles,
    disable=disabled(),
)
def test_every_function_equals_numpy(todo, ranks, profile, disable):
    def program():
        for case in todo:
            group = make_group(world(), case.group)
            result = check(case, group)
            if group.is_member:
                assert_alike(group._comm.share(result), str(case))

    run_local(program, ranks, profile=profile, disable=disable, timeout=20)
