"""ZeRO on thread ranks: losses, gradients and parameters are those of a serial run in float64."""

from dataclasses import replace

import pytest
import torch

import commlayer
from commlayer import Mesh, run_local
from tests.contracts.tensor import drawn
from tests.contracts.zero import (
    Net,
    Plain,
    Task,
    adagrad,
    adamw,
    check,
    compare,
    parallel,
    serial,
    sgd,
    train,
    whole,
    wrap,
)

STAGES = (1, 2, 3)
OPTIMIZERS = {"AdamW": adamw, "SGD": sgd, "Adagrad": adagrad}
TINY, SMALL, LARGE = 1e-6, 6e-4, 25.0  # MiB: a bucket per parameter, a few, one
SHORT = Task(Net, steps=3)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("stage", [0, *STAGES])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_serial_run(stage, name):
    check(Task(Net, optimizer=OPTIMIZERS[name], schedule=True), stage, bucket_mb=SMALL)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_offload_changes_no_number(offload, name, tmp_path):
    folder = {"folder": tmp_path} if offload == "disk" else {}
    check(Task(Net, optimizer=OPTIMIZERS[name], steps=3, schedule=True), *STAGES, offload=offload, **folder)
    assert not list(tmp_path.iterdir()), "files stay behind"


@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
@pytest.mark.parametrize("replicas", [2, 4])
def test_hybrid(replicas, offload, tmp_path):
    folder = {"folder": tmp_path} if offload == "disk" else {}
    check(replace(SHORT, clip=0.01, optimizer=sgd), *STAGES, replicas=replicas, offload=offload, **folder)


@pytest.mark.parametrize("stage", [0, *STAGES])
def test_clipping_to_the_norm_of_the_whole_model(stage):
    """With SGD: Adam would hide a gradient of the wrong scale."""
    check(Task(Net, optimizer=sgd, clip=0.05, steps=3), stage, bucket_mb=SMALL)


@pytest.mark.parametrize("no_sync", [False, True])
@pytest.mark.parametrize("stage", [0, *STAGES])
def test_accumulation(stage, no_sync):
    check(Task(Net, optimizer=sgd, micro=3, no_sync=no_sync, clip=0.05, steps=2), stage, bucket_mb=SMALL)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("no_sync", [False, True])
def test_accumulation_where_gradients_go_elsewhere(no_sync, replicas, tmp_path):
    task = Task(Net, optimizer=sgd, micro=3, no_sync=no_sync, steps=2)
    check(task, *STAGES, replicas=replicas, offload="disk", folder=tmp_path)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_other_numbers_of_ranks(ranks):
    check(replace(SHORT, ranks=ranks), *STAGES)


@pytest.mark.parametrize("disable", ["reduce_scatter", "all_gather,reduce_scatter", "all_reduce,all_gather"])
def test_on_emulated_collectives(disable):
    check(SHORT, *STAGES, layer={"disable": disable}, bucket_mb=SMALL)


@pytest.mark.parametrize("stage", [1, 2])
def test_trap_13_the_result_does_not_depend_on_the_bucket_size(stage):
    """But for the order in which a backend adds up: that of rank r begins with rank r + 1."""
    vectors = []

    def rank(bucket_mb):
        count = lambda model, step: vectors.append(len(model.flats))  # noqa: E731
        return parallel(replace(SHORT, ranks=3), stage, bucket_mb=bucket_mb, inspect=count)

    runs = [run_local(lambda mb=mb: rank(mb), ranks=3)[0] for mb in (TINY, SMALL, LARGE)]
    assert len(set(vectors)) == 3
    for run in runs[1:]:
        compare(run, runs[0], {"rtol": 1e-12, "atol": 1e-13})


def test_all_ranks_have_the_same_bits():
    def rank():
        found = []
        for stage in STAGES:
            trace = parallel(SHORT, stage)
            found.append(trace.params | {f"{name} of step {i}": g for i, g in enumerate(trace.losses) for name in "l"})
        return found

    first, *others = run_local(rank, ranks=4)
    for other in others:
        for mine, theirs in zip(other, first, strict=True):
            assert_same(mine, theirs)


def test_a_mesh_of_data_ranks_is_a_group():
    def rank():
        mesh = Mesh("dp=4")
        compare(parallel(replace(SHORT, clip=0.05), 2, mesh=mesh), serial(replace(SHORT, clip=0.05))[1])
        compare(parallel(SHORT, 3, group=commlayer.world()), serial(SHORT)[1])

    run_local(rank, ranks=4)


@pytest.mark.parametrize("stage", STAGES)
def test_the_module_has_what_the_pieces_have(stage):
    """In stages 1 and 2 after every step, in stage 3 inside of gathered()."""

    def inspect(model, step):
        pieces = {name: whole(p, p) for name, p in model.named_parameters()}
        with model.gathered():
            assert_same({n: p.detach().clone() for n, p in model.module.named_parameters()}, pieces)
        if stage < 3:
            assert_same({n: p.detach().clone() for n, p in model.module.named_parameters()}, pieces)

    run_local(lambda: parallel(SHORT, stage, inspect=inspect, bucket_mb=SMALL), ranks=4)


