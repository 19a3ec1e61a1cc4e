"""Trap 11: what is tied, frozen, unused or empty, and what data does to the order of things, on thread ranks."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import commlayer
from commlayer import CommError, run_local
from parallel import ZeRO
from tests.contracts.tensor import drawn
from tests.contracts.zero import (
    INPUTS,
    OUTPUTS,
    WIDTH,
    Built,
    Plain,
    Task,
    adamw,
    branches,
    check,
    filled,
    samples,
    sgd,
)

STAGES = (1, 2, 3)
SMALL = 4e-4  # MiB: several buckets
every_stage = pytest.mark.parametrize("stage", STAGES)


def layers(*sizes):
    return nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))


def in_turn(model, x, order=None):
    for i in range(len(model.parts)) if order is None else order:
        x = torch.tanh(model.parts[i](x))
    return x


STEPS = Task(Plain, steps=3, optimizer=adamw)


# Tied --------------------------------------------------------------------------------------------------------


def tied_across_units():
    parts = layers(INPUTS, WIDTH, WIDTH, WIDTH, OUTPUTS)
    parts[2].weight = parts[1].weight
    return Built(in_turn, parts=parts)


def tied_inside_one():
    pair = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False))
    pair[2].weight = pair[0].weight
    return Built(in_turn, parts=nn.ModuleList([nn.Linear(INPUTS, WIDTH), pair, nn.Linear(WIDTH, OUTPUTS)]))


def one_module_twice():
    parts = layers(INPUTS, WIDTH, WIDTH, OUTPUTS)
    return Built(lambda model, x: in_turn(model, x, (0, 1, 1, 1, 2)), parts=parts)


def one_module_in_two_places():
    parts = layers(INPUTS, WIDTH, WIDTH, WIDTH, OUTPUTS)
    parts[2] = parts[1]
    return Built(in_turn, parts=parts)


@every_stage
@pytest.mark.parametrize("make", [tied_across_units, tied_inside_one, one_module_twice, one_module_in_two_places])
def test_trap_11_tied(make, stage):
    check(replace(STEPS, make=make), stage, bucket_mb=SMALL)


def embedding_as_head():
    def run(model, ids):
        h = model.embed(ids)
        for part in model.parts:
            h = h + torch.tanh(part(h))
        return F.linear(model.norm(h), model.embed.weight)

    return Built(run, embed=nn.Embedding(11, WIDTH), parts=layers(WIDTH, WIDTH, WIDTH), norm=nn.LayerNorm(WIDTH))


def weight_of_a_unit_used_by_the_root():
    return Built(run_head, embed=nn.Embedding(11, WIDTH), parts=layers(WIDTH, WIDTH, 11))


def run_head(model, ids):
    """Weights of units before, while and after these run."""
    h = F.linear(model.embed(ids), model.parts[0].weight)
    h = model.parts[0](h) + (h @ model.parts[1].weight.T)[..., :WIDTH]
    return model.parts[1](h) + F.linear(h, model.embed.weight) + model.parts[0].bias.sum()


def entropy(model, step, rank, micro):
    count = (4, 0, 2, 3)[(rank + step) % 4]
    draw = torch.Generator().manual_seed(100 * step + rank)
    ids, targets = (torch.randint(11, (count,), generator=draw) for _ in range(2))
    return F.cross_entropy(model(ids), targets, reduction="sum") / 9


@every_stage
@pytest.mark.parametrize("make", [embedding_as_head, weight_of_a_unit_used_by_the_root])
def test_trap_11_a_weight_used_outside_of_its_module(make, stage):
    check(replace(STEPS, make=make, loss=entropy), stage)


# Frozen ------------------------------------------------------------------------------------------------------


def frozen_units():
    model = Plain()
    model.blocks[0].requires_grad_(False)
    model.blocks[2].requires_grad_(False)
    return model


def lora():
    def run(model, x):
        for part, a, b in zip(model.parts, model.a, model.b, strict=True):
            x = torch.tanh(part(x) + b(a(x)))
        return x

    sizes = (INPUTS, WIDTH, WIDTH, OUTPUTS)
    return Built(
        run,
        parts=layers(*sizes).requires_grad_(False),
        a=nn.ModuleList(nn.Linear(n, 2, bias=False) for n in sizes[:-1]),
        b=nn.ModuleList(nn.Linear(2, n, bias=False) for n in sizes[1:]),
    )


@every_stage
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("make", [frozen_units, lora])
def test_trap_11_frozen(make, offload, stage):
    check(replace(STEPS, make=make), stage, offload=offload)


@every_stage
def test_trap_11_frozen_parameters_in_the_optimizer(stage):
    """They have no gradient, so that nothing happens to them, weight decay included."""
    task = replace(STEPS, make=lora, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, eps=1e-4))
    check(task, stage)


@every_stage
def test_trap_11_everything_is_frozen(stage):
    def rank():
        net = drawn(Plain).requires_grad_(False)
        model = ZeRO(net, torch.optim.SGD(net.parameters(), lr=1.0), stage=stage)
        torch.testing.assert_close(model(torch.ones(2, INPUTS).double()), drawn(Plain)(torch.ones(2, INPUTS).double()))

    run_local(rank, ranks=2)


# Unused ------------------------------------------------------------------------------------------------------


def with_spare_parts():
    parts = layers(INPUTS, WIDTH, WIDTH, WIDTH, OUTPUTS)
    return Built(partial(in_turn, order=(0, 2, 3)), parts=parts, spare=nn.Linear(3, 50))


@every_stage
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_trap_11_unused_on_all_ranks(offload, stage):
    """No gradient, no weight decay, no state: all as in a serial run."""
    task = replace(
        STEPS, make=with_spare_parts, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, eps=1e-4)
    )
    check(task, stage, offload=offload, bucket_mb=SMALL)

    def rank():
        net = drawn(with_spare_parts)
        optimizer = task.optimizer(net)
        model = ZeRO(net, optimizer, stage=stage, offload=offload)
        task.loss(model, 0, commlayer.world().rank, 0).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            assert (p.grad is None or offload == "disk") == name.startswith(("spare", "parts.1")), name
            assert bool(optimizer.state.get(p)) != name.startswith(("spare", "parts.1")), name

    run_local(rank, ranks=4)


# Which branches a rank takes: (step, rank). None, one, all; in the last step nobody but rank 3 takes any.
WAYS = [
    [(0,), (0, 1), (2,), ()],
    [(1, 2), (3,), (0, 1, 2), (0, 1, 2, 3)],
    [(0, 3), (), (1, 3), (1,)],
    [(), (), (), (2,)],
]


def by_data(model, step, rank, micro):
    x, y = samples(step, rank, micro)
    return (model(x, WAYS[step][(rank + micro) % 4]) - y).square().sum() / 6


ONLY_SOME = {"none": {}, "xccl-2.7": {"profile": "xccl-2.7"}, "only-send-recv": {"profile": "only-send-recv"}}


@every_stage
@pytest.mark.parametrize("profile", ONLY_SOME)
def test_trap_11_unused_on_some_ranks_alone(stage, profile):
    """Data decides which units a rank runs, and in which order. Nobody waits, and the numbers are the serial ones."""
    task = Task(branches, by_data, steps=4)
    check(task, stage, bucket_mb=2e-4, layer=ONLY_SOME[profile])


# The same in other orders, and some more than once.
OUT_OF_TURN = [
    [(0,), (1, 0), (2,), ()],
    [(2, 1), (3,), (0, 1, 2), (3, 2, 1, 0)],
    [(1, 1), (0, 3, 3), (2, 0), (3, 1, 0)],
]


@every_stage
@pytest.mark.parametrize("profile", ONLY_SOME)
def test_trap_11_in_another_order_on_every_rank(stage, profile):
    def loss(model, step, rank, micro):
        x, y = samples(step, rank, micro)
        return (model(x, OUT_OF_TURN[step][rank]) - y).square().sum() / 6

    check(Task(branches, loss, steps=3), stage, bucket_mb=2e-4, layer=ONLY_SOME[profile])


def test_a_module_that_one_rank_alone_needs_once_more_is_an_error():
    """Units of one size would fit each other, and give the wrong numbers."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = layers(WIDTH, WIDTH, WIDTH, WIDTH, WIDTH)
            filled(self)

        def forward(self, x, order):
            return in_turn(self, x, order)

    def rank(orders):
        net = drawn(Same)
        model = ZeRO(net, sgd(net), stage=3)
        with torch.no_grad():
            model(torch.ones(1, WIDTH).double(), orders[commlayer.world().rank])

    for orders in ([(0, 1, 2, 3, 0), (0, 1, 2, 3, 1)], [(0, 2, 0), (0, 1, 2, 1)]):
        with pytest.raises(CommError, match="ranks want different modules"):
            run_local(lambda orders=orders: rank(orders), ranks=2, timeout=10)


