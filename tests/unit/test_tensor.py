"""The layers of tensor and sequence parallelism on thread ranks, against plain torch."""

import copy
import itertools
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import commlayer
from commlayer import Group, balanced_sizes, run_local
from parallel.placement import full_shape, gather_full, placement
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from parallel.transformer import ParallelAttention, ParallelMLP
from tests.contracts.tensor import CLOSE, assert_gradients, calls, drawn, mine, rand, strided

BITS = {"rtol": 0, "atol": 0}


# The linear layers ------------------------------------------------------------------------------------------


def check_linear(cls, shape, features, *, sequence=None, whole=False, bias=True, layout=strided):
    """Any option of either layer against nn.Linear. ``sequence``: the dim that is cut; ``whole``: gathered features."""
    group = commlayer.world()
    ins, outs = features
    serial = drawn(lambda: nn.Linear(ins, outs, bias)).double()
    column = cls is ColumnParallelLinear
    options = {} if sequence is None else {"sequence_parallel": True, "sequence_dim": sequence}
    options["gather_output" if column else "scatter_input"] = whole
    model = cls.from_linear(serial, group=group, **options)
    x = rand(*shape, ins, seed=1).requires_grad_()
    v = rand(*shape, outs, seed=2)
    y = serial(x)
    (y * v).sum().backward()

    tokens = (..., slice(None)) if sequence is None else part_along(x, sequence, group)
    channels = (..., slice(None) if whole else mine(group, outs if column else ins))
    x_cut, y_cut = (tokens, channels) if column else (channels, tokens)
    local = layout(x.detach()[x_cut]).requires_grad_()
    sizes = None if sequence is None else balanced_sizes(x.shape[sequence], group.size)
    out = model(local, sizes) if sequence is not None else model(local)
    torch.testing.assert_close(out, y[y_cut], **CLOSE)
    out.backward(layout(v[y_cut]))
    torch.testing.assert_close(local.grad, x.grad[x_cut], **CLOSE)
    assert_gradients(model, serial, group)
    assert torch.equal(local.detach(), x.detach()[x_cut]), "the input was overwritten"


def part_along(x, dim, group):
    return (..., mine(group, x.shape[dim]), *[slice(None)] * (-1 - dim))


@pytest.mark.parametrize("cls", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("features", [(8, 12), (7, 9), (5, 3), (2, 10), (10, 2)])
def test_linear_layers(cls, ranks, features):
    def rank():
        for whole, bias in itertools.product((False, True), repeat=2):
            check_linear(cls, (2, 5), features, whole=whole, bias=bias)
            check_linear(cls, (2, 5), features, whole=whole, bias=bias, sequence=-2)

    run_local(rank, ranks=ranks)


@pytest.mark.parametrize("cls", [ColumnParallelLinear, RowParallelLinear])
def test_any_leading_shape_and_layout(cls):
    def rank():
        for shape in ((), (4,), (0,), (2, 0), (0, 5), (2, 1, 3)):
            check_linear(cls, shape, (7, 9))
        for shape in ((4,), (0,), (2, 3, 4), (0, 4), (1, 2)):
            check_linear(cls, shape, (7, 9), sequence=-2)
        check_linear(cls, (4, 2, 3), (7, 9), sequence=-4)
        for layout in (lambda t: t.clone(), lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]]):
            check_linear(cls, (3, 4), (7, 9), sequence=-2, layout=layout)

    run_local(rank, ranks=3)


def test_gradients_from_an_expanded_tensor():
    """What sum().backward() sends: one element, seen often."""

    def rank():
        group = commlayer.world()
        serial = drawn(lambda: nn.Linear(5, 7)).double()
        model = ColumnParallelLinear.from_linear(serial, group=group)
        x = rand(3, 5)
        model(x).sum().backward()
        serial(x).sum().backward()
        assert_gradients(model, serial, group)

    run_local(rank, ranks=2)


