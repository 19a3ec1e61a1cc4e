"""Streams of random numbers: who draws the same ones, dropout eager and compiled, recomputation, resuming."""

import copy
import io
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import commlayer
from commlayer import Mesh, run_local
from parallel.mappings import copy_to_region, reduce_from_region
from parallel.recompute import checkpoint
from parallel.rng import Dropout, DropPath, Streams


def draw(stream, n=64):
    return Dropout(0.5, stream)(torch.ones(n))


# Who draws what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["dp=2 tp=2", "cp=2 tp=2", "pp=2 tp=2", "tp=3", "dp=1 cp=1 tp=2"])
@pytest.mark.parametrize("axes", ["dp", "dp-cp", "dp-cp-tp", "tp-dp"])
def test_trap_8_ranks_draw_alike_where_their_coordinates_are(spec, axes):
    size = Mesh(spec).world_size

    def drawn():
        mesh = Mesh(spec)
        stream = Streams(1, mesh).along(axes)
        first, second = draw(stream), draw(stream)
        assert not torch.equal(first, second)
        coords = mesh.coords(commlayer.world().rank)
        return [coords.get(axis, 0) for axis in (*axes.split("-"), "pp")], first, second

    ranks = run_local(drawn, size)
    for place, *masks in ranks:
        for other_place, *other_masks in ranks:
            for mask, other in zip(masks, other_masks, strict=True):
                assert torch.equal(mask, other) == (place == other_place)


def test_trap_8_dropout_inside_and_outside_of_a_tensor_parallel_region():
    rows, w1, w2 = 20_000, torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)

    def run():
        mesh = Mesh("tp=2")
        group, streams = mesh["tp"], Streams(2, mesh)
        mine = slice(3 * group.rank, 3 * group.rank + 3)
        outside, inside = Dropout(0.3, streams.along("dp-cp")), Dropout(0.3, streams.along("dp-cp-tp"))
        h = outside(torch.ones(rows, 4, dtype=torch.float64))
        u = inside(copy_to_region(h, group) @ w1[:, mine])
        return h, u == 0, reduce_from_region(u @ w2[mine], group)

    (h, zero, y), (other_h, other_zero, other_y) = run_local(run, 2)
    assert torch.equal(h, other_h)
    assert torch.equal(y, other_y)
    assert (zero != other_zero).double().mean().item() == pytest.approx(2 * 0.3 * 0.7, abs=0.01)
    error = (y.mean(0) - w1.sum(0) @ w2) / (y.std(0) / rows**0.5)
    assert error.abs().max() < 5


def test_streams_of_other_seeds_and_axes_differ():
    names = ("dp", "dp-cp", "dp-cp-tp", "cp")
    seeds = {int(Streams(seed).along(axes).state[0]) for seed in range(-5, 100) for axes in names}
    assert len(seeds) == 105 * len(names)


def test_axes_of_size_one_change_nothing():
    def drawn():
        streams = Streams(3, Mesh("dp=2"))
        first, state = draw(streams.along("dp-cp-tp")), streams.state_dict()
        again = Streams(3, Mesh("dp=2 cp=1 tp=1 pp=1"))
        assert torch.equal(draw(again.along("dp-cp-tp")), first)
        again.load_state_dict(state)
        assert torch.equal(draw(again.along("dp-cp-tp")), draw(streams.along("dp-cp-tp")))

    run_local(drawn, 2)


def test_a_stream_is_one_object_however_its_axes_are_said():
    streams = Streams(0)
    assert streams.along("dp-cp") is streams.along("cp-dp") is streams.along("cp-dp-pp")
    assert streams.along("dp-cp") is not streams.along("dp")
    module = Dropout(0.5, streams.along("dp"))
    assert copy.deepcopy(nn.Sequential(module))[0].stream is module.stream


@pytest.mark.parametrize("axes", ["", "dp cp", "dp-", None])
def test_bad_axes(axes):
    with pytest.raises(ValueError, match=re.escape(repr(axes))):
        Streams(0).along(axes)


@pytest.mark.parametrize("seed", [1.0, "1", None, True])
def test_bad_seed(seed):
    with pytest.raises(TypeError, match=f"seed: .*{seed!r}"):
        Streams(seed)


# Forks ----------------------------------------------------------------------------------------------------


def fail_in_a_fork(stream):
    with stream.fork():
        torch.rand(3)
        raise ZeroDivisionError


