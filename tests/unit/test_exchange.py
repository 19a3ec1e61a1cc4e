"""Rows on their way to the experts, and what is computed meanwhile."""

import pytest
import torch
from torch import nn

import commlayer
from commlayer import Mesh, run_local
from parallel import MoE, Routing
from parallel.exchange import Exchange


def rows(rank, outgoing):
    """Each names where it comes from, where it goes, and its number."""
    return torch.tensor(
        [[rank, dst, i] for dst, count in enumerate(outgoing) for i in range(count)], dtype=torch.float64
    ).view(-1, 3)


def test_rows_and_their_gradients_arrive():
    """Any numbers of rows, from no rank to oneself, between all."""
    splits = [[0, 3, 1], [2, 0, 0], [0, 0, 0]]  # from, to

    def body():
        group = commlayer.world()
        incoming = [outgoing[group.rank] for outgoing in splits]
        exchange = Exchange(splits[group.rank], incoming, group)
        x = rows(group.rank, splits[group.rank]).requires_grad_()
        y = exchange.wait(exchange.start(x))
        expected = [[src, group.rank, i] for src, count in enumerate(incoming) for i in range(count)]
        assert y.tolist() == expected
        (y * y).sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach())

    run_local(body, ranks=3)


def test_one_rank_exchanges_nothing():
    x = torch.randn(4, 3, requires_grad=True)
    exchange = Exchange([4], [4], commlayer.Group.alone())
    assert exchange.wait(exchange.start(x)) is x


def test_the_shared_experts_are_computed_while_tokens_travel(monkeypatch):
    """In forward, and in backward: started before, waited for after."""

    class Marked(nn.Module):
        def __init__(self, shared, log):
            super().__init__()
            self.shared, self.log = shared, log

        def forward(self, x, sizes=None):
            y = self.shared(x, sizes=sizes)
            self.log.append("shared")
            if y.requires_grad:
                y.register_hook(lambda grad: self.log.append("shared"))
            return y

    logs = {}
    launch, finish = Exchange.launch, Exchange.finish
    monkeypatch.setattr(
        Exchange, "launch", lambda self, *args: (logs[self.group.rank].append("start"), launch(self, *args))[1]
    )
    monkeypatch.setattr(
        Exchange, "finish", lambda self, *args: (logs[self.group.rank].append("wait"), finish(self, *args))[1]
    )

    def body():
        experts = Mesh("dp=2", group=commlayer.world()).fold("ep=2")
        log = logs[commlayer.world().rank] = []
        layer = MoE(8, 8, Routing(4, 2), mesh=experts, shared=1)
        layer.shared = Marked(layer.shared, log)
        y, _ = layer(torch.randn(5, 8, requires_grad=True))
        assert log == ["start", "shared", "wait", "start", "wait"]
        log.clear()
        y.sum().backward()
        assert log == ["start", "wait", "start", "shared", "wait"]

    run_local(body, ranks=2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_models_run_the_layer_eagerly():
    torch._dynamo.reset()

    layer = MoE(8, 8, Routing(4, 2, balance_loss=0.1), shared=1)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def loss(x):
        y, load = layer(model(x))
        return y.square().sum() + load.loss

    x = torch.randn(5, 8)
    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        layer.zero_grad()
        function(x).backward()
        found.append([p.grad for p in layer.parameters()])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)