@pytest.mark.parametrize("sequence", [False, True])
def test_second_derivatives(sequence):
    def rank():
        group = commlayer.world()
        serial = drawn(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))).double()
        options = {"group": group, "sequence_parallel": sequence}
        up = ColumnParallelLinear.from_linear(serial[0], **options)
        down = RowParallelLinear.from_linear(serial[2], **options)
        sizes = [balanced_sizes(5, group.size)] if sequence else []
        x = rand(5, 4, seed=1)
        share = x[mine(group, 5)] if sequence else x
        # Each rank has a part of the slopes, of the weight's and perhaps of the tokens', and so of their cubes' sum.
        found = []
        for run, weight, points in (
            (serial, serial[0].weight, x),
            (lambda t: down(torch.tanh(up(t, *sizes)), *sizes), up.weight, share),
        ):
            points = points.clone().requires_grad_()
            slopes = torch.autograd.grad(run(points).square().sum(), [points, weight], create_graph=True)
            sum(slope.pow(3).sum() for slope in slopes).backward()
            found.append(points.grad)
        assert_gradients(nn.Sequential(up, nn.Tanh(), down), serial, group)
        torch.testing.assert_close(found[1], found[0][mine(group, 5)] if sequence else found[0], **CLOSE)

    run_local(rank, ranks=3)


# What is communicated, when, and what is kept ----------------------------------------------------------------


def test_only_what_is_needed_is_communicated(monkeypatch):
    """(x requires grad, the weight does) -> calls in forward and backward."""
    reduced, gathered, scattered = ("all_reduce", (4, 6)), ("all_gather", (2, 6)), ("reduce_scatter", (4, 6))
    expected = {
        (False, True, True): [reduced],
        (False, True, False): [reduced],
        (False, False, True): [],
        (True, True, True): [gathered, gathered, scattered],
        (True, True, False): [gathered, scattered],
        (True, False, True): [gathered, gathered],
    }

    def rank(sequence, wants_x, wants_weight):
        layer = ColumnParallelLinear(6, 8, group=commlayer.world(), sequence_parallel=sequence)
        layer.weight.requires_grad_(wants_weight)
        x = torch.ones(2 if sequence else 4, 6, requires_grad=wants_x)
        commlayer.barrier()
        layer(x).sum().backward()
        assert (x.grad is not None, layer.weight.grad is not None) == (wants_x, wants_weight)
        assert layer.bias.grad is not None

    for case, wanted in expected.items():
        with calls(monkeypatch) as seen:
            run_local(lambda c=case: rank(*c), ranks=2)
        assert sorted(seen) == sorted(wanted * 2), case


def test_a_group_of_one_communicates_nothing(monkeypatch):
    with calls(monkeypatch) as seen:
        for group in (None, Group.alone()):
            check = {"group": group, "sequence_parallel": True}
            serial = nn.Linear(3, 4)
            x = torch.randn(2, 3)
            for cls in (ColumnParallelLinear, RowParallelLinear):
                layer = cls.from_linear(serial, **check)
                assert torch.equal(layer(x), serial(x))
                assert not placement(layer.weight).shards
    assert not seen


def test_the_input_gradient_is_reduced_while_the_weight_gradient_is_computed(monkeypatch):
    events = [[], []]  # of each rank

    def log(what):
        events[commlayer.world().rank].append(what)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                log("product")
            return func(*args, **(kwargs or {}))

    def observed(name, function):
        def start(x, **options):
            work = function(x, **options)
            if "async_op" not in options:
                return work
            log(name)
            return work.then(lambda: (log(f"{name} done"), work.result)[1])

        return start

    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        monkeypatch.setattr(commlayer, name, observed(name, getattr(commlayer, name)))

    def rank(sequence):
        layer = ColumnParallelLinear(6, 8, group=commlayer.world(), sequence_parallel=sequence)
        y = layer(torch.ones(3, 6, requires_grad=True))
        with Products():
            y.backward(torch.ones_like(y))

    run_local(lambda: rank(False), ranks=2)
    assert events == [["product", "all_reduce", "product", "all_reduce done"]] * 2
    events = [[], []]
    run_local(lambda: rank(True), ranks=2)
    wanted = ["all_gather", "product", "reduce_scatter", "all_gather done", "product", "reduce_scatter done"]
    assert events == [wanted] * 2


