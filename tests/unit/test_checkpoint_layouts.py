"""Checkpoints of any layout load on any other."""

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import commlayer
from commlayer import Mesh, run_local
from parallel import ColumnParallelLinear, DataParallel, RowParallelLinear, checkpoint, mark_sharded
from parallel.checkpoint import planner
from parallel.checkpoint.targets import read_metadata
from parallel.expert import MoE
from parallel.router import Routing
from tests.checkpoints import build, expected, layouts, mesh_of

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=3)


@settings(max_examples=50, deadline=None)
@given(shapes=SHAPES, data=st.data())
def test_any_cut_loads_on_any_other(shapes, data):
    source, target = data.draw(layouts(shapes)), data.draw(layouts(shapes))
    stateless = data.draw(st.integers(0, len(shapes)))  # a parameter that has no state yet, or none such
    chunk = data.draw(st.sampled_from([planner.CHUNK, 100, 8]))
    wholes = [
        np.arange(np.prod(shape, dtype=int), dtype=float).reshape(shape) + 100 * i for i, shape in enumerate(shapes)
    ]
    states = {key: [whole + 1000 * n for whole in wholes] for n, key in enumerate(("exp_avg", "exp_avg_sq"), 1)}

    def saver(folder):
        mesh = mesh_of(source)
        model = build(source, wholes, mesh)
        first, *others = model.parameters()
        groups = [{"params": [first], "lr": torch.tensor(0.5)}, *([{"params": others, "lr": 0.25}] if others else [])]
        optimizer = torch.optim.AdamW(groups)
        for i, (cut, param) in enumerate(zip(source.cuts, model.parameters(), strict=True)):
            if i != stateless:
                optimizer.state[param] = {"step": torch.tensor(float(i))} | {
                    key: torch.from_numpy(np.array(expected(values[i], cut, mesh))) for key, values in states.items()
                }
        checkpoint.save(folder, 7, model, optimizer, own=commlayer.world().rank)
        assert all(
            part.sizes.numel() <= max(1, chunk // tensor.properties.dtype.itemsize)
            for tensor in read_metadata(folder / "step-00000007").state_dict_metadata.values()
            for part in tensor.chunks
        )

    def loader(folder):
        mesh = mesh_of(target)
        model = build(target, [np.full_like(whole, np.nan) for whole in wholes], mesh)
        params = list(model.parameters())
        optimizer = torch.optim.AdamW([{"params": [param]} for param in params])
        optimizer.state[params[0]] = {"stale": torch.ones(())}
        loaded = checkpoint.load(folder / "step-00000007", model, optimizer)
        assert loaded.own == (commlayer.world().rank if source.ranks == target.ranks else None)
        assert model.refreshed == 1
        for i, (cut, param) in enumerate(zip(target.cuts, params, strict=True)):
            np.testing.assert_array_equal(param.detach().numpy(), expected(wholes[i], cut, mesh))
            state = optimizer.state.get(param)
            if i == stateless:
                assert state is None
                continue
            assert state["step"].shape == ()
            assert state["step"] == i
            assert state.keys() == {"step", *states}
            for key, values in states.items():
                assert state[key].shape == param.shape
                np.testing.assert_array_equal(state[key].numpy(), expected(values[i], cut, mesh))
        lr = [group["lr"] for group in optimizer.param_groups]
        assert isinstance(lr[0], torch.Tensor)
        assert lr == [0.5, *[0.25] * (len(shapes) - 1)]

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(planner, "CHUNK", chunk):
        run_local(lambda: saver(Path(folder)), ranks=source.ranks)
        run_local(lambda: loader(Path(folder)), ranks=target.ranks)


class Net(nn.Module):
    """Parallel layers, experts, a buffer, and a tied weight."""

    def __init__(self, mesh=None, experts=None):
        super().__init__()
        tp = mesh["tp"] if mesh else commlayer.Group.alone()
        self.up = ColumnParallelLinear(6, 10, group=tp)
        self.down = RowParallelLinear(10, 6, group=tp)
        self.moe = MoE(6, 8, Routing(4, 2), mesh=experts, group=tp)
        self.norm = nn.BatchNorm1d(6)
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        x = self.down(torch.tanh(self.up(self.first(x))))
        return self.last(self.norm(self.moe(x[None])[0][0]))


def net(spec, seed, fold=None):
    torch.manual_seed(seed)
    mesh = Mesh(spec)
    experts = mesh.fold(fold) if fold else None
    model = DataParallel(Net(mesh, experts), mesh=mesh, experts=experts)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def steps(model, optimizer, count=2):
    """Every rank of dp sees the same, so that no reduction rounds differently."""
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()


LAYOUTS = [("dp=1 tp=1", None), ("dp=2 tp=1", "ep=2 etp=1"), ("dp=1 tp=2", "ep=1 etp=2"), ("dp=2 tp=2", "ep=4 etp=1")]


@pytest.mark.parametrize("source", LAYOUTS)
def test_parallel_models_load_on_every_mesh(tmp_path, source):
    def saver():
        model, optimizer = net(source[0], 0, source[1])
        steps(model, optimizer)
        checkpoint.save(tmp_path, 2, model, optimizer)
        return checkpoint.full_state_dict(model)

    whole = run_local(saver, ranks=Mesh(source[0]).world_size)[0]
    assert {"norm.running_mean", "first.weight", "last.weight", "moe.experts.up"} <= whole.keys()

    def loader(target):
        model, optimizer = net(target[0], 1, target[1])
        checkpoint.load(tmp_path / "step-00000002", model, optimizer)
        found = checkpoint.full_state_dict(model)
        assert all(len(optimizer.state[param]) == 3 for param in model.parameters())
        model.module.norm.eval()
        steps(model, optimizer, 1)  # the next step goes
        return found

    for target in LAYOUTS:
        found = run_local(lambda to=target: loader(to), ranks=Mesh(target[0]).world_size)[0]
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole), target


