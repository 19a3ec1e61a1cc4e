"""Checkpoints: a run that was broken off anywhere and resumed is the uninterrupted one, bit for bit."""

import json
import os
import shutil
import signal

import pytest
import torch

import commlayer
from commlayer import Mesh, run_local
from models.setup import find_checkpoint
from models.train import STOPPED, main
from models.trainer import Trainer
from parallel import checkpoint
from parallel.checkpoint import files
from tests.training import MADE_UP, made_up, run, same, state_of, trainer_of

# Three steps an epoch, the last one uneven; everything that draws numbers or keeps a state takes part.
RUN = [
    "batch=5",
    "epochs=3",
    "log_every=5",
    "keep=9",
    "model.drop_path=0.5",
    "accumulate=2",
    "optimizer.lr=3e-3",
]


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        # Dropout inside of attention needs a rank to itself: threads share torch's default generator.
        ("dp=1", ["model.dropout=0.1"]),
        ("dp=1", ["model.dropout=0.1", "amp=fp16", "recompute=true"]),
        ("dp=2", ["amp=bf16"]),
        ("dp=2 tp=2", ["amp=fp16", "sequence_parallel=true"]),
        ("cp=2 tp=2", ["recompute=true"]),
        ("dp=2", ["amp=bf16", "zero=1"]),
        ("dp=2", ["amp=fp16", "zero=2", "offload=cpu"]),
        ("dp=2 tp=2", ["zero=3", "sequence_parallel=true", "recompute=true"]),
        ("dp=2", ["zero=3", "amp=bf16", "offload=disk", "replicas=2"]),
    ],
)
def test_resumed_is_uninterrupted(tmp_path, mesh, options):
    ranks = Mesh(mesh).world_size
    overrides = [*RUN, f"mesh={mesh}", *options, "save_every=4"]
    whole = run_local(lambda: run(made_up(tmp_path / "whole", *overrides)), ranks=ranks)
    # Step 4 is in the middle of the second epoch, and 8 in that of the third.
    for step in (4, 8):
        resumed = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / f"whole/checkpoints/step-{step:08}", resumed / f"checkpoints/step-{step:08}")
        again = run_local(lambda to=resumed: run(made_up(to, *overrides, "resume=auto")), ranks=ranks)
        for key in ("history", "curve", "rmse", "validation_loss"):
            assert same([metrics[key] for metrics in again], [metrics[key] for metrics in whole]), key
        for rank in range(ranks):
            assert same(state_of(tmp_path / "whole", 9, rank), state_of(resumed, 9, rank)), f"rank {rank}"


def test_the_scale_of_the_loss_goes_on(tmp_path):
    overrides = [*RUN, "amp=fp16"]

    def rank():
        trainer = trainer_of(made_up(tmp_path, *overrides))
        trainer.scaler.scale(torch.zeros(()))  # makes the scale
        trainer.scaler.update(512.0)
        trainer.save()
        again = trainer_of(made_up(tmp_path, *overrides))
        again.resume(checkpoint.last_good(tmp_path / "checkpoints"))
        return again.scaler.get_scale()

    assert run_local(rank, ranks=2) == [512.0] * 2


def test_sigterm_saves_and_the_next_try_goes_on(tmp_path, monkeypatch, capsys):
    """The command, and a signal in step 4; it is looked for whenever something is logged, as after step 5."""
    options = ["--config", "vit_synthetic", *MADE_UP, *RUN, "model.dropout=0.1", "data.workers=1"]
    assert main([*options, "--output", str(tmp_path / "whole")]) == 0
    step, before = Trainer.train_step, signal.getsignal(signal.SIGTERM)

    def interrupted(self, *arguments):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    options += ["--output", str(tmp_path / "broken"), "--resume"]
    assert main(options) == STOPPED
    assert signal.getsignal(signal.SIGTERM) is before
    assert "SIGTERM: saved step 5 of 9" in capsys.readouterr().out
    assert not (tmp_path / "broken/metrics.json").exists()
    monkeypatch.setattr(Trainer, "train_step", step)
    assert main(options) == 0
    assert "from step 5" in capsys.readouterr().out
    whole, resumed = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "broken"))
    assert whole["history"] == resumed["history"]
    assert same(whole["curve"], resumed["curve"])
    models = [torch.load(tmp_path / name / "model.pt") for name in ("whole", "broken")]
    assert same(*models)


