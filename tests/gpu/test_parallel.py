"""The parallel modules on GPUs against one process on the CPU, in float64: gradients of all parameters, training."""

from functools import cache

import pytest

from parallel.router import Routing
from tests.contracts import mappings, moe, zero_mesh
from tests.spmd.test_data_parallel import (  # noqa: F401 (tests that ask the group for its device)
    test_accumulation_without_communication,
    test_gradients_equal_the_serial_ones,
    test_half_precision_and_many_buckets,
    test_training_follows_the_serial_run,
)
from tests.spmd.test_tensor import (  # noqa: F401 (the same)
    test_block,
    test_features_gathered_and_cut,
    test_language_model,
)


@pytest.fixture(scope="module")
def world(everyone):
    return everyone


@pytest.mark.parametrize("total", [24, 25])
def test_mappings(everyone, agreed, total):
    for name, options, *tensors in mappings.cases(everyone, total):
        there = [t.to(everyone.device) for t in tensors]
        agreed(lambda n=name, o=options, t=there: mappings.check(n, *t, **o), name)


# All ranks along one axis: sizes of dp, cp and tp, and of ep.
WAYS = {"dp": "dp={n} cp=1 tp=1", "cp": "dp=1 cp={n} tp=1", "tp": "dp=1 cp=1 tp={n}"}


@cache
def grid(mesh, fold):
    return zero_mesh.grid(mesh, fold)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("along", WAYS)
@pytest.mark.parametrize("kind", ["fields", "language"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_training_is_the_serial_one(everyone, agreed, stage, along, kind, optimizer):
    """A ViT, or a language model with experts over all ranks, in DataParallel (stage 0) or ZeRO: three steps."""
    n = everyone.size
    if along == "tp" and 4 % n:
        pytest.skip("4 heads cannot be cut over so many ranks")
    mesh = grid(WAYS[along].format(n=n), f"ep={n}" if kind == "language" and n <= 5 else None)
    options = {"sequence_parallel": along == "tp", "recompute": kind == "fields" or "full"}
    agreed(lambda: zero_mesh.check(kind, optimizer, stage, *mesh, model=options))


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("capacity", [0.0, 0.8])
def test_experts(everyone, agreed, shared, capacity):
    """Uneven tokens, a hot expert and one without any, two experts on each rank."""
    n = everyone.size
    routing = Routing(2 * n, min(2, n), capacity_factor=capacity, **moe.LOSSES)
    tokens = tuple((7, 0, 9, 8)[rank % 4] for rank in range(n))
    problem = moe.Problem(routing, tokens, hot=2 * n - 1, starved=1 if n > 1 else 0, shared=shared)
    layout = moe.Layout(f"dp={n} cp=1 tp=1", f"ep={n}")
    wanted = moe.reference(problem)
    on = grid(layout.mesh, layout.fold)
    agreed(lambda: moe.check(problem, layout, wanted, on))


def test_steps_with_experts_far_away(everyone, agreed):
    n = everyone.size
    layout = moe.Layout(f"dp={n} cp=1 tp=1", f"ep={n}")
    steps = [[3 + (rank + step) % 3 for rank in range(n)] for step in range(3)]
    agreed(lambda: moe.check_steps(layout, steps))
