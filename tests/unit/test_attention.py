"""Context parallelism on ranks that are threads: all methods against attention over the whole sequence."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import commlayer
from commlayer import Group, UnsupportedOperation, run_local
from parallel import attention, blocks
from parallel.attention import SequenceShards, context_attention
from tests.contracts.attention import MASKS, METHODS, Case, check, gradients, serial, whole


def run(case, ranks):
    run_local(lambda: check(case, commlayer.world()), ranks=ranks)


# Against serial attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("causal", "zigzag"), [(False, False), (True, False), (True, True)])
def test_equals_serial_attention(method, mask, causal, zigzag):
    for heads in ((4, 4), (6, 2), (4, 1)):
        run(Case(13, method, causal, zigzag, mask, heads), ranks=4)


cases = st.builds(
    Case,
    length=st.integers(1, 24),
    method=st.sampled_from(METHODS),
    causal=st.booleans(),
    zigzag=st.booleans(),
    mask=st.sampled_from(MASKS),
    heads=st.sampled_from([(5, 5), (5, 1), (6, 3), (8, 2), (12, 4)]),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(case=cases, ranks=st.integers(1, 5))
def test_any_case_equals_serial_attention(case, ranks):
    run(case, ranks)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1, 3, 7])
def test_fewer_tokens_than_chunks_or_ranks(method, length):
    for mask, zigzag in itertools.product(MASKS, (False, True)):
        run(Case(length, method, True, zigzag, mask), ranks=4)


@pytest.mark.parametrize("method", METHODS)
def test_a_group_of_one_is_plain_attention(method):
    q, k, v, _, mask = whole(Case(9, heads=(4, 2), mask="padding"))
    alone = Group.alone()
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    assert torch.equal(context_attention(q, k, v, group=alone, method=method, causal=True, scale=0.5), wanted)
    torch.manual_seed(0)
    wanted = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.5, enable_gqa=True)
    torch.manual_seed(0)
    assert torch.equal(context_attention(q, k, v, group=alone, method=method, mask=mask, dropout=0.5), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_scale_and_equal_parts_by_default(method):
    q, k, v, grad, _ = whole(Case(12))
    wanted = gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.7), q, k, v, grad)

    def rank():
        world = commlayer.world()
        parts = [x.chunk(3, 2)[world.rank] for x in (q, k, v, grad)]
        got = gradients(lambda q, k, v: context_attention(q, k, v, group=world, method=method, scale=0.7), *parts)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b.chunk(3, 2)[world.rank], rtol=1e-12, atol=1e-12)

    run_local(rank, ranks=3)


# Numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kernel", ["CPU", "PLAIN"])
def test_trap_10_logits_of_1e4_do_not_overflow(monkeypatch, method, kernel):
    monkeypatch.setattr(blocks, "CPU", getattr(blocks, kernel))
    q, k, v, grad, _ = whole(Case(16))
    q, k = (100 * x.sign() for x in (q, k))  # scores up to ±2.8e4
    wanted = gradients(lambda q, k, v: serial(q, k, v, causal=True), q, k, v, grad)
    assert float((q @ k.mT).abs().max()) * 8**-0.5 > 1e4

    def rank():
        world = commlayer.world()
        shards = SequenceShards(16, 4, zigzag=True)
        mine = shards.positions(world.rank)
        got = gradients(
            lambda q, k, v: context_attention(q, k, v, group=world, shards=shards, method=method, causal=True),
            *(x[:, :, mine].float() for x in (q, k, v, grad)),
        )
        for a, b in zip(got, wanted, strict=True):
            # The next number after 2.8e4 is 0.002 away, so weights are known to three digits.
            torch.testing.assert_close(a, b[:, :, mine].float(), rtol=0, atol=2e-3 * float(b.abs().max()))

    run_local(rank, ranks=4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kernel", ["CPU", "PLAIN"])
@pytest.mark.parametrize("causal", [False, True])
def test_trap_10_hidden_blocks_and_rows_give_no_nan(monkeypatch, method, kernel, causal):
    """Rank 0's queries see nothing, rank 1's only the keys of rank 2, …; float32 and halves."""
    monkeypatch.setattr(blocks, "CPU", getattr(blocks, kernel))
    q, k, v, grad, _ = whole(Case(16))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:8, 8:12] = mask[8:, :4] = True
    wanted = gradients(lambda q, k, v: serial(q, k, v, mask, causal), q, k, v, grad)
    nothing = ~(mask.tril() if causal else mask).any(-1)

    def rank(dtype, tolerance):
        world = commlayer.world()
        rows = slice(4 * world.rank, 4 * world.rank + 4)
        got = gradients(
            lambda q, k, v: context_attention(q, k, v, group=world, method=method, causal=causal, mask=mask[rows]),
            *(x[:, :, rows].to(dtype) for x in (q, k, v, grad)),
        )
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.double(), b[:, :, rows], rtol=tolerance, atol=tolerance)
        assert not got[0][:, :, nothing[rows]].any()
        assert not got[1][:, :, nothing[rows]].any()

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)):
        run_local(lambda d=dtype, t=tolerance: rank(d, t), ranks=4)


def test_trap_10_zigzag_balances_causal_attention():
    def pairs(shards, rank):
        return int((shards.positions(rank)[:, None] >= torch.arange(shards.length)).sum())

    assert {pairs(SequenceShards(48, 4, zigzag=True), rank) for rank in range(4)} == {12 * 49 // 2}
    contiguous = [pairs(SequenceShards(48, 4), rank) for rank in range(4)]
    assert contiguous[3] > 6 * contiguous[0]


# What goes with it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "ranks", "query_heads", "kv_heads"),
    [
        ((5, 5), 2, [3, 2], [3, 2]),
        ((8, 4), 4, [2, 2, 2, 2], [1, 1, 1, 1]),
        ((8, 2), 4, [2, 2, 2, 2], [1, 1, 1, 1]),
        ((6, 3), 2, [3, 3], [3, 3]),
        ((6, 1), 4, [2, 2, 1, 1], [2, 2, 1, 1]),
        ((4, 2), 3, [2, 1, 1], [2, 1, 1]),
    ],
)
def test_ulysses_shares_heads_evenly(monkeypatch, heads, ranks, query_heads, kv_heads):
    """It repeats key-value heads where that takes it, and no oftener."""
    plain = attention._attention

    def noted(q, k, *args):
        seen[commlayer.world().rank] = q.shape[1], k.shape[1]
        return plain(q, k, *args)

    seen = {}
    monkeypatch.setattr(attention, "_attention", noted)
    run(Case(12, "ulysses", heads=heads), ranks)
    assert [seen[rank] for rank in range(ranks)] == list(zip(query_heads, kv_heads, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_as_for_scaled_dot_product_attention(method):
    def rank():
        q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
        with torch.autocast("cpu", torch.bfloat16):
            out = context_attention(q, k, v.bfloat16(), group=commlayer.world(), method=method)
        out.sum().backward()
        return out.dtype, q.grad.dtype

    assert run_local(rank, ranks=2) == [(torch.bfloat16, torch.float32)] * 2


@pytest.mark.parametrize("method", ["all_gather", "ulysses"])
def test_dropout_drops_weights(method):
    def rank():
        world = commlayer.world()
        torch.manual_seed(world.rank)
        x = torch.ones(1, 2, 64, 8)
        return context_attention(x, x, x, group=world, method=method, dropout=0.25)

    for out in run_local(rank, ranks=2):
        assert abs(float(out.mean()) - 1) < 0.05
        assert float(out.std()) > 0.01


def test_without_gradients():
    def rank():
        x = torch.randn(1, 2, 4, 8)
        with torch.inference_mode():
            return context_attention(x, x, x, group=commlayer.world())

    assert all(out.shape == (1, 2, 4, 8) for out in run_local(rank, ranks=2))


def test_an_empty_batch():
    def rank():
        x = torch.randn(0, 2, 4, 8)
        return [x.shape for x in gradients(lambda *qkv: context_attention(*qkv, group=commlayer.world()), x, x, x, x)]

    assert run_local(rank, ranks=2) == [[(0, 2, 4, 8)] * 4] * 2


# What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": (1, 4, 5)}, ValueError, r"q, k, v: expected B N T D.* got shapes \(1, 4, 5\)"),
        ({"k": (1, 4, 3, 8)}, ValueError, r"with the same B, T and D, got shapes .*\(1, 4, 3, 8\)"),
        ({"v": (1, 4, 5, 4)}, ValueError, "with the same B, T and D"),
        ({"k": (1, 3, 5, 8), "v": (1, 3, 5, 8)}, ValueError, "k: the 3 key-value heads must divide the 4 query heads"),
        ({"dtype": torch.int64}, TypeError, "q, k, v: expected one floating-point dtype, got torch.int64"),
        ({"method": "flash"}, ValueError, "method: expected one of ring, all_gather, ulysses, got 'flash'"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout": 0.1}, ValueError, "dropout: ring attention has none, got 0.1; use method='all_gather'"),
        ({"method": "ulysses", "N": 1}, ValueError, "method: 'ulysses' gives each of 2 ranks some"),
        ({"shards": SequenceShards(13, 2)}, ValueError, "shards: .*length=13.* does not fit 2 ranks with 5 tokens on"),
        ({"shards": SequenceShards(5, 1)}, ValueError, "shards: .*parts=1.* does not fit 2 ranks"),
        ({"mask": torch.ones(5, 5)}, ValueError, r"mask: got shape \(5, 5\), .* to B N T L = \(1, 4, 5, 10\)"),
        ({"mask": torch.ones(3, 1, 5, 10)}, ValueError, r"mask: got shape \(3, 1, 5, 10\)"),
        ({"mask": torch.ones(10)}, ValueError, r"mask: got shape \(10,\)"),
        ({"mask": torch.ones(5, 10).int()}, TypeError, "mask: expected bool or a floating-point dtype, got torch.int"),
        ({"mask": torch.ones(5, 10).requires_grad_()}, UnsupportedOperation, "mask: requires grad"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_sent(changes, error, message):
    options = dict(changes)
    N = options.pop("N", 4)
    dtype = options.pop("dtype", torch.float32)
    q, k, v = (torch.zeros(options.pop(name, (1, N, 5, 8)), dtype=dtype) for name in "qkv")

    def rank():
        # The last rank alone would wait for the others, if anything were sent.
        if commlayer.world().rank == 1:
            with pytest.raises(error, match=message):
                context_attention(q, k, v, group=commlayer.world(), **options)

    run_local(rank, ranks=2, timeout=5)
