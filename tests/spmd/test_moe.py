"""The language model with experts on every grid of the ranks: its gradients are those of a plain one on one process.

Nothing divides evenly: 3 samples of 7 tokens, 5 experts, 11 hidden channels, 13 entries of the vocabulary; on dp=4 a
rank has no token at all. Four ranks make every grid of dp, cp and tp with every fold into ep and etp; other numbers
make those that fit. Sequence parallelism, recomputation, attention and capacity are spread over them.
"""

import os
import random
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

import commlayer
from commlayer import Mesh, balanced_sizes
from commlayer.launch import discover
from models.generate import generate
from models.moe import LanguageModel, LanguageModelConfig
from parallel import DataParallel, clip_grad_norm_, verify_gradients
from parallel.balance import LoadCounter
from parallel.placement import gather_full
from parallel.router import Routing
from parallel.shards import SequenceShards
from tests.contracts.plain_moe import PlainLanguageModel

ROUTING = Routing(5, 2, normalise=True, balance_loss=0.3, z_loss=0.2)
CONFIG = LanguageModelConfig(13, 16, 2, 8, 4, hidden=11, every=2, expert_hidden=5, routing=ROUTING, shared=1)
SAMPLES, TOKENS = 3, 7


def grids(ranks):
    """(dp, cp, tp), (ep, etp), sequence parallelism, how attention sees other cp ranks, recomputation, capacity."""
    sizes = range(1, ranks + 1)
    dense = [grid for grid in product(sizes, repeat=3) if grid[0] * grid[1] * grid[2] == ranks and 4 % grid[2] == 0]
    folds = [fold for fold in product(sizes, (1, 2)) if ranks % (fold[0] * fold[1]) == 0 and fold[0] <= ROUTING.experts]
    dice = random.Random(0)
    # Other plans of the exchange are the affair of test_expert.py: under a profile every third is enough.
    some = slice(None, None, 3 if os.environ.get("COMMLAYER_PROFILE") else 1)
    for grid, fold in [*product(dense, folds)][some]:
        options = ([False, True], ["ring", "all_gather", "ulysses"], ["none", "selective", "full"], [0.0, 0.0, 0.8])
        yield *grid, *fold, *map(dice.choice, options)


@cache
def meshes(dp, cp, tp, ep, etp):
    mesh = Mesh(f"dp={dp} cp={cp} tp={tp}")
    return mesh, mesh.fold(f"ep={ep} etp={etp}")


@cache
def data():
    generator = torch.Generator().manual_seed(5)
    ids, targets = (torch.randint(CONFIG.vocab_size, (SAMPLES, TOKENS), generator=generator) for _ in range(2))
    targets[0, 2:5] = -100
    return ids, targets


def share(mesh, x):
    return x.split(balanced_sizes(SAMPLES, mesh.size("dp")))[mesh.rank("dp")]


def loss(model, ids, targets, terms):
    """``terms`` of the mean over valid tokens, so that the mean over dp ranks is that over all tokens."""
    output = model(ids, targets)
    return (output.loss / (data()[1] >= 0).sum() + sum(load.loss for load in output.loads)) * terms, output.loads


def order(mesh, model):
    """In which the tokens of all ranks ask for room in the experts."""
    cp, tp = mesh["cp"], mesh["tp"]
    places = share(mesh, torch.arange(SAMPLES * TOKENS).view(SAMPLES, TOKENS))
    places = SequenceShards(TOKENS, cp.size, zigzag=cp.size > 1).shard(places, 1, cp)
    places = places if model.sequence_parallel else places.flatten()
    mine = places.split(balanced_sizes(places.shape[-1], tp.size), -1)[tp.rank]
    return [place for theirs in commlayer.all_gather_object(mine.flatten().tolist()) for place in theirs]