@contextmanager
def saved():
    """What autograd keeps meanwhile."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        yield kept


def test_what_is_kept_for_backward():
    """The input as it came, under sequence parallelism this rank's part; nothing for weights that are frozen."""

    def rank(sequence, trained):
        layer = ColumnParallelLinear(6, 8, bias=False, group=commlayer.world(), sequence_parallel=sequence)
        layer.weight.requires_grad_(trained)
        x = torch.ones(3, 6, requires_grad=True)
        with saved() as kept:
            layer(x)
        return [{id(x): "x", id(layer.weight): "weight"}.get(id(t), tuple(t.shape)) for t in kept]

    for sequence in (False, True):
        assert run_local(lambda s=sequence: rank(s, True), ranks=2) == [["x", "weight"]] * 2
        assert run_local(lambda s=sequence: rank(s, False), ranks=2) == [["weight"]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_nn_linear(dtype):
    def rank():
        group = commlayer.world()
        for sequence in (False, True):
            serial = drawn(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)))
            up, down = (
                cls.from_linear(layer, group=group, sequence_parallel=sequence)
                for cls, layer in zip((ColumnParallelLinear, RowParallelLinear), serial, strict=True)
            )
            x = rand(4, 6, dtype=torch.float32)
            share = (x[mine(group, 4)] if sequence else x).clone().requires_grad_()
            x.requires_grad_()
            with torch.autocast("cpu", dtype):
                expected = serial(x)
                with saved() as kept:
                    hidden = up(share)
                y = down(hidden)
                doubles = up.double()(share.double())
            up.float()
            assert hidden.dtype == y.dtype == expected.dtype == dtype
            assert doubles.dtype == torch.float64
            assert {t.dtype for t in kept} == {dtype}
            half = {"rtol": 2e-2, "atol": 2e-2}
            torch.testing.assert_close(y, expected[mine(group, 4)] if sequence else expected, **half)
            expected.float().square().sum().backward()
            y.float().square().sum().backward()
            torch.testing.assert_close(share.grad, x.grad[mine(group, 4)] if sequence else x.grad, rtol=3e-2, atol=6e-2)
            assert_gradients(nn.Sequential(up, down), serial, group, rtol=3e-2, atol=6e-2)

    run_local(rank, ranks=2)


# Weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_8_init_is_the_serial_one_bit_for_bit(ranks, dtype):
    """Of a model of several layers, and whatever is drawn afterwards."""

    def layers(linear, row, embedding):
        return nn.ModuleList(
            [embedding(11, 6, 2), linear(6, 10), row(10, 7), linear(7, 5, bias=False), row(3, 4), embedding(5, 3)]
        ).append(nn.Linear(3, 3, dtype=dtype))

    def parallel(cls):
        return lambda *args, **options: cls(*args, **options, group=commlayer.world(), dtype=dtype)

    def plain(cls):
        return lambda *args, **options: cls(*args, **options, dtype=dtype)

    def rank():
        classes = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
        model, after = drawn(lambda: (layers(*map(parallel, classes)), torch.rand(1)), seed=7)
        serial, wanted = drawn(lambda: (layers(*map(plain, (nn.Linear, nn.Linear, nn.Embedding))), torch.rand(1)), 7)
        assert torch.equal(after, wanted)
        for (name, p), q in zip(model.named_parameters(), serial.parameters(), strict=True):
            assert p.dtype == dtype
            assert torch.equal(gather_full(p, p), q), name
            assert full_shape(p) == list(q.shape)
        drawn(lambda: [m.reset_parameters() for m in model], seed=8)
        drawn(lambda: [m.reset_parameters() for m in serial], seed=8)
        for p, q in zip(model.parameters(), serial.parameters(), strict=True):
            assert torch.equal(gather_full(p, p), q)

    run_local(rank, ranks=ranks)


