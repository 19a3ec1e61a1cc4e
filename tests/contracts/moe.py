"""MoE layers on every mesh against the plain one on one process: output, losses, counts, and all gradients.

The plain one is computed before, by whoever starts the ranks, and every rank takes its parts of it: the comparison
needs nothing of the layer but ``gather_full``.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import commlayer
from commlayer import Mesh, balanced_sizes, run_local
from parallel.data import DataParallel
from parallel.expert import MoE
from parallel.experts import Experts
from parallel.placement import gather_full, mark_replicated, part_of
from parallel.recompute import checkpoint
from parallel.router import Routing
from parallel.verify import verify_gradients
from tests.contracts.plain_moe import PlainMoE, Result
from tests.contracts.tensor import drawn, mine, rand, strided

EMBED = 6
CLOSE = {"rtol": 1e-10, "atol": 1e-12, "check_device": False}
LOSSES = {"balance_loss": 0.3, "z_loss": 0.2}
# Under which the plan of this name is taken for uneven all_to_all of float64: options of run_local.
PLANS = {
    "native": {},
    "pairwise": {"disable": "all_to_all"},
    "post": {"disable": "all_to_all,send,recv,broadcast,all_gather,gather,all_reduce,reduce"},
    "padded_all_gather": {"disable": "all_to_all,send,recv,broadcast,all_reduce,reduce,reduce_scatter,gather,scatter"},
    "broadcasts": {"disable": "all_to_all,send,recv,all_gather,all_reduce,reduce,reduce_scatter,gather,scatter"},
    "sum_with_zeros": {"profile": "only-all-reduce"},
}


@dataclass(frozen=True)
class Problem:
    """What there is to compute, however many ranks do it.

    ``tokens``: of each rank along dp and cp. ``hot``: an expert that nearly all tokens choose first. ``starved``: so
    many experts, the first ones, get no token.
    """

    routing: Routing
    tokens: tuple[int, ...] = (4, 0, 5, 3)
    hot: int | None = None
    starved: int = 0
    hidden: int = 5
    shared: int = 0
    gated: bool = True


@dataclass(frozen=True)
class Layout:
    """How the ranks share it. ``keep``: what a checkpoint around the layer keeps; None: there is no checkpoint."""

    mesh: str = "dp=4 cp=1 tp=1"
    fold: str = "ep=4"
    sequence_parallel: bool = False
    keep: str | None = None
    order: str | None = None  # of the mesh's axes, fastest first


class Reference(NamedTuple):
    model: PlainMoE
    x: torch.Tensor
    v: torch.Tensor  # the gradient of y
    y: torch.Tensor
    loss: torch.Tensor
    counts: torch.Tensor
    dropped: torch.Tensor


@cache
def reference(problem):
    """All of it on one process, after backward."""
    routing, tokens = problem.routing, sum(problem.tokens)
    model = drawn(lambda: PlainMoE(EMBED, problem.hidden, routing, problem.shared, problem.gated)).double()
    x = rand(tokens, EMBED, seed=1)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(rand(*p.shape, seed=20 + i))  # larger than they are drawn, so that gradients are of order 1
        if routing.bias_rate:
            model.router.bias.copy_(rand(routing.experts, seed=10) / 4)
        model.router.weight /= 2
        x[:, 0] = 1
        model.router.weight[: problem.starved, 0] = -50
        if problem.hot is not None:
            model.router.weight[problem.hot, 0] = 7
    x.requires_grad_()
    v = rand(tokens, EMBED, seed=2)
    found = model(x)
    ((found.y * v).sum() + found.loss).backward()
    assert not found.counts[: problem.starved].any()
    assert problem.hot is None or found.counts[problem.hot] > 0.8 * tokens
    return Reference(model, x, v, found.y.detach(), found.loss.detach(), found.counts, found.dropped)


class Layer(nn.Module):
    """The parallel layer with the reference's parameters, perhaps in a checkpoint."""

    def __init__(self, problem, layout, mesh, experts, serial):
        super().__init__()
        self.keep = layout.keep
        self.moe = MoE(
            EMBED,
            problem.hidden,
            problem.routing,
            mesh=experts,
            group=mesh["tp"],
            shared=problem.shared,
            activation=F.silu if problem.gated else F.gelu,
            gated=problem.gated,
            sequence_parallel=layout.sequence_parallel,
        ).double()
        load(self.moe, serial)
        for module in self.moe.modules():
            if not isinstance(module, Experts):
                mark_replicated(module, ("cp",), recurse=False)

    def forward(self, x, sizes=None):
        if self.keep is None:
            return self.moe(x, sizes)
        return checkpoint(self.moe, x, sizes, keep=self.keep)


@torch.no_grad()
def load(model, serial):
    """This rank's parts of all parameters, and the buffers."""
    for (name, p), (other, q) in zip(model.named_parameters(), serial.named_parameters(), strict=True):
        assert name == other
        p.copy_(part_of(q, p))
    for (name, b), (other, c) in zip(model.named_buffers(), serial.named_buffers(), strict=True):
        assert name == other
        b.copy_(c)


