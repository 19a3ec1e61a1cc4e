"""The mixture-of-experts layer on thread ranks, against the plain one on one process."""

import itertools
from contextlib import nullcontext

import pytest
import torch

import commlayer
from commlayer import Mesh, run_local
from parallel.data import DataParallel
from parallel.expert import MoE
from parallel.placement import gather_full, part_of
from parallel.router import Routing
from tests.contracts.moe import (
    CLOSE,
    EMBED,
    LOSSES,
    PLANS,
    Layer,
    Layout,
    Problem,
    compare,
    meshes,
    reference,
    tokens_of,
)
from tests.contracts.plain_moe import PlainMoE
from tests.contracts.tensor import drawn, rand

# Gradients --------------------------------------------------------------------------------------------------


def problems(ep, per_rank, **options):
    """Every number of choices, dropless and not, with random, skewed, and missing tokens."""
    experts = ep * per_rank
    for top_k, capacity in itertools.product((1, 2, 6), (0.0, 0.75)):
        if top_k <= experts:
            routing = Routing(experts, top_k, capacity_factor=capacity, **LOSSES)
            yield Problem(routing, (4, 0, 5, 3), **options)
            yield Problem(routing, (3, 2, 1, 4), hot=experts - 1, **options)
            if top_k <= experts - per_rank:
                yield Problem(routing, (3, 2, 4, 1), starved=per_rank, **options)


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("per_rank", [1, 2, 5])
def test_gradients_are_the_serial_ones(ep, per_rank):
    compare((problem, Layout(fold=f"ep={ep}")) for problem in problems(ep, per_rank))


