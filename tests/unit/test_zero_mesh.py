"""ZeRO together with tensor, context and expert parallelism, and with recomputation, on thread ranks."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from commlayer import run_local
from parallel.recompute import checkpoint
from tests.contracts import zero_mesh
from tests.contracts.zero import INPUTS, OUTPUTS, WIDTH, Block, Task, check, filled, samples, sgd

STAGES = (1, 2, 3)
every_stage = pytest.mark.parametrize("stage", STAGES)


def train(kind, optimizer, mesh, fold=None, stages=STAGES, **options):
    zero_mesh.serial(kind, optimizer)

    def rank():
        on = zero_mesh.grid(mesh, fold)
        for stage in stages:
            try:
                zero_mesh.check(kind, optimizer, stage, *on, **options)
            except Exception as error:
                raise AssertionError(f"stage {stage}: {type(error).__name__}: {error}") from error

    run_local(rank, ranks=4, timeout=20)


@pytest.mark.parametrize("stage", [0, *STAGES])
@pytest.mark.parametrize("optimizer", zero_mesh.OPTIMIZERS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_beside_tensor_parallelism(stage, optimizer, sequence_parallel):
    model = {"sequence_parallel": sequence_parallel, "recompute": optimizer == "AdamW"}
    train("fields", optimizer, "dp=2 cp=1 tp=2", stages=[stage], model=model, bucket_mb=0.005)


@pytest.mark.parametrize(
    ("mesh", "optimizer"),
    [("dp=2 cp=2 tp=1", "AdamW"), ("dp=2 cp=2 tp=1", "SGD"), ("dp=1 cp=2 tp=2", "SGD"), ("dp=1 cp=4 tp=1", "SGD")],
)
def test_beside_context_parallelism(mesh, optimizer):
    """Gradients are partial sums over cp, also where dp is 1."""
    train("fields", optimizer, mesh, model={"sequence_parallel": True})


@pytest.mark.parametrize(
    ("mesh", "fold", "optimizer"),
    [
        ("dp=4 cp=1 tp=1", "ep=2", "SGD"),
        ("dp=4 cp=1 tp=1", "ep=2", "AdamW"),
        ("dp=2 cp=2 tp=1", "ep=2", "SGD"),
        ("dp=2 cp=1 tp=2", "ep=2", "AdamW"),
        ("dp=4 cp=1 tp=1", "ep=4", "SGD"),
        ("dp=2 cp=1 tp=2", "etp=2 ep=1", "SGD"),
        ("dp=1 cp=2 tp=2", "ep=2", "SGD"),
    ],
)
def test_beside_expert_parallelism(mesh, fold, optimizer):
    """Experts are cut over edp: 2 ranks, or 1; or 4, which are more than those of dp."""
    options = {"sequence_parallel": True, "recompute": "selective" if optimizer == "SGD" else "none"}
    train("language", optimizer, mesh, fold, model=options)


@pytest.mark.parametrize(
    ("mesh", "fold", "recompute"), [("dp=4 cp=1 tp=1", "ep=2", "full"), ("dp=2 cp=1 tp=2", "ep=2", "none")]
)
def test_hybrid_and_offload_beside_experts(mesh, fold, recompute, tmp_path):
    train("language", "SGD", mesh, fold, model={"recompute": recompute}, replicas=2, offload="disk", folder=tmp_path)


# Recomputation -----------------------------------------------------------------------------------------------


class Recomputed(nn.Module):
    """Blocks in checkpoints of one kind or another."""

    def __init__(self, how, inside=False):
        super().__init__()
        self.how = how
        self.first = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(Inner(how) if inside else Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, OUTPUTS)
        self.inside = inside
        filled(self)

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = block(h) if self.inside else self.how(block, h)
        return self.head(h)


class Inner(Block):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return x + self.down(self.how(lambda y: torch.tanh(self.up(self.norm(y))), x))


HOWS = {
    "full": checkpoint,
    "selective": partial(checkpoint, keep="products"),
    "torch": partial(torch_checkpoint, use_reentrant=False),
}


@every_stage
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("inside", [False, True])
def test_recomputation(stage, how, inside):
    """Of whole units, and of a part of one."""
    check(Task(partial(Recomputed, HOWS[how], inside), optimizer=sgd, steps=3), stage, bucket_mb=4e-4)


class Segments(nn.Module):
    """One checkpoint around several units, and one around everything."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, OUTPUTS)
        filled(self)

    def forward(self, x):
        h = self.first(x)
        for pair in (self.blocks[:2], self.blocks[2:]):
            h = checkpoint(lambda y, pair=pair: pair[1](pair[0](y)), h)
        return self.head(h)


@every_stage
def test_recomputation_of_several_units(stage):
    check(Task(Segments, optimizer=sgd, steps=3), stage)


@every_stage
def test_recomputation_of_the_whole_model(stage):
    def loss(model, step, rank, micro):
        x, y = samples(step, rank)
        return (checkpoint(model, x) - y).square().sum() / 6

    check(Task(Segments, loss, sgd, steps=3), stage)
