"""How the ring does it: kernels, what they are summed in, what travels, and when."""

import pytest
import torch

import commlayer
from commlayer import UnsupportedOperation, run_local
from parallel import blocks, ring
from parallel.attention import SequenceShards, context_attention
from parallel.ring import Block, Ring
from tests.contracts.attention import MASKS, Case, check, gradients


@pytest.fixture
def events(monkeypatch):
    """What the ring of rank 0 sends, computes and waits for, in order."""
    seen = []

    def note(*event):
        if commlayer.world().rank == 0:
            seen.append(event)

    def sendrecv(x, **options):
        note("send", x.dtype, tuple(x.shape))
        assert x.data_ptr() != options["out"].data_ptr()
        work = commlayer.sendrecv(x, **options)
        return work.then(lambda: note("arrived")) if options["async_op"] else work

    def noted(name, function):
        def call(*args):
            note(name)
            return function(*args)

        return call

    monkeypatch.setattr(ring, "sendrecv", sendrecv)
    monkeypatch.setattr(ring, "block_forward", noted("compute", ring.block_forward))
    monkeypatch.setattr(ring, "block_backward", noted("compute", ring.block_backward))
    return seen


def test_messages_are_under_way_during_computation(events):
    def rank():
        x = torch.randn(1, 4, 6, 8, requires_grad=True)
        y = context_attention(x, x, x, group=commlayer.world())
        if commlayer.world().rank == 0:
            events.append(("backward",))
        y.sum().backward()

    run_local(rank, ranks=3)
    names = [event[0] for event in events]
    middle = names.index("backward")
    assert names[:middle] == ["send", "compute", "arrived", "send", "compute", "arrived", "compute"]
    # Of two messages, one is K and V for the next step, the other the gradients of the step before.
    assert names[middle + 1 :] == [
        *["send", "compute", "send", "arrived"],
        *["send", "compute", "arrived", "send", "arrived"],
        *["compute", "arrived", "send", "arrived"],
    ]


def test_keys_and_values_travel_unexpanded_and_gradients_in_float32(events):
    def rank():
        q = torch.randn(1, 6, 4, 8, dtype=torch.bfloat16, requires_grad=True)
        k = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
        context_attention(q, k, k, group=commlayer.world()).sum().backward()

    run_local(rank, ranks=2)
    shape = (2, 1, 2, 4, 8)
    assert [event[1:] for event in events if event[0] == "send"] == [
        (torch.bfloat16, shape),
        (torch.bfloat16, shape),
        (torch.float32, shape),
        (torch.float32, shape),
    ]


def test_zigzag_is_one_kernel_call_a_step_and_half_a_square_each():
    """It needs no masks: intervals that see the same go together."""

    def rank():
        world = commlayer.world()
        layout = Ring(world, SequenceShards(32, 4, zigzag=True), causal=True, scale=1.0)
        found = [layout.blocks(layout.source(step)) for step in range(4)]
        assert found[0] == [Block(slice(0, 8), 8, True)]
        for (block,) in found[1:]:
            assert not block.causal
            assert block.keys * (block.queries.stop - block.queries.start) == 32

    run_local(rank, ranks=4)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_plain_kernels_equal_serial_attention(monkeypatch, rows):
    """What runs where torch has no fused kernel, some rows at a time."""
    monkeypatch.setattr(blocks, "CPU", blocks.PLAIN)
    monkeypatch.setattr(blocks, "SCORES", rows * 2 * 6 * 7)  # B, N, and the keys of one of two ranks
    for mask in MASKS:
        run_local(lambda m=mask: check(Case(13, "ring", True, True, m, (6, 2)), commlayer.world()), ranks=2)
    run_local(lambda: check(Case(13, "ring"), commlayer.world()), ranks=3)


def test_cuda_kernels_take_what_they_are_given():
    """Their signatures, on tensors without values."""
    q, k = (torch.empty(2, 4, tokens, 8, dtype=torch.bfloat16, device="meta") for tokens in (5, 7))
    out, lse = blocks.CUDA.forward(q, k, k, None, False, 0.5)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 4, 5), torch.float32)
    assert [x.shape for x in blocks.CUDA.backward(q, q, k, k, out, lse, None, False, 0.5)] == [
        q.shape,
        k.shape,
        k.shape,
    ]


def test_halves_are_summed_in_float32():
    """One token a rank, all weights 1/4: 256 and three small terms, each of which alone bfloat16 would round away."""

    def column(*values):
        x = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)
        x[0, 0, :, 0] = torch.tensor(values)
        return x

    def rank(k, v, grad):
        world = commlayer.world()
        parts = [x[:, :, world.rank, None] for x in (column(0, 0, 0, 0), k, v, grad)]
        return [
            float(x[0, 0, 0, 0])
            for x in gradients(lambda *qkv: context_attention(*qkv, group=world, scale=1.0), *parts)
        ]

    zeros, ones = column(0, 0, 0, 0), column(1, 1, 1, 1)
    out, *_ = run_local(lambda: rank(zeros, column(256, 258, 258, 258), ones))[0]
    assert out == 258  # of 257.5
    _, dq, _, _ = run_local(lambda: rank(column(1024, -4, 4, -4), column(1, -1, 1, -1), ones))[0]
    assert dq == 260  # of 256 + 1 + 1 + 1
    _, _, _, dv = run_local(lambda: rank(zeros, ones, column(1024, 4, 4, 4)))[0]
    assert dv == 260


def test_plain_kernels_under_autocast_sum_in_float32(monkeypatch):
    monkeypatch.setattr(blocks, "CPU", blocks.PLAIN)

    def rank():
        world = commlayer.world()
        q, k, v = torch.randn(3, 2, 2, 12, 8, generator=torch.Generator().manual_seed(0))
        mine = slice(6 * world.rank, 6 * world.rank + 6)
        with torch.autocast("cpu", torch.bfloat16):
            out = context_attention(q[:, :, mine], k[:, :, mine], v[:, :, mine], group=world)
        halves = [x.bfloat16().float() for x in (q, k, v)]
        wanted = torch.nn.functional.scaled_dot_product_attention(*halves)[:, :, mine].bfloat16()
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, wanted, rtol=2**-7, atol=2**-9)

    run_local(rank, ranks=2)


def test_a_second_derivative_through_the_ring_is_refused():
    def rank():
        x = torch.randn(1, 2, 4, 8, requires_grad=True)
        y = context_attention(x, x, x, group=commlayer.world())
        with pytest.raises(UnsupportedOperation, match="RingAttention has no second derivative"):
            torch.autograd.grad(y.square().sum(), x, create_graph=True)

    run_local(rank, ranks=2)
