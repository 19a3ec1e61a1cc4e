"""The mixture-of-experts layer on thread ranks, against the plain one on one process."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch

import commlayer
from commlayer import Mesh, run_local
from parallel import clip_grad_norm_, grad_norm
from parallel.data import DataParallel
from parallel.expert import MoE
from parallel.placement import gather_full, mark_replicated, part_of, placement, recall_marks
from parallel.router import Routing
from tests.contracts.moe import (
    CLOSE,
    EMBED,
    PLANS,
    Layer,
    Layout,
    Problem,
    check_all,
    check_steps,
    meshes,
    reference,
    tokens_of,
)
from tests.contracts.plain_moe import PlainMoE
from tests.contracts.tensor import drawn, rand

LOSSES = {"balance_loss": 0.3, "z_loss": 0.2}


def compare(todo, ranks=4, **options):
    todo = list(todo)
    assert todo
    for problem, _ in todo:
        reference(problem)  # before there are ranks to compute it all at once
    run_local(lambda: check_all(todo), ranks, timeout=20, **options)


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


# Traps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_trap_5_expert_outputs_carry_gradients(plan):
    """Also where nothing but the experts learns."""

    def rank():
        problem, layout = Problem(Routing(8, 2)), Layout()
        layer = Layer(problem, layout, *meshes(layout), wanted.model).moe
        layer.router.requires_grad_(False)
        y, load = layer(wanted.x.detach()[:5])
        assert y.requires_grad
        assert not load.loss.requires_grad
        y.sum().backward()
        assert layer.router.weight.grad is None
        return [p.grad.flatten(1).abs().sum(1) for p in layer.experts.parameters()], load.counts

    wanted = reference(Problem(Routing(8, 2)))
    ranks = run_local(rank, 4, **PLANS[plan])
    counts = sum(load for _, load in ranks)
    for i in range(2):
        sizes = torch.cat([grads[i] for grads, _ in ranks])
        assert torch.equal(sizes > 0, counts > 0)
        assert (counts > 0).sum() > 4


@pytest.mark.parametrize("fold", ["ep=4", "etp=2 ep=2", "ep=1"])
def test_trap_5_experts_and_ranks_without_tokens(fold):
    """Gradients are zeros, not None, which an optimiser would pass over. Nobody waits; also where no rank has any."""

    def rank():
        mesh = Mesh("dp=4")
        experts = mesh.fold(fold)
        layer = MoE(EMBED, 4, Routing(8, 1, capacity_factor=1.0, **LOSSES), mesh=experts, shared=1).double()
        model = DataParallel(layer, mesh=mesh, experts=experts)
        for all_tokens in (0, 1):
            tokens = all_tokens if mesh.rank("dp") == 2 else 0
            model.zero_grad()
            y, load = model(torch.ones(tokens, EMBED, dtype=torch.float64))
            assert y.shape == (tokens, EMBED)
            (y.sum() + load.loss).backward()
            assert not any(p.grad is None or p.grad.isnan().any() for p in layer.parameters())
            used = layer.experts.up.grad.flatten(1).any(1).sum()
            assert commlayer.all_reduce(used) == all_tokens * 4 // experts.size("ep")

    run_local(rank, 4, timeout=20)


def test_trap_5_splits_are_swapped_on_combine(monkeypatch):
    """And gradients go the ways of what they are gradients of."""
    splits, real = [[] for _ in range(4)], commlayer.all_to_all

    def spy(x, *, input_splits, output_splits, **options):
        splits[commlayer.world().rank].append(([*input_splits], [*output_splits]))
        return real(x, input_splits=input_splits, output_splits=output_splits, **options)

    monkeypatch.setattr(commlayer, "all_to_all", spy)
    problem = Problem(Routing(8, 2))
    compare([(problem, Layout())])
    for there, back, *gradients in splits:
        assert back == there[::-1]
        assert gradients == [there, back]
    sent = torch.tensor([there for (there, _), *_ in splits])
    assert torch.equal(sent.sum(1), 2 * torch.tensor(problem.tokens))
    assert not torch.equal(sent, sent.T), "these would be their own inverse"


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(fold="ep=2"), Layout("dp=2 cp=2 tp=1"), Layout(fold="ep=1")], ids=str
)
def test_trap_5_expert_gradients_are_divided_by_the_same_count_as_dense_ones(layout):
    """By the size of dp, not by that of edp: experts that all are the shared one, with weight 1, have its gradient."""

    def rank():
        mesh, experts = meshes(layout)
        routing = Routing(4, 4, normalise=True, scale=4.0)
        moe = drawn(lambda: MoE(EMBED, 3, routing, mesh=experts, shared=1)).double()
        pairs = ((moe.experts.up, moe.shared.up.weight), (moe.experts.down, moe.shared.down.weight))
        with torch.no_grad():
            moe.router.weight.zero_()
            for each, shared in pairs:
                each.copy_(shared.expand_as(each))
        mark_replicated(moe.router, ("cp",))
        mark_replicated(moe.shared, ("cp",))
        model = DataParallel(moe, mesh=mesh, experts=experts)
        y, _ = model(rand(3, EMBED, seed=commlayer.world().rank))
        y.square().sum().backward()
        for each, shared in pairs:
            torch.testing.assert_close(each.grad, shared.grad.expand_as(each), **CLOSE)
            assert shared.grad.abs().max() > 0.1

    run_local(rank, 4)


def test_trap_9_losses_from_the_counts_of_all_ranks():
    """Shares are uneven; the mean of what each rank would find alone is something else."""
    problem = Problem(Routing(8, 2, balance_loss=1.0), (9, 1, 0, 2))
    wanted = reference(problem)
    alone = [wanted.model(x).loss for x in wanted.x.split(problem.tokens) if len(x)]
    assert abs(sum(alone) / len(alone) - wanted.loss) > 0.1 * wanted.loss
    for layout in (Layout(), Layout(fold="ep=1"), Layout(fold="ep=2"), Layout("dp=1 cp=4 tp=1")):
        compare([(problem, layout)])


def test_trap_9_recomputation_counts_tokens_once():
    problem = Problem(Routing(8, 2, **LOSSES))
    wanted, computed = reference(problem), []

    def rank():
        layout = Layout(keep="nothing")
        layer = Layer(problem, layout, *meshes(layout), wanted.model)
        layer.moe.router.register_forward_hook(lambda *_: computed.append(1))
        y, load = layer(wanted.x.detach()[:3].clone().requires_grad_())
        before = load.counts.clone()
        (y.sum() + load.loss).backward()
        assert torch.equal(load.counts, before)
        assert load.counts.sum() == 6

    run_local(rank, 4)
    assert len(computed) == 8, "each rank's forward, and its recomputation"


@pytest.mark.parametrize("fold", ["ep=4", "ep=2", "etp=2 ep=2", "etp=2 ep=1"])
@pytest.mark.parametrize("bucket_mb", [1e-6, 25.0])
def test_trap_11_different_experts_active_on_different_ranks_never_hangs(fold, bucket_mb):
    steps = [(3, 3, 3, 3), (0, 4, 0, 1), (0, 0, 0, 2), (1, 0, 5, 0), (2, 2, 2, 2)]
    ranks = run_local(lambda: check_steps(Layout(fold=fold), steps, bucket_mb=bucket_mb), 4, timeout=20)
    for active in zip(*ranks, strict=True):
        assert len(set(active)) > 1


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


# Norms, marks, first values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(fold="ep=2"), Layout(fold="etp=2 ep=1"), Layout("dp=2 cp=1 tp=2", "etp=2 ep=2")],
    ids=str,
)
def test_trap_6_norms_and_clipping_on_folded_meshes(layout, p):
    """Every element of every expert counts once, however many ranks hold it."""
    problem = Problem(Routing(10, 2, **LOSSES), (4, 0, 5, 3) if "dp=4" in layout.mesh else (7, 5), shared=1)
    wanted = reference(problem)
    grads = [p.grad for p in wanted.model.parameters()]
    norm = torch.cat([grad.flatten() for grad in grads]).norm(p)

    def rank():
        mesh, experts = meshes(layout)
        model = Layer(problem, layout, mesh, experts, wanted.model).moe
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad = part_of(grad, param).clone()
        torch.testing.assert_close(grad_norm(model, p, mesh=mesh), norm, **CLOSE)
        torch.testing.assert_close(grad_norm(model, p, mesh=experts), norm, **CLOSE)
        torch.testing.assert_close(grad_norm(model, p), norm, **CLOSE)
        clip_grad_norm_(model, norm.item() / 3, p, mesh=mesh)
        for param, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(gather_full(param.grad, param), grad / 3, rtol=1e-6, atol=0)

    run_local(rank, 4)


FOLDS = ["ep=1", "ep=2", "ep=4", "etp=2 ep=2", "etp=4 ep=1"]


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("tp", [1, 2])
def test_trap_8_first_values_are_the_serial_ones_bit_for_bit(fold, tp):
    """Drawn at once, or after the meta device; the marks are there in both."""
    routing = Routing(6, 2, bias_rate=0.1)

    def rank():
        mesh, experts = meshes(Layout(f"dp={4 // tp} tp={tp}", fold))

        def make():
            return MoE(EMBED, 5, routing, mesh=experts, group=mesh["tp"], shared=2)

        def fill():
            for module in empty.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            return torch.rand(1)

        serial, after = drawn(lambda: (PlainMoE(EMBED, 5, routing, shared=2), torch.rand(1)), seed=3)
        model, then = drawn(lambda: (make(), torch.rand(1)), seed=3)
        with torch.device("meta"):
            empty = make()
        assert all(p.is_meta for p in empty.parameters())
        empty.to_empty(device="cpu")
        assert torch.equal(drawn(fill, seed=3), after)
        recall_marks(empty)
        assert torch.equal(then, after)
        for found in (model, empty):
            for (name, p), (other, q) in zip(found.named_parameters(), serial.named_parameters(), strict=True):
                assert name == other
                assert torch.equal(gather_full(p, p), q), name
                assert placement(p) == placement(model.get_parameter(name))
            assert torch.equal(found.router.bias, torch.zeros(6))
            up, down, router = found.experts.up, found.experts.down, found.router.weight
            assert [(shard.axis, shard.dim) for shard in placement(up).shards] == [("ep", 0), ("etp", 1)]
            assert [(shard.axis, shard.dim) for shard in placement(down).shards] == [("ep", 0), ("etp", 2)]
            assert placement(router).partial == (("tp",) if tp > 1 else ())

    run_local(rank, 4)


def test_a_copy_and_conversions_keep_the_marks():
    def rank():
        mesh = Mesh("dp=2")
        layer = MoE(EMBED, 4, Routing(4, 2), mesh=mesh.fold("ep=2"))
        for other in (copy.deepcopy(layer), copy.deepcopy(layer).bfloat16().float()):
            for p, q in zip(layer.parameters(), other.parameters(), strict=True):
                assert placement(p) == placement(q)

    run_local(rank, 2)


# Precision, inference, bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize("fold", ["ep=2", "etp=2"])
def test_autocast(fold):
    """Tokens are routed in float32 whatever the products are in, so no choice changes by rounding."""
    problem = Problem(Routing(8, 2, **LOSSES), (40, 24), shared=1)
    wanted = reference(problem)

    def rank():
        layout = Layout("dp=2 cp=1 tp=1", fold)
        layer = Layer(problem, layout, *meshes(layout), wanted.model).moe.float()
        start = 40 * commlayer.world().rank
        x = wanted.x.detach().float()[start : start + 40].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, load = layer(x)
        assert y.dtype == torch.bfloat16
        assert load.loss.dtype == torch.float32
        close = {"rtol": 3e-2, "atol": 3e-2 * wanted.y.abs().max().item()}
        torch.testing.assert_close(y.double(), wanted.y[start : start + 40], **close)
        assert torch.equal(commlayer.all_reduce(load.counts), wanted.counts)
        (y.float().sum() + load.loss).backward()
        assert x.grad.dtype == layer.experts.up.grad.dtype == torch.float32

    run_local(rank, 2)


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
            (lambda: MoE(EMBED, 4, Routing(1, 1), mesh=experts), "experts: 1 are too few for 2 ranks of ep"),
            (lambda: DataParallel(layer, experts=experts), "mesh: needed beside experts"),
            (lambda: DataParallel(layer, mesh=mesh), "experts: needed beside mesh, since experts.up"),
            (lambda: DataParallel(layer), "experts: needed beside mesh, since experts.up"),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    run_local(rank, 2)
