"""The training command: the same run on any number of ranks, honest scores, clear errors."""

import copy
import json

import numpy as np
import pytest
import torch

import commlayer
from commlayer import run_local
from models import config as configuration
from models.metrics import cell_weights, rivals, rmse
from models.train import build_model, load_data, main, train

pytest.importorskip("h5py")
pytest.importorskip("iris_sample_data")

# Small, and nothing random but the start.
SMALL = ["epochs=1", "batch=60", "model.size=tiny", "model.drop_path=0", "data.split=2075"]


def config_for(folder, *overrides):
    return configuration.load("demo", [f"output={folder}", *SMALL, *overrides])


def test_any_number_of_ranks_trains_alike(tmp_path):
    config = config_for(tmp_path)
    data = load_data(config)
    start = build_model(config, data[0])
    assert len(data[0]) % 60 % 3, "the last batch was meant to be uneven"

    def rank():
        vit = copy.deepcopy(start)
        metrics = train(config, vit, *data, commlayer.world())
        return metrics, {name: p.detach().clone() for name, p in vit.named_parameters()}

    ((alone, serial),) = run_local(rank, ranks=1)
    for metrics, parameters in run_local(rank, ranks=3):
        assert metrics["history"][1]["loss"] == pytest.approx(alone["history"][1]["loss"], rel=1e-4)
        assert metrics["rmse"] == pytest.approx(alone["rmse"], rel=1e-4)
        for name, p in parameters.items():
            torch.testing.assert_close(p, serial[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_scores_are_the_plain_formula(tmp_path):
    config = config_for(tmp_path)
    _, data = load_data(config)
    samples = [data[i] for i in range(len(data))]
    x, y = data.collate(samples)
    kelvin = data.denormalise(y).double()
    area = np.cos(np.deg2rad(data.latitudes))[:, None]
    area = torch.from_numpy(area / area.mean())
    history = x.unflatten(1, (-1, 1))
    last, recent = (data.denormalise(state).double() for state in (history[:, 0], history.mean(1)))
    expected = {
        name: ((forecast - kelvin) ** 2 * area).mean().sqrt().item()
        for name, forecast in {
            "persistence": last,
            "climatology": data.climatology.double(),
            "mean of last 15": recent,
        }.items()
    }

    def rank():
        me = commlayer.world()
        mine = [data.collate(samples[i :: 4 * me.size]) for i in range(me.rank, 4 * me.size, me.size)]
        weights = cell_weights(data.latitudes)
        return rmse(rivals(data, me.device), mine, data, weights, me)

    for scores in run_local(rank, ranks=3):
        assert {name: value for name, (value,) in scores.items()} == pytest.approx(expected, rel=1e-5)


def test_the_command_writes_its_results(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--config", "demo", "--output", str(out), *SMALL, "optimizer.lr=3e-3"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["skill"] == pytest.approx(1 - metrics["rmse"]["ViT"] / metrics["rmse"]["persistence"])
    assert metrics["skill"] > 0
    for name in ("loss.png", "forecast.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert configuration.load(str(out / "config.yaml")).optimizer.lr == 3e-3
    vit = build_model(config_for(out), load_data(config_for(out))[1])
    vit.load_state_dict(torch.load(out / "model.pt"))
    shown = capsys.readouterr().out
    for line in ("persistence", "climatology", "mean of last 15", "training samples/s"):
        assert line in shown


def test_without_skill_the_exit_status_says_so(tmp_path, capsys):
    options = ["--config", "demo", f"output={tmp_path}", *SMALL, "optimizer.lr=0"]
    assert main([*options, "require_skill=true"]) == 1
    assert "does not beat persistence" in capsys.readouterr().err
    assert main([*options, "require_skill=false"]) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", "unknown key 'epoch': did you mean 'epochs'?"),
        ("optimizer.lrr=3", "unknown key 'optimizer.lrr': did you mean 'lr'?"),
        ("optimizer.lr=fast", "optimizer.lr: expected float, got 'fast'"),
        ("optimizer=3", "optimizer: expected a section of keys, got 3"),
        ("optimizer.betas=0.9", "optimizer.betas: expected a list like [0.9, 0.95], got 0.9"),
        ("name.first=x", "'name' in 'name.first' is not a section"),
        ("batch=0", "batch: must be at least 1, got 0"),
        ("batch=true", "batch: expected int, got True"),
        ("data.source=csv", "data.source: expected one of netcdf, era5, got 'csv'"),
        ("data.histroy=3", "unknown key 'data.histroy': did you mean 'history'?"),
        ("data.history=x", "data.history: expected int, got 'x'"),
        ("model.pach=4", "unknown key 'model.pach': did you mean 'patch'?"),
        ("model.size=big", "model.size: expected one of tiny"),
        ("model.heads=3", "heads: must divide embed 64, got 3"),
        ("variable=t2m", "variable: expected one of air_temperature, got 't2m'"),
        ("epochs", "override: expected key=value, got 'epochs'"),
    ],
)
def test_wrong_settings_are_named(override, message, capsys):
    assert main(["--config", "demo", override]) == 2
    assert message in capsys.readouterr().err


def test_wrong_configurations(tmp_path, capsys):
    assert main(["--config", "nowhere"]) == 2
    assert "no shipped configuration of this name (demo, vit_era5, vit_mp)" in capsys.readouterr().err
    assert main(["--config", "vit_era5"]) == 2
    assert "root: era5 is not a folder" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert main(["--config", str(tmp_path / "list.yaml")]) == 2
    assert "list.yaml: expected keys and values, got list" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("a: [")
    assert main(["--config", str(tmp_path / "broken.yaml")]) == 2
    assert "broken.yaml: not valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo", "vit_era5", "vit_mp"])
def test_shipped_configurations_are_read_and_written_back(name, tmp_path):
    config = configuration.load(name)
    assert config.name == name
    (tmp_path / "again.yaml").write_text(configuration.dump(config))
    assert configuration.load(str(tmp_path / "again.yaml")) == config
