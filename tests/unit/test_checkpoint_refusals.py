"""What cannot be saved, and what does not fit, is refused on all ranks before anything changes."""

import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

import commlayer
from commlayer import run_local
from parallel import checkpoint, mark_sharded
from parallel.checkpoint.rest import Rest
from parallel.checkpoint.targets import Saved
from tests.checkpoints import filled


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


def test_without_verification_broken_files_are_still_errors(tmp_path):
    checkpoint.save(tmp_path, 1, *filled(1))
    (tmp_path / "step-00000001/__0_0.distcp").write_bytes(b"")
    with pytest.raises(ValueError, match="a file cannot be read"):
        checkpoint.load(tmp_path / "step-00000001", filled(0)[0], verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert checkpoint.last_good(tmp_path) is None


def test_the_index_is_not_searched_for_each_name():
    """Ten thousand experts have as many names."""

    class Searched(dict):
        times = 0

        def values(self):
            self.times += 1
            return super().values()

    found = Searched({f"model.{i}": ("model", str(i)) for i in range(100)})
    saved = Saved(Path(), Metadata({}, planner_data=found), Rest(tied={"a": "b"}))
    assert [saved.source(str(i)) for i in range(100)] == [str(i) for i in range(100)]
    assert saved.source("a") == "b"
    assert found.times == 1
