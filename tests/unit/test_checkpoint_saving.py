"""Saving: what is kept beside tensors, in the background, and beside others that save in the same folder."""

import threading

import torch
from torch import nn

import commlayer
from commlayer import run_local
from parallel import checkpoint
from parallel.checkpoint import files
from parallel.checkpoint.writing import PENDING
from tests.checkpoints import filled


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
        assert commlayer.world() not in PENDING
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


def test_a_step_is_saved_again(tmp_path):
    for value in (1, 2):
        checkpoint.save(tmp_path, 5, *filled(value))
    model, _ = filled(0)
    checkpoint.load(tmp_path / "step-00000005", model)
    assert torch.equal(model.weight, filled(2)[0].weight)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_what_others_are_writing_is_left_alone(tmp_path):
    one, two = files.make_aside(tmp_path, 1), files.make_aside(tmp_path, 2)
    assert one.exists()
    files.release(one)  # as the end of the process would
    three = files.make_aside(tmp_path, 3)
    assert [path.exists() for path in (one, two, three)] == [False, True, True]
    assert files.publish(two, tmp_path, 2) == tmp_path / "step-00000002"
    files.discard(three)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    files.release(two)


def test_groups_save_in_one_folder(tmp_path):
    def rank():
        world = commlayer.world()
        half = world.split(world.rank // 2, 0)
        for step in range(1, 6):
            own = 10 * step + world.rank // 2
            checkpoint.save(tmp_path, own, *filled(own), shared={"step": own}, group=half, background=True)
        PENDING[half].wait()

    run_local(rank, ranks=4)
    assert len(list(tmp_path.iterdir())) == 10
    for path in tmp_path.iterdir():
        checkpoint.verify(path)
