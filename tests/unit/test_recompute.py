"""What is computed, and communicated, again in backward, and what is not."""

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import commlayer
from commlayer import Mesh, run_local
from parallel import ParallelAttention, ParallelMLP, SequenceShards
from parallel.expert import MoE
from parallel.notes import once
from parallel.recompute import checkpoint
from parallel.rng import Dropout, Streams
from parallel.router import Routing
from tests.contracts.tensor import drawn, rand

EMBED = 8


class Block(nn.Module):
    """Attention over a sequence that is cut, an MLP that is cut, and experts."""

    def __init__(self, mesh, experts, method):
        super().__init__()
        self.shards = SequenceShards(6, mesh.size("cp"))
        place = {"group": mesh["tp"], "bias": False}
        self.attention = ParallelAttention(EMBED, 4, context=mesh["cp"], method=method, causal=True, **place)
        self.mlp = ParallelMLP(EMBED, 10, gated=True, **place)
        self.moe = MoE(EMBED, 6, Routing(4, 2), mesh=experts, group=mesh["tp"], shared=1)

    def forward(self, x):
        x = x + self.attention(x, shards=self.shards)
        x = x + self.mlp(x)
        return x + self.moe(x)[0]


class Seen(TorchDispatchMode):
    """Matrix products and pointwise sigmoids that are computed."""

    def __init__(self):
        super().__init__()
        self.products = self.pointwise = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)
        self.pointwise += func.overloadpacket in (torch.ops.aten.silu, torch.ops.aten.gelu)
        return func(*args, **(kwargs or {}))


class Run(NamedTuple):
    values: list[torch.Tensor]  # the output and all gradients
    sent: list[str]  # what the forward communicates
    sent_back: list[str]
    forward: Seen
    backward: Seen


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
@pytest.mark.parametrize("layout", ["dp=1 cp=1 tp=2", "dp=1 cp=2 tp=1", "dp=2 cp=1 tp=1"])
def test_what_is_done_again(monkeypatch, method, layout):
    """All, none of it, or what is cheap; the gradients have the same bits."""
    communicated = [[], []]

    def spied(name, function):
        def call(*args, **options):
            communicated[commlayer.world().rank].append(name)
            return function(*args, **options)

        return call

    def rank():
        mesh = Mesh(layout)
        experts, mine = mesh.fold("ep=2"), communicated[commlayer.world().rank]
        for axes in ("ep", "etp-ep", "etp-ep-edp"):
            assert experts[axes]
        assert mesh["tp"]
        block = drawn(lambda: Block(mesh, experts, method)).double()
        found = []
        for keep in (None, "nothing", "products"):
            block.zero_grad()
            x = rand(3, 6 // mesh.size("cp"), EMBED).requires_grad_()
            mine.clear()
            with Seen() as forward:
                y = block(x) if keep is None else checkpoint(block, x, keep=keep)
            sent = [*mine]
            mine.clear()
            with Seen() as backward:
                y.square().sum().backward()
            values = [y.detach(), x.grad, *(p.grad for p in block.parameters())]
            found.append(Run(values, sent, [*mine], forward, backward))
        return found

    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "sendrecv"):
        monkeypatch.setattr(commlayer, name, spied(name, getattr(commlayer, name)))
    for plain, nothing, products in run_local(rank, 2):
        for run in (nothing, products):
            assert all(torch.equal(*pair) for pair in zip(run.values, plain.values, strict=True))
            assert run.sent == plain.sent != []
            assert run.backward.pointwise > plain.backward.pointwise == 0
        assert products.sent_back == plain.sent_back
        assert products.backward.products == plain.backward.products
        # All but the last layer's result, which torch does not come to, and the counts of tokens.
        most = [name for name in plain.sent if name != "all_gather" or method == "all_gather"]
        assert 0 < len(nothing.sent_back) - len(plain.sent_back) <= len(most)
        assert 0 < nothing.backward.products - plain.backward.products <= plain.forward.products


def test_once():
    """As often as there are forwards, whatever is recomputed; in the order of the calls."""
    drawn_numbers, answers = [], []

    def decide():
        drawn_numbers.append(len(drawn_numbers))
        return drawn_numbers[-1]

    def function(x):
        first, second = once(decide), once(decide)
        answers.append((first, second))
        return (x * (first + 1)).exp() * (second + 1)

    x = torch.tensor(0.5, requires_grad=True)
    for keep in ("nothing", "products"):
        drawn_numbers.clear()
        answers.clear()
        ys = [checkpoint(function, x, keep=keep) for _ in range(2)]
        assert answers == [(0, 1), (2, 3)]
        for y in reversed(ys):
            y.backward(retain_graph=True)
        ys[1].backward()
        assert len(drawn_numbers) == 4
        assert set(answers[2:]) == {(0, 1), (2, 3)}
        assert len(answers) == 5
    function(x)
    function(x)
    assert len(drawn_numbers) == 8, "outside of a checkpoint it is done each time"


def test_once_within_a_checkpoint_within_another():
    calls = []

    def inner(x):
        once(lambda: calls.append(1))
        return x.exp()

    def outer(x):
        return checkpoint(inner, x.sin()).sin()

    x = torch.tensor(0.5, requires_grad=True)
    checkpoint(outer, x).backward()
    assert x.grad.item() == pytest.approx(torch.autograd.functional.jacobian(lambda t: t.sin().exp().sin(), x).item())
    assert len(calls) == 1