@every_stage
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("no_sync", [False, True])
def test_trap_11_unused_on_some_ranks_while_gradients_add_up(stage, replicas, no_sync):
    task = Task(branches, by_data, sgd, steps=4, micro=3, no_sync=no_sync)
    check(task, stage, bucket_mb=2e-4, replicas=replicas)


@every_stage
def test_trap_11_a_unit_that_leaves_the_graph_on_some_ranks(stage):
    """It runs, but the loss does not depend on it: backward never comes there."""

    def loss(model, step, rank, micro):
        x, y = samples(step, rank, micro)
        return (model(x, (rank % 4,)) + model(x, (0, 1, 2, 3)).detach() - y).square().sum() / 6

    check(Task(branches, loss, steps=3), stage)


# Empty -------------------------------------------------------------------------------------------------------


class Void(nn.Module):
    """A linear layer, whose class would warn."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight.T


class Odd(nn.Module):
    """Parameters of size zero, of no dimension, of one element, and units that have nothing else."""

    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.void = nn.ParameterList([nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(3, 0))])
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.ModuleList([Void(0, 0), Void(INPUTS, 0)])
        self.body = nn.Linear(INPUTS, OUTPUTS)
        self.bias = nn.Parameter(torch.ones(1))
        filled(self)

    def forward(self, x):
        ends = self.nothing[1](x).sum() + self.nothing[0](x[:, :0]).sum()
        return self.body(x) * self.scale + self.bias + self.empty.sum() + self.void[0].sum() + ends


@every_stage
@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
def test_trap_11_zero_size_and_0_dim(stage, offload, tmp_path):
    check(replace(STEPS, make=Odd), stage, offload=offload, **({"folder": tmp_path} if offload == "disk" else {}))


@every_stage
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_trap_11_integers_and_booleans(stage, dtype):
    """No float has all their bits."""

    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            numbers, flags = torch.tensor([2**24 + 1, -3, 2**62 + 1]), torch.tensor([True, False, True, True, False])
            self.numbers = nn.Parameter(numbers, requires_grad=False)
            self.flags = nn.Parameter(flags, requires_grad=False)
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            assert self.numbers.tolist() == [2**24 + 1, -3, 2**62 + 1]
            assert self.flags.tolist() == [True, False, True, True, False]
            return x * self.weight

    def rank():
        net = Lookup()
        optimizer = torch.optim.SGD([net.weight], lr=0.1)
        model = ZeRO(net, optimizer, stage=stage, dtype=dtype)
        for _ in range(2):
            model(torch.ones(3)).sum().backward()
            optimizer.step()
        assert dict(model.named_parameters())["numbers"].dtype == torch.int64
        with model.gathered():
            assert net.numbers.tolist() == [2**24 + 1, -3, 2**62 + 1]
            assert net.numbers.dtype == torch.int64
            assert net.flags.dtype == torch.bool

    run_local(rank, ranks=3)


@every_stage
def test_trap_11_nothing_but_zero_size(stage):
    def rank():
        net = Void(3, 0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        model = ZeRO(net, optimizer, stage=stage)
        for _ in range(2):
            model(torch.ones(2, 3).double()).sum().backward()
            optimizer.step()
        assert [p.shape for p in model.parameters()] == [(0,)]

    run_local(rank, ranks=2)


@every_stage
def test_trap_11_fewer_elements_than_ranks(stage):
    def make():
        return Built(lambda model, x: x[:, :OUTPUTS] * model.scale, scale=nn.Parameter(torch.ones(1)))

    check(Task(make, steps=3), stage)
