"""Language models in the trainer: the same run on any mesh, what is counted, exact resume, what it writes, errors."""

import json
import math
import shutil

import pytest
import torch
from torch import nn

import commlayer
from commlayer import Mesh, run_local
from models import config as configuration
from models import devices, results
from models.data.sampling import ShardedBatches
from models.optimizer import adamw, learning_rate
from models.tasks.language import build_model, load_data
from models.train import main, train
from parallel.router import TopKRouter
from tests.training import TINY, language, run, same, state_of, trainer_of

# Biases of routers move, nothing is balanced by a loss.
BIASED = ["model.routing.balance_loss=0", "model.routing.z_loss=0", "model.routing.bias_rate=0.01"]


def plain_loop(config, steps, ranks):
    """On one process, the micro-batches of ``ranks``, all losses written out.

    Returns the losses and norms of gradients of each step, in nats per token, and the loss of validation at the end.
    """
    data, validation = load_data(config)
    model = build_model(config).train()
    adam = adamw(model, config.optimizer)
    rate = learning_rate(config.optimizer, config.steps, config.batch)
    shares = ShardedBatches(len(data), config.batch, seed=config.seed)
    shares.set_epoch(1)
    losses, norms = [], []
    for step, indices in zip(range(steps), shares, strict=False):
        adam.zero_grad()
        counts, total = 0, 0.0
        for micro in range(config.accumulate):
            mine = [data[i] for n, i in enumerate(indices) if n // ranks % config.accumulate == micro]
            output = model(*data.collate(mine))
            loss = output.loss / (16 * len(indices))
            total += loss.item()
            for load in output.loads:
                loss = loss + load.loss * len(mine) / len(indices)
                counts += load.counts
            loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip).item())
        for group in adam.param_groups:
            group["lr"] = rate(step)
        adam.step()
        if output.loads:
            model.blocks[1].moe.router.balance(counts)
        losses.append(total)
    ids, targets = validation.collate([validation[i] for i in range(len(validation))])
    with torch.no_grad():
        return losses, norms, model.eval()(ids, targets).loss.item() / targets.numel()


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("dp=1", []),
        ("dp=2 tp=2", ["experts=ep=4", "recompute=selective"]),
        ("dp=2 cp=2", ["experts=ep=2 etp=2"]),
        ("tp=4", ["experts=ep=2", "sequence_parallel=true", "recompute=full"]),
        ("dp=4", ["accumulate=3", "experts=ep=2"]),  # a step of 5: some ranks have nothing to bring
        ("dp=2", [*BIASED, "accumulate=2", "experts=ep=2"]),
        ("dp=2", ["model.size=tiny-dense", "accumulate=2"]),
    ],
)
def test_the_curve_of_any_mesh_is_that_of_one_process(tmp_path, mesh, options):
    config, ranks = language(tmp_path, f"mesh={mesh}", *options), Mesh(mesh).world_size
    losses, norms, validated = plain_loop(config, steps=3, ranks=Mesh(mesh).sizes.get("dp", 1))

    def rank():
        metrics = train(trainer_of(config))
        curve = [(entry["loss"], entry["gradient_norm"]) for entry in metrics["curve"]]
        return curve, metrics["validation_loss"]["LM"]

    found = run_local(rank, ranks=ranks)
    assert found == [found[0]] * ranks
    curve, loss = found[0]
    assert curve == [pytest.approx(pair, rel=1e-4) for pair in zip(losses, norms, strict=True)]
    assert loss == pytest.approx(validated, rel=1e-4)


