"""Whole models out of and into any layout: state dicts, safetensors, and what plain torch reads of a checkpoint."""

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import commlayer
from commlayer import Mesh, run_local
from parallel import ColumnParallelLinear, DataParallel, RowParallelLinear, checkpoint
from parallel.placement import gather_full
from tests.checkpoints import build, expected, layouts, mesh_of

MESHES = ("dp=1 tp=1", "dp=3 tp=1", "dp=1 tp=3", "dp=2 tp=2")


class Plain(nn.Module):
    """Two layers, a norm with buffers, and a weight with two names."""

    def __init__(self, up=None, down=None):
        super().__init__()
        self.up, self.down = up or nn.Linear(4, 7), down or nn.Linear(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, x):
        return self.last(self.norm(self.down(torch.tanh(self.up(self.first(x))))))


def parallel(spec, seed=0):
    torch.manual_seed(seed)
    mesh = Mesh(spec)
    layers = ColumnParallelLinear(4, 7, group=mesh["tp"]), RowParallelLinear(7, 4, group=mesh["tp"])
    return DataParallel(Plain(*layers), mesh=mesh)


def trained(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(torch.linspace(-1, 1, 12).view(3, 4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def over(spec, work):
    return run_local(work, ranks=Mesh(spec).world_size)


@pytest.mark.parametrize("spec", MESHES)
def test_the_whole_model_is_that_of_the_plain_module(spec):
    def rank():
        model, _ = trained(parallel(spec))
        return checkpoint.full_state_dict(model)

    found, *others = over(spec, rank)
    assert others == [None] * len(others)
    plain = Plain()
    plain.load_state_dict(found)  # strictly
    assert found.keys() == plain.state_dict().keys()
    assert found["first.weight"] is found["last.weight"]
    for target in MESHES:

        def taker(to=target):
            model = parallel(to, seed=1)
            checkpoint.load_full_state_dict(model, plain.state_dict())
            return checkpoint.full_state_dict(model)

        same(over(target, taker)[0], found)


@pytest.mark.parametrize("spec", MESHES)
def test_safetensors_there_and_back(tmp_path, spec):
    path = tmp_path / "model.safetensors"

    def rank():
        model, _ = trained(parallel(spec))
        checkpoint.export_safetensors(model, path)
        return checkpoint.full_state_dict(model)

    whole = over(spec, rank)[0]
    plain = Plain()
    plain.load_state_dict(load_file(path))
    same(plain.state_dict(), whole)
    # As others write them: with one name for what is tied.
    save_file({name: value for name, value in plain.state_dict().items() if name != "first.weight"}, path)
    for target in MESHES:

        def taker(to=target):
            model = parallel(to, seed=1)
            checkpoint.import_safetensors(model, path)
            return checkpoint.full_state_dict(model)

        same(over(target, taker)[0], whole)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@settings(max_examples=30, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=3), data=st.data())
def test_any_cut_gives_and_takes_whole_models(tmp_path_factory, shapes, data):
    layout = data.draw(layouts(shapes))
    wholes = [np.arange(np.prod(shape, dtype=int), dtype=float).reshape(shape) for shape in shapes]
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"

    def rank():
        mesh = mesh_of(layout)
        model = build(layout, wholes, mesh)
        found = checkpoint.full_state_dict(model)
        checkpoint.export_safetensors(model, path)
        for take in (checkpoint.import_safetensors, lambda m, p: checkpoint.load_full_state_dict(m, load_file(p))):
            empty = build(layout, [np.full_like(whole, np.nan) for whole in wholes], mesh)
            take(empty, path)
            for whole, cut, param in zip(wholes, layout.cuts, empty.parameters(), strict=True):
                np.testing.assert_array_equal(param.detach().numpy(), expected(whole, cut, mesh))
        return found

    found = run_local(rank, ranks=layout.ranks)[0]
    for index, whole in enumerate(wholes):
        np.testing.assert_array_equal(found[f"{index}.weight"].numpy(), whole)


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    state = Plain().state_dict()
    path = tmp_path / "model.safetensors"

    def rank():
        model = parallel("dp=1 tp=2")
        before = {name: param.clone() for name, param in model.module.named_parameters()}
        texts = []
        for wrong in (
            {name: value for name, value in state.items() if name != "norm.weight"},
            {**state, "more": torch.ones(2)},
            {**state, "up.weight": torch.ones(8, 4)},
            {**state, "up.weight": torch.ones(7, 4, dtype=torch.complex64)},
            {**state, "norm.num_batches_tracked": torch.tensor(1.5)},
            {**state, "last.weight": state["first.weight"] + 1},
        ):
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                checkpoint.load_full_state_dict(model, wrong)
            texts.append(str(caught.value))
            commlayer.barrier()
            if commlayer.world().rank == 0:
                save_file({name: value.clone() for name, value in wrong.items()}, path)
            commlayer.barrier()
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                checkpoint.import_safetensors(model, path)
            assert str(caught.value) == texts[-1]
        same(dict(model.module.named_parameters()), before)
        return texts

    expected_texts = [
        "norm.weight: missing",
        "more: there is no place for it here",
        "up.weight: [7, 4] here, but [8, 4] there",
        "up.weight: torch.float32 here, but torch.complex64 there",
        "norm.num_batches_tracked: torch.int64 here, but torch.float32 there",
        "first.weight and last.weight are one parameter here, but have different values there",
    ]
    assert run_local(rank, ranks=2) == [expected_texts] * 2
    path.write_bytes(b"no such file")
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read"):
        checkpoint.import_safetensors(Plain(), path)
    with pytest.raises(OSError, match="was not written"):
        checkpoint.export_safetensors(Plain(), tmp_path / "nowhere/model.safetensors")


def test_a_tied_weight_of_no_numbers_is_tied_all_the_same():
    state = {name: value * torch.nan for name, value in Plain().state_dict().items()}
    state["norm.num_batches_tracked"] = torch.tensor(3)
    model = Plain()
    checkpoint.load_full_state_dict(model, state)
    assert model.last.weight.isnan().all()


def test_plain_torch_reads_a_checkpoint(tmp_path):
    def rank():
        model, optimizer = trained(parallel("dp=2 tp=2"))
        checkpoint.save(tmp_path, 1, model, optimizer)
        named = model.module.named_parameters()
        averages = {name: gather_full(optimizer.state[param]["exp_avg"], param) for name, param in named}
        return checkpoint.full_state_dict(model), averages

    whole, averages = run_local(rank, ranks=4)[0]
    kept = {name: value for name, value in whole.items() if name != "last.weight"}

    plain = Plain()
    state = {"model": {name: torch.zeros_like(value) for name, value in plain.state_dict().items() if name in kept}}
    with pytest.warns(UserWarning, match="to load in a single process"):
        dcp.load(state, checkpoint_id=tmp_path / "step-00000001", no_dist=True)
    same(state["model"], kept)

    dcp_to_torch_save(tmp_path / "step-00000001", tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    same(found["model"], kept)
    states = found["optimizer"]["state"]
    assert states.keys() == dict(plain.named_parameters()).keys()
    same({name: state["exp_avg"] for name, state in states.items()}, averages)
    assert states["up.weight"]["step"] == 1

    checkpoint.checkpoint_to_safetensors(tmp_path / "step-00000001", tmp_path / "model.safetensors")
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    same(plain.state_dict(), whole)
