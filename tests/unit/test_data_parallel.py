"""DataParallel on thread ranks: gradients against a serial float64 model on all ranks' samples together."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import commlayer
from commlayer import AVG, CommError, Group, UnsupportedOperation, run_local
from parallel.buckets import Bucket, Reduction
from parallel.data import DataParallel

TINY, LARGE = 1e-6, 25.0  # MiB: a bucket per parameter, and one for all


def batch(sizes):
    """Inputs and targets of all ranks, and this rank's slice."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 5, generator=generator, dtype=torch.float64)
    y = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    start = sum(sizes[: commlayer.world().rank])
    return x, y, slice(start, start + sizes[commlayer.world().rank])


class Net(nn.Module):
    """A bit of everything: frozen, tied and zero-size parameters, a buffer, a non-contiguous weight."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7)
        self.tied = nn.Linear(7, 7, bias=False)
        self.again = nn.Linear(7, 7)
        self.again.weight = self.tied.weight
        self.norm = nn.LayerNorm(7)
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.strided = nn.Parameter(torch.empty(3, 7).t())
        self.register_buffer("shift", torch.ones(7))
        self.double()
        for p in self.parameters():
            p.data.normal_(generator=generator)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(self.again(torch.tanh(self.tied(self.frozen(self.first(x))))))
        return (self.norm(h) * self.scale + self.shift + self.empty.sum()) @ self.strided


def loss_of(model, x, y, count, ranks=1):
    return (model(x) - y).square().sum() * ranks / count


def serial_gradients(x, y, net=None):
    net = net or Net()
    loss_of(net, x, y, len(x)).backward()
    return gradients(net)


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert (got[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(
                got[name], grad.to(got[name].dtype), msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )


CLOSE = {"rtol": 1e-12, "atol": 1e-13}


@pytest.mark.parametrize("bucket_mb", [TINY, 5e-4, LARGE])
@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [3, 1, 0, 2], [1, 4], [0, 0, 5]])
def test_gradients_equal_the_serial_ones_on_uneven_batches(sizes, bucket_mb):
    def rank():
        x, y, mine = batch(sizes)
        model = DataParallel(Net(), bucket_mb=bucket_mb)
        loss_of(model, x[mine], y[mine], len(x), len(sizes)).backward()
        assert_same(gradients(model.module), serial_gradients(x, y), **CLOSE)
        assert model.module.frozen.weight.grad is None
        assert model.module.empty.grad.shape == (0, 4)
        return gradients(model.module)

    first, *others = run_local(rank, ranks=len(sizes))
    for other in others:
        assert_same(other, first, rtol=0, atol=0)


def test_trap_13_the_bucket_size_does_not_change_a_bit():
    def rank(bucket_mb):
        x, y, mine = batch([3, 1, 2])
        model = DataParallel(Net().float(), bucket_mb=bucket_mb)
        loss_of(model, x[mine].float(), y[mine].float(), len(x), 3).backward()
        return gradients(model.module), len(model._buckets)

    runs = [run_local(lambda mb=mb: rank(mb), ranks=3)[0] for mb in (TINY, 3e-4, LARGE)]
    assert len({buckets for _, buckets in runs}) == 3, "the sizes must differ in their number of buckets"
    for grads, _ in runs[1:]:
        assert_same(grads, runs[0][0], rtol=0, atol=0)


def test_trap_13_the_reduction_waits_for_the_streams_that_made_the_gradients(monkeypatch):
    class Stream:
        def __init__(self):
            self.waited_for = []

        def wait_stream(self, other):
            self.waited_for.append(other)

    main, side, other = Stream(), Stream(), Stream()
    named = [(name, nn.Parameter(torch.zeros(2))) for name in "abc"]
    bucket = Bucket(named, Reduction(Group.alone(), AVG))
    bucket.flat = SimpleNamespace(device=torch.device("cuda", 0))  # as if it were there
    for slot, stream in zip(bucket.slots, (side, main, other), strict=True):
        slot.param.grad = torch.ones(2)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device, stream=stream: stream)
        bucket.mark_ready(slot)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: main)
    bucket.collect()
    assert set(main.waited_for) == {side, other}
    assert not side.waited_for
    assert not other.waited_for


@pytest.mark.parametrize("disable", ["all_reduce:avg", "all_reduce"])
def test_on_emulated_reductions(disable):
    def rank():
        x, y, mine = batch([3, 1, 2])
        model = DataParallel(Net(), bucket_mb=5e-4)
        loss_of(model, x[mine], y[mine], len(x), 3).backward()
        assert_same(gradients(model.module), serial_gradients(x, y), **CLOSE)

    run_local(rank, ranks=3, disable=disable)


class Branches(nn.Module):
    """Uses the branches it is told to, in that order."""

    def __init__(self, count=4):
        super().__init__()
        # Of different sizes, so that reductions that do not belong together would not fit.
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 4 + i, dtype=torch.float64), nn.Linear(4 + i, 3, dtype=torch.float64))
            for i in range(count)
        )

    def forward(self, x, order):
        return sum(self.branches[i](x) for i in order)


@pytest.mark.parametrize("bucket_mb", [TINY, 4e-4, LARGE])
def test_parameters_unused_on_some_ranks_and_on_all(bucket_mb):
    torch.manual_seed(0)
    net = Branches()
    # Branch 3 is used by nobody in the first step, and by rank 1 alone in the second.
    steps = [[[0], [1, 0], [2]], [[2, 1], [3], [0, 1, 2]]]

    def rank():
        x, y, mine = batch([2, 2, 2])
        model = DataParallel(copy.deepcopy(net), bucket_mb=bucket_mb)
        reference = copy.deepcopy(net)
        for orders in steps:
            for m in (model, reference):
                m.zero_grad()
            order = orders[model.group.rank]
            ((model(x[mine], order) - y[mine]).square().sum() * 3 / 6).backward()
            for r, order in enumerate(orders):
                part = slice(2 * r, 2 * r + 2)
                ((reference(x[part], order) - y[part]).square().sum() / 6).backward()
            assert_same(gradients(model.module), gradients(reference), **CLOSE)

    run_local(rank, ranks=3)


@pytest.mark.parametrize("bucket_mb", [TINY, LARGE])
def test_gradients_ready_in_another_order_on_every_rank(bucket_mb):
    torch.manual_seed(0)
    net = Branches()

    def rank():
        x, y, mine = batch([2, 1, 3])
        me = commlayer.world().rank
        order = [(i + me) % 4 for i in range(4)]
        model = DataParallel(copy.deepcopy(net), bucket_mb=bucket_mb)
        ((model(x[mine], order) - y[mine]).square().sum() * 3 / 6).backward()
        reference = copy.deepcopy(net)
        ((reference(x, range(4)) - y).square().sum() / 6).backward()
        assert_same(gradients(model.module), gradients(reference), **CLOSE)

    run_local(rank, ranks=3)


def test_no_sync_accumulates_locally_and_the_next_backward_averages_the_sum():
    def rank():
        x, y, mine = batch([3, 2])
        model = DataParallel(Net(), bucket_mb=5e-4)
        alone = Net()
        half = mine.start + 1
        pieces = [slice(mine.start, half), slice(half, mine.stop)]
        with model.no_sync():
            loss_of(model, x[pieces[0]], y[pieces[0]], len(x), 2).backward()
        loss_of(alone, x[pieces[0]], y[pieces[0]], len(x), 2).backward()
        assert_same(gradients(model.module), gradients(alone), **CLOSE)
        loss_of(model, x[pieces[1]], y[pieces[1]], len(x), 2).backward()
        assert_same(gradients(model.module), serial_gradients(x, y), **CLOSE)

    run_local(rank, ranks=2)


def test_gradient_accumulated_under_no_sync_only_is_not_lost():
    torch.manual_seed(0)
    net = Branches(2)

    def rank():
        x, _, mine = batch([2, 2])
        model, reference = DataParallel(copy.deepcopy(net)), copy.deepcopy(net)
        with model.no_sync():  # branch 0: only here, and on rank 1 only
            if model.group.rank == 1:
                model(x[mine], [0]).square().sum().backward()
        model(x[mine], [1]).square().sum().backward()
        reference(x[2:], [0]).square().sum().div(2).backward()
        reference(x, [1]).square().sum().div(2).backward()
        assert_same(gradients(model.module), gradients(reference), **CLOSE)

    run_local(rank, ranks=2)


def test_gradients_set_by_hand_are_averaged_too():
    torch.manual_seed(0)
    net = Branches(3)

    def rank():
        model = DataParallel(copy.deepcopy(net))
        if model.group.rank == 0:
            bias = model.module.branches[2][0].bias
            bias.grad = torch.full_like(bias, 3.0)
        model(batch([1, 1])[0], [0]).sum().backward()
        assert (model.module.branches[2][0].bias.grad == 1.5).all()
        assert model.module.branches[1][0].bias.grad is None

    run_local(rank, ranks=2)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_training_follows_the_serial_run(set_to_none):
    def rank():
        x, y, mine = batch([3, 1, 2])
        model, serial = DataParallel(Net(), bucket_mb=5e-4), Net()
        flats = [bucket.flat.untyped_storage().data_ptr() for bucket in model._buckets]
        for m, part, ranks in ((model, mine, 3), (serial, slice(None), 1)):
            optimizer = torch.optim.AdamW(m.parameters(), lr=0.05)
            for _ in range(4):
                optimizer.zero_grad(set_to_none=set_to_none)
                loss_of(m, x[part], y[part], len(x), ranks).backward()
                optimizer.step()
        for (name, p), q in zip(model.module.named_parameters(), serial.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
            if p.grad is not None:
                assert p.grad.untyped_storage().data_ptr() in flats, f"{name}: grad is no view of a bucket"
        return {name: p.detach().clone() for name, p in model.module.named_parameters()}

    first, *others = run_local(rank, ranks=3)
    for other in others:
        assert_same(other, first, rtol=0, atol=0)


def test_starts_from_the_state_of_rank_0():
    def rank():
        me = commlayer.world().rank
        net = nn.Sequential(Net(seed=me), nn.BatchNorm1d(3, dtype=torch.float64))
        net[1].running_mean.fill_(me)
        net[1].num_batches_tracked.fill_(7 + me)
        return DataParallel(net, bucket_mb=TINY).module.state_dict()

    first, *others = run_local(rank, ranks=3)
    assert first["1.num_batches_tracked"] == 7
    for other in others:
        assert_same(other, first, rtol=0, atol=0)


@pytest.mark.parametrize("sync", [True, False])
def test_buffers_follow_rank_0_in_training(sync):
    def rank():
        model = DataParallel(nn.BatchNorm1d(2, momentum=1.0), sync_buffers=sync)
        x = torch.tensor([[0.0, 1.0], [2.0, 3.0]]) + 10 * model.group.rank
        model(x).sum().backward()
        before = model.module.running_mean.clone()
        model.eval()(x)
        evaluated = model.module.running_mean.clone()
        model.module.momentum = 0.0  # the next forward keeps what it finds
        model.train()(x)
        return [mean[0].item() for mean in (before, evaluated, model.module.running_mean)]

    assert run_local(rank, ranks=2) == [[1.0, 1.0, 1.0], [11.0, 11.0, 1.0 if sync else 11.0]]


def test_state_dict_has_no_prefix_and_loads_back():
    def rank():
        model = DataParallel(Net(seed=1))
        wrapped_within = nn.Sequential(DataParallel(Net(seed=2)))
        assert model.state_dict().keys() == Net().state_dict().keys()
        assert "0.first.weight" in wrapped_within.state_dict()
        wrapped_within.load_state_dict({f"0.{key}": value for key, value in model.state_dict().items()})
        model.load_state_dict(Net(seed=3).state_dict())
        assert_same(dict(wrapped_within[0].module.state_dict()), dict(Net(seed=1).state_dict()), rtol=0, atol=0)
        assert_same(dict(model.module.state_dict()), dict(Net(seed=3).state_dict()), rtol=0, atol=0)

    run_local(rank, ranks=2)


@pytest.mark.parametrize("bucket_mb", [TINY, LARGE])
def test_mixed_dtypes(bucket_mb):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            dtypes = [torch.float64, torch.bfloat16, torch.float32, torch.complex64, torch.float16]
            self.weights = nn.ParameterList(torch.full((3,), 2.0, dtype=d) for d in dtypes * 2)

        def forward(self, x):
            return sum((w.to(torch.complex128) * x).real.sum() for w in self.weights)

    def rank():
        model = DataParallel(Mixed(), bucket_mb=bucket_mb)
        assert len(model._buckets) == (10 if bucket_mb == TINY else 5)
        model(torch.tensor(float(model.group.rank))).backward()
        for w in model.module.weights:
            torch.testing.assert_close(w.grad, torch.full_like(w, 1.0))  # the mean of 0, 1, 2

    run_local(rank, ranks=3)


def test_channels_last_gradients_keep_their_layout():
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    def rank():
        model, serial = DataParallel(copy.deepcopy(net)), copy.deepcopy(net)
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2))
        model(x[model.group.rank :][:1]).square().sum().backward()
        serial(x).square().sum().div(2).backward()
        assert model.module.weight.grad.stride() == model.module.weight.stride()
        assert_same(gradients(model.module), gradients(serial), rtol=1e-5, atol=1e-5)

    run_local(rank, ranks=2)


def test_reductions_start_while_backward_goes_on():
    def rank():
        model = DataParallel(nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]), bucket_mb=TINY)
        started = []
        x = torch.ones(2, 8, requires_grad=True)
        x.register_hook(lambda _: started.append(model._launched))
        model(x).sum().backward()
        return len(model._buckets), started

    # The gradient of x needs the first layer's, so 5 of 6 layers are through when it is ready.
    for buckets, started in run_local(rank, ranks=2):
        assert buckets == 12
        assert started[0] >= 10


def test_derivatives_inside_the_loss():
    def rank():
        x, _, mine = batch([2, 3])
        model, serial = DataParallel(Net(), bucket_mb=5e-4), Net()
        for m, part, ranks in ((model, mine, 2), (serial, slice(None), 1)):
            points = x[part].clone().requires_grad_()
            (slope,) = torch.autograd.grad(m(points).sum(), points, create_graph=True)
            (slope.square().sum() * ranks / len(x)).backward()
        assert_same(gradients(model.module), gradients(serial), **CLOSE)

    run_local(rank, ranks=2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_activation_checkpointing(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            h = checkpoint(self.first, x, use_reentrant=reentrant)
            h = checkpoint(lambda h: torch.tanh(self.tied(self.frozen(h))), h, use_reentrant=reentrant)
            return (self.norm(h) * self.scale) @ self.strided

    def rank():
        x, y, mine = batch([2, 1])
        model, serial = DataParallel(Checkpointed(), bucket_mb=5e-4), Checkpointed()
        loss_of(model, x[mine].clone().requires_grad_(), y[mine], len(x), 2).backward()
        loss_of(serial, x.clone().requires_grad_(), y, len(x)).backward()
        expected = gradients(serial)
        got = gradients(model.module)
        assert_same(got, expected, **CLOSE)

    run_local(rank, ranks=2)


def test_wrapping_again_replaces_the_first_wrapper():
    def rank():
        x, y, mine = batch([2, 1])
        net = Net()
        old = DataParallel(net, bucket_mb=TINY)
        gone = weakref.ref(old)
        del old
        gc.collect()
        assert gone() is None, "hooks on the parameters keep the wrapper alive"
        assert not net.scale._post_accumulate_grad_hooks, "hooks of the old wrapper stay behind"
        model = DataParallel(net)
        loss_of(model, x[mine], y[mine], len(x), 2).backward()
        assert_same(gradients(net), serial_gradients(x, y), **CLOSE)

    run_local(rank, ranks=2)


def test_one_rank_communicates_nothing():
    def rank():
        x, y, _ = batch([4])
        model = DataParallel(Net())
        loss_of(model, x, y, len(x)).backward()
        assert_same(gradients(model.module), serial_gradients(x, y), rtol=0, atol=0)

    run_local(rank, ranks=1, disable="all_reduce,broadcast,all_gather,send,recv")


# Errors --------------------------------------------------------------------------------------------------


def test_ranks_with_different_modules_are_all_told():
    def rank():
        me = commlayer.world().rank
        with pytest.raises(ValueError, match=r"rank 0 has 0.weight: float32 \[3, 2\], rank 1 has 0.weight: .*\[4, 2\]"):
            DataParallel(nn.Sequential(nn.Linear(2, 3 + me)))
        with pytest.raises(ValueError, match=r"rank 1 has weight: float32 \[2, 2\] frozen"):
            DataParallel(nn.Linear(2, 2).requires_grad_(me != 1))
        with pytest.raises(ValueError, match="rank 0 has bucket_mb 1, rank 1 has bucket_mb 2"):
            DataParallel(nn.Linear(2, 2), bucket_mb=1 + me)

    run_local(rank, ranks=3)


def test_wrong_arguments():
    def rank():
        with pytest.raises(ValueError, match="bucket_mb: must be positive, got 0"):
            DataParallel(nn.Linear(2, 2), bucket_mb=0)
        with pytest.raises(UnsupportedOperation, match="0: an embedding with sparse=True"):
            DataParallel(nn.Sequential(nn.Embedding(3, 2, sparse=True)))
        with pytest.raises(ValueError, match="already wrapped"):
            DataParallel(DataParallel(nn.Linear(2, 2)))

    run_local(rank, ranks=2)


def test_a_copy_which_would_reduce_nothing_is_refused():
    model = run_local(lambda: DataParallel(Net()), ranks=1)[0]
    with pytest.raises(TypeError, match="copy the wrapped module"):
        copy.deepcopy(model)
    copy.deepcopy(model.module)


def test_sparse_gradient_names_the_parameter():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(4, 2))

        def forward(self, i):
            return nn.functional.embedding(i, self.table, sparse=True)

    def rank():
        model = DataParallel(Lookup())
        with pytest.raises(UnsupportedOperation, match="gradient of table is sparse"):
            model(torch.tensor([1])).sum().backward()

    run_local(rank, ranks=2)


def test_second_derivative_through_grad_is_refused():
    def rank():
        model = DataParallel(nn.Linear(2, 2))
        with pytest.raises(UnsupportedOperation, match=r"gradient of (weight|bias) has a graph"):
            model(torch.ones(1, 2)).square().sum().backward(create_graph=True)

    run_local(rank, ranks=2)


@pytest.mark.parametrize("has_gradients", [False, True])
def test_a_module_converted_later_is_refused(has_gradients):
    def rank():
        model = DataParallel(nn.Linear(2, 2))
        if has_gradients:
            model(torch.ones(1, 2)).sum().backward()
        model.double()
        with pytest.raises(ValueError, match=r"became torch.float64 .* after DataParallel was built"):
            model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()

    run_local(rank, ranks=2)


def test_unfreezing_later_is_refused():
    def rank():
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
        model = DataParallel(net)
        net[1].requires_grad_()
        with pytest.raises(ValueError, match=r"requires_grad of one of 1\.weight, 1\.bias was set"):
            model(torch.ones(1, 2))

    run_local(rank, ranks=2)


def test_after_a_broken_backward_nothing_goes_on_as_if_it_were_whole():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("on purpose")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.late(Broken.apply(self.early(x)))

    def rank():
        model = DataParallel(Model(), bucket_mb=TINY)
        with pytest.raises(ArithmeticError):
            model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(CommError, match="broke off halfway"):
            model(torch.ones(1, 2))

    run_local(rank, ranks=2)
