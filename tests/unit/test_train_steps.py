"""Single steps of the trainer, against a plain loop of torch's own parts on one process."""

import copy
import signal
import subprocess

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import commlayer
from commlayer import run_local
from models.config import Optimizer
from models.data.loading import Feed
from models.data.sampling import ShardedBatches
from models.mean import Mean
from models.metrics import cell_weights
from models.optimizer import learning_rate
from models.tasks.forecast import build_model, load_data
from models.train import train
from tests.training import made_up, run, trainer_of


def plain_loop(config, data, steps):
    """Whole batches, torch's AdamW one parameter at a time, torch's clipping: parameters, losses, gradient norms."""
    vit, weights = build_model(config, data).train(), cell_weights(data.latitudes)
    settings, every = config.optimizer, list(vit.named_parameters())
    flat = [p for name, p in every if p.ndim < 2 or name == "position"]
    groups = [{"params": [p for _, p in every if all(p is not q for q in flat)]}, {"params": flat, "weight_decay": 0}]
    adam = torch.optim.AdamW(
        groups, lr=0.0, betas=tuple(settings.betas), weight_decay=settings.weight_decay, foreach=False
    )
    rate = learning_rate(settings, steps, config.batch)
    losses, norms = [], []
    shares = ShardedBatches(len(data), config.batch, seed=config.seed)
    shares.set_epoch(1)
    for step, indices in zip(range(steps), shares, strict=False):
        x, y = data.collate([data[i] for i in indices])
        loss = ((vit(x) - y).square() * weights).mean()
        adam.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(vit.parameters(), settings.clip).item())
        for group in adam.param_groups:
            group["lr"] = rate(step)
        adam.step()
        losses.append(loss.item())
    return {name: p.detach() for name, p in every}, losses, norms


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("ranks", [1, 3])
def test_micro_batches_and_ranks_make_one_batch(tmp_path, ranks, accumulate):
    # Steps of 8 and 6 samples: on 3 ranks in 3 micro-batches each has 0 or 1 of them.
    settings = ["batch=8", "steps=2", f"accumulate={accumulate}"]
    settings += ["optimizer.lr=1e-2", "optimizer.warmup=1", "optimizer.clip=0.05"]
    config = made_up(tmp_path, *settings)
    data = load_data(config)
    expected, losses, norms = plain_loop(config, data[0], steps=2)
    assert min(norms) > 0.05, "the norm was meant to be clipped"

    def rank():
        trainer = trainer_of(config, data)
        assert trainer.optimizer.defaults["fused"]
        steps, found = trainer.feed.steps_from(0), []
        for _ in range(2):
            size, micro_batches = next(steps)
            norm = trainer.train_step(micro_batches, size).item()
            found.append((trainer.recent_loss.take(), norm))
        return found, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    for found, parameters in run_local(rank, ranks=ranks):
        assert found == [pytest.approx(pair, rel=1e-5) for pair in zip(losses, norms, strict=True)]
        for name, p in parameters.items():
            torch.testing.assert_close(p, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("dp=2 tp=2", []),
        ("tp=4", ["sequence_parallel=true", "model.heads=4"]),
        ("cp=4", ["context=all_gather"]),
        ("cp=2 tp=2", ["recompute=true", "order=cp-tp-dp"]),
    ],
)
def test_the_curve_of_any_mesh_is_that_of_one_process(tmp_path, mesh, options):
    config = made_up(tmp_path, "batch=5", "accumulate=2", "steps=3", "log_every=1", f"mesh={mesh}", *options)
    data = load_data(config)
    _, losses, norms = plain_loop(config, data[0], steps=3)

    def rank():
        trainer = trainer_of(config, data)
        return [(entry["loss"], entry["gradient_norm"]) for entry in train(trainer)["curve"]]

    curves = run_local(rank, ranks=4)
    assert curves == [curves[0]] * 4
    assert curves[0] == [pytest.approx(pair, rel=1e-4) for pair in zip(losses, norms, strict=True)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch looks at it
def test_compiled_blocks_train_alike(tmp_path, monkeypatch):
    """Also where blocks are more, each with its own rate of DropPath, than torch makes graphs for by default."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, backend="aot_eager", **how))

    @torch._dynamo.config.patch(recompile_limit=1)
    def steps(compile):
        settings = ["batch=7", "model.drop_path=0.3", "recompute=true", f"compile={compile}"]
        trainer = trainer_of(made_up(tmp_path, *settings))
        return [
            (trainer.train_step(micro_batches, size).item(), trainer.recent_loss.take())
            for _, (size, micro_batches) in zip(range(2), trainer.feed.steps_from(0), strict=False)
        ]

    (plain,) = run_local(lambda: steps(False), ranks=1)
    before = counters["stats"]["unique_graphs"]
    (compiled,) = run_local(lambda: steps(True), ranks=1)
    assert counters["stats"]["unique_graphs"] == before + 2
    assert compiled == [pytest.approx(pair, rel=1e-5) for pair in plain]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns_as_well(tmp_path, amp):
    def losses(amp):
        trainer = trainer_of(made_up(tmp_path, "batch=7", "epochs=8", f"amp={amp}", "optimizer.lr=3e-3"))
        steps, found = trainer.feed.steps_from(0), []
        while trainer.step < trainer.steps:
            size, micro_batches = next(steps)
            trainer.train_step(micro_batches, size)
            found.append(trainer.recent_loss.take())
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        return found

    for mixed, full in run_local(lambda: (losses(amp), losses("none")), ranks=2):
        assert mixed != full
        assert mixed == pytest.approx(full, rel=0.02)
        assert mixed[-1] < 0.5 * mixed[0]


def test_a_step_that_overflows_anywhere_is_skipped_everywhere(tmp_path):
    config = made_up(tmp_path, "amp=fp16", "batch=7")

    def rank():
        trainer = trainer_of(config)
        before = copy.deepcopy(trainer.model.state_dict())
        (size, micro_batches), samples = next(trainer.feed.steps_from(0)), []
        for x, y in micro_batches:
            samples.append((x, y + torch.inf * (commlayer.world().rank == 1)))
        trainer.train_step(samples, size)
        unchanged = all(torch.equal(p, before[name]) for name, p in trainer.model.state_dict().items())
        return unchanged, trainer.scaler.get_scale(), trainer.step

    assert run_local(rank, ranks=2) == [(True, 32768.0, 1)] * 2


def test_the_learning_rate():
    settings = Optimizer(lr=2.0, warmup=0.2, final=0.1)
    rate = learning_rate(settings, steps=10, batch=64)
    assert [rate(step) for step in (0, 1, 2)] == pytest.approx([1.0, 2.0, 2.0])
    assert rate(6) == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rate(10) == rate(11) == pytest.approx(0.2)
    scaled = learning_rate(Optimizer(lr=2.0, warmup=0.2, final=0.1, reference_batch=16), steps=10, batch=64)
    assert [scaled(step) for step in range(11)] == pytest.approx([2 * rate(step) for step in range(11)])


def test_ranks_that_share_a_model_see_the_same_samples(tmp_path):
    config = made_up(tmp_path, "batch=4", "mesh=cp=2 dp=2", "order=cp-dp-tp")

    def rank():
        return [x for x, _ in trainer_of(config).feed]

    (a, b, c, d) = run_local(rank, ranks=4)
    for x, y in ((a, b), (c, d)):
        assert all(map(torch.equal, x, y))
    for x, y in zip(a, c, strict=True):
        assert not torch.equal(x, y)


@pytest.mark.parametrize(("samples", "size", "accumulate"), [(7, 2, 2), (9, 4, 3), (3, 2, 4), (8, 1, 3)])
def test_sizes_of_micro_batches_over_all_ranks(samples, size, accumulate):
    ranks = [ShardedBatches(samples, samples, rank=rank, size=size, accumulate=accumulate) for rank in range(size)]
    counted = [sum(map(len, together)) for together in zip(*ranks, strict=True)]
    assert ranks[0].micro_sizes(samples) == counted


def test_means_over_ranks_and_steps():
    def rank():
        me, mean = commlayer.world(), Mean(commlayer.world())
        mean.add(torch.tensor(float(me.rank)), 2)
        mean.add(torch.tensor(10.0), 4)
        first = mean.take()
        mean.add(torch.tensor(3.0), 3)
        return first, mean.take()

    assert run_local(rank, ranks=3) == [((0 + 1 + 2 + 30) / 6, 3.0)] * 3


def test_workers_read_the_same_batches_wherever_a_run_goes_on(tmp_path):
    data, _ = load_data(made_up(tmp_path))

    def first(count, start, workers):
        shares = ShardedBatches(len(data), 6, rank=1, size=2, accumulate=2, seed=4)
        steps = Feed(data, shares, torch.device("cpu"), workers=workers).steps_from(start)
        return [(size, list(micro_batches)) for _, (size, micro_batches) in zip(range(count), steps, strict=False)]

    before = torch.get_rng_state()
    whole = first(7, 0, workers=0)  # of 3 steps an epoch
    assert torch.equal(torch.get_rng_state(), before), "took numbers that the model would have drawn"
    assert [size for size, _ in whole] == [6, 6, 2, 6, 6, 2, 6]
    assert {len(micro_batches) for _, micro_batches in whole} == {2}
    for start, workers in ((0, 1), (4, 0), (5, 2), (3, 1)):
        again = first(7 - start, start, workers)
        for (size, batches), (expected_size, expected) in zip(again, whole[start:], strict=True):
            assert size == expected_size
            for (x, y), (expected_x, expected_y) in zip(batches, expected, strict=True):
                assert torch.equal(x, expected_x)
                assert torch.equal(y, expected_y)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS does not say who sent a signal")
def test_workers_obey_only_the_trainer(tmp_path):
    data, _ = load_data(made_up(tmp_path))
    feed = Feed(data, ShardedBatches(len(data), 2), torch.device("cpu"), workers=1, prefetch=1)
    steps = feed.steps_from(0)
    list(next(steps)[1])
    (worker,) = feed._loader._iterator._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    for _ in range(20):
        size, micro_batches = next(steps)
        assert sum(len(x) for x, _ in micro_batches) == size
    assert worker.is_alive()
    worker.terminate()  # as the end of the interpreter does
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch looks at it
@pytest.mark.parametrize("zero", [0, 3])
def test_compiled_blocks_learn_the_same(tmp_path, zero):
    """Validated before they are trained, as the command does."""
    losses = []
    for compiled in ("false", "true"):
        config = made_up(tmp_path / compiled, "batch=5", "epochs=1", f"zero={zero}", f"compile={compiled}")
        losses.append([entry["loss"] for entry in run_local(lambda config=config: run(config), ranks=1)[0]["curve"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