def test_micro_batches_make_the_same_step(tmp_path):
    """Where no loss looks at a micro-batch as a whole: gradient by gradient."""
    configs = [language(tmp_path, *BIASED, f"accumulate={count}", "optimizer.clip=0") for count in (1, 2)]

    def gradients(config):
        trainer = trainer_of(config)
        size, micro_batches = next(trainer.feed.steps_from(0))
        trainer.train_step(micro_batches, size)
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    for whole, parts in run_local(lambda: [gradients(config) for config in configs], ranks=2):
        for name, expected in whole.items():
            torch.testing.assert_close(parts[name], expected, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("dp=2", [*BIASED, "experts=ep=2"]),
        ("dp=2", ["model.routing.capacity_factor=0.8", "amp=fp16", "recompute=full"]),
        ("cp=2 tp=2", [*BIASED, "experts=ep=2 etp=2", "model.routing.score=sigmoid", "amp=bf16"]),
    ],
)
def test_resumed_is_uninterrupted(tmp_path, mesh, options):
    ranks = Mesh(mesh).world_size
    overrides = [f"mesh={mesh}", *options, "steps=6", "validate_steps=3", "accumulate=2", "save_every=2", "keep=9"]
    config = language(tmp_path, *overrides)
    whole = run_local(lambda: run(config), ranks=ranks)
    resumed = tmp_path / "resumed"
    for step in (2, 4):  # a validation is due after 3 and 6
        shutil.rmtree(resumed, ignore_errors=True)
        shutil.copytree(tmp_path / f"checkpoints/step-{step:08}", resumed / f"checkpoints/step-{step:08}")
        again = run_local(lambda: run(language(tmp_path, *overrides, "resume=auto", f"output={resumed}")), ranks=ranks)
        for key in ("history", "curve", "bits_per_byte", "experts"):
            assert same([metrics[key] for metrics in again], [metrics[key] for metrics in whole]), key
        for rank in range(ranks):
            assert same(state_of(tmp_path, 6, rank), state_of(resumed, 6, rank)), f"rank {rank}"
    model = state_of(tmp_path, 6, 0)["model"]
    assert "blocks.1.moe.router.bias" not in model or model["blocks.1.moe.router.bias"].any()


def test_checkpoints_do_not_depend_on_where_experts_are(tmp_path):
    for experts in ("ep=1", "ep=2"):
        config = language(tmp_path / experts, f"experts={experts}")
        run_local(lambda config=config: trainer_of(config).save(), ranks=2)
    one, two = (state_of(tmp_path / experts, 0, 0)["model"] for experts in ("ep=1", "ep=2"))
    assert one["blocks.1.moe.experts.up"].any()
    assert same(one, two)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["mesh=dp=2", "zero=3"], ["mesh=dp=1"]),
        (["mesh=dp=1"], ["mesh=dp=4", "zero=2", "replicas=2", "experts=ep=2"]),
        (["mesh=dp=2", "zero=1", "experts=ep=2"], ["mesh=cp=2 tp=2", "experts=ep=2 etp=2", "sequence_parallel=true"]),
        (["mesh=cp=2 tp=2"], ["mesh=dp=2 tp=2", "zero=3", "recompute=full", "offload=disk"]),
    ],
)
def test_a_run_goes_on_from_any_other_layout(tmp_path, first, then):
    """As if nothing had been: to rounding, which few steps do not let grow."""

    def metrics(name, *overrides):
        config = language(tmp_path / name, *BIASED, "steps=4", "save_every=2", "keep=9", *overrides)
        return run_local(lambda: run(config), ranks=Mesh(config.mesh).world_size)[0]

    whole = metrics("whole", *first)
    shutil.copytree(tmp_path / "whole/checkpoints/step-00000002", tmp_path / "then/checkpoints/step-00000002")
    moved = metrics("then", *then, "resume=auto", f"data.root={tmp_path / 'whole/text'}")
    assert [entry["step"] for entry in moved["curve"]] == [1, 2, 3, 4]
    for key in ("loss", "gradient_norm"):
        expected = [entry[key] for entry in whole["curve"]]
        assert [entry[key] for entry in moved["curve"]] == pytest.approx(expected, rel=2e-4), key
    assert moved["bits_per_byte"]["LM"] == pytest.approx(whole["bits_per_byte"]["LM"], rel=2e-4)


