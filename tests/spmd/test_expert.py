"""Mixture of experts between processes, on whatever backend the environment chooses.

The finer points, and every number of experts and choices, are tested on thread ranks, in tests/unit.
"""

import math

import pytest
import torch

from commlayer.fallbacks import FALLBACKS
from commlayer.launch import discover
from parallel.router import Routing
from tests.contracts.moe import LOSSES, Layout, Problem, check, check_steps, meshes, reference

EMULATIONS = [each for each in FALLBACKS if "all_to_all" in each.ops and not each.reinterprets]


def layouts(ranks):
    """Experts over all ranks, over some, over none, and cut; beside data, tensor and context parallelism."""
    dp = f"dp={ranks} cp=1 tp=1"
    yield Layout(dp, f"ep={ranks}")
    yield Layout(dp, "ep=1")
    if ranks % 2 == 0:
        half, tp = ranks // 2, f"dp={ranks // 2} cp=1 tp=2"
        yield Layout(dp, f"ep={half}")
        yield Layout(dp, f"etp=2 ep={half}")
        yield Layout(tp, f"ep={ranks}")
        yield Layout(tp, f"etp=2 ep={half}", sequence_parallel=True)
        yield Layout(f"dp={half} cp=2 tp=1", f"ep={ranks}")


def problem(layout, routing, **options):
    places = torch.Size(int(axis.split("=")[1]) for axis in layout.mesh.split()[:2]).numel()
    return Problem(routing, tuple((4, 0, 5, 3)[i % 4] for i in range(places)), **options)


@pytest.mark.parametrize("layout", list(layouts(discover().size)), ids=str)
@pytest.mark.parametrize("capacity_factor", [0.0, 0.75])
def test_gradients_are_the_serial_ones(everyone, agreed, layout, capacity_factor):
    routing = Routing(2 * everyone.size + 1, 3, capacity_factor=capacity_factor, **LOSSES)
    todo = problem(layout, routing, hot=1, shared=1)
    agreed(lambda: check(todo, layout, reference(todo)))


@pytest.mark.parametrize("keep", ["nothing", "products"])
def test_recomputed(everyone, agreed, keep):
    layout = Layout(f"dp={everyone.size} cp=1 tp=1", f"ep={everyone.size}", keep=keep)
    todo = problem(layout, Routing(2 * everyone.size, 2, bias_rate=0.1, **LOSSES), shared=1)
    agreed(lambda: check(todo, layout, reference(todo)))


@pytest.mark.parametrize("emulation", EMULATIONS, ids=lambda each: each.name)
def test_every_emulated_exchange(everyone, agreed, emulation):
    """Forced, whatever the planner thinks best here."""
    layout, calls = Layout(f"dp={everyone.size} cp=1 tp=1", f"ep={everyone.size}"), []
    todo = problem(layout, Routing(2 * everyone.size, 2, "sigmoid"), starved=2)

    def run(*args):
        calls.append(1)
        return emulation.run(*args)

    mesh, experts = meshes(layout)
    exchange = {("all_to_all", None, torch.float64, "uneven"): (math.inf, run)}
    experts["ep"].flat._routes = {**exchange}
    agreed(lambda: check(todo, layout, reference(todo), (mesh, experts)))
    assert len(calls) == 4, "there and back, and their gradients"


def test_trap_11_different_experts_active_on_different_ranks_never_hangs(everyone, agreed):
    steps = [[(3 * step + 2 * rank) % 4 for rank in range(everyone.size)] for step in range(1, 4)]
    layout = Layout(f"dp={everyone.size} cp=1 tp=1", f"ep={everyone.size}")
    agreed(lambda: check_steps(layout, steps, bucket_mb=1e-6))
