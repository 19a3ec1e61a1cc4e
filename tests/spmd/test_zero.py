"""ZeRO between processes, on whatever backend the environment chooses; the finer points are in tests/unit."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import commlayer
from commlayer import Mesh
from commlayer.launch import discover
from models.moe import LanguageModel, LanguageModelConfig
from parallel import ZeRO
from parallel.router import Routing
from tests.contracts import zero_mesh
from tests.contracts.zero import (
    Net,
    Plainest,
    Task,
    adagrad,
    adamw,
    branches,
    compare,
    parallel,
    samples,
    serial,
    sgd,
    whole,
)

RANKS = discover().size
STAGES = (1, 2, 3)
every_stage = pytest.mark.parametrize("stage", STAGES)


def as_serial(task, stage, **options):
    compare(parallel(task, stage, **options), serial(task)[1])


@pytest.mark.parametrize("stage", [0, *STAGES])
@pytest.mark.parametrize(("optimizer", "steps"), [(adamw, 10), (sgd, 3), (adagrad, 3)])
def test_it_is_the_serial_run(agreed, everyone, stage, optimizer, steps):
    task = Task(Net, optimizer=optimizer, ranks=RANKS, steps=steps, schedule=True)
    agreed(lambda: as_serial(task, stage, bucket_mb=6e-4))


@every_stage
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offload_and_hybrid(agreed, everyone, shared_folder, stage, offload):
    options = {"folder": shared_folder / f"{everyone.rank}"} if offload == "disk" else {}
    task = Task(Net, optimizer=sgd, ranks=RANKS, steps=2, micro=2, no_sync=offload == "cpu")
    agreed(lambda: as_serial(task, stage, offload=offload, replicas=2 - RANKS % 2, **options))


# Which branches a rank takes: (step, rank).
WAYS = [[(0,), (0, 1), (2,), ()], [(1, 2), (3,), (0, 1, 2), (0, 1, 2, 3)], [(), (0,), (), (2, 3)]]


def by_data(model, step, rank, micro):
    x, y = samples(step, rank)
    return (model(x, WAYS[step][rank % 4]) - y).square().sum() / 6


@every_stage
def test_trap_11_unused_on_some_ranks_alone(agreed, everyone, stage):
    task = Task(branches, by_data, adamw, ranks=RANKS, steps=3)
    agreed(lambda: as_serial(task, stage, bucket_mb=2e-4))


@cache
def grid(mesh, fold):
    return zero_mesh.grid(mesh, fold)


@every_stage
@pytest.mark.parametrize(
    ("kind", "mesh", "fold"),
    [
        ("fields", "dp=2 cp=1 tp=2", None),
        ("fields", "dp=2 cp=2 tp=1", None),
        ("language", "dp=4 cp=1 tp=1", "ep=2"),
        ("language", "dp=2 cp=1 tp=2", "ep=2"),
    ],
)
def test_on_a_mesh(agreed, everyone, stage, kind, mesh, fold):
    if RANKS != 4:
        pytest.skip("for four ranks")
    options = {"sequence_parallel": True, "recompute": True if kind == "fields" else "full"}
    agreed(lambda: zero_mesh.check(kind, "SGD", stage, *grid(mesh, fold), model=options))


LANGUAGE = LanguageModelConfig(13, 16, 2, 4, 2, hidden=11, every=2, expert_hidden=5, routing=Routing(4, 2), tied=True)


@every_stage
@pytest.mark.parametrize("kind", ["torch", "language"])
def test_from_meta_with_the_bits_of_the_model_built_whole(agreed, everyone, stage, kind):
    """What rank 0 draws, also where others draw something else; of what is cut, all ranks that have a part."""

    def compare_bits():
        experts = None
        mesh = Mesh(f"dp={RANKS}")
        if kind == "language":
            experts = mesh.fold("ep=2" if RANKS % 2 == 0 else "ep=1")

        def make():
            return Plainest() if kind == "torch" else LanguageModel(LANGUAGE, mesh, experts)

        with torch.device("meta"):
            net = make()
        torch.manual_seed(3 + (everyone.rank if kind == "torch" else 0))
        model = ZeRO(net, torch.optim.SGD(net.parameters(), lr=0.1), stage=stage, mesh=mesh, experts=experts)
        torch.manual_seed(3)
        expected = Plainest() if kind == "torch" else LanguageModel(LANGUAGE)
        for name, p in model.named_parameters():
            assert torch.equal(whole(p, p), expected.get_parameter(name)), name

    agreed(compare_bits)


@every_stage
def test_all_ranks_have_the_same_bits(agreed, everyone, stage):
    def same():
        trace = parallel(replace(Task(Net, optimizer=adamw, steps=2), ranks=RANKS), stage)
        for name, value in (*trace.params.items(), *((f"loss {i}", v) for i, v in enumerate(trace.losses))):
            for theirs in commlayer.all_gather_object(value):
                assert torch.equal(theirs, value), name

    agreed(same)
