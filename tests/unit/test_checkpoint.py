"""Checkpoints of any layout load on any other; what is kept beside tensors; and what is refused."""

import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import commlayer
from commlayer import Mesh, run_local
from parallel import ColumnParallelLinear, DataParallel, RowParallelLinear, checkpoint, mark_sharded
from parallel.expert import MoE
from parallel.router import Routing
from tests.checkpoints import build, expected, filled, layouts, mesh_of

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=3)


@settings(max_examples=50, deadline=None)
@given(shapes=SHAPES, data=st.data())
def test_any_cut_loads_on_any_other(shapes, data):
    source, target = data.draw(layouts(shapes)), data.draw(layouts(shapes))
    stateless = data.draw(st.integers(0, len(shapes)))  # a parameter that has no state yet, or none such
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

    with tempfile.TemporaryDirectory() as folder:
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


def test_what_is_kept_beside_tensors(tmp_path):
    def rank():
        number = commlayer.world().rank
        model, optimizer = filled(3)
        shared, own = {"epoch": 2, "scheduler": {"last": [1.5]}}, {"rng": torch.arange(3) + number}
        checkpoint.save(tmp_path, 3, model, optimizer, shared=shared, own=own, about={"mesh": "dp=2", 1: (2, None)})
        loaded = checkpoint.load(tmp_path / "step-00000003", model, optimizer)
        assert loaded.step == 3
        assert loaded.shared == shared
        assert loaded.about == {"mesh": "dp=2", "1": [2, None]}
        assert torch.equal(loaded.own["rng"], own["rng"])

    run_local(rank, ranks=2)
    assert checkpoint.read_about(tmp_path / "step-00000003") == {"mesh": "dp=2", "1": [2, None]}


def test_buffers_are_those_of_rank_0(tmp_path):
    def rank():
        model = nn.BatchNorm1d(3)
        model.running_mean += commlayer.world().rank + 5
        checkpoint.save(tmp_path, 1, model)
        checkpoint.load(tmp_path / "step-00000001", model)
        return model.running_mean.tolist()

    assert run_local(rank, ranks=3) == [[5, 5, 5]] * 3


def test_background_saves_the_values_of_the_call(tmp_path):
    def rank():
        model, optimizer = filled(1)
        saving = checkpoint.save(tmp_path, 1, model, optimizer, shared={"step": 1}, background=True)
        with torch.no_grad():
            model.weight.zero_()
            optimizer.state[model.weight]["momentum_buffer"].zero_()
        again = checkpoint.save(tmp_path, 2, *filled(2), shared={"step": 2}, background=True)
        assert (tmp_path / "step-00000001").exists(), "a save waits for the one before"
        assert again.wait() == again.wait() == tmp_path / "step-00000002"
        assert saving.wait() == tmp_path / "step-00000001"
        fresh, _ = filled(-1)
        checkpoint.load(tmp_path / "step-00000001", fresh)
        assert torch.equal(fresh.weight, filled(1)[0].weight)

    run_local(rank, ranks=3)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("save")] == []


def test_a_save_that_nobody_waits_for_is_finished(tmp_path):
    run_local(lambda: checkpoint.save(tmp_path, 1, *filled(1), background=True) and None, ranks=3)
    for thread in threading.enumerate():
        if thread.name.startswith("save"):
            assert not thread.daemon
            thread.join(20)
    checkpoint.verify(tmp_path / "step-00000001")


def test_keep(tmp_path):
    for step in (1, 2, 3, 4, 10):
        checkpoint.save(tmp_path, step, *filled(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000010"]
    # A run that goes on from earlier: its own is not removed, whatever the others are.
    checkpoint.save(tmp_path, 3, *filled(3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_step_is_saved_again(tmp_path):
    for value in (1, 2):
        checkpoint.save(tmp_path, 5, *filled(value))
    model, _ = filled(0)
    checkpoint.load(tmp_path / "step-00000005", model)
    assert torch.equal(model.weight, filled(2)[0].weight)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("kind", ["missing", "left", "shape", "dtype", "optimizer", "groups", "unknown"])
def test_what_does_not_fit_is_named_before_anything_changes(tmp_path, kind):
    def rank():
        saved = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
        optimizer = torch.optim.SGD([{"params": saved[0].parameters(), "lr": 1.0}, {"params": saved[1].parameters()}])
        checkpoint.save(tmp_path, 1, saved, None if kind == "optimizer" else optimizer)
        model = {
            "missing": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)),
            "left": nn.Sequential(nn.Linear(2, 3), nn.Identity()),
            "shape": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)),
        }.get(kind, nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)))
        if kind == "dtype":
            model[0].weight = nn.Parameter(torch.ones(3, 2, dtype=torch.complex64))
        params = [*model.parameters(), *([nn.Parameter(torch.ones(2))] if kind == "unknown" else [])]
        other = torch.optim.SGD(params, lr=0.5)
        before = [param.clone() for param in model.parameters()]
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            checkpoint.load(tmp_path / "step-00000001", model, None if kind in ("left", "shape") else other)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert other.param_groups[0]["lr"] == 0.5
        return str(caught.value)

    first, second = run_local(rank, ranks=2)
    assert first == second
    assert {
        "missing": "model.2.weight: not in",
        "left": "has model.1.bias, for which there is no place here",
        "shape": "model.1.weight: [4, 3] here, but [3, 3] in",
        "dtype": "model.0.weight: torch.complex64 here, but torch.float32 in",
        "optimizer": "was saved without an optimizer",
        "groups": "0.weight and 1.weight are in group 0 here, but were saved with different values of lr: 1.0 and 0.0",
        "unknown": "a parameter of shape [2] that is not the model's",
    }[kind] in first


def test_what_cannot_be_saved_is_refused_on_all_ranks(tmp_path):
    def factored():
        model = nn.Linear(4, 2, bias=False)
        mark_sharded(model.weight, 0, axis="tp", group=commlayer.world(), sizes=[2] * commlayer.world().size)
        optimizer = torch.optim.SGD(model.parameters())
        optimizer.state[model.weight] = {"row": torch.ones(7)}
        return model, optimizer

    def rank():
        world = commlayer.world()
        texts = []
        for model, options in (
            ((nn.Linear(2 + world.rank, 2),), {}),
            (factored(), {}),
            ((nn.Linear(2, 2),), {"own": object() if world.rank else None}),
            ((nn.Linear(2, 2),), {"shared": threading.Lock()}),
            ((nn.Linear(2, 2),), {"about": {1, 2}}),
            ((nn.Linear(2, 2),), {"keep": 0}),
        ):
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                checkpoint.save(tmp_path, 1, *model, **options)
            texts.append(str(caught.value))
        return texts

    first, second = run_local(rank, ranks=2)
    assert first == second
    assert "model.weight: torch.float32 [2, 2] on one rank, torch.float32 [2, 3] on rank 1" in first[0]
    assert "optimizer: row of weight has the shape [7]" in first[1]
    assert first[2].startswith("rank 1: own: torch.load(weights_only=True) could not read it")
    assert first[3].startswith("rank 0: shared: ")
    assert first[4].startswith("about: not of JSON's types")
    assert first[5] == "keep: expected at least 1, got 0"
    assert list(tmp_path.iterdir()) == []


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


def test_without_verification_broken_files_are_still_errors(tmp_path):
    checkpoint.save(tmp_path, 1, *filled(1))
    (tmp_path / "step-00000001/__0_0.distcp").write_bytes(b"")
    with pytest.raises(ValueError, match="a file cannot be read"):
        checkpoint.load(tmp_path / "step-00000001", filled(0)[0], verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert checkpoint.last_good(tmp_path) is None