def test_each_region_is_written_once_and_all_ranks_write(tmp_path):
    def rank():
        model = DataParallel(nn.Sequential(*[nn.Linear(100, 100) for _ in range(8)]))
        checkpoint.save(tmp_path, 1, model)

    run_local(rank, ranks=4)
    sizes = [path.stat().st_size for path in (tmp_path / "step-00000001").glob("*.distcp")]
    assert len(sizes) == 4
    assert max(sizes) < 1.2 * min(sizes)
    assert 320_000 < sum(sizes) < 360_000


def test_a_large_tensor_that_all_hold_is_written_by_all(tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "CHUNK", 2**16)
    run_local(lambda: checkpoint.save(tmp_path, 1, nn.Linear(300, 1000, bias=False)) and None, ranks=4)
    sizes = [path.stat().st_size for path in (tmp_path / "step-00000001").glob("*.distcp")]
    assert len(sizes) == 4
    assert max(sizes) < 1.3 * min(sizes)
    assert 1_200_000 < sum(sizes) < 1_300_000


def test_a_part_that_nobody_has_is_refused(tmp_path):
    def rank():
        world = commlayer.world()
        model = nn.Linear(4, 2, bias=False)
        model.weight = nn.Parameter(torch.ones(1, 4))
        # Ranks 0 and 1 hold the same row, and say so of the same mesh.
        half = world.split(world.rank, 0)
        mark_sharded(model.weight, 0, axis="tp", group=half, sizes=[1])
        model.weight._placement.shards[0].__dict__["sizes"] = (1, 1)
        checkpoint.save(tmp_path, 1, model)

    with pytest.raises(ValueError, match=r"model.weight: ranks hold 4 of 8 elements"):
        run_local(rank, ranks=2)


def test_an_untied_weight_gets_what_it_was_tied_to(tmp_path):
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    optimizer = torch.optim.Adam(tied.parameters())
    tied(torch.ones(3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path, 1, tied, optimizer)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    other = torch.optim.Adam(model.parameters())
    checkpoint.load(tmp_path / "step-00000001", model, other)
    for layer in model:
        assert torch.equal(layer.weight, tied[0].weight)
        assert torch.equal(other.state[layer.weight]["exp_avg"], optimizer.state[tied[0].weight]["exp_avg"])
