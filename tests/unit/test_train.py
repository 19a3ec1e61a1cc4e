"""The training command: the same run on any number of ranks, honest scores, what it writes, clear errors."""

import json

import numpy as np
import pytest
import torch

import commlayer
from commlayer import run_local
from models import arguments as command_line
from models import config as configuration
from models import results
from models.metrics import cell_weights, rivals, scores
from models.optimizer import learning_rate
from models.tasks.forecast import build_model, load_data
from models.train import main, train
from tests.training import SMALL, made_up, real, trainer_of

pytest.importorskip("h5py")
pytest.importorskip("iris_sample_data")

SHIPPED = ["demo", "moe_debug", "moe_deepseek_1b", "text_demo", "vit_era5", "vit_mp", "vit_synthetic"]


def test_any_number_of_ranks_trains_alike(tmp_path):
    config = real(tmp_path)
    data = load_data(config)
    assert len(data[0]) % 60 % 3, "the last batch was meant to be uneven"

    def rank():
        trainer = trainer_of(config, data)
        return train(trainer), {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    ((alone, serial),) = run_local(rank, ranks=1)
    for metrics, parameters in run_local(rank, ranks=3):
        assert metrics["history"][1]["loss"] == pytest.approx(alone["history"][1]["loss"], rel=1e-4)
        assert metrics["history"][1]["validation_loss"] == pytest.approx(
            alone["history"][1]["validation_loss"], rel=1e-4
        )
        assert metrics["rmse"] == pytest.approx(alone["rmse"], rel=1e-4)
        for name, p in parameters.items():
            torch.testing.assert_close(p, serial[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_scores_are_the_plain_formula(tmp_path):
    config = real(tmp_path)
    _, data = load_data(config)
    samples = [data[i] for i in range(len(data))]
    x, y = data.collate(samples)
    kelvin = data.denormalise(y).double()
    area = np.cos(np.deg2rad(data.latitudes))[:, None]
    area = torch.from_numpy(area / area.mean())
    history = x.unflatten(1, (-1, 1))
    last, recent = (data.denormalise(state).double() for state in (history[:, 0], history.mean(1)))
    forecasts = {"persistence": last, "climatology": data.climatology.double(), "mean of last 15": recent}
    squares = {name: ((forecast - kelvin) ** 2 * area).mean().item() for name, forecast in forecasts.items()}

    def rank():
        me = commlayer.world()
        mine = [data.collate(samples[i :: 4 * me.size]) for i in range(me.rank, 4 * me.size, me.size)]
        weights = cell_weights(data.latitudes)
        return scores(rivals(data, me.device), mine, data, weights, me)

    for found in run_local(rank, ranks=3):
        assert set(found) == set(squares)
        for name, score in found.items():
            assert score.rmse == pytest.approx([squares[name] ** 0.5], rel=1e-5)
            assert score.loss == pytest.approx(squares[name] / data.std.item() ** 2, rel=1e-5)  # one channel


def test_the_command_writes_its_results(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--config", "demo", "--output", str(out), *SMALL, "optimizer.lr=3e-3", "log_every=2"]
    assert main(options) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["skill"] == pytest.approx(1 - metrics["rmse"]["ViT"] / metrics["rmse"]["persistence"])
    assert metrics["skill"] > 0
    assert metrics["validation_loss"]["ViT"] < metrics["validation_loss"]["persistence"]
    assert [entry["step"] for entry in metrics["curve"]] == [2, 4, 5]
    marks = [metrics["memory_bytes"][name]["max"] for name in ("scaffold", "forward", "step")]
    assert 50e6 < marks[0] <= marks[1] <= marks[2]
    for name in ("loss.png", "forecast.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert configuration.load(str(out / "config.yaml")).optimizer.lr == 3e-3
    vit = build_model(real(out), load_data(real(out))[1])
    vit.load_state_dict(torch.load(out / "model.pt"))
    shown = capsys.readouterr().out
    for line in ("persistence", "climatology", "mean of last 15", "training samples/s", "GiB after forward"):
        assert line in shown


def test_the_whole_model_is_written_from_any_mesh(tmp_path):
    config = made_up(tmp_path, "steps=2", "mesh=tp=2")
    data = load_data(config)

    def rank():
        trainer = trainer_of(config, data)
        metrics = train(trainer)
        results.write(trainer, metrics)
        return trainer.task.forecast(data[1][0][0][None]), metrics["parameters"]

    (forecast, parameters), _ = run_local(rank, ranks=2)
    vit = build_model(config, data[0]).eval()
    vit.load_state_dict(torch.load(tmp_path / "model.pt"))
    torch.testing.assert_close(vit(data[1][0][0][None]), forecast, rtol=1e-4, atol=1e-5)
    assert parameters == sum(p.numel() for p in vit.parameters())


def test_tensorboard_gets_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = real(tmp_path, "log_every=2", "model.dropout=0.1", "amp=fp16")
    (metrics,) = run_local(lambda: train(trainer_of(config)), ranks=1)
    curves = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    def scalars(name):
        return [(event.step, event.value) for event in curves.Scalars(name)]

    for name, key in (("loss/training", "loss"), ("training/gradient norm", "gradient_norm")):
        assert scalars(name) == [(entry["step"], pytest.approx(entry[key])) for entry in metrics["curve"]]
    for name, key in (("loss/validation", "validation_loss"), ("RMSE/air_temperature [K]", "rmse")):
        assert scalars(name) == [(entry["step"], pytest.approx(entry[key])) for entry in metrics["history"]]
    assert [step for step, rate in scalars("training/samples per second") if rate > 0] == [2, 4, 5]
    assert scalars("training/loss scale") == [(step, 65536.0) for step in (2, 4, 5)]
    assert scalars("training/learning rate")[-1][1] == pytest.approx(3e-4 * (1 + np.cos(np.pi * 3 / 4)) / 2)


def test_without_skill_the_exit_status_says_so(tmp_path, capsys):
    options = ["--config", "demo", f"output={tmp_path}", *SMALL, "optimizer.lr=0", "require_skill=false"]
    assert main([*options, "--require-skill"]) == 1
    assert "does not beat persistence" in capsys.readouterr().err
    assert main(options) == 0


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
        ("save_every=-1", "save_every: must be at least 0, got -1"),
        ("optimizer.clip=-1", "optimizer.clip: must be at least 0, got -1"),
        ("batch=true", "batch: expected int, got True"),
        ("accumulate=0", "accumulate: must be at least 1, got 0"),
        ("amp=fp8", "amp: expected one of none, bf16, fp16, got 'fp8'"),
        ("context=tree", "context: expected one of ring, all_gather, ulysses, got 'tree'"),
        ("mesh=dp=1 ep=2", "mesh: the axes are dp, cp, tp; got 'ep' in 'dp=1 ep=2'"),
        ("mesh=dp=3", "mesh 'dp=3 cp=1 tp=1': the sizes make 3, which does not fit 1 ranks"),
        ("order=dp-tp", "order 'dp-tp': each of the axes dp, cp, tp must stand in it once"),
        ("data.source=csv", "data.source: expected one of netcdf, era5, synthetic, got 'csv'"),
        ("data.histroy=3", "unknown key 'data.histroy': did you mean 'history'?"),
        ("data.history=x", "data.history: expected int, got 'x'"),
        ("data={source: synthetic, grid: 9}", "data.grid: expected a list like [32, 64], got 9"),
        ("data={source: synthetic, samples: 0}", "samples: must be at least 1, got 0"),
        ("data.workers=-1", "workers, prefetch: at least 0 and 1, got -1 and 2"),
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


def test_settings_that_exclude_each_other(tmp_path, capsys):
    assert main(["--config", "demo", f"output={tmp_path}", "--compile", "model.dropout=0.1"]) == 2
    assert "compile: with model.dropout 0.1 it cannot be" in capsys.readouterr().err


def test_named_options_are_keys(tmp_path):
    mesh = ["--mesh", "dp=1 tp=1", "--order", "tp-cp-dp"]
    given = ["--config", "demo", "epochs=3", *mesh, "--amp", "bf16", "--compile", "amp=fp16", "--resume", "batch=4"]
    config = configuration.load(*command_line.parse(given))
    assert (config.epochs, config.mesh, config.order) == (3, "dp=1 tp=1", "tp-cp-dp")
    assert (config.amp, config.compile, config.resume, config.batch) == ("bf16", True, "auto", 4)
    assert configuration.load(*command_line.parse(["--resume", "runs/x"])).resume == "runs/x"
    assert configuration.load(*command_line.parse([])) == configuration.load("demo")


def test_wrong_configurations(tmp_path, capsys):
    assert main(["--config", "nowhere"]) == 2
    assert f"no shipped configuration of this name ({', '.join(SHIPPED)})" in capsys.readouterr().err
    assert main(["--config", "vit_era5"]) == 2
    assert "root: era5 is not a folder" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert main(["--config", str(tmp_path / "list.yaml")]) == 2
    assert "list.yaml: expected keys and values, got list" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("a: [")
    assert main(["--config", str(tmp_path / "broken.yaml")]) == 2
    assert "broken.yaml: not valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["demo", "moe_debug", "moe_deepseek_1b", "text_demo", "vit_era5", "vit_mp", "vit_synthetic"]
)
def test_shipped_configurations_are_read_and_written_back(name, tmp_path):
    config = configuration.load(name)
    assert config.name == name
    (tmp_path / "again.yaml").write_text(configuration.dump(config))
    assert configuration.load(str(tmp_path / "again.yaml")) == config


def test_shipped_configurations_follow_the_tutorial():
    for name, batch, lr in (("vit_era5", 16, 5e-4), ("vit_mp", 64, 1e-3)):
        config = configuration.load(name)
        assert config.batch == batch
        warm = learning_rate(config.optimizer, config.steps, config.batch)(round(0.05 * config.steps))
        assert warm == pytest.approx(lr)
