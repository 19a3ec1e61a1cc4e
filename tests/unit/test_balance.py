"""The loads of a step over micro-batches and ranks, and the biases that follow them."""

import pytest
import torch
from torch import nn

import commlayer
from commlayer import Group, Mesh, run_local
from parallel.balance import LoadCounter
from parallel.expert import Load, MoE
from parallel.recompute import checkpoint
from parallel.router import Routing
from tests.contracts.moe import EMBED, Layout, meshes
from tests.contracts.plain_moe import PlainMoE
from tests.contracts.tensor import drawn, rand


def balanced(bias, counts, rate):
    """What the paper (arXiv:2408.15664, algorithm 1) does with the counts of a step."""
    mean = sum(counts) / len(counts)
    return [b + rate * ((c < mean) - (c > mean)) for b, c in zip(bias, counts, strict=True)]


@pytest.mark.parametrize("fold", ["ep=4", "etp=2 ep=1", "ep=1"])
@pytest.mark.parametrize("keep", [None, "nothing", "products"])
def test_trap_9_biases_move_once_per_step_by_the_counts_of_all_ranks_and_micro_batches(fold, keep):
    """Uneven micro-batches; nothing moves before the step, and recomputed tokens count once."""
    routing = Routing(5, 2, capacity_factor=0.75, bias_rate=0.01)
    tokens = [[(3, 0, 2, 5), (1, 1, 0, 4)], [(2, 2, 2, 2), (0, 7, 0, 0)]]  # of each step, micro-batch, rank

    def batch(step, micro):
        return rand(sum(tokens[step][micro]), EMBED, seed=10 * step + micro).split(tokens[step][micro])

    def rank():
        mesh, experts = meshes(Layout(fold=fold))
        model = drawn(lambda: nn.ModuleList(MoE(EMBED, 4, routing, mesh=experts) for _ in range(2))).double()
        serial = drawn(lambda: nn.ModuleList(PlainMoE(EMBED, 4, routing) for _ in range(2))).double()
        counter = LoadCounter(model, experts["etp-ep-edp"])
        for step in range(len(tokens)):
            before = [layer.router.bias.tolist() for layer in model]
            for layer, plain in zip(model, serial, strict=True):
                plain.router.bias.copy_(layer.router.bias)
            wanted = [(0, 0), (0, 0)]
            for micro in range(2):
                parts = batch(step, micro)
                loads = []
                for layer in model:
                    run = layer if keep is None else lambda x, m=layer: checkpoint(m, x, keep=keep)
                    y, load = run(parts[mesh.rank("dp")].clone().requires_grad_())
                    y.sum().backward()
                    loads.append(load)
                counter.add(loads)
                found = [plain(torch.cat(parts)) for plain in serial]
                wanted = [(c + each.counts, d + each.dropped) for (c, d), each in zip(wanted, found, strict=True)]
            assert [layer.router.bias.tolist() for layer in model] == before
            totals = counter.step()
            assert torch.equal(totals.counts, torch.stack([counts for counts, _ in wanted]))
            assert torch.equal(totals.dropped, torch.stack([dropped for _, dropped in wanted]))
            assert totals.dropped.all()
            for layer, bias, (counts, _) in zip(model, before, wanted, strict=True):
                expected = balanced(bias, counts.tolist(), 0.01)
                torch.testing.assert_close(layer.router.bias.double().tolist(), expected, rtol=1e-6, atol=0)
                assert layer.router.bias.tolist() != bias
        return [layer.router.bias.tolist() for layer in model]

    ranks = run_local(rank, 4)
    assert ranks[1:] == ranks[:1] * 3


def test_one_reduction_per_step(monkeypatch):
    calls, real = [], commlayer.all_reduce

    def counted(x, *args, group, **options):
        calls.append((group.size, x.dtype))
        return real(x, *args, group=group, **options)

    def rank():
        experts = Mesh("dp=2").fold("ep=2")
        model = nn.ModuleList(MoE(EMBED, 4, Routing(4, 2, bias_rate=0.1), mesh=experts) for _ in range(3))
        counter = LoadCounter(model, experts["etp-ep-edp"])
        for _ in range(2):
            counter.add([layer(torch.ones(2, EMBED))[1] for layer in model])
        commlayer.barrier()
        calls.clear()
        commlayer.barrier()
        counter.step()

    monkeypatch.setattr(commlayer, "all_reduce", counted)
    run_local(rank, 2)
    assert calls == [(2, torch.int64)] * 2


def test_a_step_starts_anew_and_keeps_nothing_of_the_loads():
    """Also one that nothing was added to; and what a step returned stays as it is."""
    model = MoE(EMBED, 4, Routing(3, 1, bias_rate=0.5))
    counter = LoadCounter(model, Group.alone())
    load = Load(torch.zeros(()), torch.tensor([2, 0, 1]), torch.tensor(1))
    counter.add([load])
    counter.add([load])
    totals = counter.step()
    assert totals.counts.tolist() == [[4, 0, 2]]
    assert totals.dropped.tolist() == [2]
    assert load.counts.tolist() == [2, 0, 1]
    counter.add([load])
    assert totals.counts.tolist() == [[4, 0, 2]]
    assert counter.step().counts.tolist() == [[2, 0, 1]]
    bias = model.router.bias.tolist()
    assert counter.step().counts.tolist() == [[0, 0, 0]]
    assert model.router.bias.tolist() == bias == [-1.0, 1.0, 0.0]


def test_a_skewed_router_is_evened_out_over_steps():
    """Without a loss, by biases alone: from all tokens at one expert to hardly more than the mean at any."""
    routing = Routing(8, 2, score="sigmoid", bias_rate=0.02)

    def rank():
        mesh, experts = meshes(Layout("dp=2", "ep=2"))
        model = drawn(lambda: MoE(EMBED, 4, routing, mesh=experts))
        with torch.no_grad():
            model.router.weight[3, 0] = 2
        counter = LoadCounter(model, experts["etp-ep-edp"])
        loads = []
        for step in range(60):
            x = rand(64, EMBED, seed=2 * step + mesh.rank("dp"), dtype=torch.float32)
            x[:, 0] = 1
            counter.add([model(x)[1]])
            loads.append(counter.step().counts[0].max().item() / (2 * 64 * 2 / 8))
        return loads

    for loads in run_local(rank, 2):
        assert loads[0] > 3.5, "of at most 4: one of the two choices of every token"
        assert sum(loads[-10:]) / 10 < 1.4


def test_layers_without_biases_are_counted_too():
    model = nn.Sequential(nn.Linear(2, 2), MoE(EMBED, 4, Routing(3, 1)))
    counter = LoadCounter(model, Group.alone())
    counter.add([model[1](torch.ones(4, EMBED))[1]])
    assert counter.step().counts.sum() == 4


def test_bad_input():
    alone = Group.alone()
    with pytest.raises(ValueError, match="model: expected MoE layers"):
        LoadCounter(nn.Linear(2, 2), alone)
    layers = [MoE(EMBED, 4, Routing(experts, 1)) for experts in (3, 4)]
    with pytest.raises(ValueError, match=r"model: .* alike, got numbers of experts \[3, 4\]"):
        LoadCounter(nn.ModuleList(layers), alone)
    counter = LoadCounter(layers[0], alone)
    with pytest.raises(ValueError, match="loads: expected one for each of 1 layers, got 0"):
        counter.add([])
