"""Forward and backward passes that are not one after the other: ZeRO on thread ranks."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import commlayer
from commlayer import CommError, run_local
from parallel import ZeRO
from parallel.placement import gather_full
from tests.contracts.tensor import drawn, rand
from tests.contracts.zero import (
    CLOSE,
    INPUTS,
    OUTPUTS,
    WIDTH,
    Net,
    Plain,
    Task,
    check,
    compare,
    filled,
    parallel,
    samples,
    serial,
    sgd,
    train,
    whole,
    wrap,
)

STAGES = (1, 2, 3)
every_stage = pytest.mark.parametrize("stage", STAGES)
STEPS = Task(Plain, steps=3, optimizer=sgd)


def some(step, rank):
    return samples(step, rank)[0]


# More than one forward ---------------------------------------------------------------------------------------


@every_stage
@pytest.mark.parametrize("make", [Plain, Net])
def test_two_forwards_before_one_backward(stage, make):
    def loss(model, step, rank, micro):
        x, y = samples(step, rank)
        a, b = model(x), model(x.flip(0) * 0.5)
        return ((a - y).square() + (b - a) ** 2).sum() / 6

    check(replace(STEPS, make=make, loss=loss), stage)


@every_stage
def test_two_forwards_then_two_backwards(stage):
    """Of different batches, backward in the order of forward."""

    def pairs(model, optimizer, ranks, gain):
        found = []
        for step in range(3):
            optimizer.zero_grad()
            losses = []
            for r in ranks:
                losses += [STEPS.loss(model, 10 * step + i, r, 0) * gain for i in range(2)]
            for value in losses:
                value.backward()
            optimizer.step()
            found.append({name: whole(p.grad, p) for name, p in model.named_parameters()})
        return found

    net = drawn(Plain)
    expected = pairs(net, sgd(net), range(4), 1)

    def rank():
        net = drawn(Plain)
        optimizer = sgd(net)
        for mine, theirs in zip(
            pairs(wrap(net, optimizer, stage), optimizer, [commlayer.world().rank], 4), expected, strict=True
        ):
            for name, grad in theirs.items():
                torch.testing.assert_close(mine[name], grad, **CLOSE)

    run_local(rank, ranks=4)


@every_stage
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "with a graph", "eval"])
def test_forward_without_backward_between_steps(stage, how):
    def inspect(model, step):
        x = rand(3, INPUTS, seed=commlayer.world().rank)
        plain = drawn(Plain)
        with model.gathered():
            plain.load_state_dict({k: v.clone() for k, v in model.module.state_dict().items()})
        contexts = {"no_grad": torch.no_grad(), "inference_mode": torch.inference_mode()}
        with contexts.get(how, torch.enable_grad()):
            model.train(how != "eval")
            for _ in range(2):
                torch.testing.assert_close(model(x), plain(x))
            model.train()

    def rank():
        compare(parallel(STEPS, stage, inspect=inspect), expected)

    expected = serial(STEPS)[1]
    run_local(rank, ranks=4)


@every_stage
def test_a_forward_under_no_grad_between_forward_and_backward(stage):
    """As of a teacher, or of what a loss compares with."""

    def loss(model, step, rank, micro):
        x, y = samples(step, rank)
        out = model(x)
        with torch.no_grad():
            target = model(x * 0.5)
        return (out - y - target).square().sum() / 6

    check(replace(STEPS, loss=loss), stage)


@every_stage
def test_a_loop_of_generation(stage):
    """Each forward sees what the last has given, on every rank something else, as often on each."""

    def rank():
        net = drawn(Plain)
        model, plain = wrap(net, sgd(net), stage), drawn(Plain)
        x = y = rand(2, INPUTS, seed=commlayer.world().rank)
        with torch.no_grad():
            for _ in range(6):
                x = torch.cat([x, model(x)], -1)[:, -INPUTS:]
                y = torch.cat([y, plain(y)], -1)[:, -INPUTS:]
        torch.testing.assert_close(x, y)

    run_local(rank, ranks=3)


# Backward of a part ------------------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(INPUTS, WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, OUTPUTS) for _ in range(3))
        filled(self)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return [head(h) for head in self.heads]


@every_stage
@pytest.mark.parametrize("parts", [lambda step, rank: [step % 3], lambda step, rank: [(step + rank) % 3]])
def test_a_loss_of_some_outputs(stage, parts):
    def loss(model, step, rank, micro):
        x, y = samples(step, rank)
        outputs = model(x)
        return sum((outputs[i] - y).square().sum() for i in parts(step, rank)) / 6

    check(Task(Heads, loss, steps=4), stage, bucket_mb=1e-4)


@every_stage
def test_backward_in_two_parts(stage):
    """One graph, kept, and gone through twice."""

    def both(model, ranks, gain):
        for r in ranks:
            outputs = model(some(0, r))
            (outputs[0].sum() * gain).backward(retain_graph=True)
            (outputs[1].square().sum() * gain).backward()
        return {name: whole(p.grad, p) for name, p in model.named_parameters()}

    expected = both(drawn(Heads), range(4), 1)

    def rank():
        net = drawn(Heads)
        found = both(wrap(net, sgd(net), stage), [commlayer.world().rank], 4)
        for name, grad in expected.items():
            if grad is None:
                assert found[name] is None
            else:
                torch.testing.assert_close(found[name], grad, **CLOSE)

    run_local(rank, ranks=4)


@every_stage
def test_gradients_of_inputs_too(stage):
    def rank():
        net, plain = drawn(Plain), drawn(Plain)
        model = wrap(net, sgd(net), stage)
        x, z = (rand(2, INPUTS, seed=commlayer.world().rank).requires_grad_() for _ in range(2))
        model(x).square().sum().backward()
        plain(z).square().sum().backward()
        torch.testing.assert_close(x.grad, z.grad)

    run_local(rank, ranks=2)


@every_stage
def test_a_loss_with_a_derivative_inside(stage):
    """A penalty on the gradient by the input, as of a potential: torch.autograd.grad with create_graph."""

    def loss(model, step, rank, micro):
        x, y = samples(step, rank)
        x = x.requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return ((out - y).square().sum() + slope.square().sum()) / 6

    check(replace(STEPS, loss=loss), stage)


@pytest.mark.parametrize("change", ["step", "gathered"])
@every_stage
def test_backward_through_parameters_that_have_changed_since(stage, change):
    """As in torch: an error, and no gradient of something between."""

    def rank():
        net = drawn(Plain)
        optimizer = sgd(net)
        model = wrap(net, optimizer, stage)
        x = torch.ones(2, INPUTS).double()
        model(x).sum().backward()
        late = model(x).square().sum()
        if change == "step":
            optimizer.step()
        else:
            with model.gathered(), torch.no_grad():
                for p in net.parameters():
                    p.mul_(2)
        with pytest.raises(RuntimeError, match="modified"):
            late.backward()

    run_local(rank, ranks=2)


# Exceptions --------------------------------------------------------------------------------------------------


class Fragile(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        filled(self)

    def forward(self, x, fail=None):
        for i, part in enumerate(self.parts):
            if i == fail:
                raise ArithmeticError("on purpose")
            x = torch.tanh(part(x))
        return x


@every_stage
@pytest.mark.parametrize("fail", [0, 2])
@pytest.mark.parametrize("grad", [True, False])
def test_after_an_exception_in_forward_on_all_ranks_training_goes_on(stage, fail, grad):
    def loss(model, step, rank, micro):
        x = rand(2, WIDTH, seed=10 * step + rank)
        if step == 1 and hasattr(model, "module"):
            with pytest.raises(ArithmeticError), torch.set_grad_enabled(grad):
                model(x, fail)
        return model(x).square().sum()

    check(Task(Fragile, loss, sgd, steps=3), stage)


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("on purpose")


@every_stage
def test_after_a_broken_backward_nothing_goes_on_as_if_it_were_whole(stage):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.late(Broken.apply(self.early(x)))

    def rank():
        net = Model()
        model = ZeRO(net, torch.optim.SGD(net.parameters(), lr=0.1), stage=stage, bucket_mb=1e-6)
        with pytest.raises(ArithmeticError):
            model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(CommError, match="broke off halfway"):
            model(torch.ones(1, 2))

    run_local(rank, ranks=2)


# Past the wrapper --------------------------------------------------------------------------------------------


@every_stage
def test_the_wrapped_module_called_by_itself(stage):
    def loss(model, step, rank, micro):
        x, y = samples(step, rank)
        return (getattr(model, "module", model)(x) - y).square().sum() / 6

    check(replace(STEPS, loss=loss), stage)


@every_stage
def test_a_submodule_called_by_itself(stage):
    """By all ranks alike, as to look at features."""

    def rank():
        net, plain = drawn(Plain), drawn(Plain)
        model = wrap(net, sgd(net), stage)
        x = rand(2, WIDTH, seed=commlayer.world().rank)
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(model.module.blocks[1](x), plain.blocks[1](x))
                torch.testing.assert_close(model.module.head(x), plain.head(x))

    run_local(rank, ranks=2)


@every_stage
def test_training_through_a_submodule(stage):
    def loss(model, step, rank, micro):
        x, y = samples(step, rank)
        inner = getattr(model, "module", model)
        return (inner.head(inner.blocks[0](inner.first(x))) - y).square().sum() / 6

    check(replace(STEPS, loss=loss), stage)


# Buffers -----------------------------------------------------------------------------------------------------


def normed():
    parts = [nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, OUTPUTS)]
    model = filled(nn.Sequential(*parts))
    model.register_buffer("count", torch.tensor(3))
    return model


def batches_of_two(model, step, rank, micro):
    x, y = (rand(2, n, seed=50 * step + 7 * rank + n) for n in (INPUTS, OUTPUTS))
    return (model(x) - y).square().sum() / 8


@every_stage
def test_trap_11_buffers(stage):
    """Each rank normalises by its own batch; before each forward, statistics are those of rank 0."""
    task = Task(normed, batches_of_two, sgd, steps=4)
    check(task, stage)

    def rank():
        me, states = commlayer.world().rank, []
        for kind in (0, stage):
            net = drawn(normed)
            net[1].running_mean.add_(me)
            net.count += me
            optimizer = sgd(net)
            model = wrap(net, optimizer, kind)
            train(task, model, optimizer, me)
            model.eval()
            with torch.no_grad():
                states.append((model(torch.ones(1, INPUTS).double()), *net.buffers()))
        for a, b in zip(*states, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert net.count == 3

    run_local(rank, ranks=4)


@every_stage
@pytest.mark.parametrize("sync", [True, False])
def test_buffers_follow_rank_0_in_training(sync, stage):
    def rank():
        net = nn.BatchNorm1d(2, momentum=1.0)
        model = ZeRO(net, torch.optim.SGD(net.parameters(), lr=0.0), stage=stage, sync_buffers=sync)
        x = torch.tensor([[0.0, 1.0], [2.0, 3.0]]) + 10 * commlayer.world().rank
        model(x).sum().backward()
        before = net.running_mean.clone()
        with torch.no_grad():
            model.eval()(x)
        evaluated = net.running_mean.clone()
        net.momentum = 0.0  # the next forward keeps what it finds
        model.train()(x).sum().backward()
        return [mean[0].item() for mean in (before, evaluated, net.running_mean)]

    assert run_local(rank, ranks=2) == [[1.0, 1.0, 1.0], [11.0, 11.0, 1.0 if sync else 11.0]]


# The wrapper's life ------------------------------------------------------------------------------------------


@every_stage
def test_no_hook_keeps_the_wrapper_alive(stage):
    def rank():
        net = drawn(Plain)
        optimizer = sgd(net)
        model = ZeRO(net, optimizer, stage=stage)
        STEPS.loss(model, 0, commlayer.world().rank, 0).backward()
        optimizer.step()
        gone = weakref.ref(model)
        commlayer.barrier()
        del model
        gc.collect()
        assert gone() is None

    run_local(rank, ranks=2)


class OneOrOther(nn.Module):
    """A unit of two weights, of which a call uses one."""

    def __init__(self):
        super().__init__()
        self.pair = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))])

    def forward(self, x, which):
        return x * self.pair[which]


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.units = nn.ModuleList([nn.Linear(3, 3), OneOrOther()])

    def forward(self, x, which):
        return self.units[1](self.units[0](x), which)


def test_a_weight_whose_gradient_left_first_keeps_it():
    """One backward of two passes: the second weight's gradient leaves with the unit, the first one's comes later."""

    def rank():
        net = drawn(Both).double()
        model = ZeRO(net, sgd(net), stage=3, units=[*net.units])
        x = torch.ones(2, 3, dtype=torch.float64)
        (model(x, 0).sum() + model(x, 1).sum()).backward()
        return [gather_full(p.grad, p) for name, p in model.named_parameters() if "pair" in name]

    for first, second in run_local(rank, ranks=2):
        assert first.any()
        torch.testing.assert_close(first, second)