def test_loads_are_plain_counts(tmp_path, monkeypatch):
    """Of the steps between two validations, without what validation itself and recomputation route."""
    options = ["model.routing.capacity_factor=0.9", "accumulate=2", "recompute=full", "mesh=dp=2", "experts=ep=2"]
    config = language(tmp_path, *options, "steps=4")
    chosen = {rank: [] for rank in range(2)}
    choose = TopKRouter.choose

    def noted(self, scores):
        experts = choose(self, scores)
        if self.training:
            chosen[commlayer.world().rank].append(experts.flatten())
        return experts

    monkeypatch.setattr(TopKRouter, "choose", noted)
    metrics = run_local(lambda: train(trainer_of(config)), ranks=2)
    assert len(chosen[0]) == len(chosen[1]) == 8, "a layer, four steps of two micro-batches"
    counts = torch.stack(
        [torch.cat([mine, theirs]).bincount(minlength=4) for mine, theirs in zip(*chosen.values(), strict=True)]
    )
    capacity = torch.ceil(0.9 * counts.sum(1, keepdim=True) / 4)
    dropped = (counts - capacity).clamp(min=0).sum(1)
    for found in metrics:
        assert found["experts"]["load"] == {"layer 1": counts[4:].sum(0).tolist()}
        assert found["experts"]["dropped"] == [dropped[4:].sum()]
        for entry, steps in zip(found["history"][1:], (slice(0, 4), slice(4, 8)), strict=True):
            total = counts[steps].sum(0).double()
            assert entry["busiest_over_mean"] == [pytest.approx((total.max() / total.mean()).item())]
            assert entry["drop_rate"] == pytest.approx((dropped[steps].sum() / total.sum()).item())
            assert entry["drop_rate"] > 0
        assert "drop_rate" not in found["history"][0]


def test_what_is_counted(tmp_path):
    """Bits per byte, of the model and its rivals, prediction by prediction."""
    config = language(tmp_path, "mesh=dp=3", "experts=ep=1")

    def rank():
        trainer = trainer_of(config)
        return train(trainer), trainer.model.state_dict()

    ((metrics, state), *_) = run_local(rank, ranks=3)
    _, data = load_data(config)
    serial = build_model(config).eval()
    serial.load_state_dict(state)
    with torch.no_grad():
        logits = torch.cat([serial(data[i][0][None]) for i in range(len(data))]).double()
    targets = torch.stack([data[i][1] for i in range(len(data))])
    bits = -logits.log_softmax(-1).gather(2, targets[..., None]).mean().item() / math.log(2)
    assert metrics["bits_per_byte"]["LM"] == pytest.approx(bits, rel=1e-5)
    assert metrics["skill"] == pytest.approx(1 - bits / metrics["bits_per_byte"]["byte bigram"], rel=1e-4)


