"""Training by ZeRO against a serial run in float64: losses, the gradients of every step, parameters at the end.

A task says what to train, and the loss of one rank's share of a step. The serial run adds up those of all ranks, and
knows nothing of the layer; the parallel one has this rank's alone.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

import commlayer
from commlayer import run_local
from parallel import DataParallel, ZeRO, clip_grad_norm_
from parallel.placement import gather_full
from tests.contracts.tensor import drawn, rand

CLOSE = {"rtol": 1e-10, "atol": 1e-10, "check_device": False}
WIDTH, INPUTS, OUTPUTS = 7, 5, 3


def adamw(model):
    """Weight decay as everybody has it: of matrices alone."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "lr": 0.03},
    ]
    # Adam divides by the size of a gradient: with the usual eps one that is zero but for rounding would count.
    return torch.optim.AdamW(groups, lr=0.05, eps=1e-4)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9, weight_decay=0.1)


def adagrad(model):
    """Its state is there from the start."""
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adagrad(params, lr=0.05, initial_accumulator_value=0.1, weight_decay=0.1)


def squares(model, step, rank, micro):
    """Of 3, 1, 0 or 2 samples: no two ranks have as many."""
    x, y = samples(step, rank, micro)
    return (model(x) - y).square().sum() / 6


def samples(step, rank, micro=0, sizes=(3, 1, 0, 2)):
    seed = 1000 * step + 10 * rank + micro
    count = sizes[(rank + step) % len(sizes)]
    return rand(count, INPUTS, seed=seed), rand(count, OUTPUTS, seed=seed + 5)


@dataclass(frozen=True)
class Task:
    """``loss(model, step, rank, micro)``: of one rank. ``micro``: backward passes in a step, all but the last
    under no_sync if ``no_sync``. ``clip``: to this norm, which has to be smaller than that of every gradient."""

    make: Callable[[], nn.Module]
    loss: Callable[..., torch.Tensor] = squares
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    ranks: int = 4
    steps: int = 10
    micro: int = 1
    no_sync: bool = False
    clip: float | None = None
    schedule: bool = False


class Trace(NamedTuple):
    losses: list
    norms: list
    grads: list  # of each step, by name; before clipping
    params: dict


def train(task, model, optimizer, me=None, mesh=None, group=None, inspect=None):
    """``me``: the rank whose data this is, or None: the data of all, one after the other."""
    mine, gain = (range(task.ranks), 1) if me is None else ([me], task.ranks)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * task.steps) if task.schedule else None
    trace = Trace([], [], [], {})
    for step in range(task.steps):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(task.micro):
            silent = task.no_sync and me is not None and micro + 1 < task.micro
            with model.no_sync() if silent else nullcontext():
                for rank in mine:
                    value = task.loss(model, step, rank, micro) * gain
                    value.backward()
                    total += value.detach().cpu() / gain
        trace.losses.append(total if me is None else commlayer.all_reduce(total, group=group))
        trace.grads.append({name: whole(p.grad, p) for name, p in pieces(model)})
        if task.clip and me is None:
            trace.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip))
            assert trace.norms[-1] > task.clip, "the limit must matter"
        elif task.clip:
            trace.norms.append(clip_grad_norm_(model, task.clip, mesh=mesh))
        optimizer.step()
        if scheduler:
            scheduler.step()
        if inspect:
            inspect(model, step)
    trace.params.update({name: whole(p, p) for name, p in pieces(model)})
    return trace


def pieces(model):
    """Under the names of the plain model."""
    return (model.module if isinstance(model, DataParallel) else model).named_parameters()


def whole(values, param):
    return None if values is None else gather_full(values, param).cpu().clone()


@cache
def serial(task):
    """The run on one process. What it starts with, and what it has done."""
    model = drawn(task.make)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    return start, train(task, model, task.optimizer(model))


def wrap(model, optimizer, stage, **options):
    if stage:
        return ZeRO(model, optimizer, stage=stage, **options)
    return DataParallel(model, **{k: v for k, v in options.items() if k in ("mesh", "experts", "bucket_mb", "group")})