def test_forks_leave_the_default_generator_where_it_was():
    streams = Streams(4)
    torch.manual_seed(0)
    plain = torch.rand(4)
    torch.manual_seed(0)
    first = torch.rand(2)
    with streams.along("dp").fork():
        one = torch.rand(3)
        with streams.along("dp").fork():
            nested = torch.rand(3)
        after = torch.rand(3)
    with pytest.raises(ZeroDivisionError):
        fail_in_a_fork(streams.along("cp"))
    assert torch.equal(torch.cat([first, torch.rand(2)]), plain)

    again = Streams(4)
    with again.along("dp").fork():
        assert torch.equal(torch.rand(6), torch.cat([one, after]))
    with again.along("dp").fork():
        assert torch.equal(torch.rand(3), nested)
    assert not torch.equal(one, nested)


# Dropout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.25, 0.9])
def test_dropout(dtype, p):
    x = torch.full((200, 100), 2.0, dtype=dtype, requires_grad=True)
    y = Dropout(p, Streams(0).along("dp"))(x)
    assert y.dtype == dtype
    kept = y != 0
    scale = torch.tensor(1 / (1 - p), dtype=torch.float64)
    torch.testing.assert_close(y, (2 * scale * kept).to(dtype))
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.02)
    y.backward(torch.full_like(y, 3.0))
    torch.testing.assert_close(x.grad, (3 * scale * kept).to(dtype))


def test_drop_path_drops_whole_samples():
    x = torch.rand(1000, 3, 2, requires_grad=True)
    for stream in (None, Streams(0).along("dp")):
        y = DropPath(0.4, stream)(x)
        kept = (y != 0).any(dim=(1, 2))
        assert kept.float().mean().item() == pytest.approx(0.6, abs=0.07)
        torch.testing.assert_close(y, x / 0.6 * kept[:, None, None])


@pytest.mark.parametrize("stream", [None, Streams(0).along("dp")])
@pytest.mark.parametrize("make", [Dropout, DropPath])
def test_dropout_of_nothing_and_of_everything(make, stream):
    x = torch.rand(5, 4, requires_grad=True)
    assert make(0.0, stream)(x) is x
    assert make(0.5, stream).eval()(x) is x
    y = make(1.0, stream)(x)
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()


def test_dropout_without_a_stream_is_torchs():
    x = torch.rand(50)
    torch.manual_seed(0)
    y = Dropout(0.3)(x)
    torch.manual_seed(0)
    assert torch.equal(y, F.dropout(x, 0.3))


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_bad_probability(p):
    with pytest.raises(ValueError, match=f"p: .*{p}"):
        Dropout(p)
    with pytest.raises(ValueError, match=f"rate: .*{p}"):
        DropPath(p)


# In graphs, and recomputed --------------------------------------------------------------------------------


class Net(nn.Module):
    """Dropout of two streams, twice of one and the same input, and once for nothing; on request recomputed."""

    def __init__(self, streams, recompute=None, default=False):
        super().__init__()
        self.streams, self.recompute = streams, recompute
        self.one = Dropout(0.3, streams.along("dp"))
        self.other = Dropout(0.6, streams.along("dp-cp"))
        self.path = DropPath(0.2, streams.along("dp"))
        self.default = Dropout(0.5) if default else nn.Identity()

    def block(self, x):
        self.one(x)
        y = self.one(x) * 2 + self.one(x) * 3 + self.path(torch.sin(x))
        return torch.tanh(self.other(self.default(y)) * x)

    def forward(self, x):
        if self.recompute:
            return self.recompute(self.block, self.recompute(self.block, x))
        return self.block(self.block(x))