def test_the_command_writes_its_results(tmp_path, capsys):
    out = tmp_path / "out"
    config = language(tmp_path, "steps=80", "validate_steps=40", "batch=16")
    (tmp_path / "config.yaml").write_text(configuration.dump(config))
    options = ["--config", str(tmp_path / "config.yaml"), "--output", str(out), "--experts", "ep=1"]
    assert main([*options, "optimizer.lr=1e-2"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["bits_per_byte"]["LM"] < metrics["bits_per_byte"]["byte bigram"]
    assert [entry["step"] for entry in metrics["history"]] == [0, 40, 80]
    assert metrics["peak_source"] == "measured: matrix products in fp32"
    speed = metrics["tokens_per_second"] * metrics["flops_per_token"]
    assert metrics["mfu"] == pytest.approx(speed / metrics["peak_flops"])
    assert metrics["memory_bytes"]["step"]["max"] > 50e6
    for name in ("loss.png", "load.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "── the model goes on ──" in (out / "sample.txt").read_text(encoding="utf-8")
    model = build_model(config)
    model.load_state_dict(torch.load(out / "model.pt"))
    shown = capsys.readouterr().out
    for text in ("byte unigram", "bits per byte (bigram ", "0.0% dropped", "training tokens/s, MFU ", "step 40  loss"):
        assert text in shown
    options[3] = str(tmp_path / "bad")
    assert main([*options, "optimizer.lr=0", "steps=1", "--require-skill"]) == 1
    assert "the model does not beat the byte bigram" in capsys.readouterr().err


def test_the_whole_model_is_written_from_any_mesh(tmp_path):
    config = language(tmp_path, "steps=1", "mesh=tp=2", "experts=ep=2")

    def rank():
        trainer = trainer_of(config)
        results.write(trainer, train(trainer))
        ids = trainer.task.validation[0][0][None]
        with torch.no_grad():
            return ids, trainer.model(ids)

    (ids, logits), _ = run_local(rank, ranks=2)
    model = build_model(config).eval()
    model.load_state_dict(torch.load(tmp_path / "model.pt"))
    torch.testing.assert_close(model(ids), logits, rtol=1e-4, atol=1e-5)


def test_tensorboard_gets_the_loads(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (metrics,) = run_local(lambda: train(trainer_of(language(tmp_path))), ranks=1)
    curves = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    last = curves.Histograms("experts/layer 1")[-1]
    assert last.step == 3
    assert last.histogram_value.bucket == metrics["experts"]["load"]["layer 1"]
    bits = [(event.step, event.value) for event in curves.Scalars("validation/bits per byte")]
    assert bits == [(entry["step"], pytest.approx(entry["bits_per_byte"])) for entry in metrics["history"]]
    assert len(curves.Scalars("training/mfu")) == 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch looks at it
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_train_alike(tmp_path, monkeypatch, recompute):
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, backend="aot_eager", **how))
    config = language(tmp_path, f"recompute={recompute}")
    (plain,) = run_local(lambda: train(trainer_of(config)), ranks=1)
    config = language(tmp_path, f"recompute={recompute}", "compile=true")
    (compiled,) = run_local(lambda: train(trainer_of(config)), ranks=1)
    assert [e["loss"] for e in compiled["curve"]] == pytest.approx([e["loss"] for e in plain["curve"]], rel=1e-5)


def test_the_peak_is_that_of_all_ranks(monkeypatch):
    rates = iter([1e9, 3e9])
    monkeypatch.setattr(devices, "_measured", lambda *_: next(rates))
    found = run_local(lambda: devices.peak("fp32", commlayer.world()), ranks=2)
    assert found == [devices.Peak(4e9, "measured: matrix products in fp32")] * 2


@pytest.mark.parametrize(
    ("name", "precision", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "tf32", 378e12),
        ("NVIDIA GH200 480GB", "fp32", 66.9e12),
        ("AMD Instinct MI250X", "tf32", 47.9e12),
        ("NVIDIA T4", "fp16", 0.0),
    ],
)
def test_peaks_by_the_name_of_a_device(monkeypatch, name, precision, rate):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert devices._listed(torch.device("cuda", 0), precision) == (name, rate)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experts=ep=3"], "does not fit 1 ranks"),
        (["experts=tp=1"], "fold 'tp=1': the axes may be etp, ep and edp"),
        (["model.size=tiny-dense", "experts=ep=1"], "experts: size tiny-dense has none to spread, got 'ep=1'"),
        (["model.size=huge"], "model.size: expected one of tiny"),
        (["model.vocab_size=256"], "model.vocab_size: bytes and the end of a document make 257, got 256"),
        (["model.routing.topk=1"], "unknown key 'model.routing.topk': did you mean 'top_k'?"),
        (["model.routing.top_k=9"], "top_k: expected 1 to 4, the number of experts, got 9"),
        (["data.sequence=4"], "unknown key 'data.sequence'"),
        (["data.root=nowhere"], "root: nowhere is not a folder"),
        (["variable=t2m"], "variable: is for task forecast, and this is language; got 't2m'"),
        (["task=speech"], "task: expected one of forecast, language, got 'speech'"),
        (["recompute=some"], "recompute: expected one of none, selective, full, got 'some'"),
        (["validate_steps=-1"], "validate_steps: must be at least 0, got -1"),
    ],
)
def test_wrong_settings_are_named(tmp_path, capsys, overrides, message):
    language(tmp_path)  # makes the text
    small = [f"output={tmp_path}", f"data.root={tmp_path / 'text'}", *TINY]
    assert main(["--config", "text_demo", *small, *overrides]) == 2
    assert message in capsys.readouterr().err


def test_settings_of_the_other_task(tmp_path, capsys):
    assert main(["--config", "demo", f"output={tmp_path}", "--experts", "ep=1"]) == 2
    assert "experts: is for task language, and this is forecast; got 'ep=1'" in capsys.readouterr().err
    assert main(["--config", "demo", f"output={tmp_path}", "recompute=selective"]) == 2
    assert "recompute: the ViT knows none, full, got 'selective'" in capsys.readouterr().err
    for given, expected in (("yes", "full"), ("false", "none"), ("selective", "selective")):
        assert configuration.load("text_demo", [f"recompute={given}"]).recompute == expected
