"""Random small models, layouts and batches: ZeRO on thread ranks is the serial run, whatever they are."""

import os
from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.contracts.tensor import rand
from tests.contracts.zero import Task, adagrad, adamw, check, filled, serial, sgd

EXAMPLES = int(os.environ.get("COMMLAYER_TEST_EXAMPLES", 0)) // 20 or 40


class Random(nn.Module):
    """Units of two layers between vectors of 4, in a random order; ``ways``: which of them a rank takes in a step."""

    def __init__(self, widths, ties, frozen, extras, direct):
        super().__init__()
        self.direct = direct
        self.units = nn.ModuleList(
            nn.Sequential(nn.Linear(4, n, bias=n % 2 == 0), nn.Tanh(), nn.Linear(n, 4)) for n in widths
        )
        for a, b in ties:
            a, b = self.units[a % len(widths)], self.units[b % len(widths)]
            if a[0].weight.shape == b[0].weight.shape:
                a[0].weight = b[0].weight
            a[2].bias = b[2].bias
        for i, unit in enumerate(self.units):
            unit.requires_grad_(not frozen[i % len(frozen)])
        self.extras = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in extras)
        self.scale = nn.Parameter(torch.zeros(4))
        filled(self)

    def forward(self, x, way):
        for i in way:
            x = x + self.units[i % len(self.units)](x)
        if self.direct:
            x = x + self.units[0][2].bias
        # Not their plain sum: to 0-dim parameters torch 2 would give one and the same gradient, and add to it twice.
        return x * self.scale + sum((i + 2) * p.square().sum() for i, p in enumerate(self.extras[:2]))


def loss(ways, sizes, model, step, rank, micro):
    x = rand(sizes[(rank + micro) % len(sizes)], 4, seed=100 * step + 10 * rank + micro)
    return model(x, ways[(rank + 2 * step + micro) % len(ways)]).square().sum() / 5


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
ways = st.lists(st.lists(st.integers(0, 3), max_size=4, unique=True).map(sorted).map(tuple), min_size=1, max_size=4)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.integers(1, 9), min_size=4, max_size=5),
    ties=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=2),
    frozen=st.lists(st.booleans(), min_size=1, max_size=3),
    extras=st.lists(shapes, max_size=3),
    direct=st.booleans(),
    ways=ways,
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    ranks=st.integers(1, 4),
    stage=st.integers(1, 3),
    bucket=st.sampled_from([1e-6, 1e-4, 5e-4, 25.0]),
    offload=st.sampled_from(["none", "cpu"]),
    hybrid=st.booleans(),
    optimizer=st.sampled_from([adamw, sgd, adagrad]),
    micro=st.integers(1, 3),
    no_sync=st.booleans(),
)
def test_it_is_the_serial_run(
    widths, ties, frozen, extras, direct, ways, sizes, ranks, stage, bucket, offload, hybrid, optimizer, micro, no_sync
):
    direct = direct and len(ways) == 1  # what is needed once more, all ranks have to need
    make = partial(Random, widths, ties, frozen, extras, direct)
    task = Task(make, partial(loss, ways, sizes), optimizer, ranks, steps=3, micro=micro, no_sync=no_sync)
    replicas = 2 if hybrid and ranks % 2 == 0 else 1
    check(task, stage, bucket_mb=bucket, offload=offload, replicas=replicas, moves=False)
    serial.cache_clear()