@pytest.mark.parametrize("cls", [ColumnParallelLinear, RowParallelLinear])
def test_to_and_from_plain_layers(cls):
    def rank():
        group = commlayer.world()
        for bias in (True, False):
            serial = drawn(lambda b=bias: nn.Linear(7, 5, b, dtype=torch.float64))
            serial.weight.requires_grad_(False)
            model = cls.from_linear(serial, group=group)
            assert [p.requires_grad for p in model.parameters()] == [False, True][: 1 + bias]
            assert torch.equal(model.full_weight(), serial.weight)
            assert model.full_bias() is None if not bias else torch.equal(model.full_bias(), serial.bias)
            assert model.weight.untyped_storage().nbytes() == model.weight.nbytes, "a view keeps the whole alive"
            back = model.to_linear()
            assert str(back) == str(serial)
            for (name, p), (other, q) in zip(back.named_parameters(), serial.named_parameters(), strict=True):
                assert name == other
                assert torch.equal(p, q)
                assert p.requires_grad == q.requires_grad
                assert p.dtype == q.dtype
            with torch.no_grad():
                back.weight.zero_()
            assert model.weight.any(), "the copy shares memory with the model"

    run_local(rank, ranks=3)
    run_local(rank, ranks=1)


def test_marks_last():
    """Through the meta device, conversion, copies, assigned and loaded parameters."""

    def marks(layer):
        return {name: placement(p) for name, p in layer.named_parameters()}

    def rank():
        group = commlayer.world()
        for make in (
            lambda **o: ColumnParallelLinear(5, 7, group=group, **o),
            lambda **o: RowParallelLinear(5, 7, group=group, sequence_parallel=True, **o),
            lambda **o: VocabParallelEmbedding(7, 5, group=group, **o),
        ):
            reference = drawn(make)
            wanted = marks(reference)
            assert wanted["weight"].shards[0].sizes == tuple(
                balanced_sizes(5 + 2 * (wanted["weight"].shards[0].dim == 0), 3)
            )
            if isinstance(reference, RowParallelLinear):
                assert wanted["bias"].partial == ("tp",)
            layer = make(device="meta")
            assert layer.weight.is_meta
            layer.to_empty(device="cpu")
            drawn(layer.reset_parameters)
            for (name, p), q in zip(layer.named_parameters(), reference.parameters(), strict=True):
                assert torch.equal(p, q), name
            assert marks(layer) == marks(copy.deepcopy(layer)) == marks(layer.double()) == wanted
            loaded = make(device="meta")
            loaded.load_state_dict(reference.state_dict(), assign=True)
            assert marks(loaded) == wanted
            reference.weight = nn.Parameter(torch.zeros_like(reference.weight))
            assert marks(reference) == wanted

    run_local(rank, ranks=3)


def test_a_tied_weight_is_marked_once():
    def rank():
        group = commlayer.world()
        embedding = VocabParallelEmbedding(7, 5, group=group)
        head = ColumnParallelLinear(5, 7, bias=False, group=group)
        head.weight = embedding.weight
        assert len(placement(head.weight).shards) == 1
        with pytest.raises(ValueError, match="but dim 0 of the parameter has 7"):
            head.weight = nn.Embedding(7, 5).weight

    run_local(rank, ranks=2)


