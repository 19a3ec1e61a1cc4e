"""Products of many experts at once, and what the experts of a rank are."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import commlayer
from commlayer import Mesh, run_local
from parallel import experts as module
from parallel.experts import Experts, grouped_linear
from parallel.placement import full_shape, gather_full
from tests.contracts.plain_moe import PlainExperts
from tests.contracts.tensor import drawn, rand

ROWS = [(3, 0, 5, 1), (0, 0, 9, 0), (0, 0, 0, 0), (1, 1, 1, 1), (0, 4, 0, 0)]


def one_by_one(x, weight, rows):
    return torch.cat([part @ w.T for part, w in zip(x.split(rows), weight, strict=True)])


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extents", [(8, 16), (5, 7), (8, 0), (0, 8)])  # torch's grouped product takes the first
@pytest.mark.parametrize("grouped", [True, False])
def test_grouped_linear(monkeypatch, rows, dtype, extents, grouped):
    if not grouped:
        monkeypatch.setattr(module, "_has_grouped_mm", lambda *_: False)
    grouped = grouped and sum(rows) > 0 and extents == (8, 16) and supported(dtype)
    module._has_grouped_mm(torch.device("cpu"), dtype)  # finds out by trying
    used = spied(monkeypatch)
    close = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    x, weight, v = (rand(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes(rows, *extents)))
    found = []
    for function, kind in ((grouped_linear, dtype), (one_by_one, torch.float64)):
        points, weights = (t.to(kind).clone().requires_grad_() for t in (x, weight))
        y = function(strided(points), weights, rows)
        y.backward(strided(v.to(kind)))
        if function is grouped_linear:
            assert used.count(dtype) == (3 if grouped else 0)  # of y, and of both gradients
        found.append((y, points.grad, weights.grad))
        assert y.dtype == weights.grad.dtype == kind
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=close, atol=close * 3)


def shapes(rows, ins, outs):
    return (sum(rows), ins), (len(rows), outs, ins), (sum(rows), outs)


def strided(x):
    """The same values, not contiguous."""
    return torch.stack([x, x], -1)[..., 0]


def spied(monkeypatch):
    """The dtype of each grouped product that torch computes."""
    used = []

    def product(x, *args, **options):
        result = real(x, *args, **options)
        used.append(x.dtype)
        return result

    if hasattr(torch, "_grouped_mm"):
        real = torch._grouped_mm
        monkeypatch.setattr(torch, "_grouped_mm", product)
    return used


def supported(dtype):
    try:
        ones = torch.ones(16, 16, dtype=dtype)
        torch._grouped_mm(ones, ones.unsqueeze(0), offs=torch.tensor([16], dtype=torch.int32))
    except (AttributeError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize(("of_x", "of_weight"), [(True, False), (False, True)])
def test_gradients_that_nobody_wants_are_not_computed(monkeypatch, of_x, of_weight):
    done = []
    for name in ("_products", "_outer_products"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, n=name, f=real: done.append(n) or f(*args))
    x, weight = torch.ones(3, 4, requires_grad=of_x), torch.ones(2, 5, 4, requires_grad=of_weight)
    grouped_linear(x, weight, (1, 2)).sum().backward()
    assert done == ["_products", "_products" if of_x else "_outer_products"]
    assert (x.grad is not None, weight.grad is not None) == (of_x, of_weight)


def test_rows_that_do_not_fit():
    for rows in ((1, 1), (1, 2, 0), ()):
        with pytest.raises(ValueError, match=r"rows: .* for 2 experts; they must add up to the 3 rows of x"):
            grouped_linear(torch.ones(3, 4), torch.ones(2, 5, 4), rows)


@pytest.mark.parametrize("gated", [True, False])
def test_each_expert_is_an_mlp_for_its_rows(gated):
    """On ranks that have one channel more or less of each, partial sums."""
    rows, x = (2, 0, 3), rand(5, 6)
    activation = F.silu if gated else F.gelu
    serial = drawn(lambda: PlainExperts(6, 5, 3, gated)).double()
    of = [expert for expert, n in enumerate(rows) for _ in range(n)]
    wanted = torch.stack([serial(expert, token) for expert, token in zip(of, x, strict=True)])

    def rank():
        mesh = Mesh(f"dp={commlayer.world().size}").fold(f"etp={commlayer.world().size}")
        assert mesh["ep"]
        assert mesh["etp"]
        experts = drawn(lambda: Experts(6, 5, 3, mesh=mesh, activation=activation, gated=gated)).double()
        torch.testing.assert_close(commlayer.all_reduce(experts(x, rows)), wanted, rtol=1e-12, atol=1e-14)

    for ranks in (1, 2, 3):
        run_local(rank, ranks)


def test_autocast():
    """The products are those of half precision, and so are what they keep, and what is sent on."""
    experts, x = Experts(8, 8, 2), rand(3, 8, dtype=torch.float32).requires_grad_()
    kept = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = experts(x, (1, 2))
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in kept if t.is_floating_point()} == {torch.bfloat16}
    torch.testing.assert_close(y.float(), experts(x, (1, 2)), rtol=3e-2, atol=3e-3)
    y.sum().backward()
    assert {t.grad.dtype for t in (x, experts.up, experts.down)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_8_first_values_are_the_serial_ones_bit_for_bit(dtype):
    """Each expert is drawn as a linear layer is, whoever has it; in a part of the ranks, and of uneven parts too."""
    serial, after = drawn(lambda: (PlainExperts(6, 5, 7, dtype=dtype), torch.rand(1)))

    def rank(fold):
        mesh = Mesh(f"dp={commlayer.world().size}").fold(fold)
        assert mesh["ep"]
        assert mesh["etp"]
        experts, then = drawn(lambda: (Experts(6, 5, 7, mesh=mesh, dtype=dtype), torch.rand(1)))
        assert torch.equal(then, after)
        for name, p in experts.named_parameters():
            assert torch.equal(gather_full(p, p), serial.get_parameter(name)), name
            assert full_shape(p) == list(serial.get_parameter(name).shape)

    for ep, etp in itertools.product((1, 2, 3), (1, 2)):
        run_local(lambda f=f"ep={ep} etp={etp}": rank(f), ep * etp)


def test_repr_says_what_is_on_this_rank():
    def rank():
        mesh = Mesh("dp=4").fold("ep=2 etp=2")
        return repr(Experts(6, 5, 7, mesh=mesh))

    assert run_local(rank, 4)[3] == "Experts(7, ep: 3 on rank 1, etp: 2 of 5 channels on rank 1)"