LAYOUTS = [
    *(Layout(fold=fold) for fold in ("etp=2 ep=2", "etp=2 ep=1", "etp=4 ep=1")),
    *(
        Layout(mesh, fold, sequence_parallel)
        for mesh in ("dp=2 cp=1 tp=2", "dp=1 cp=1 tp=4", "dp=1 cp=2 tp=2")
        for fold in ("ep=4", "ep=2", "etp=2 ep=2", "ep=1")
        for sequence_parallel in (False, True)
    ),
    *(Layout(mesh, fold) for mesh in ("dp=2 cp=2 tp=1", "dp=1 cp=4 tp=1") for fold in ("ep=4", "ep=2", "etp=2 ep=1")),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(layout):
    """Of experts that divide neither by ranks nor by channels; tokens that do not, or are fewer than ranks."""
    places = Mesh(layout.mesh).size("dp-cp")
    tokens = {4: (4, 0, 5, 3), 2: (7, 2), 1: (9,)}[places]
    compare(
        (Problem(Routing(10, 3, capacity_factor=capacity, **LOSSES), tokens, hot=hot, shared=1), layout)
        for capacity, hot in ((0.0, None), (0.75, 6))
    )


@pytest.mark.parametrize("order", ["dp-tp-cp", "tp-dp-cp", "cp-dp-tp"])
@pytest.mark.parametrize("fold", ["ep=2", "etp=2"])
def test_every_order_of_axes(order, fold):
    """Those who share an expert then are not those who share a parameter of other layers."""
    problem = Problem(Routing(5, 2, **LOSSES), (7, 2), shared=1)
    compare((problem, Layout(mesh, fold, order=order)) for mesh in ("dp=2 cp=1 tp=2", "dp=1 cp=2 tp=2"))


@pytest.mark.parametrize(
    "routing",
    [
        Routing(8, 3, normalise=True, scale=2.5),
        Routing(8, 1, "sigmoid", z_loss=0.2),
        Routing(8, 3, "sigmoid", normalise=True, balance_loss=0.3),
        Routing(8, 3, "sigmoid", groups=4, top_groups=2, **LOSSES),
        Routing(8, 2, groups=8, top_groups=3, capacity_factor=0.75, **LOSSES),
        Routing(8, 3, bias_rate=0.01, **LOSSES),
        Routing(8, 3, "sigmoid", True, 2.5, 2, 1, 0.5, 0.3, 0.2, 0.01),
    ],
    ids=str,
)
def test_every_routing(routing):
    layouts = (Layout(fold="ep=4"), Layout(fold="etp=2 ep=2"), Layout("dp=2 cp=1 tp=2", "ep=2", True))
    for layout in layouts:
        places = Mesh(layout.mesh).size("dp-cp")
        compare([(Problem(routing, (4, 0, 5, 3) if places == 4 else (7, 5)), layout)])


@pytest.mark.parametrize("keep", ["nothing", "products"])
def test_recomputed(keep):
    compare(
        (Problem(Routing(10, top_k, capacity_factor=capacity, bias_rate=0.01, **LOSSES), (7, 5), shared=1), layout)
        for top_k, capacity in ((2, 0.0), (6, 0.75))
        for layout in (
            Layout("dp=2 cp=1 tp=2", "ep=4", keep=keep),
            Layout("dp=2 cp=1 tp=2", "etp=2 ep=2", sequence_parallel=True, keep=keep),
            Layout("dp=1 cp=2 tp=2", "etp=2 ep=1", keep=keep),
        )
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_and_experts_without_gates(ranks):
    tokens = {1: (9,), 2: (6, 3), 3: (4, 0, 5)}[ranks]
    routings = [Routing(4, 2, **LOSSES), Routing(4, 4, capacity_factor=0.75, **LOSSES)]
    options = {"hidden": 2, "shared": 2, "gated": False}
    compare(
        [(Problem(routing, tokens, **options), Layout(f"dp={ranks} tp=1 cp=1", f"ep={ranks}")) for routing in routings],
        ranks,
    )


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(plan):
    todo = [
        (Problem(Routing(8, top_k, capacity_factor=capacity, **LOSSES), shared=1), Layout(fold=fold, keep=keep))
        for top_k, capacity in ((1, 0.0), (6, 0.75))
        for fold, keep in (("ep=4", None), ("etp=2 ep=2", "products"))
    ]
    compare([*todo, (Problem(Routing(8, 2), (3, 2, 4, 1), starved=4), Layout())], **PLANS[plan])


def test_one_process_without_a_mesh():
    """Any leading shape; nothing is initialised."""
    assert not commlayer.is_initialized()
    for shape, capacity in itertools.product([(7,), (2, 3), (2, 1, 3), (0,), (2, 0)], (0.0, 0.75)):
        routing = Routing(5, 2, capacity_factor=capacity, **LOSSES)
        layer = drawn(lambda r=routing: MoE(EMBED, 4, r, shared=1)).double()
        serial = drawn(lambda r=routing: PlainMoE(EMBED, 4, r, shared=1)).double()
        found = []
        for model in (layer, serial):
            x = rand(*shape, EMBED).requires_grad_()
            y, loss, counts, dropped = [*model(x)] if model is serial else [*(out := model(x))[:1], *out[1]]
            (y.square().sum() + loss).backward()
            assert y.shape == x.shape
            found.append([y, loss, counts, dropped, x.grad, *(p.grad for p in model.parameters() if p.numel())])
        for mine, wanted in zip(*found, strict=True):
            torch.testing.assert_close(mine, wanted, **CLOSE) if wanted is not None else None


@pytest.mark.parametrize("layout", [Layout(), Layout(fold="ep=2"), Layout("dp=2 cp=2 tp=1", "ep=2")], ids=str)
@pytest.mark.parametrize("once", [True, False])
def test_accumulated_gradients(layout, once):
    """Over two backward passes, whether reduced after the second or after both."""
    problem = Problem(Routing(8, 2), shared=1)
    wanted = reference(problem)

    def rank():
        mesh, experts = meshes(layout)
        layer = Layer(problem, layout, mesh, experts, wanted.model)
        model = DataParallel(layer, mesh=mesh, experts=experts)
        share, _ = tokens_of(problem, layout, mesh)
        for first in (True, False):
            with model.no_sync() if first and once else nullcontext():
                y, _ = model(wanted.x.detach()[share])
                ((y * wanted.v[share]).sum() * mesh.size("dp")).backward()
        for p, q in zip(layer.moe.parameters(), wanted.model.parameters(), strict=True):
            torch.testing.assert_close(gather_full(p.grad, p), 2 * q.grad, **CLOSE)

    run_local(rank, 4)


def test_looking_at_gradients_changes_none():
    """torch.autograd.grad runs the same graph, and no reduction."""

    def rank():
        mesh = Mesh("dp=2")
        experts = mesh.fold("ep=2")
        layer = MoE(EMBED, 4, Routing(4, 2), mesh=experts)
        model = DataParallel(layer, mesh=mesh, experts=experts)
        x = torch.ones(3, EMBED, requires_grad=True)
        model(x)[0].sum().backward()
        before = [p.grad.clone() for p in layer.parameters()]
        torch.autograd.grad(model(x)[0].sum(), list(layer.parameters()))
        for p, grad in zip(layer.parameters(), before, strict=True):
            assert torch.equal(p.grad, grad)

    run_local(rank, 2)


# What is communicated ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", ["ep=4", "ep=2", "etp=2 ep=2"])
@pytest.mark.parametrize("keep", [None, "nothing", "products"])
@pytest.mark.parametrize("options", [{}, LOSSES, {"capacity_factor": 0.75}], ids=str)
def test_one_exchange_of_counts_and_one_of_data_in_each_direction(monkeypatch, fold, keep, options):
    """And of counts none in backward, nor where the layer is computed again; nor with those who need not know."""
    problem, layout = Problem(Routing(8, 2, **options)), Layout(fold=fold, keep=keep)
    wanted, seen = reference(problem), [[] for _ in range(4)]

    def spy(name, function):
        def call(x, *args, group, **kwargs):
            seen[commlayer.world().rank].append((name, x.dtype, group.size))
            return function(x, *args, group=group, **kwargs)

        return call

    def rank():
        layer, mine = Layer(problem, layout, *meshes(layout), wanted.model), seen[commlayer.world().rank]
        x = wanted.x.detach()[:3].clone().requires_grad_()
        mine.clear()
        y, load = layer(x)
        forward = [*mine]
        mine.clear()
        (y.sum() + load.loss).backward()
        return forward, [*mine]

    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        monkeypatch.setattr(commlayer, name, spy(name, getattr(commlayer, name)))
    for forward, backward in run_local(rank, 4):
        assert forward[0] == ("all_gather", torch.int64, 2 if fold == "ep=2" and not options else 4)
        assert {dtype for _, dtype, _ in forward[1:] + backward} == {torch.float64}
        etp = "etp" in fold  # whose ranks gather rows, and add up results
        there, back = ["all_to_all", *["all_gather"] * etp], [*["reduce_scatter"] * etp, "all_to_all"]
        assert [name for name, *_ in forward[1:]] == there + back
        again = there + back if keep == "nothing" else []
        assert [name for name, *_ in backward] == again + there + back


def test_tokens_are_under_way_while_the_shared_experts_work(monkeypatch):
    """In backward their gradients, too."""
    events, real = [[], []], commlayer.all_to_all

    def log(what):
        events[commlayer.world().rank].append(what)

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            log("shared")
            return grad

    def observed(x, **options):
        log("start")
        return real(x, **options).then(lambda: log("done"))

    def rank():
        mesh = Mesh("dp=2")
        layer = MoE(EMBED, 4, Routing(4, 2), mesh=mesh.fold("ep=2"), shared=1)
        layer.shared.register_forward_hook(lambda *_: log("shared"))
        layer.shared.register_forward_pre_hook(lambda _, args: Watched.apply(*args))
        y, _ = layer(torch.ones(3, EMBED, requires_grad=True))
        events[commlayer.world().rank].append("backward")
        y.sum().backward()

    monkeypatch.setattr(commlayer, "all_to_all", observed)
    run_local(rank, 2)
    forward, backward = ["start", "shared", "done", "start", "done"], ["start", "done", "start", "shared", "done"]
    assert events == [[*forward, "backward", *backward]] * 2


# Precision, inference, bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize("fold", ["ep=2", "etp=2"])
def test_autocast(monkeypatch, fold):
    """Products and what is sent are in half precision; nothing else is far from what it is in float32."""
    problem = Problem(Routing(8, 2, **LOSSES), (40, 24), shared=1)
    wanted, sent = reference(problem), set()

    def rank():
        layout = Layout("dp=2 cp=1 tp=1", fold)
        layer = Layer(problem, layout, *meshes(layout), wanted.model).moe.float()
        share, _ = tokens_of(problem, layout, Mesh(layout.mesh))
        x = wanted.x.detach().float()[share].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, load = layer(x)
        assert y.dtype == torch.bfloat16
        assert load.loss.dtype == torch.float32
        close = {"rtol": 3e-2, "atol": 3e-2 * wanted.y.abs().max().item()}
        torch.testing.assert_close(y.double(), wanted.y[share], **close)
        assert torch.equal(commlayer.all_reduce(load.counts), wanted.counts)
        (y.float().sum() + load.loss).backward()
        assert x.grad.dtype == layer.experts.up.grad.dtype == torch.float32

    def spy(x, *args, **options):
        sent.add(x.dtype)
        return real(x, *args, **options)

    real = commlayer.all_to_all
    monkeypatch.setattr(commlayer, "all_to_all", spy)
    run_local(rank, 2)
    assert sent == (set() if fold == "etp=2" else {torch.bfloat16})


def test_autocast_changes_no_choice():
    """Tokens are rounded for the experts, and not before the router has seen them."""
    layer = MoE(2, 4, Routing(2, 1))
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1 - 2**-12]]))
    with torch.autocast("cpu", torch.bfloat16):
        _, load = layer(torch.tensor([[1, 1 + 2**-10]]))
    assert load.counts.tolist() == [0, 1]


