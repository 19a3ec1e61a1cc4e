"""Rows on their way to the experts, and what is computed meanwhile."""

import pytest
import torch
from torch import nn

import commlayer
from commlayer import run_local
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
