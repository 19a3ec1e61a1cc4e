"""The branches of a transformer on thread ranks, the traps of tensor parallelism, and all of it inside graphs."""

import copy

import pytest
import torch
from torch import nn

import commlayer
from commlayer import Mesh, balanced_sizes, run_local
from parallel import DataParallel
from parallel.column import column_linear
from parallel.mappings import reduce_from_region
from parallel.placement import gather_full, mark_replicated, placement
from parallel.rng import Streams
from parallel.shards import SequenceShards
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from parallel.transformer import ParallelAttention, ParallelMLP
from tests.contracts.tensor import (
    CLOSE,
    PlainAttention,
    assert_gradients,
    blocks,
    calls,
    check_block,
    drawn,
    in_step,
    mine,
    rand,
    strided,
)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_block(ranks, sequence_parallel):
    variants = [
        {},
        {"gated": True, "causal": True, "masked": True},
        {"kv_heads": 3 if ranks == 3 else 4, "gated": True, "hidden": 2, "masked": True},
        {"heads": 12, "kv_heads": 12, "tokens": 2},
    ]
    for options in variants:
        run_local(
            lambda o=options: check_block(commlayer.world(), sequence_parallel=sequence_parallel, **o), ranks=ranks
        )


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_attention_on_a_grid_with_context_parallelism(method, sequence_parallel):
    def rank():
        mesh = Mesh("cp=2 tp=2")
        tp, cp = mesh["tp"], mesh["cp"]
        shards = SequenceShards(9, 2, zigzag=True)
        options = {"group": tp, "context": cp, "method": method, "causal": True}
        model = drawn(lambda: ParallelAttention(24, 4, sequence_parallel=sequence_parallel, **options)).double()
        serial = drawn(lambda: PlainAttention(24, 4, 4, causal=True)).double()
        mark_replicated(model, ("cp",))
        x, v = rand(2, 9, 24, seed=1), rand(2, 9, 24, seed=2)
        (serial(x) * v).sum().backward()
        local, w = (shards.shard(t, 1, cp) for t in (x, v))
        sizes = None
        if sequence_parallel:
            sizes = balanced_sizes(local.shape[1], 2)
            local, w = (t[:, mine(tp, t.shape[1])] for t in (local, w))
        model(local, shards=shards, sizes=sizes).mul(w).sum().backward()
        for p in model.parameters():
            p.grad = commlayer.all_reduce(p.grad, group=cp)
        assert_gradients(model, serial, tp)

    run_local(rank, ranks=4)


def test_fused_qkv_has_one_reduction_in_backward(monkeypatch):
    def rank(sequence, backward):
        model = ParallelAttention(8, 4, 2, group=commlayer.world(), sequence_parallel=sequence)
        y = model(torch.ones(1, 2, 8, requires_grad=True))
        if backward:
            y.sum().backward()

    for sequence, forward, both in (
        (False, ["all_reduce"], ["all_reduce"] * 2),
        (True, ["all_gather", "reduce_scatter"], ["all_gather"] * 3 + ["reduce_scatter"] * 2),
    ):
        for backward, wanted in ((False, forward), (True, both)):
            with calls(monkeypatch) as seen:
                run_local(lambda s=sequence, b=backward: rank(s, b), ranks=2)
            assert sorted(name for name, _ in seen) == sorted(wanted * 2)


def test_pairs_of_a_gated_mlp_stay_together():
    def rank():
        model = ParallelMLP(4, 3, group=commlayer.world(), gated=True)
        return tuple(model.up.weight.shape), tuple(model.down.weight.shape)

    assert run_local(rank, ranks=2) == [((4, 4), (4, 2)), ((2, 4), (4, 1))]