@pytest.mark.parametrize("fold", ["ep=4", "etp=2 ep=2", "etp=4"])
def test_single_precision(monkeypatch, fold):
    """In which torch multiplies all experts of a rank in one call, where it can."""
    routing, products = Routing(9, 3, **LOSSES), []
    serial = drawn(lambda: PlainMoE(8, 16, routing)).double()
    x, v = rand(20, 8, seed=1).requires_grad_(), rand(20, 8, seed=2)
    found = serial(x)
    ((found.y * v).sum() + found.loss).backward()

    def rank():
        mesh, experts = meshes(Layout(fold=fold))
        layer = drawn(lambda: MoE(8, 16, routing, mesh=experts))
        model = DataParallel(layer, mesh=mesh, experts=experts)
        mine = x.detach().float().split(5)[mesh.rank("dp")].requires_grad_()
        y, load = model(mine)
        (((y * v.split(5)[mesh.rank("dp")]).sum() + load.loss) * 4).backward()
        torch.testing.assert_close(y.double(), found.y.detach().split(5)[mesh.rank("dp")], rtol=1e-4, atol=1e-5)
        for (name, p), q in zip(layer.named_parameters(), serial.parameters(), strict=True):
            assert (gather_full(p.grad, p) - q.grad).abs().max() < 1e-5 * q.grad.abs().max(), name

    if hasattr(torch, "_grouped_mm"):
        real = torch._grouped_mm
        monkeypatch.setattr(torch, "_grouped_mm", lambda *a, **k: products.append(1) or real(*a, **k))
    run_local(rank, 4)
    assert products or not hasattr(torch, "_grouped_mm")