@pytest.mark.parametrize("keep", ["nothing", "products"])
def test_products_are_kept_around_another_checkpoint(keep):
    """What the inner one communicates, with tensor operations that differ between ranks, is hidden from the outer."""

    def rank():
        mesh = Mesh("dp=2")
        layer = MoE(EMBED, 6, Routing(4, 2), mesh=mesh.fold("ep=2"))
        x = rand(5 + mesh.rank("dp"), EMBED, seed=1, dtype=torch.float32)

        def inner(x):
            return layer(x.sin())[0]

        found = []
        for function in (inner, lambda x: checkpoint(lambda x: checkpoint(inner, x, keep=keep), x, keep="products")):
            points = x.clone().requires_grad_()
            function(points).square().sum().backward()
            found.append(points.grad)
        torch.testing.assert_close(*found)

    for _ in range(5):
        run_local(rank, 2)


def test_operations_of_communication_are_hidden_also_by_a_checkpoint_that_keeps_nothing(monkeypatch):
    """From one around it that keeps products, and counts them: here there are more in the recomputation."""
    real = commlayer.all_to_all

    def spy(x, **options):
        if torch._C._current_graph_task_id() != -1:
            torch.erfinv(x)
        return real(x, **options)

    def rank():
        layer = MoE(EMBED, 6, Routing(4, 2), mesh=Mesh("dp=2").fold("ep=2"))
        x = torch.ones(3, EMBED, requires_grad=True)
        y = checkpoint(lambda x: checkpoint(lambda x: layer(x)[0], x).sin(), x, keep="products")
        y.sum().backward()
        assert x.grad.any()

    monkeypatch.setattr(commlayer, "all_to_all", spy)
    run_local(rank, 2)


def test_a_kept_result_that_is_changed_in_place_is_an_error():
    def rank():
        group = commlayer.world()
        mlp = ParallelMLP(EMBED, 10, group=group, bias=False)

        def function(x):
            y = mlp(x)
            y += x
            return y.sin()

        y = checkpoint(function, torch.ones(3, EMBED, requires_grad=True), keep="products")
        with pytest.raises(RuntimeError, match="was changed in place"):
            y.sum().backward()

    run_local(rank, 2)


def test_what_is_done_once_may_do_things_once():
    def function(x):
        return (x * once(lambda: once(lambda: 1) + once(lambda: 1))).exp() * once(lambda: 5)

    x = torch.tensor(0.5, requires_grad=True)
    y = checkpoint(function, x)
    y.backward()
    assert x.grad.item() == pytest.approx(2 * y.item())


def test_another_way_through_the_function_is_an_error():
    more = []

    def function(x):
        for _ in [0, *more]:
            once(lambda: 1)
        return x.exp()

    y = checkpoint(function, torch.tensor(0.5, requires_grad=True))
    more.append(0)
    with pytest.raises(RuntimeError, match="the recomputation took another way through the function"):
        y.backward()


@pytest.mark.parametrize("keep", ["nothing", "products"])
def test_a_result_that_nobody_wants_takes_its_graph_along(keep):
    """What a checkpoint keeps does not keep it in turn."""
    linear = nn.Linear(EMBED, EMBED)

    def rank():
        mlp = ParallelMLP(EMBED, 10, group=commlayer.world(), bias=False)
        x = linear(torch.ones(3, EMBED))
        y = checkpoint(lambda x: mlp(x).sin() * once(lambda: 2), x, keep=keep)
        gone = [weakref.ref(t) for t in (x, y)]
        del x, y
        gc.collect()
        return [ref() for ref in gone]

    assert run_local(rank, 2) == [[None, None]] * 2


def test_an_error_within_leaves_nothing_behind():
    def fail(x):
        once(lambda: 1)
        raise ArithmeticError("of the function")

    with pytest.raises(ArithmeticError, match="of the function"):
        checkpoint(fail, torch.ones(1, requires_grad=True))
    calls = []
    for _ in range(2):
        once(lambda: calls.append(1))
    assert len(calls) == 2


@pytest.mark.parametrize("keep", ["nothing", "products"])
def test_streams_are_replayed(keep):
    streams = Streams(3)
    dropout = Dropout(0.5, streams.along("dp"))
    weight = rand(6, 6).requires_grad_()
    x = rand(4, 6).requires_grad_()
    y = checkpoint(lambda x: dropout(x @ weight).exp(), x, streams=streams, keep=keep)
    position = streams.along("dp").draws
    dropout(x)  # something else is drawn before backward
    y.sum().backward()
    kept = y.detach() != 1
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(x.grad, (y.detach() * kept * 2) @ weight.detach().T)
    assert streams.along("dp").draws == position + 1


@pytest.mark.parametrize("keep", ["nothing", "products"])
def test_compiled(keep):
    torch._dynamo.reset()
    weight = rand(6, 6).requires_grad_()
    x = rand(4, 6).requires_grad_()

    def function(x):
        return checkpoint(lambda x: torch.tanh(x @ weight).sin(), x, keep=keep)

    wanted = torch.autograd.grad(function(x).sum(), (x, weight))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(torch.autograd.grad(compiled(x).sum(), (x, weight)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bad_input():
    with pytest.raises(ValueError, match="keep: expected one of nothing, products, got 'all'"):
        checkpoint(torch.sin, torch.ones(1), keep="all")
