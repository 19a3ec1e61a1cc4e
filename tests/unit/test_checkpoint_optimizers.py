"""Optimisers go on after loading as they would have."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn

import commlayer
from commlayer import run_local
from parallel import checkpoint
from parallel.checkpoint import loading
from tests.checkpoints import Cut, Layout, Pieces, build, mesh_of


def optimizers():
    return {
        "SGD": {"momentum": 0.9},
        "Adam": {"amsgrad": True},
        "NAdam": {},
        "RAdam": {},
        "ASGD": {},
        "RMSprop": {"centered": True},
        "Adagrad": {},
        "Rprop": {},
        "Adadelta": {},
        "Adamax": {},
        "Adafactor": {},
    }


@pytest.mark.parametrize("kind", optimizers())
def test_every_optimizer_goes_on_as_it_would_have(tmp_path, kind):
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        model.scale = nn.Parameter(torch.ones(()))
        return model, getattr(torch.optim, kind)(model.parameters(), **optimizers()[kind])

    def go(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.linspace(0, 1, 6).view(2, 3)) * model.scale).square().sum().backward()
            optimizer.step()
        return [param.tolist() for param in model.parameters()]

    model, optimizer = made()
    go(model, optimizer)
    checkpoint.save(tmp_path, 1, model, optimizer)
    uninterrupted = go(model, optimizer)
    again, other = made()
    checkpoint.load(tmp_path / "step-00000001", again, other)
    assert go(again, other) == uninterrupted


class WithFiles(Pieces):
    """As ZeRO with state in files: what is in memory is moved there when it is told to settle."""

    optimizer: torch.optim.Optimizer

    def __init__(self, inner):
        super().__init__(inner.module, inner.pieces)
        self.moved, self.in_memory, self.passing = set(), [], []

    def settle(self):
        assert [value for value in self.passing if value() is not None] == [], "moved, and yet in memory"
        self.in_memory.append(0)
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if value.ndim and value.data_ptr() not in self.moved:
                    self.in_memory[-1] += value.nbytes
                    self.passing.append(weakref.ref(value))
                    state[key] = value.clone()
                    self.moved.add(state[key].data_ptr())


@pytest.mark.parametrize("fresh", [True, False])
def test_state_that_belongs_in_files_is_never_all_in_memory(tmp_path, monkeypatch, fresh):
    """A state of 9,600 bytes a rank, through 2,000 in memory."""
    monkeypatch.setattr(loading, "AT_ONCE", 2000)
    wholes = [np.full((10, 10), float(i)) for i in range(12)]
    layout = Layout(2, 1, (Cut(None, (), ((0, 0.5, 1),)),) * 12)

    def rank():
        mesh = mesh_of(layout)
        model = WithFiles(build(layout, wholes, mesh))
        model.optimizer = optimizer = torch.optim.AdamW(model.parameters())

        def fill(value):
            for i, param in enumerate(model.parameters()):
                averages = {key: torch.full_like(param, value + i) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[param] = {"step": torch.tensor(value)} | averages

        fill(100.0)
        checkpoint.save(tmp_path, 1, model, optimizer)
        optimizer.state.clear()
        if not fresh:
            fill(0.0)
            model.settle()
        places = [value.data_ptr() for state in optimizer.state.values() for value in state.values() if value.ndim]
        model.in_memory.clear()
        checkpoint.load(tmp_path / "step-00000001", model, optimizer)
        assert sum(model.in_memory) == (12 * 2 * 50 * 8 if fresh else 0)
        assert max(model.in_memory) <= 2000
        assert len(model.in_memory) > 5
        for i, param in enumerate(model.parameters()):
            assert optimizer.state[param]["step"] == 100
            assert (optimizer.state[param]["exp_avg_sq"] == 100 + i).all()
        now = [value.data_ptr() for state in optimizer.state.values() for value in state.values() if value.ndim]
        assert fresh or now == places

    run_local(rank, ranks=2)


def test_a_full_disk_of_state_is_an_error_on_all_ranks(tmp_path):
    class Full(Pieces):
        def settle(self):
            if commlayer.world().rank:
                raise OSError("no space left")

    def rank():
        model = Full(nn.Linear(2, 2), {})
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        checkpoint.save(tmp_path, 1, model, optimizer)
        checkpoint.load(tmp_path / "step-00000001", model, optimizer)

    with pytest.raises(ValueError, match=r"rank 1: the state of the optimizer cannot be kept: no space left"):
        run_local(rank, ranks=2)