def test_qkv_is_not_copied():
    """Of multi-head attention q, k and v are kept as views of what one product made."""
    model = ParallelAttention(8, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(1, 5, 8))
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(nbytes == 5 * 24 * 4 for nbytes in memory.values()) == 1


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_differs_inside_and_agrees_outside(sequence_parallel):
    def rank():
        mesh = Mesh("tp=2")
        options = {"group": mesh["tp"], "dropout": 0.5, "sequence_parallel": sequence_parallel}
        streams = Streams(3, mesh)
        model = drawn(lambda: ParallelMLP(16, 32, streams=streams, **options))
        kept = []
        model.hidden_dropout.register_forward_hook(lambda _, args, out: kept.append(out != 0))
        x = drawn(lambda: torch.randn(4, 16))
        first, second = model(x), model(x)
        assert not torch.equal(first, second)
        exact = ParallelMLP(16, 32, group=mesh["tp"], sequence_parallel=sequence_parallel)
        exact.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(x), exact(x))
        attention = ParallelAttention(16, 4, streams=streams, **options)
        return kept[0], first != 0, int(attention.stream.state[0]), int(attention.output_dropout.stream.state[0])

    (hidden, out, inside, outside), (hidden1, out1, inside1, outside1) = run_local(rank, ranks=2)
    assert not torch.equal(hidden, hidden1)
    assert torch.equal(out, out1) == (not sequence_parallel)
    assert inside != inside1
    assert (outside == outside1) == (not sequence_parallel)


def test_attention_weights_are_dropped_from_the_stream():
    def outputs(streams):
        model = drawn(lambda: ParallelAttention(8, 2, dropout=0.5, streams=streams))
        x = drawn(lambda: torch.randn(1, 6, 8))
        model.output_dropout.eval()
        before = torch.get_rng_state()
        results = [model(x), model(x), model.eval()(x)]
        assert streams is None or torch.equal(torch.get_rng_state(), before)
        assert torch.equal(results[2], drawn(lambda: ParallelAttention(8, 2))(x))
        return results

    first, second, plain = outputs(Streams(5))
    again, *_ = outputs(Streams(5))
    other, *_ = outputs(Streams(6))
    assert torch.equal(first, again)
    for different in (second, plain, other):
        assert not torch.allclose(first, different)
    first, second, _ = outputs(None)
    assert not torch.allclose(first, second)


# The traps of this field ---------------------------------------------------------------------------------------


def test_trap_2_weights_that_see_some_of_the_tokens():
    """Norms and the bias of row-parallel layers under sequence parallelism: their gradients are right when summed over
    the axis, and only then; DataParallel does it, also with a data axis of one rank."""

    def rank():
        mesh = Mesh("dp=1 tp=3")
        group = mesh["tp"]
        model, serial = blocks(group, sequence_parallel=True)
        x, v = rand(2, 7, 24, seed=1), rand(2, 7, 24, seed=2)
        (serial(x) * v).sum().backward()
        cut = (slice(None), mine(group, 7))
        sizes = balanced_sizes(7, 3)
        (model(x[cut], sizes=sizes) * v[cut]).sum().backward()
        references = dict(serial.named_parameters())
        partial = {name: p for name, p in model.named_parameters() if placement(p).partial == ("tp",)}
        assert set(partial) == {
            *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attention.out.bias", "mlp.down.bias")
        }
        for name, p in partial.items():
            wanted = references[name].grad
            assert not torch.allclose(p.grad, wanted), name
            torch.testing.assert_close(commlayer.all_reduce(p.grad, group=group), wanted, **CLOSE)
        model.zero_grad()
        wrapped = DataParallel(model, mesh=mesh)
        (wrapped(x[cut], sizes=sizes) * v[cut]).sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(gather_full(p.grad, p), references[name].grad, **CLOSE)

    run_local(rank, ranks=3)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_trap_3_gradients_of_all_gather_go_by_its_consumers(ranks):
    """Consumers that do the same take a slice of the gradient; those that differ, its sum. Seen by the layer before."""

    def rank():
        group = commlayer.world()
        serial = drawn(lambda: nn.Sequential(*[nn.Linear(5, 5) for _ in range(4)])).double()
        x, v = rand(7, 5, seed=1), rand(7, 5, seed=2)
        serial(x).mul(v).sum().backward()
        # The same work on all ranks, on features gathered: a plain layer, then one that takes its part of them.
        first, _, third, _ = copy.deepcopy(serial)
        gathered = ColumnParallelLinear.from_linear(serial[1], group=group, gather_output=True)
        scattered = RowParallelLinear.from_linear(serial[3], group=group, scatter_input=True)
        model = nn.Sequential(first, gathered, third, scattered)
        model(x).mul(v).sum().backward()
        assert_gradients(model, serial, group)
        # Other work on each rank, on tokens gathered: the layers before and after see this rank's tokens alone.
        first, _, _, last = copy.deepcopy(serial)
        for layer in (first, last):
            mark_replicated(layer, ("tp",))
        options = {"group": group, "sequence_parallel": True}
        up = ColumnParallelLinear.from_linear(serial[1], **options)
        down = RowParallelLinear.from_linear(serial[2], **options)
        tokens, sizes = mine(group, 7), balanced_sizes(7, group.size)
        last(down(up(first(x[tokens]), sizes), sizes)).mul(v[tokens]).sum().backward()
        assert_gradients(nn.Sequential(first, up, down, last), serial, group)

    run_local(rank, ranks=ranks)