def meshes(layout):
    """The mesh and its fold, with all groups made: under the lock of ``drawn`` ranks could not wait for each other."""
    mesh = Mesh(layout.mesh, layout.order)
    experts = mesh.fold(layout.fold)
    for axes in ("ep", "etp-ep", "etp-ep-edp"):
        assert experts[axes]
    assert mesh["dp"]
    return mesh, experts


def tokens_of(problem, layout, mesh):
    """This rank's slice of all tokens, and how its tensor-parallel group shares them."""
    place = mesh.rank("dp-cp")
    start, count = sum(problem.tokens[:place]), problem.tokens[place]
    if not layout.sequence_parallel:
        return slice(start, start + count), None
    part = mine(mesh["tp"], count)
    return slice(start + part.start, start + part.stop), balanced_sizes(count, mesh.size("tp"))


def check(problem, layout, wanted, on=None):
    """On every rank; ``wanted`` is reference(problem), ``on`` the mesh and its fold, if they are there already."""
    mesh, experts = on or meshes(layout)
    world = mesh["-".join(mesh.axes)]
    layer = Layer(problem, layout, mesh, experts, wanted.model).to(world.device)
    model = DataParallel(layer, mesh=mesh, experts=experts)
    share, sizes = tokens_of(problem, layout, mesh)
    x = strided(wanted.x.detach()[share].to(world.device)).requires_grad_()
    y, load = model(x, sizes)
    assert y.requires_grad
    assert load.loss.requires_grad == bool(problem.routing.balance_loss or problem.routing.z_loss)
    assert not load.counts.requires_grad
    torch.testing.assert_close(y, wanted.y[share], **CLOSE)
    for what in ("loss", "counts", "dropped"):
        total = commlayer.all_reduce(getattr(load, what).detach(), group=world)
        torch.testing.assert_close(total, getattr(wanted, what), **CLOSE, msg=lambda m, w=what: f"{w}: {m}")

    dp = mesh.size("dp")
    (((y * wanted.v[share].to(y)).sum() + load.loss) * dp).backward()
    torch.testing.assert_close(x.grad, wanted.x.grad[share] * dp, **CLOSE, msg=lambda m: f"x.grad: {m}")
    for (name, p), q in zip(layer.moe.named_parameters(), wanted.model.parameters(), strict=True):
        grad = gather_full(torch.zeros_like(p) if p.grad is None else p.grad, p)
        serial = torch.zeros_like(q) if q.grad is None else q.grad
        torch.testing.assert_close(grad, serial, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def compare(todo, ranks=4, **options):
    """``check`` all pairs of Problem and Layout on thread ranks; ``options`` are run_local's. What fails is named."""
    todo = [(problem, layout, reference(problem)) for problem, layout in todo]
    assert todo

    def rank():
        for problem, layout, wanted in todo:
            try:
                check(problem, layout, wanted)
            except Exception as error:
                raise AssertionError(f"{problem}\n{layout}: {type(error).__name__}: {error}") from error

    run_local(rank, ranks, timeout=20, **options)


class Stack(nn.Module):
    """Two layers with experts of either kind, and one without between them. The output, and the layers' losses."""

    def __init__(self, make):
        super().__init__()
        self.first, self.between, self.last = make(), nn.Linear(EMBED, EMBED), make()

    def forward(self, x):
        y, loss = output_and_loss(self.first(x))
        z, other = output_and_loss(self.last(torch.tanh(self.between(x + y))))
        return y + z, loss + other


def output_and_loss(found):
    return (found.y, found.loss) if isinstance(found, Result) else (found[0], found[1].loss)


def check_steps(layout, steps, **options):
    """Training with ``steps``: how many tokens each rank has in each; every gradient is the serial one.

    Each rank has a favourite expert of its own in every step. Returns which experts this rank's tokens chose.
    """
    mesh, experts = meshes(layout)
    world, me, dp = mesh["-".join(mesh.axes)], mesh.rank("dp"), mesh.size("dp")
    routing = Routing(2 * world.size, 1, **LOSSES)
    stack = drawn(lambda: Stack(lambda: MoE(EMBED, 4, routing, mesh=experts))).double().to(world.device)
    serial = drawn(lambda: Stack(lambda: PlainMoE(EMBED, 4, routing))).double().to(world.device)
    model = DataParallel(stack, mesh=mesh, experts=experts, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    active = []

    def loss(model, x):
        y, losses = model(x)
        return y.square().sum() + losses

    for step, tokens in enumerate(steps):
        favourites = 3 * rand(dp, 1, EMBED, seed=50 + step)
        x = [(favourites[r] + rand(n, EMBED, seed=r) / 10).to(world.device) for r, n in enumerate(tokens)]
        active.append(tuple(stack.first(x[me])[1].counts.nonzero().flatten().tolist()))
        verify_gradients(model, serial, lambda m, x=x[me]: dp * loss(m, x), lambda m, x=x: loss(m, torch.cat(x)))
        optimizer.step()
    return active
