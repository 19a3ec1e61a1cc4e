"""Trap 14: a checkpoint of any layout of four ranks loads on any other, and the next step is the same.

A language model with experts and a tied embedding, in float64: its first steps on one process say what is right.
"""

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import commlayer
from commlayer import Group, Mesh, balanced_sizes
from models.moe import LanguageModel, LanguageModelConfig
from parallel import DataParallel, ZeRO, checkpoint, clip_grad_norm_
from parallel.balance import LoadCounter
from parallel.checkpoint import full_state_dict, load_full_state_dict
from parallel.router import Routing

ROUTING = Routing(4, 2, normalise=True, balance_loss=0.3, bias_rate=0.01)
CONFIG = LanguageModelConfig(13, 16, 2, 8, 4, hidden=11, every=2, expert_hidden=5, routing=ROUTING, tied=True)
SAMPLES, TOKENS, BEFORE = 5, 7, 2  # steps before the checkpoint


class Layout(NamedTuple):
    mesh: str | None  # None: each rank by itself
    experts: str = "ep=1"
    zero: int = 0
    replicas: int = 1


LAYOUTS = {
    "serial": Layout(None),
    "dp4": Layout("dp=4 cp=1 tp=1"),
    "tp4": Layout("dp=1 cp=1 tp=4"),
    "dp2 tp2": Layout("dp=2 cp=1 tp=2"),
    "dp2 cp2": Layout("dp=2 cp=2 tp=1"),
    "ep2": Layout("dp=4 cp=1 tp=1", "ep=2"),
    "zero1": Layout("dp=4 cp=1 tp=1", zero=1),
    "zero2": Layout("dp=2 cp=1 tp=2", "ep=2", zero=2),
    "zero3": Layout("dp=4 cp=1 tp=1", "ep=2", zero=3),
    "hybrid": Layout("dp=4 cp=1 tp=1", zero=3, replicas=2),
}


@cache
def mesh_of(layout):
    if layout.mesh is None:
        return None, None
    mesh = Mesh(layout.mesh)
    return mesh, mesh.fold(layout.experts)


@cache
def whole():
    """The values to begin with; drawn alike on all ranks."""
    torch.manual_seed(0)
    return {name: value.double() for name, value in LanguageModel(CONFIG).state_dict().items()}


class Run:
    """A model and its optimiser on a layout, and steps of it."""

    def __init__(self, layout, state=None):
        self.mesh, self.experts = mesh_of(layout)
        self.group = Group.alone() if self.mesh is None else commlayer.world()
        self.model = LanguageModel(CONFIG, self.mesh, self.experts).double()
        if state is not None:
            load_full_state_dict(self.model, state)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.counter = LoadCounter(self.model, self.group if self.mesh is None else self.experts["etp-ep-edp"])
        if layout.zero:
            options = {"stage": layout.zero, "replicas": layout.replicas}
            self.parallel = ZeRO(self.model, self.optimizer, mesh=self.mesh, experts=self.experts, **options)
        elif self.mesh is None:
            self.parallel = DataParallel(self.model, self.group)
        else:
            self.parallel = DataParallel(self.model, mesh=self.mesh, experts=self.experts)

    def step(self, number):
        """The cross entropy of all samples, before the step."""
        ids, targets = batch(number)
        dp = self.group if self.mesh is None else self.mesh["dp"]
        mine = [x.split(balanced_sizes(SAMPLES, dp.size))[dp.rank] for x in (ids, targets)]
        output = self.parallel(*mine)
        loss = output.loss / targets.numel() + torch.stack([load.loss for load in output.loads]).sum()
        self.optimizer.zero_grad()
        (loss * dp.size).backward()
        clip_grad_norm_(self.parallel, 0.1, mesh=self.mesh)
        self.optimizer.step()
        self.counter.add(output.loads)
        self.counter.step()
        axes = None if self.mesh is None else self.mesh["dp-cp"]
        return commlayer.all_reduce(output.loss.detach() / targets.numel(), group=axes or self.group).item()

    def everything(self):
        """The whole model, on rank 0 of the group."""
        return full_state_dict(self.parallel)


@cache
def batch(number):
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randint(CONFIG.vocab_size, (SAMPLES, TOKENS), generator=generator) for _ in range(2))


@cache
def expected():
    """Losses of all steps on one process, and the model after the last."""
    run = Run(LAYOUTS["serial"], whole())
    losses = [run.step(number) for number in range(BEFORE + 1)]
    return losses, run.model.state_dict()


@pytest.fixture(scope="module")
def saved(everyone):
    """A folder with a checkpoint of every layout, after some steps there."""
    own = tempfile.TemporaryDirectory() if everyone.rank == 0 else None
    folder = Path(commlayer.broadcast_object(own.name if own else None, group=everyone))
    for name, layout in LAYOUTS.items():
        run = Run(layout, whole())
        losses = [run.step(number) for number in range(BEFORE)]
        assert losses == pytest.approx(expected()[0][:BEFORE], rel=1e-10)
        if layout.mesh is not None or everyone.rank == 0:
            checkpoint.save(folder / name, BEFORE, run.parallel, run.optimizer, group=run.group)
        commlayer.barrier(group=everyone)
    yield folder
    commlayer.barrier(group=everyone)
    if own:
        own.cleanup()


@pytest.mark.parametrize("target", LAYOUTS)
def test_trap_14_any_checkpoint_loads_on_any_layout(everyone, agreed, saved, target):
    if everyone.size != 4:
        pytest.skip("these are layouts of four ranks")
    # All pairs once, on gloo: a checkpoint does the same on every backend, so elsewhere two for each are enough.
    names = list(LAYOUTS)
    at = names.index(target)
    every = everyone.backend == "gloo" and not os.environ.get("COMMLAYER_PROFILE")
    sources = names if every else [names[at - 1], names[(at + 3) % len(names)]]
    losses, model = expected()
    for source in sources:
        run = Run(LAYOUTS[target])
        checkpoint.load(saved / source / f"step-{BEFORE:08}", run.parallel, run.optimizer, group=run.group)
        loss = run.step(BEFORE)
        after = run.everything()

        def compare(loss=loss, after=after):
            assert loss == pytest.approx(losses[BEFORE], rel=1e-10)
            for name, value in (after or {}).items():
                torch.testing.assert_close(
                    value, model[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
                )

        agreed(compare, f"{source} -> {target}")