def test_a_finished_run_resumed_only_writes_its_results_again(tmp_path):
    overrides = [*RUN, "save_every=9"]
    (first,) = run_local(lambda: run(made_up(tmp_path, *overrides)), ranks=1)
    (again,) = run_local(lambda: run(made_up(tmp_path, *overrides, "resume=auto")), ranks=1)
    for key in ("history", "curve", "rmse", "validation_loss", "samples_per_second"):
        assert first[key] == again[key]


def test_a_crash_while_writing_leaves_the_previous_one(tmp_path, monkeypatch):
    overrides = [*RUN, "save_every=2"]
    real = files.write

    def full_disk(path, data):
        if path.name == "own-00001.pt" and "step-00000004" in str(path):
            raise OSError("No space left on device")
        real(path, data)

    monkeypatch.setattr(files, "write", full_disk)
    with pytest.raises(OSError, match=r"step-00000004 was not saved: rank 1: OSError: No space left"):
        run_local(lambda: run(made_up(tmp_path, *overrides)), ranks=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.setattr(files, "write", real)
    metrics = run_local(lambda: run(made_up(tmp_path, *overrides, "resume=auto")), ranks=2)
    assert metrics[0]["history"][-1]["step"] == 9
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [f"step-{step:08}" for step in (2, 4, 6, 8, 9)]


def test_the_newest_stay(tmp_path):
    overrides = [*RUN, "save_every=2", "keep=2"]
    run_local(lambda: run(made_up(tmp_path, *overrides)), ranks=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000008", "step-00000009"]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of one rank; what the command says to whoever wants to go on from it."""
    run_local(lambda: trainer_of(made_up(tmp_path / "a", *RUN)).save(), ranks=1)
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=1e-4"], "step-00000000 belongs to another run: optimizer.lr is 0.0001 here and 0.003 there"),
        (["batch=6"], "belongs to another run: batch is 6 here and 5 there"),
        (["data.samples=15"], "belongs to another run: data.samples is 15 here and 14 there"),
        (["resume=''"], "is there from an earlier run; go on from it with --resume, choose another output"),
        (["resume=nowhere"], "resume: no checkpoint in nowhere"),
    ],
)
def test_another_run_is_not_gone_on_from(saved, overrides, message):
    config = made_up(saved, *RUN, "resume=auto", *overrides)
    with pytest.raises(ValueError, match=message):
        run_local(lambda: find_checkpoint(config, commlayer.world()), ranks=1)


def test_what_may_differ(saved, tmp_path):
    free = ["log_every=1", "save_every=3", "validate_every=2", "keep=1", "data.workers=1", "name=other"]
    free += ["mesh=dp=2", "zero=3", "replicas=2", "recompute=full", "order=dp-tp-cp"]

    def found(*options):
        config = made_up(tmp_path / "b", *options)
        return run_local(lambda: find_checkpoint(config, commlayer.world()), ranks=2)

    for resume in (f"resume={saved}", f"resume={saved}/checkpoints/step-00000000"):
        assert [path.name for path in found(*RUN, *free, resume)] == ["step-00000000"] * 2
    assert found("resume=auto") == [None, None]


def test_damaged_checkpoints(saved):
    folder = saved / "checkpoints/step-00000000"
    config = made_up(saved, *RUN, "resume=auto")
    (folder / "shared.pt").write_bytes((folder / "shared.pt").read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"skipped a broken checkpoint: .*shared\.pt"):
        assert run_local(lambda: find_checkpoint(config, commlayer.world()), ranks=1) == [None]
    config = made_up(saved, *RUN, f"resume={folder}")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match=r"shared\.pt"):
        run_local(lambda: find_checkpoint(config, commlayer.world()), ranks=1)