@pytest.mark.parametrize(
    ("dp", "cp", "tp", "ep", "etp", "sequence_parallel", "context", "recompute", "capacity"),
    list(grids(discover().size)),
)
def test_gradients_are_the_serial_ones(agreed, dp, cp, tp, ep, etp, sequence_parallel, context, recompute, capacity):
    mesh, experts = meshes(dp, cp, tp, ep, etp)
    config = replace(CONFIG, tied=cp > 1, routing=replace(ROUTING, capacity_factor=capacity))
    ids, targets = data()

    def compare():
        torch.manual_seed(0)
        options = {"sequence_parallel": sequence_parallel, "context": context, "recompute": recompute}
        inner = LanguageModel(config, mesh, experts, **options).double()
        with torch.no_grad():
            for p in inner.parameters():
                p *= 10  # larger than they are drawn, so that experts and router matter
        model = DataParallel(inner, mesh=mesh, experts=experts, bucket_mb=0.01)
        serial = PlainLanguageModel(config).double()
        places, valid, found = order(mesh, inner), (targets >= 0).sum(), []

        def parallel_loss(model):
            found.append(loss(model, share(mesh, ids), share(mesh, targets), dp))
            return found[0][0]

        def serial_loss(model):
            entropy, auxiliary = model(ids, targets, places)
            found.append(entropy / valid + auxiliary)
            return found[1]

        verify_gradients(model, serial, parallel_loss, serial_loss, rtol=1e-10)
        (value, (load,)), whole = found
        assert all(p.grad.abs().max() > 1e-6 for p in serial.parameters())
        counts, dropped = (commlayer.all_reduce(x) for x in (load.counts, load.dropped))
        assert counts.sum() == SAMPLES * TOKENS * 2
        assert (dropped > 0) == (capacity > 0)
        # The entropy is the same along tp, where the auxiliary losses are parts.
        parts = commlayer.all_reduce(torch.stack([value.detach() / dp - load.loss.detach(), load.loss.detach()]))
        assert (parts[0] / tp + parts[1]).item() == pytest.approx(whole.item(), rel=1e-12)

    agreed(compare)


def some_grids(ranks):
    """A few meshes, with experts over as many ranks as there may be, or cut themselves."""
    if ranks != 4:
        return [(ranks, 1, 1, max(ep for ep in range(1, ROUTING.experts + 1) if ranks % ep == 0), 1)]
    return [(2, 1, 2, 4, 1), (1, 2, 2, 2, 2), (2, 2, 1, 2, 1)]


@pytest.mark.parametrize("grid", some_grids(discover().size))
def test_training_is_the_serial_one(agreed, grid):
    """Steps of Adam with clipped gradients, and biases that balance the experts."""
    mesh, experts = meshes(*grid)
    config = replace(CONFIG, tied=True, routing=replace(ROUTING, score="sigmoid", bias_rate=0.05))
    ids, targets = data()

    def steps(model, ids, targets, terms, mesh, group):
        inner = getattr(model, "module", model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        counter = LoadCounter(inner, group)
        for _ in range(4):
            optimizer.zero_grad()
            value, loads = loss(model, ids, targets, terms)
            value.backward()
            norm = clip_grad_norm_(model, 0.5, mesh=mesh)
            optimizer.step()
            counter.add(loads)
            counter.step()
        return norm, inner.blocks[1].moe.router.bias

    def train():
        torch.manual_seed(0)
        inner = LanguageModel(config, mesh, experts, sequence_parallel=True, recompute="selective").double()
        model = DataParallel(inner, mesh=mesh, experts=experts)
        torch.manual_seed(0)
        serial = LanguageModel(config).double()
        start = {name: p.clone() for name, p in serial.named_parameters()}
        found = steps(model, share(mesh, ids), share(mesh, targets), mesh.size("dp"), mesh, experts["etp-ep-edp"])
        norm, bias = steps(serial, ids, targets, 1, None, commlayer.Group.alone())
        assert bias.abs().max() > 0.04
        assert torch.equal(found[1], bias)
        assert found[0].item() == pytest.approx(norm.item(), rel=1e-9)
        assert norm > 0.5
        for name, p in inner.named_parameters():
            reference = serial.get_parameter(name)
            assert (reference - start[name]).abs().max() > 1e-4, name
            torch.testing.assert_close(
                gather_full(p, p), reference, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )

    agreed(train)


@pytest.mark.parametrize("grid", some_grids(discover().size))
def test_all_ranks_generate_the_same_text(agreed, grid, everyone):
    mesh, experts = meshes(*grid)
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def compare():
        torch.manual_seed(0)
        serial = LanguageModel(CONFIG)
        torch.manual_seed(0)
        model = LanguageModel(CONFIG, mesh, experts, sequence_parallel=True)
        torch.testing.assert_close(model(prompt), serial(prompt))
        # Another seed on every rank: that of rank 0 counts.
        text = generate(model, prompt, 4, generator=torch.Generator().manual_seed(everyone.rank))
        expected = generate(serial, prompt, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(text, expected)

    agreed(compare)