def test_out_sizes():
    def rank():
        layer = ColumnParallelLinear(3, 8, group=commlayer.world(), out_sizes=[6, 2], gather_output=True)
        assert layer.weight.shape == ([6, 2][commlayer.world().rank], 3)
        assert layer(torch.ones(1, 3)).shape == (1, 8)
        return repr(layer)

    assert run_local(rank, ranks=2)[1] == (
        "ColumnParallelLinear(in_features=3, out_features=8, bias=True, tp: 2 of 8 on rank 1)"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: ColumnParallelLinear(3, 8, group=g, out_sizes=[3, 3]), r"2 ranks that add up to 8, got \[3, 3\]"),
        (lambda g: ColumnParallelLinear(3, 8, group=g, out_sizes=[8]), r"sizes: expected extents for 2 ranks"),
        (lambda g: ColumnParallelLinear(3, 8, group=g)(torch.ones(2, 3), [1, 1]), "for sequence_parallel, which is"),
        (
            lambda g: RowParallelLinear(4, 3, group=g, sequence_parallel=True)(torch.ones(5, 2)),
            r"sizes: 5 tokens do not divide into 2 equal parts; give each rank's, for example balanced_sizes\(5, 2\)",
        ),
        (
            lambda g: RowParallelLinear(4, 3, group=g, sequence_parallel=True)(torch.ones(5, 2), [3, 3]),
            r"sizes: \[3, 3\] for 2 ranks; they must add up to the 5",
        ),
        (lambda g: VocabParallelEmbedding(1, 3, group=g), "num_embeddings: 1 rows are too few for 2 ranks"),
        (lambda g: VocabParallelEmbedding(5, 3, 5, group=g), "padding_idx: expected one of 5 rows, got 5"),
        (
            lambda g: VocabParallelEmbedding.from_embedding(nn.Embedding(5, 3, max_norm=1.0), group=g),
            "embedding: max_norm=1.0 has no parallel counterpart",
        ),
        (lambda g: ParallelAttention(12, 5, group=g), "heads: must divide embed 12, got 5"),
        (lambda g: ParallelAttention(12, 4, 3, group=g), "kv_heads: must divide heads 4, got 3"),
        (lambda g: ParallelAttention(12, 3, group=g), "heads: must be a multiple of the 2 ranks of tp, got 3"),
        (lambda g: ParallelAttention(12, 4, 1, group=g), "kv_heads: must be a multiple of the 2 ranks of tp, got 1"),
        (lambda g: ParallelMLP(4, 8, group=g, dropout=0.1), "dropout: 0.1 on 2 ranks needs streams="),
    ],
)
def test_bad_input(call, message):
    def rank():
        with pytest.raises(ValueError, match=message):
            call(commlayer.world())

    run_local(rank, ranks=2)


# The embedding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", [None, 0, 5, -1])
def test_embedding(ranks, padding):
    def rank(sequence, shape):
        group = commlayer.world()
        serial = drawn(lambda: nn.Embedding(11, 6, padding)).double()
        model = VocabParallelEmbedding.from_embedding(serial, group=group, sequence_parallel=sequence)
        ids = torch.randint(11, shape, generator=torch.Generator().manual_seed(3)).to(torch.int32)
        v = rand(*shape, 6)
        expected = serial(ids)
        (expected * v).sum().backward()
        cut = part_along(v, -2, group) if sequence else ...
        y = model(ids, balanced_sizes(shape[-1], group.size)) if sequence else model(ids)
        torch.testing.assert_close(y, expected[cut], **BITS)
        y.backward(strided(v[cut]))
        assert_gradients(model, serial, group)
        assert torch.equal(model.full_weight(), serial.weight)

    for shape in ((9,), (3, 5), (2, 0)):
        for sequence in (False, True):
            run_local(lambda c=sequence, s=shape: rank(c, s), ranks=ranks)


def test_ids_out_of_range_are_refused_on_all_ranks():
    def rank():
        layer = VocabParallelEmbedding(11, 6, group=commlayer.world())
        for wrong in (-1, 11):
            with pytest.raises(IndexError, match=f"ids: expected 0 to 10, got {wrong}"):
                layer(torch.tensor([3, wrong, 5]))

    run_local(rank, ranks=3)
