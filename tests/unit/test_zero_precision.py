"""Computing in half precision with master weights in float32: against the same by hand, on thread ranks."""

import pytest
import torch
from torch import nn

import commlayer
from commlayer import Mesh, run_local
from parallel import GradScaler, ZeRO
from parallel.placement import gather_full
from tests.contracts.tensor import drawn, rand

STAGES = (1, 2, 3)
every_stage = pytest.mark.parametrize("stage", STAGES)
BF16, FP16 = torch.bfloat16, torch.float16


def network():
    parts = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6)) for _ in range(3))
    return nn.Sequential(nn.Linear(5, 6), *parts, nn.LayerNorm(6), nn.Linear(6, 3))


def optimizer_of(params):
    return torch.optim.AdamW(params, lr=0.05, weight_decay=0.1, foreach=False)


def share(step, micro, rank):
    return rand(3, 5, seed=100 * step + 10 * micro + rank, dtype=torch.float32)


def by_hand(ranks, dtype, reduce_dtype, steps=4, micros=3, own_sum=True):
    """Masters in float32; a copy of them in ``dtype`` computes; what every rank has is added up in ``reduce_dtype``.

    ``own_sum``: a rank adds up its own gradients before, in float32; else each backward is reduced.
    """
    net = drawn(network).float()
    names = [name for name, _ in net.named_parameters()]
    optimizer = optimizer_of(net.parameters())
    losses = []
    for step in range(steps):
        copy = drawn(network).to(dtype)
        with torch.no_grad():
            for p, q in zip(copy.parameters(), net.parameters(), strict=True):
                p.copy_(q)
        mean = [torch.zeros_like(p) for p in net.parameters()]
        mine = []
        for micro in range(micros):
            grads = []
            for rank in range(ranks):
                copy.zero_grad()
                loss = copy(share(step, micro, rank).to(dtype)).float().square().sum()
                loss.backward()
                losses.append(loss.item())
                grads.append([p.grad.float() for p in copy.parameters()])
            if mine and own_sum:
                mine = [[a + b for a, b in zip(m, g, strict=True)] for m, g in zip(mine, grads, strict=True)]
            else:
                mine = grads
            if not own_sum or micro == micros - 1:
                for i, m in enumerate(mean):
                    m += sum(theirs[i].to(reduce_dtype) for theirs in mine).float() / ranks
        for p, m in zip(net.parameters(), mean, strict=True):
            p.grad = m
        optimizer.step()
    return losses, dict(zip(names, net.parameters(), strict=True)), dict(zip(names, mean, strict=True))


def by_zero(ranks, stage, dtype, steps=4, micros=3, quiet=True, **options):
    def rank():
        me = commlayer.world().rank
        net = drawn(network).float()
        optimizer = optimizer_of(net.parameters())
        model = ZeRO(net, optimizer, stage=stage, dtype=dtype, **options)
        losses = []
        for step in range(steps):
            optimizer.zero_grad()
            for micro in range(micros):
                out = None
                if quiet and micro < micros - 1:
                    with model.no_sync():
                        out = model(share(step, micro, me))
                        loss = out.float().square().sum()
                        loss.backward()
                else:
                    out = model(share(step, micro, me))
                    loss = out.float().square().sum()
                    loss.backward()
                assert out.dtype == dtype
                losses.append(loss.item())
            grads = {name: gather_full(p.grad, p) for name, p in model.named_parameters()}
            optimizer.step()
        for p in model.parameters():
            assert p.dtype == torch.float32
            assert p.grad is None or p.grad.dtype == torch.float32
        assert all(p.dtype == dtype for p in net.parameters())
        return losses, {name: gather_full(p, p) for name, p in model.named_parameters()}, grads

    found = run_local(rank, ranks=ranks)
    losses = [theirs[0] for theirs in found]
    return [value for at in zip(*losses, strict=True) for value in at], found[0][1], found[0][2]


