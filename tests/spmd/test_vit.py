"""The ViT on every grid of the ranks: loss and parameter gradients are those of a plain ViT on one process.

Nothing divides evenly: 15 tokens, 55 hidden channels, 5 samples. Four ranks make all grids of dp, cp and tp; other
numbers make those that fit.
"""

import dataclasses
import os
from functools import cache
from itertools import product

import pytest
import torch

from commlayer import Mesh, balanced_sizes
from commlayer.launch import discover
from models.vit import ViT, ViTConfig
from parallel import DataParallel, verify_gradients
from parallel.placement import gather_full
from parallel.rng import Streams
from tests.contracts.plain_vit import PlainViT

CONFIG = ViTConfig((13, 10), 3, 2, patch=(5, 2), embed=24, depth=2, heads=4, mlp_ratio=2.3)
SAMPLES = 5
SIZES = (1, 2, 3, 4)


def grids(ranks):
    """(dp, cp, tp), how attention sees other cp ranks, sequence parallelism; every grid, and each variant on some."""
    for dp, cp, tp in product(SIZES, repeat=3):
        if dp * cp * tp == ranks and CONFIG.heads % tp == 0:
            yield dp, cp, tp, "ring", False
            for context in ("all_gather", "ulysses") if cp > 1 and dp == 1 else ():
                if context != "ulysses" or CONFIG.heads // tp >= cp:
                    yield dp, cp, tp, context, False
            if tp > 1:
                yield dp, cp, tp, "ring", True


every_grid = pytest.mark.parametrize(("dp", "cp", "tp", "context", "sequence_parallel"), list(grids(discover().size)))


@cache
def mesh_of(dp, cp, tp, order):
    return Mesh(f"dp={dp} cp={cp} tp={tp}", order=order)


def samples(dtype):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, CONFIG.in_channels, *CONFIG.grid, generator=generator, dtype=torch.float64)
    y = torch.randn(SAMPLES, CONFIG.out_channels, *CONFIG.grid, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def share(mesh, *tensors):
    return [t.split(balanced_sizes(SAMPLES, mesh.size("dp")))[mesh.rank("dp")] for t in tensors]


def loss(model, x, y, terms):
    """``terms`` of the mean over samples, so that the mean over dp ranks is the mean over samples."""
    return (model(x) - y).square().mean((1, 2, 3)).sum() * (terms / SAMPLES)


def models(mesh, context, sequence_parallel, dtype):
    torch.manual_seed(mesh.rank("dp"))  # what rank 0 has counts
    vit = ViT(CONFIG, mesh, context=context, sequence_parallel=sequence_parallel).to(dtype)
    return DataParallel(vit, mesh=mesh, bucket_mb=0.01), PlainViT(CONFIG).to(dtype)


@pytest.mark.parametrize("order", ["tp-cp-dp", "cp-tp-dp"])
@every_grid
def test_gradients_are_the_serial_ones(agreed, dp, cp, tp, context, sequence_parallel, order):
    mesh = mesh_of(dp, cp, tp, order)
    x, y = samples(torch.float64)
    mine = share(mesh, x, y)

    def compare():
        model, serial = models(mesh, context, sequence_parallel, torch.float64)
        found = []

        def parallel_loss(model):
            found.append(loss(model, *mine, dp))
            return found[0]

        verify_gradients(model, serial, parallel_loss, lambda m: loss(m, x, y, 1), rtol=1e-10)
        assert found[0].item() == pytest.approx(loss(serial, *mine, dp).item(), rel=1e-12)

    agreed(compare)


@every_grid
def test_training_is_the_serial_one(agreed, dp, cp, tp, context, sequence_parallel):
    mesh = mesh_of(dp, cp, tp, "tp-cp-dp")
    x, y = samples(torch.float32)
    mine = share(mesh, x, y)

    def train():
        model, serial = models(mesh, context, sequence_parallel, torch.float32)
        whole = {name: gather_full(p, p).clone() for name, p in model.module.named_parameters()}
        serial.load_state_dict(whole)
        for m, batch, terms in ((model, mine, dp), (serial, (x, y), 1)):
            # A large eps: Adam would blow up the rounding of gradients that are zero, as those of the keys' bias are.
            optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3)
            for _ in range(5):
                optimizer.zero_grad()
                loss(m, *batch, terms).backward()
                optimizer.step()
        reference = dict(serial.named_parameters())
        for name, p in model.module.named_parameters():
            moved = (reference[name] - whole[name]).abs().max().item()
            apart = (gather_full(p, p) - reference[name]).abs().max().item()
            assert moved > 1e-3, name
            assert apart < 1e-5 * (moved + whole[name].abs().max().item()), name

    agreed(train)


@pytest.mark.skipif(bool(os.environ.get("COMMLAYER_PROFILE")), reason="the graphs are those without a profile")
@pytest.mark.parametrize(
    ("context", "sequence_parallel", "recompute"), [("ring", True, False), ("ulysses", False, True)]
)
def test_compiled_whole_it_is_the_same(everyone, agreed, context, sequence_parallel, recompute):
    torch._dynamo.reset()
    tp = 2 if everyone.size % 2 == 0 else 1
    cp = 2 if everyone.size % 4 == 0 else everyone.size // tp
    mesh = mesh_of(everyone.size // tp // cp, cp, tp, "tp-cp-dp")
    x, y = samples(torch.float64)

    def compare():
        streams = Streams(0, mesh)
        config = dataclasses.replace(CONFIG, depth=1, drop_path=0.3)
        vit = ViT(
            config,
            mesh,
            streams=streams,
            context=context,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
        ).double()
        found = []
        for model in (vit, torch.compile(vit, fullgraph=True, backend="aot_eager")):
            streams.along("dp").draws = 0
            vit.zero_grad()
            loss(model, x, y, 1).backward()
            found.append([p.grad for p in vit.parameters()])
        for eager, compiled in zip(*found, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)

    agreed(compare)
