"""Random streams, gradient clipping and the loss scaler between processes.

The finer points are tested on thread ranks, in tests/unit.
"""

import math
import os

import pytest
import torch
from torch import nn

import commlayer
from commlayer import Mesh, balanced_sizes
from parallel.amp import GradScaler
from parallel.clip import clip_grad_norm_
from parallel.mappings import copy_to_region, reduce_from_region
from parallel.placement import gather_full, mark_sharded, part_of
from parallel.recompute import checkpoint
from parallel.rng import Dropout, Streams


@pytest.fixture(scope="module")
def mesh(everyone):
    tp = 2 if everyone.size % 2 == 0 else everyone.size
    return Mesh(f"dp={everyone.size // tp} tp={tp}", group=everyone)


def everywhere(x, mesh):
    """``x`` of all ranks, and their coordinates."""
    whole = mesh["-".join(mesh.axes)]
    return commlayer.all_gather(x.detach()[None], group=whole), [mesh.coords(rank) for rank in range(whole.size)]


def assert_alike_along(axes, x, mesh):
    """Ranks have the same bits exactly where they have the same coordinates on ``axes``."""
    xs, coords = everywhere(x, mesh)
    places = [tuple(place[axis] for axis in axes) for place in coords]
    for one, here in zip(xs, places, strict=True):
        for other, there in zip(xs, places, strict=True):
            assert torch.equal(one, other) == (here == there), f"{axes}: {here} and {there}"


def dropout_in_both_regions(mesh, streams, rows=10_000, recompute=False):
    """What the two dropouts let through, the linear result and its mean without dropout, and a gradient."""
    group, device = mesh["tp"], mesh["tp"].device
    generator = torch.Generator().manual_seed(0)
    w1 = torch.randn(4, 6, generator=generator, dtype=torch.float64).to(device)
    w2 = torch.randn(6, 3, generator=generator, dtype=torch.float64).to(device)
    sizes = balanced_sizes(6, group.size)
    mine = slice(sum(sizes[: group.rank]), sum(sizes[: group.rank + 1]))
    outside, inside = Dropout(0.3, streams.along("dp-cp")), Dropout(0.3, streams.along("dp-cp-tp"))

    def block(x):
        h = outside(x)
        u = inside(copy_to_region(h, group) @ w1[:, mine])
        y = reduce_from_region(u @ w2[mine], group)
        return h, u, y, torch.tanh(y)

    x = torch.ones(rows, 4, dtype=torch.float64, device=device, requires_grad=True)
    h, u, y, bent = checkpoint(block, x, streams=streams) if recompute else block(x)
    bent.sum().backward()
    return h, u[:, : min(sizes)], y, w1.sum(0) @ w2, x.grad


def test_trap_8_dropout_inside_and_outside_of_tensor_parallel_regions(mesh, agreed):
    h, u, y, mean, _ = dropout_in_both_regions(mesh, Streams(1, mesh))
    agreed(lambda: assert_alike_along(("dp",), h, mesh))
    agreed(lambda: assert_alike_along(("dp", "tp"), u == 0, mesh))
    agreed(lambda: assert_alike_along(("dp",), y, mesh))
    assert ((y.mean(0) - mean) / (y.std(0) / len(y) ** 0.5)).abs().max() < 5


@pytest.mark.skipif(bool(os.environ.get("COMMLAYER_PROFILE")), reason="recomputation is the same with a profile")
def test_trap_8_dropout_recomputed(mesh):
    kept, again = Streams(1, mesh), Streams(1, mesh)
    wanted = dropout_in_both_regions(mesh, kept, rows=50)
    for one, other in zip(dropout_in_both_regions(mesh, again, rows=50, recompute=True), wanted, strict=True):
        assert torch.equal(one, other)
    assert again.state_dict()["draws"] == kept.state_dict()["draws"]


def test_trap_8_forks_and_resuming(mesh, agreed):
    streams = Streams(2, mesh)

    def drawn():
        with streams.along("dp").fork():
            outside = torch.rand(8)
            with streams.along("dp-tp").fork():
                inside = torch.rand(8)
            outside = torch.cat([outside, torch.rand(8)])
        return outside, inside, torch.rand(8)

    torch.manual_seed(3)
    drawn()
    state = streams.state_dict()
    outside, inside, default = drawn()
    agreed(lambda: assert_alike_along(("dp",), outside, mesh))
    agreed(lambda: assert_alike_along(("dp", "tp"), inside, mesh))
    agreed(lambda: assert_alike_along((), default, mesh))
    streams = Streams(2, mesh)
    streams.load_state_dict(state)
    assert all(torch.equal(one, other) for one, other in zip(drawn(), (outside, inside, default), strict=True))


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_trap_6_the_norm_and_the_coefficient(mesh, agreed, p):
    tp, device = mesh["tp"], mesh["tp"].device
    generator = torch.Generator().manual_seed(4)
    wholes = [torch.randn(7, 5, generator=generator, dtype=torch.float64).to(device) for _ in range(3)]
    params = []
    for whole, dim in zip(wholes, (None, 0, 1), strict=True):
        if dim is None:
            param = nn.Parameter(torch.zeros_like(whole))
        else:
            sizes = balanced_sizes(whole.shape[dim], tp.size)
            part = whole.narrow(dim, 0, sizes[tp.rank])
            param = mark_sharded(nn.Parameter(torch.zeros_like(part)), dim, axis="tp", group=tp, sizes=sizes)
        param.grad = part_of(whole, param).clone()
        params.append(param)
    total = clip_grad_norm_([*params, params[0]], 0.5, p, mesh=mesh)  # one of them tied
    wanted = torch.cat([whole.flatten() for whole in wholes]).norm(p).to(total.device)
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=0)
    for param, whole in zip(params, wholes, strict=True):
        torch.testing.assert_close(gather_full(param.grad, param), whole * (0.5 / wanted).to(device), rtol=1e-5, atol=0)
    agreed(lambda: assert_alike_along((), total, mesh))


@pytest.mark.parametrize("clip", [False, True])
def test_trap_7_an_overflow_on_one_rank_skips_the_step_on_all(mesh, agreed, clip):
    group, device = mesh["tp"], mesh["tp"].device
    param = nn.Parameter(torch.ones(2, device=device))
    mark_sharded(param, 0, axis="tp", group=group, sizes=[2] * group.size)
    optimizer = torch.optim.AdamW([param], lr=0.1, fused=True)
    scaler = GradScaler(mesh, device.type, init_scale=1024.0)
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        bad = step == 1 and group.rank == 1 and mesh.rank("dp") == 0
        scaler.scale((param * (1e38 if bad else 3.0)).sum()).backward()
        if clip:
            scaler.unscale_(optimizer)
            clip_grad_norm_([param], 1e9, mesh=mesh)
        scaler.step(optimizer)
        scaler.update()
        seen.append((param.detach().clone(), scaler.get_scale()))
    (first, _), (second, _), (third, _) = seen
    assert [scale for _, scale in seen] == [1024.0, 512.0, 512.0]
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    agreed(lambda: assert_alike_along((), third, mesh))