def parallel(task, stage, prepare=None, inspect=None, **options):
    """The run of this rank, which is one of those of ``run_local`` or of a job."""
    me = commlayer.world().rank
    model = drawn(task.make)
    if not task.optimizer(model).state:  # rank 0's values count, and the others have other ones
        with torch.no_grad():
            for p in model.parameters():
                p.add_(me) if p.is_floating_point() else None
    if prepare:
        prepare(model)
    optimizer = task.optimizer(model)
    model = wrap(model, optimizer, stage, **options)
    return train(task, model, optimizer, me, options.get("mesh"), inspect=inspect)


def compare(found, expected, tolerance=CLOSE):
    def close(a, b, what):
        if a is None or b is None:
            assert a is b, f"{what}: {a} instead of {b}"
        else:
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m: f"{what}: {m}")

    close(torch.stack(found.losses), torch.stack(expected.losses), "losses")
    for step, (mine, theirs) in enumerate(zip(found.grads, expected.grads, strict=True)):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            close(mine[name], theirs[name], f"gradient of {name} in step {step}")
    for step, (mine, theirs) in enumerate(zip(found.norms, expected.norms, strict=True)):
        close(mine, theirs, f"norm in step {step}")
    assert found.params.keys() == expected.params.keys()
    for name in expected.params:
        close(found.params[name], expected.params[name], name)


def check(task, *stages, layer=None, moves=True, **options):
    """On thread ranks: the same numbers as the serial run, at each of these stages. ``layer``: options of run_local."""
    start, expected = serial(task)
    moved = [(expected.params[name] - p).abs().max() > 1e-3 for name, p in start.items() if p.numel()]
    assert any(moved) or not moves, "nothing was trained"

    def rank():
        for stage in stages:
            try:
                compare(parallel(task, stage, **options), expected)
            except Exception as error:
                raise AssertionError(f"stage {stage}, {options}: {type(error).__name__}: {error}") from error

    run_local(rank, task.ranks, timeout=20, **(layer or {}))


# Models ------------------------------------------------------------------------------------------------------


def filled(model, seed=0):
    """In float64, and with numbers of order 1 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.double().parameters():
        if p.is_floating_point():
            p.data.normal_(generator=generator).mul_(0.5)
    return model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 9)
        self.down = nn.Linear(9, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """A bit of everything that has gone wrong somewhere: trap 11. No size divides by any number of ranks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[2].up.weight = self.blocks[0].up.weight  # across units
        self.blocks[1].again = nn.Linear(WIDTH, 9)
        self.blocks[1].again.weight = self.blocks[1].up.weight  # and inside of one, whose forward does not use it
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.never = nn.Linear(WIDTH, OUTPUTS)
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.index = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)
        self.strided = nn.Parameter(torch.empty(OUTPUTS, WIDTH).t())
        self.register_buffer("shift", torch.ones(WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        filled(self)

    def forward(self, x):
        h = self.frozen(self.first(x))
        for block in self.blocks:
            h = block(h)
        h = h + torch.tanh(self.blocks[1].again(h)).sum(-1, keepdim=True)  # one that is gone again, if units go
        return (self.norm(h) * self.scale + self.shift + self.empty.sum()) @ self.strided[:, self.index]


class Plain(nn.Module):
    """Only what everybody uses."""

    def __init__(self, blocks=3):
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, OUTPUTS)
        filled(self)

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


class Built(nn.Module):
    """A model in a few words: ``run(self, x)`` is its forward."""

    def __init__(self, run, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run
        filled(self)

    def forward(self, *args, **options):
        return self.run(self, *args, **options)


def branches():
    # Of different sizes, so that collectives that do not belong together would not fit.
    parts = nn.ModuleList(
        nn.Sequential(nn.Linear(INPUTS, 4 + i), nn.Tanh(), nn.Linear(4 + i, OUTPUTS)) for i in range(4)
    )

    def run(model, x, order):
        return sum((model.parts[i](x) for i in order), x[:, :OUTPUTS] * model.scale)

    return Built(run, parts=parts, scale=nn.Parameter(torch.ones(OUTPUTS)))


class Plainest(nn.Module):
    """What has reset_parameters() in torch."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 6)) for _ in range(2))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, ids):
        h = self.embed(ids)
        for block in self.blocks:
            h = h + block(h)
        return self.head(self.norm(h))
