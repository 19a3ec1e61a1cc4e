"""What is computed, and communicated, again in backward, and what is not."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import commlayer
from commlayer import Mesh, run_local
from parallel import ParallelAttention, ParallelMLP, SequenceShards, checkpoint
from parallel.expert import MoE
from parallel.notes import once
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
        found = {}
        for keep in (None, "nothing", "products"):
            block.zero_grad()
            x = rand(3, 6 // mesh.size("cp"), EMBED).requires_grad_()
            run = block if keep is None else lambda x, k=keep: checkpoint(block, x, keep=k)
            mine.clear()
            with Seen() as forward:
                y = run(x)
            sent = [*mine]
            mine.clear()
            with Seen() as backward:
                y.square().sum().backward()
            grads = [y, x.grad, *(p.grad for p in block.parameters())]
            found[keep] = (grads, sent, [*mine], forward.products, backward.products, backward.pointwise)
        return found

    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "sendrecv"):
        monkeypatch.setattr(commlayer, name, spied(name, getattr(commlayer, name)))
    for found in run_local(rank, 2):
        grads, sent, sent_back, products, products_back, pointwise_back = found[None]
        assert sent
        assert not pointwise_back
        for keep in ("nothing", "products"):
            for mine, wanted in zip(found[keep][0], grads, strict=True):
                assert torch.equal(mine, wanted)
            assert found[keep][1] == sent
            assert found[keep][5] > 0
        # But for what only the last layer's result needs, which torch does not come to.
        assert found["nothing"][3] == products
        assert products_back < found["nothing"][4] <= products_back + products
        assert found["products"][4] == products_back
        again = [name for name in sent if name != "all_gather" or method == "all_gather"]  # counts are not
        assert len(sent_back) < len(found["nothing"][2]) <= len(sent_back) + len(again)
        assert found["products"][2] == sent_back


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
        assert len(answers) > 4 - (keep == "products")
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
