"""Trap 14: every layout of dp, tp and ZeRO reloads from every other, and the next step is the same."""

import pytest
import torch
from torch import nn

from commlayer import Mesh, run_local
from parallel import ColumnParallelLinear, DataParallel, RowParallelLinear, ZeRO, checkpoint

# A mesh, and the options of ZeRO, if any.
LAYOUTS = {
    "serial": ("dp=1 tp=1", None),
    "dp4": ("dp=4 tp=1", None),
    "tp3": ("dp=1 tp=3", None),
    "dp2×tp2": ("dp=2 tp=2", None),
    "zero1": ("dp=4 tp=1", {"stage": 1}),
    "zero2 offloaded": ("dp=4 tp=1", {"stage": 2, "offload": "cpu"}),
    "zero3 of 3": ("dp=3 tp=1", {"stage": 3}),
    "hybrid": ("dp=4 tp=1", {"stage": 3, "replicas": 2}),
    "zero2 on disk×tp2": ("dp=2 tp=2", {"stage": 2, "offload": "disk"}),
    "zero3×tp2": ("dp=2 tp=2", {"stage": 3}),
}


class Net(nn.Module):
    """With what is easily forgotten: buffers, tied, frozen, one-number and empty parameters."""

    def __init__(self, tp):
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.up, self.down = ColumnParallelLinear(5, 7, group=tp), RowParallelLinear(7, 5, group=tp)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.first, self.last = nn.Linear(5, 5, bias=False), nn.Linear(5, 5)
        self.last.weight = self.first.weight
        self.scale, self.nothing = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(0, 3))
        self.double()
        generator = torch.Generator().manual_seed(0)  # ranks are threads, which share torch's own
        for param in [*self.first.parameters(), *self.frozen.parameters(), self.last.bias]:
            param.data = torch.randn(param.shape, generator=generator, dtype=param.dtype)

    def forward(self, x):
        x = self.down(torch.tanh(self.up(self.norm(self.first(x)))))
        return self.last(self.frozen(x)) * self.scale


def made(name, folder):
    spec, zero = LAYOUTS[name]
    mesh = Mesh(spec)
    model = Net(mesh["tp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if zero is None:
        return DataParallel(model, mesh=mesh), optimizer
    options = {"folder": folder} if zero.get("offload") == "disk" else {}
    return ZeRO(model, optimizer, mesh=mesh, **zero, **options), optimizer


def step(model, optimizer, index):
    x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(8, 5).sin() * (index + 1)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("source", LAYOUTS)
def test_trap_14_every_layout_reloads_on_every_other(tmp_path, source):
    def save():
        model, optimizer = made(source, tmp_path / "disk")
        for index in range(2):
            step(model, optimizer, index)
        checkpoint.save(tmp_path, 2, model, optimizer, background=True).wait()
        saved = checkpoint.full_state_dict(model)
        step(model, optimizer, 2)
        return saved, checkpoint.full_state_dict(model)

    saved, after = run_local(save, ranks=Mesh(LAYOUTS[source][0]).world_size)[0]
    for target in LAYOUTS:

        def load(target=target):
            model, optimizer = made(target, tmp_path / "disk")
            step(model, optimizer, 5)  # whatever it has done before
            checkpoint.load(tmp_path / "step-00000002", model, optimizer)
            loaded = checkpoint.full_state_dict(model)
            step(model, optimizer, 2)
            return loaded, checkpoint.full_state_dict(model)

        loaded, later = run_local(load, ranks=Mesh(LAYOUTS[target][0]).world_size)[0]
        for name in saved:
            assert torch.equal(loaded[name], saved[name]), (target, name)
            torch.testing.assert_close(later[name], after[name], rtol=1e-10, atol=1e-10)


def test_every_layout_of_zero_goes_on_in_a_new_process(tmp_path):
    """Where the optimiser has no state yet."""

    def save():
        model, optimizer = made("serial", None)
        for index in range(2):
            step(model, optimizer, index)
        checkpoint.save(tmp_path, 2, model, optimizer)
        step(model, optimizer, 2)
        return checkpoint.full_state_dict(model)

    after = run_local(save, ranks=1)[0]

    def go_on(name):
        model, optimizer = made(name, tmp_path / "disk")
        checkpoint.load(tmp_path / "step-00000002", model, optimizer)
        step(model, optimizer, 2)
        return checkpoint.full_state_dict(model)

    for name in LAYOUTS:
        later = run_local(lambda name=name: go_on(name), ranks=Mesh(LAYOUTS[name][0]).world_size)[0]
        for key in after:
            torch.testing.assert_close(later[key], after[key], rtol=1e-10, atol=1e-10)
