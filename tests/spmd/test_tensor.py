"""Tensor and sequence parallelism between processes, on whatever backend the environment chooses.

The finer points are tested on thread ranks, in tests/unit.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import commlayer
from commlayer import MAX, MIN, Mesh, balanced_sizes
from parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel.rng import Streams
from parallel.tensor import ColumnParallelLinear, RowParallelLinear
from parallel.transformer import ParallelAttention, ParallelMLP
from tests.contracts.tensor import CLOSE, PlainMLP, Words, assert_gradients, check_block, drawn, mine, rand, strided


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("gated", "causal"), [(False, False), (True, True)])
def test_block(everyone, agreed, sequence_parallel, gated, causal):
    heads = {"heads": 24, "kv_heads": 24}  # for up to 24 ranks
    options = {"sequence_parallel": sequence_parallel, "gated": gated, "causal": causal, **heads}
    agreed(lambda: check_block(everyone, **options))


def test_features_gathered_and_cut(everyone, agreed):
    """Uneven, and fewer than ranks."""
    group = everyone
    for width in (7, 2):
        serial = drawn(lambda w=width: nn.Sequential(nn.Linear(5, w), nn.Linear(w, w), nn.Linear(w, 5))).double()
        model = nn.Sequential(
            ColumnParallelLinear.from_linear(serial[0], group=group, gather_output=True),
            nn.Linear(width, width).double().to(group.device),
            RowParallelLinear.from_linear(serial[2], group=group, scatter_input=True),
        ).to(group.device)
        model[1].load_state_dict(serial[1].state_dict())
        x, v = rand(3, 4, 5, seed=1), rand(3, 4, 5, seed=2)
        reference = x.clone().requires_grad_()
        serial(reference).backward(v)

        def compare(model=model, serial=serial, x=x, v=v, reference=reference):
            points = strided(x.to(group.device)).requires_grad_()
            model(points).backward(strided(v.to(group.device)))
            torch.testing.assert_close(points.grad.cpu(), reference.grad, **CLOSE)
            assert_gradients(model, serial.to(group.device), group)

        agreed(compare)


def test_language_model(everyone, agreed):
    """An embedding and a head with 10 words, and targets that are ignored."""
    model, serial = drawn(lambda: Words(everyone)).double().to(everyone.device), drawn(Words).double()
    ids = torch.randint(10, (3, 5), generator=torch.Generator().manual_seed(1))
    target = ids.flip(0, 1)
    target[1, 2:] = -100
    expected = serial(ids, target, "mean")
    expected.backward()

    def compare():
        loss = model(ids.to(everyone.device), target.to(everyone.device), "mean")
        loss.backward()
        torch.testing.assert_close(loss.cpu(), expected, **CLOSE)
        assert_gradients(model, serial.to(everyone.device), everyone)

    agreed(compare)


def test_half_precision(everyone, agreed):
    """The same bits on every rank, and nothing but rounding beside float32."""
    group = everyone
    model = drawn(lambda: ParallelMLP(16, 36, group=group)).to(group.device)
    serial = drawn(lambda: PlainMLP(16, 36)).to(group.device)
    x = rand(4, 16, dtype=torch.float32).to(group.device)

    def compare():
        with torch.autocast(group.device.type, torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
        serial(x).square().sum().backward()
        low, high = (commlayer.all_reduce(y.detach(), op, group=group) for op in (MIN, MAX))
        assert torch.equal(low, high)
        assert_gradients(model, serial, group, rtol=5e-2, atol=5e-2)

    agreed(compare)


def test_dropout_of_attention(everyone, agreed):
    """Weights are dropped independently on every rank, the output alike."""
    mesh = Mesh(f"tp={everyone.size}")
    group = mesh["tp"]
    model = ParallelAttention(24, 24, group=group, dropout=0.3, streams=Streams(1, mesh)).to(group.device)
    heads = []
    model.out.register_forward_pre_hook(lambda _, args: heads.append(args[0].detach()))

    def compare():
        for p in model.parameters():  # the same heads everywhere, so that only dropout makes a difference
            commlayer.broadcast(p.data, group=group, out=p.data)
        x = rand(2, 5, 24, dtype=torch.float32).to(group.device)
        y, again = model(x), model(x)
        low, high = (commlayer.all_reduce(y.detach(), op, group=group) for op in (MIN, MAX))
        assert torch.equal(low, high)
        assert (y == 0).any()
        assert not torch.equal(y, again)
        first, second, *_ = commlayer.all_gather(heads[0].unsqueeze(0), group=group)
        assert not torch.equal(first, second)

    agreed(compare)


@pytest.mark.skipif("COMMLAYER_PROFILE" in os.environ, reason="the graphs are those without a profile")
def test_inside_a_graph(everyone, agreed):
    """A head of tokens that are cut, and its loss."""
    torch._dynamo.reset()
    group = everyone
    serial = drawn(lambda: nn.Linear(6, 10)).double()
    head = ColumnParallelLinear.from_linear(serial, group=group, sequence_parallel=True).to(group.device)
    x, target = rand(2, 7, 6, seed=1), torch.arange(14).view(2, 7) % 10
    expected = F.cross_entropy(serial(x).flatten(0, 1), target.flatten())
    expected.backward()
    sizes = balanced_sizes(7, group.size)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x, target):
        return vocab_parallel_cross_entropy(head(x, sizes), target, group=group, vocab_size=10)

    def compare():
        found = loss(x[:, mine(group, 7)].to(group.device), target.to(group.device))
        found.backward()
        torch.testing.assert_close(found.cpu(), expected, **CLOSE)
        assert_gradients(head, serial.to(group.device), group)

    agreed(compare)