def test_bfloat16_keeps_the_bias_in_float32():
    """In which steps of 0.001 still add up."""
    layer = MoE(EMBED, 4, Routing(4, 2, bias_rate=0.001)).bfloat16()
    assert layer.router.bias.dtype == torch.float32
    y, load = layer(torch.ones(3, EMBED, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert load.counts.sum() == 6


def test_backward_twice_through_the_same_graph():
    problem = Problem(Routing(8, 2), (5, 3), shared=1)
    wanted = reference(problem)

    def rank():
        layout = Layout("dp=2 cp=1 tp=1", "ep=2")
        layer = Layer(problem, layout, *meshes(layout), wanted.model)
        share, _ = tokens_of(problem, layout, Mesh(layout.mesh))
        loss = (layer(wanted.x.detach()[share])[0] * wanted.v[share]).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        for p, q in zip(layer.moe.experts.parameters(), wanted.model.experts.parameters(), strict=True):
            torch.testing.assert_close(p.grad, part_of(2 * q.grad, p), **CLOSE)

    run_local(rank, 2)


def test_without_gradients():
    problem = Problem(Routing(8, 2, **LOSSES), (5, 3), shared=1)
    wanted = reference(problem)

    def rank():
        layout = Layout("dp=2 cp=1 tp=1", "ep=2")
        layer = Layer(problem, layout, *meshes(layout), wanted.model)
        x = wanted.x.detach().split(problem.tokens)[commlayer.world().rank]
        share = wanted.y.split(problem.tokens)[commlayer.world().rank]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                y, load = layer(x)
            torch.testing.assert_close(y, share, **CLOSE)
            assert not y.requires_grad
            assert not load.loss.requires_grad

    run_local(rank, 2)


def test_bad_input():
    def rank():
        mesh = Mesh("dp=2")
        experts = mesh.fold("ep=2")
        layer = MoE(EMBED, 4, Routing(4, 2), mesh=experts)
        for call, message in (
            (lambda: layer(torch.ones(2, 3, EMBED + 1)), r"x: expected … × 6, got \(2, 3, 7\)"),
            (lambda: layer(torch.ones(())), r"x: expected … × 6, got \(\)"),
            (lambda: MoE(EMBED, 4, Routing(1, 1), mesh=experts), "experts: 1 are too few for 2 ranks of ep"),
            (lambda: DataParallel(layer, experts=experts), "mesh: needed beside experts"),
            (lambda: DataParallel(layer, mesh=mesh), "experts: needed beside mesh, since experts.up"),
            (lambda: DataParallel(layer), "experts: needed beside mesh, since experts.up"),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    run_local(rank, 2)


def test_experts_that_no_rank_shares_need_no_fold():
    """Over data parallelism alone. Where the tokens of a sample are cut, they do."""

    def rank():
        mesh = Mesh("dp=2")
        layer = MoE(EMBED, 4, Routing(4, 2), mesh=mesh.fold("ep=1"))
        x, grads = rand(4, EMBED, seed=mesh.rank("dp"), dtype=torch.float32), []
        for fold in (None, mesh.fold("ep=1")):
            model = DataParallel(layer, mesh=mesh, experts=fold)
            model.zero_grad()
            model(x)[0].square().sum().backward()
            grads.append([p.grad.clone() for p in layer.parameters()])
        for mine, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(mine, wanted)
        for spec in ("dp=1 cp=2", "dp=1 tp=2"):
            with pytest.raises(ValueError, match=r"experts: needed beside mesh, since experts.up"):
                DataParallel(layer, mesh=Mesh(spec))

    run_local(rank, 2)