@every_stage
@pytest.mark.parametrize("reduce_dtype", [None, BF16])
@pytest.mark.parametrize("quiet", [True, False])
def test_bf16_is_the_same_by_hand_bit_for_bit(stage, reduce_dtype, quiet):
    """Of two ranks, whose sum has one order. What a rank adds up itself, it does in float32."""
    expected = by_hand(2, BF16, reduce_dtype or torch.float32, own_sum=quiet)
    found = by_zero(2, stage, BF16, reduce_dtype=reduce_dtype, quiet=quiet)
    assert found[0] == expected[0]
    for name in expected[1]:
        assert torch.equal(found[2][name], expected[2][name]), f"gradient of {name}"
        torch.testing.assert_close(found[1][name], expected[1][name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@every_stage
def test_offload_of_master_weights(stage, offload, tmp_path):
    expected = by_hand(2, BF16, torch.float32)
    options = {"folder": tmp_path} if offload == "disk" else {}
    losses, params, _ = by_zero(2, stage, BF16, offload=offload, **options)
    assert losses == expected[0]
    for name in expected[1]:
        torch.testing.assert_close(params[name], expected[1][name], rtol=1e-6, atol=1e-7, msg=name)


@every_stage
@pytest.mark.parametrize("reduce_dtype", [BF16, FP16])
def test_many_ranks_add_up_in_the_dtype_of_messages(stage, reduce_dtype):
    """Each of the three additions rounds by half a unit at most; fp16 is divided before."""
    exact = by_hand(4, BF16, torch.float32, steps=1, micros=1)[2]
    found = by_zero(4, stage, BF16, steps=1, micros=1, reduce_dtype=reduce_dtype)[2]
    unit = torch.finfo(reduce_dtype).eps
    different = False
    for name, grad in exact.items():
        largest = 4 * grad.abs().max() + 1
        assert (found[name] - grad).abs().max() <= 4 * unit * largest, name
        different |= not torch.equal(found[name], grad)
    assert different, "nothing was rounded"


@every_stage
def test_sums_of_fp16_do_not_overflow(stage):
    def rank():
        net = nn.Linear(3, 1, bias=False)
        model = ZeRO(net, torch.optim.SGD(net.parameters(), lr=0.1), stage=stage, reduce_dtype=FP16)
        (model(torch.full((1, 3), 4e4)).sum()).backward()
        for p in model.parameters():
            torch.testing.assert_close(p.grad, torch.full_like(p, 4e4), rtol=1e-3, atol=0)

    run_local(rank, ranks=4)


@every_stage
def test_small_steps_are_not_lost(stage):
    """In bf16 1 + 0.001 is 1; the master weights have it."""

    def rank():
        net = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            net.weight.fill_(1.0)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        model = ZeRO(net, optimizer, stage=stage, dtype=BF16)
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.ones(1, 1)).sum().neg().backward()
            optimizer.step()
        with model.gathered():
            return net.weight.item()

    assert run_local(rank, ranks=2) == [1.0078125] * 2


@every_stage
def test_inputs_are_cast_wherever_they_are(stage):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x, *, more, flag):
            assert x[0].dtype == more["a"].dtype == BF16
            assert more["ids"].dtype == torch.int64
            assert flag is True
            return (x[0] + more["a"]) * self.weight

    def rank():
        net = Model()
        model = ZeRO(net, torch.optim.SGD(net.parameters(), lr=1.0), stage=stage, dtype=BF16)
        out = model([torch.ones(3)], more={"a": torch.ones(3).double(), "ids": torch.tensor([1])}, flag=True)
        assert out.dtype == BF16

    run_local(rank, ranks=2)


@every_stage
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_trap_7_an_overflow_on_one_rank_skips_the_step_on_all(stage, offload):
    def rank():
        mesh, me = Mesh("dp=4"), commlayer.world().rank
        net = drawn(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        model = ZeRO(net, optimizer, stage=stage, mesh=mesh, dtype=FP16, offload=offload)
        scaler = GradScaler(mesh, init_scale=64.0, growth_interval=100)
        scales, values = [], []
        for step in range(4):
            optimizer.zero_grad()
            x = torch.ones(2, 4) * (6e4 if step == 1 and me == 2 else 1)
            loss = model(x).float().square().mean() if step != 1 else model(x).float().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            values.append({name: gather_full(p, p).clone() for name, p in model.named_parameters()})
        for name in values[0]:
            assert torch.equal(values[1][name], values[0][name]), "the step was not skipped"
            assert values[3][name].isfinite().all()
            assert not torch.equal(values[2][name], values[1][name])
        return scales

    assert run_local(rank, ranks=4) == [[64.0, 32.0, 32.0, 32.0]] * 4
