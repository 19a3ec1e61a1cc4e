"""What has gone wrong in mixtures of experts elsewhere, each as a test of its own, on thread ranks."""

import copy

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
    LOSSES,
    PLANS,
    Layer,
    Layout,
    Problem,
    check_steps,
    compare,
    meshes,
    reference,
)
from tests.contracts.plain_moe import PlainMoE
from tests.contracts.tensor import drawn, rand


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
