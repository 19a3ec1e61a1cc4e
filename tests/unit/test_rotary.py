"""Rotary positions: what they do to scores, in which precision, and in attention whose tokens are cut."""

import pytest
import torch

from commlayer import Mesh, run_local
from parallel.mappings import scatter_to_region
from parallel.rotary import rotary_tables, rotate
from parallel.shards import SequenceShards
from parallel.transformer import ParallelAttention
from tests.contracts.plain_moe import rotated


def turned(x, positions, **options):
    return rotate(x, *rotary_tables(positions, x.shape[-1], like=x, **options))


@pytest.mark.parametrize("theta", [10000.0, 7.0])
@pytest.mark.parametrize("channels", [2, 6, 16])
def test_it_is_the_plain_rotation(channels, theta):
    x = torch.randn(2, 3, 5, channels, dtype=torch.float64)
    torch.testing.assert_close(turned(x, torch.arange(5), theta=theta), rotated(x, theta), rtol=1e-13, atol=1e-13)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 12, dtype=torch.float64).expand(2, 7, 12)
    near, far = (turned(q, torch.arange(7) + start) @ turned(k, torch.arange(7) + start).mT for start in (0, 100_000))
    torch.testing.assert_close(near, far, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(near[3, 1], near[6, 4])
    assert (near[3, 1] - near[3, 2]).abs() > 1e-3


def test_far_positions_and_half_types_keep_their_digits():
    x = torch.randn(4, 64)
    positions = torch.tensor([0, 1, 131_071, 1_000_003])
    exact = turned(x.double(), positions)
    torch.testing.assert_close(turned(x, positions).double(), exact, rtol=1e-6, atol=1e-6)
    half = x.bfloat16()
    found = turned(half, positions)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, turned(half.float(), positions).bfloat16())  # rounded once, at the end


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_attention_of_cut_tokens_is_that_of_the_whole_sequence(method, sequence_parallel):
    torch.manual_seed(0)
    serial = ParallelAttention(24, 4, 2, causal=True, bias=False).double()
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    expected = serial(x, rotary=rotary_tables(torch.arange(13), 6, like=x))
    assert not torch.allclose(expected, serial(x))

    def rank():
        mesh = Mesh("cp=2 tp=2")
        cp, tp = mesh["cp"], mesh["tp"]
        options = {"context": cp, "method": method, "sequence_parallel": sequence_parallel}
        model = ParallelAttention(24, 4, 2, group=tp, causal=True, bias=False, **options).double()
        for name, layer in (("qkv", model.qkv), ("out", model.out)):
            whole = serial.get_parameter(f"{name}.weight").detach()
            layer.weight.data.copy_(whole.split(layer.sizes, layer.cuts["weight"])[tp.rank])
        shards = SequenceShards(13, 2, zigzag=True)
        mine = shards.shard(x, 1, cp)
        positions, sizes = shards.positions(cp.rank), None
        if sequence_parallel:
            sizes = [mine.shape[1] - 2, 2]
            mine = scatter_to_region(mine, 1, tp, sizes)
        y = model(mine, shards=shards, sizes=sizes, rotary=rotary_tables(positions, 6, like=x))
        wanted = shards.shard(expected.detach(), 1, cp)
        wanted = wanted if sizes is None else wanted.split(sizes, 1)[tp.rank]
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)

    run_local(rank, ranks=4)


def test_bad_input():
    x = torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match=r"channels: rotary positions turn pairs, .* even number, got 5"):
        rotary_tables(torch.arange(3), 5, like=x)
    for tokens, channels in ((4, 6), (5, 4)):
        tables = rotary_tables(torch.arange(tokens), channels, like=x)
        with pytest.raises(ValueError, match=r"tables of shapes \(., .\) and \(., .\) do not fit \(2, 5, 6\)"):
            rotate(x, *tables)
