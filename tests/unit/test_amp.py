"""The shared verdict of the loss scaler, on thread ranks that hold a shard each, and autocast by name."""

import copy

import pytest
import torch
from torch import nn

import commlayer
from commlayer import Mesh, run_local
from parallel.amp import GradScaler, autocast
from parallel.clip import clip_grad_norm_
from parallel.placement import mark_sharded

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "fused adam": lambda params: torch.optim.Adam(params, lr=0.1, fused=True),
}


def train(scaler, mesh, optimizer, clip, *, overflow_at=1, steps=3):
    """The parameter and the scale after each step; in one of them a gradient of the last rank overflows."""
    group, world = mesh["tp"], commlayer.world()
    param = nn.Parameter(torch.ones(2))
    mark_sharded(param, 0, axis="tp", group=group, sizes=[2] * group.size)
    optimizer, history = OPTIMIZERS[optimizer]([param]), []
    for step in range(steps):
        optimizer.zero_grad()
        bad = step == overflow_at and world.rank == world.size - 1
        scaler.scale((param * (1e38 if bad else 3.0)).sum()).backward()
        if clip:
            scaler.unscale_(optimizer)
            clip_grad_norm_([param], 1e9, mesh=mesh)
        scaler.step(optimizer)
        scaler.update()
        history.append((param.tolist(), scaler.get_scale()))
    return history


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spec", ["dp=2 tp=2", "tp=3"])
def test_trap_7_an_overflow_on_one_rank_skips_the_step_on_all(optimizer, clip, spec):
    def run():
        mesh = Mesh(spec)
        return train(GradScaler(mesh, init_scale=1024.0), mesh, optimizer, clip)

    ranks = run_local(run, Mesh(spec).world_size)
    assert all(history == ranks[0] for history in ranks)
    (first, _), (second, _), (third, _) = ranks[0]
    assert [scale for _, scale in ranks[0]] == [1024.0, 512.0, 512.0]
    assert first == second
    assert first != [1.0, 1.0]
    assert third != second


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trap_7_with_torchs_scaler_the_ranks_would_drift_apart(optimizer):
    def run():
        mesh = Mesh("tp=2")
        return train(torch.amp.GradScaler("cpu", init_scale=1024.0), mesh, optimizer, False)

    one, other = run_local(run, 2)
    assert one[0] == other[0]
    assert one[1:] != other[1:]
    assert one[2][1] != other[2][1]


def test_a_rank_without_gradients_takes_part():
    def run():
        param, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        mine = idle if commlayer.world().rank == 1 else param
        optimizer = torch.optim.SGD([mine], lr=0.1)
        scaler = GradScaler(Mesh("tp=2"), init_scale=8.0)
        loss = scaler.scale((param * torch.inf).sum())
        loss.backward()
        scaler.step(optimizer)
        scaler.update()
        return mine.tolist(), scaler.get_scale()

    assert run_local(run, 2) == [([1.0, 1.0], 4.0)] * 2


def test_two_optimizers_are_judged_each_for_itself():
    def run():
        good, bad = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        optimizers = [torch.optim.SGD([p], lr=0.25) for p in (good, bad)]
        scaler = GradScaler(Mesh("tp=2"), init_scale=8.0)
        factor = torch.inf if commlayer.world().rank == 0 else 1.0
        scaler.scale((good + bad * factor).sum()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        return good.item(), bad.item(), scaler.get_scale()

    assert run_local(run, 2) == [(0.75, 1.0, 4.0)] * 2


def count_reductions(monkeypatch):
    calls, real = [], commlayer.all_reduce

    def counted(x, *args, **kwargs):
        calls.append(x.numel())
        return real(x, *args, **kwargs)

    monkeypatch.setattr(commlayer, "all_reduce", counted)
    return calls


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_number_a_step_and_nothing_where_it_is_disabled(monkeypatch, optimizer):
    calls = count_reductions(monkeypatch)
    run_local(lambda: train(GradScaler(Mesh("tp=2")), Mesh("tp=2"), optimizer, False, steps=2), 2)
    assert calls == [1] * 4
    calls.clear()
    run_local(lambda: train(GradScaler(Mesh("tp=2"), enabled=False), Mesh("tp=2"), optimizer, False, steps=2), 2)
    assert calls == []


def test_without_a_mesh_it_is_torchs():
    results = []
    for scaler in (GradScaler(init_scale=64.0), torch.amp.GradScaler("cpu", init_scale=64.0)):
        param = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([param], lr=0.1)
        scaler.scale((param * 3).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append((param.tolist(), scaler.state_dict()))
    assert results[0] == results[1]
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(copy.deepcopy(results[0][1]))
    assert other.get_scale() == 64.0


def test_options_are_torchs():
    with pytest.raises(TypeError, match="patience"):
        GradScaler(patience=3)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_autocast(device):
    linear = nn.Linear(3, 3)
    for mode, dtype in {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        with autocast(mode, device):
            assert linear(torch.rand(2, 3)).dtype == dtype
    with pytest.raises(ValueError, match="mode: expected one of none, bf16, fp16, got 'fp8'"):
        autocast("fp8", device)