@pytest.mark.parametrize("transposed", [False, True])
def test_trap_4_reductions_overwrite_nothing_that_is_still_needed(transposed):
    """tanh keeps its output for backward, and the residual branch its gradient, contiguous or not."""

    def turned(t):
        return t.transpose(0, 1) if transposed else t

    def rank():
        group = commlayer.world()
        weight = rand(3 * 4, 4, seed=1)
        x, v = rand(5, 6, 4, seed=2).transpose(0, 1), rand(6, 5, 4, seed=3)
        reference = weight.clone().requires_grad_()
        points = x.clone().requires_grad_()
        h = torch.tanh(points @ reference.T).unflatten(-1, (3, 4)).sum(-2)
        ((points + h) * v).sum().backward()

        part = weight.split(4)[group.rank].clone().requires_grad_()
        local = x.detach().requires_grad_()
        assert not local.is_contiguous()
        kept = torch.tanh(column_linear(local, part, None, group))
        h = turned(reduce_from_region(turned(kept), group))
        out = local + h
        out.retain_grad()
        out.backward(strided(v))
        assert torch.equal(out.grad, v)
        assert torch.equal(local.detach(), x)
        torch.testing.assert_close(part.grad, reference.grad.split(4)[group.rank], **CLOSE)
        torch.testing.assert_close(local.grad, points.grad, **CLOSE)

    run_local(rank, ranks=3)


# Inside graphs ---------------------------------------------------------------------------------------------------


def test_block_inside_a_graph(monkeypatch):
    options = {"sequence_parallel": True, "kv_heads": 4, "gated": True, "compiled": True}
    with in_step(monkeypatch, 2):
        run_local(lambda: check_block(commlayer.world(), **options), ranks=2)


def test_layers_inside_a_graph(monkeypatch):
    """Lookup, layers with frozen parts and without, under autocast: the same bits as in eager."""

    def rank():
        group = commlayer.world()
        embedding = drawn(lambda: VocabParallelEmbedding(11, 6, 3, group=group))
        up = drawn(lambda: ColumnParallelLinear(6, 7, group=group))
        down = drawn(lambda: RowParallelLinear(7, 6, group=group))
        head = drawn(lambda: ColumnParallelLinear(6, 5, group=group, gather_output=True)).requires_grad_(False)
        ids = torch.tensor([[0, 3, 10, 5], [4, 4, 9, 8]])
        trained = [*embedding.parameters(), *up.parameters(), *down.parameters()]

        def call(ids):
            with torch.autocast("cpu", torch.bfloat16):
                return head(down(torch.tanh(up(embedding(ids)))))

        results = []
        compiled = torch.compile(call)
        for run in (call, compiled):
            y = run(ids)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), trained)))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert y.dtype == torch.bfloat16
        # There nothing looks at the ids beforehand: the lookup fails.
        compiled(torch.where(ids == 10, 11, ids))

    with in_step(monkeypatch, 2), pytest.raises(IndexError, match="index out of range"):
        run_local(rank, ranks=2)
