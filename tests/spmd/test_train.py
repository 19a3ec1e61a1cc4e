"""The trainer on processes: a signal to one rank stops all of them, and the resumed run is the uninterrupted one."""

import os
import signal

import pytest
import torch

import commlayer
from models import arguments
from models.train import set_up, train
from models.trainer import Trainer
from tests.training import MADE_UP, TINY, small_text

pytest.importorskip("yaml")


FORECAST = ["--config", "vit_synthetic", *MADE_UP, "batch=9", "epochs=2", "model.dropout=0.1", "model.drop_path=0.2"]
LANGUAGE = ["--config", "text_demo", *TINY, "batch=9", "steps=4", "validate_steps=2", "model.routing.bias_rate=0.01"]


@pytest.mark.parametrize("task", ["forecast", "language"])
def test_resumed_after_sigterm_on_one_rank(task, everyone, shared_folder, monkeypatch):
    tp = 2 if everyone.size % 2 == 0 else 1
    options = ["--mesh", f"dp=-1 tp={tp}", "log_every=1"]
    if everyone.rank == 0:
        small_text(shared_folder)
    commlayer.barrier(group=everyone)
    language = [*LANGUAGE, f"data.root={shared_folder / 'text'}", "--experts", f"ep={min(everyone.size, 4)}"]
    options += FORECAST if task == "forecast" else language

    def run(name, *more):
        trainer = set_up(arguments.parse([*options, "--output", str(shared_folder / name), *more]), everyone)
        return train(trainer), [p.detach().clone() for p in trainer.model.parameters()]

    whole, expected = run("whole")
    step = Trainer.train_step

    def interrupted(self, *given):
        if self.step == 1 and everyone.rank == everyone.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert run("broken")[0] is None
    assert os.listdir(shared_folder / "broken/checkpoints") == ["step-00000002"]
    resumed, parameters = run("broken", "--resume")
    assert [e["loss"] for e in resumed["curve"]] == [e["loss"] for e in whole["curve"]]
    assert resumed["history"] == whole["history"]
    assert all(map(torch.equal, parameters, expected))