@pytest.mark.parametrize("stage", STAGES)
def test_pieces(stage):
    """Vectors under the names of the module, tied ones once, each element on one rank; no parameter of the module."""

    def rank():
        net = drawn(Net)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer = adamw(net)
        model = wrap(net, optimizer, stage)
        named = dict(model.named_parameters())
        assert list(named) == list(before)
        assert [*model.parameters()] == [*named.values()]
        ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert ours == {id(p) for p in named.values() if p.requires_grad}
        for name, p in named.items():
            assert isinstance(p, torch.nn.Parameter)
            assert p.requires_grad == (not name.startswith(("frozen", "index")))
            if stage == 3 or p.requires_grad:
                assert p.ndim == 1
                total = commlayer.all_reduce(torch.tensor(p.numel()))
                assert total == before[name].numel()
        assert_same({name: whole(p, p) for name, p in named.items()}, before)
        sizes = [p.numel() for p in named.values()]
        return sum(sizes)

    sizes = run_local(rank, ranks=4)
    frozen = sum(p.numel() for p in Net().parameters() if not p.requires_grad)
    total = sum(p.numel() for p in Net().parameters()) + (3 * frozen if stage < 3 else 0)
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) < 0.2 * total, sizes


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_that_has_made_steps_goes_on(stage):
    """Its state is cut, too."""
    task = Task(Plain, steps=3)

    def begun():
        model = drawn(Plain)
        optimizer = adamw(model)
        for step in range(2):
            optimizer.zero_grad()
            sum(task.loss(model, 100 + step, r, 0) for r in range(4)).backward()
            optimizer.step()
        return model, optimizer

    expected = train(task, *begun())

    def rank():
        model, optimizer = begun()
        model = wrap(model, optimizer, stage)
        compare(train(task, model, optimizer, commlayer.world().rank), expected)

    run_local(rank, ranks=4)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.05, eps=1e-4, amsgrad=True),
        lambda p: torch.optim.NAdam(p, lr=0.05, eps=1e-4),
        lambda p: torch.optim.RAdam(p, lr=0.05, eps=1e-4),
        lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-4, momentum=0.5, centered=True),
        lambda p: torch.optim.Adadelta(p, lr=0.5, eps=1e-4),
        lambda p: torch.optim.Adamax(p, lr=0.05, eps=1e-4),
        lambda p: torch.optim.ASGD(p, lr=0.05),
        lambda p: torch.optim.Rprop(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.05, eps=1e-4, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.05, eps=1e-4, fused=True),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.05), eps=1e-4, maximize=True, weight_decay=0.3),
    ],
)
def test_every_elementwise_optimizer_of_torch(make):
    check(Task(Plain, optimizer=lambda m: make(m.parameters()), steps=3), 1, 3, bucket_mb=SMALL)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_of_model_and_optimizer(stage, set_to_none):
    """Either forgets all gradients, those under no_sync too."""
    task = replace(SHORT, make=Plain)

    def rank():
        me = commlayer.world().rank
        net = drawn(Plain)
        optimizer = sgd(net)
        model = wrap(net, optimizer, stage)

        def grads():
            task.loss(model, 0, me, 0).backward()
            found = {name: whole(p.grad, p) for name, p in model.named_parameters()}
            return found

        expected = grads()
        for forget in (model.zero_grad, optimizer.zero_grad):
            with model.no_sync():
                task.loss(model, 5, me, 0).backward()
            forget(set_to_none=set_to_none)
            for p in model.parameters():
                assert p.grad is None if set_to_none else not p.grad.any()
            assert_same(grads(), expected)

    run_local(rank, ranks=4)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_kept_over_several_backwards_add_up(stage):
    """Without zero_grad between steps, as in a serial run."""
    task = replace(SHORT, make=Plain)

    def steps(model, optimizer, ranks, gain):
        found = []
        for step in range(3):
            for r in ranks:
                (task.loss(model, step, r, 0) * gain).backward()
            optimizer.step()
            found.append({name: whole(p.grad, p) for name, p in model.named_parameters()})
        return found

    net = drawn(Plain)
    expected = steps(net, sgd(net), range(4), 1)

    def rank():
        net = drawn(Plain)
        optimizer = sgd(net)
        model = wrap(net, optimizer, stage)
        for mine, theirs in zip(steps(model, optimizer, [commlayer.world().rank], 4), expected, strict=True):
            for name, grad in theirs.items():
                torch.testing.assert_close(mine[name], grad, rtol=1e-10, atol=1e-12)

    run_local(rank, ranks=4)


@pytest.mark.parametrize("stage", STAGES)
def test_refresh_takes_over_pieces_that_were_changed(stage):
    def rank():
        net = drawn(Plain)
        model = wrap(net, sgd(net), stage)
        x = torch.ones(2, 5, dtype=torch.float64)
        model(x)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
        model.refresh()
        expected = drawn(Plain)
        with torch.no_grad():
            for p in expected.parameters():
                p.mul_(2)
        torch.testing.assert_close(model(x), expected(x))

    run_local(rank, ranks=3)