def results(net, x, streams, **backward):
    """The output, the gradient, and two numbers that follow."""
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    y = net(x)
    y.square().sum().backward(**backward)
    return y.detach(), x.grad, draw(streams.along("dp")), torch.rand(3)


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def sample():
    return torch.rand(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own
def test_compiled_as_eager(backend):
    torch._dynamo.reset()
    x, eager, compiled = sample(), Streams(5), Streams(5)
    wanted = results(Net(eager), x, eager)
    net = torch.compile(Net(compiled), fullgraph=True, backend=backend)
    assert_same(results(net, x, compiled), wanted)
    assert_same(results(net, x, compiled), results(Net(eager), x, eager))


def test_two_calls_in_one_graph_differ():
    torch._dynamo.reset()
    dropout = Dropout(0.5, Streams(0).along("dp"))
    one, other = torch.compile(lambda x: (dropout(x), dropout(x)), fullgraph=True, backend="aot_eager")(torch.ones(64))
    assert not torch.equal(one, other)


def test_one_graph_serves_other_rates_and_streams():
    torch._dynamo.reset()
    x, eager, compiled = sample(), Streams(6), Streams(6)
    for rate, axes in ((0.1, "dp"), (0.2, "dp"), (0.4, "cp"), (0.7, "tp")):
        net = torch.compile(Dropout(rate, compiled.along(axes)), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(net(x), Dropout(rate, eager.along(axes))(x))


@pytest.mark.parametrize("how", ["eager", "compiled inside", "compiled outside"])
def test_recomputed_as_kept(how):
    torch._dynamo.reset()
    x, kept, again = sample(), Streams(7), Streams(7)
    # What the default generator draws in a graph is another matter.
    wanted = results(Net(kept, default=how == "eager"), x, kept)
    net = Net(again, lambda block, x: checkpoint(block, x, streams=again), default=how == "eager")
    if how == "compiled inside":
        net.block = torch.compile(net.block, fullgraph=True, backend="aot_eager")
    if how == "compiled outside":
        net = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_same(results(net, x, again), wanted)


def test_recomputed_twice_and_within_forks():
    streams = Streams(8)
    x = torch.rand(30, requires_grad=True)

    def block(x):
        with streams.along("cp").fork():
            x = F.dropout(x)
        return torch.exp(Dropout(0.5, streams.along("new"))(x))  # a stream that was not there before

    with streams.along("dp").fork():
        y = checkpoint(lambda x: checkpoint(block, x, streams=streams) * F.dropout(x), x, streams=streams)
    with streams.along("ep").fork():
        before = streams.state_dict()
        (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        (second,) = torch.autograd.grad(y.sum(), x)
        after = streams.state_dict()
    assert torch.equal(first, second)
    assert after["draws"] == before["draws"]
    assert torch.equal(after["default"]["cpu"], before["default"]["cpu"])

    streams = Streams(8)
    with streams.along("dp").fork():
        y = block(x) * F.dropout(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], first)


def test_recomputation_without_streams_replays_the_default_generator():
    x = torch.rand(100, requires_grad=True)
    y = checkpoint(lambda x: torch.exp(F.dropout(x)), x)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpoint_that_knows_no_streams_is_found_out(compiled):
    torch._dynamo.reset()
    streams = Streams(9)
    net = Net(streams, lambda block, x: torch_checkpoint(block, x, use_reentrant=False))
    if compiled:
        net = torch.compile(net, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="streams=streams"):
        results(net, sample(), streams)


# Resuming -------------------------------------------------------------------------------------------------


def following(streams):
    return torch.cat(
        [draw(streams.along("dp")), draw(streams.along("dp-cp")), torch.rand(5), draw(streams.along("cp"))]
    )


def test_resumed_streams_draw_the_very_same_numbers():
    streams = Streams(10)
    for _ in range(3):
        draw(streams.along("dp"))
    draw(streams.along("dp-cp"))
    file = io.BytesIO()
    torch.save(streams.state_dict(), file)
    wanted = following(streams)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    used = Streams(10)
    for _ in range(7):
        draw(used.along("dp"))
    used.load_state_dict(state)
    assert torch.equal(following(used), wanted)

    fresh = Streams(10)
    fresh.load_state_dict(state)
    assert torch.equal(following(fresh), wanted)


def test_states_that_do_not_fit():
    streams = Streams(11)
    draw(streams.along("dp"))
    good = streams.state_dict()
    bad = {
        "saved with seed 12, but here it is 11": {**good, "seed": 12},
        "saved with mesh": {**good, "mesh": {"dp": 2}},
        "saved with coordinates": {**good, "coordinates": {"dp": 1}},
        "the stream along dp-pp": {**good, "draws": {}},
        "expected the keys": {key: value for key, value in good.items() if key != "draws"},
        "generators of cpu, quantum": {**good, "default": {**good["default"], "quantum": torch.rand(1)}},
    }
    for message, state in bad.items():
        with pytest.raises(ValueError, match=message):
            streams.load_state_dict(state)
    assert streams.state_dict()["draws"] == good["draws"] == {"dp-pp": 1}


def test_a_state_is_that_of_one_rank():
    def exchange():
        streams = Streams(12, Mesh("dp=2"))
        streams.load_state_dict(streams.state_dict())
        other = commlayer.all_gather_object(streams.state_dict())[1 - commlayer.world().rank]
        with pytest.raises(ValueError, match="saved with coordinates"):
            streams.load_state_dict(other)

    run_local(exchange, 2)
