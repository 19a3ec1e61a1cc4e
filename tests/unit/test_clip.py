"""Norms of gradients on thread ranks, against those of the whole gradients on one process in float64."""

import math

import pytest
import torch
from torch import nn

import commlayer
from commlayer import Group, Mesh, balanced_sizes, run_local
from parallel.clip import clip_grad_norm_, grad_norm
from parallel.placement import gather_full, mark_sharded, part_of

# Shapes of the whole parameters, and what they are cut over: (axis, dim), ...
WHOLE = {
    "replicated": ((3, 5), ()),
    "columns": ((7, 4), (("tp", 0),)),
    "rows": ((3, 9), (("tp", 1),)),
    "over both": ((6, 5), (("tp", 0), ("other", 1))),
    "fewer rows than ranks": ((1, 4), (("tp", 0),)),
    "over the other axis": ((5, 2), (("other", 0),)),
    "scalar": ((), ()),
    "empty": ((0, 3), ()),
    "unused": ((2, 2), ()),
}


def whole_gradients(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, (shape, _) in WHOLE.items()}


def parameters(mesh, other, grads=None, dtype=torch.float64):
    """This rank's parts, with their gradients; ``other`` is the mesh's second axis."""
    found = {}
    for name, whole in (grads or whole_gradients()).items():
        param, cut = nn.Parameter(torch.zeros(whole.shape, dtype=dtype)), []
        for axis, dim in WHOLE[name][1]:
            axis = other if axis == "other" else axis
            sizes = balanced_sizes(whole.shape[dim], mesh.size(axis))
            cut.append((axis, dim, sizes))
            shape = [sizes[mesh.rank(axis)] if d == dim else n for d, n in enumerate(param.shape)]
            param = nn.Parameter(torch.zeros(shape, dtype=dtype))
            for a, d, extents in cut:
                mark_sharded(param, d, axis=a, group=mesh[a], sizes=extents)
        param.grad = None if name == "unused" else part_of(whole, param).to(dtype).clone()
        found[name] = param
    return found


def reference(p, grads):
    return torch.cat([g.flatten() for name, g in grads.items() if name != "unused"]).norm(p).item()


@pytest.mark.parametrize("spec", ["dp=2 tp=2", "cp=2 tp=2", "dp=1 tp=3", "dp=2 tp=1"])
@pytest.mark.parametrize("p", [1, 2.0, 3.5, math.inf])
@pytest.mark.parametrize("with_mesh", [True, False])
def test_trap_6_every_element_counts_once(spec, p, with_mesh):
    wanted = reference(p, whole_gradients())

    def norm():
        mesh = Mesh(spec)
        params = parameters(mesh, spec[:2])
        tied = [*params.values(), params["replicated"], params["columns"]]
        return grad_norm(tied, p, mesh=mesh if with_mesh else None)

    for total in run_local(norm, Mesh(spec).world_size):
        assert total.dtype == torch.float64
        assert total.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_trap_6_stages_of_a_pipeline_have_parameters_of_their_own(p):
    stages = [whole_gradients(seed) for seed in (0, 1)]
    del stages[0]["columns"], stages[0]["over both"], stages[1]["over both"]
    wanted = torch.tensor([reference(p, grads) for grads in stages], dtype=torch.float64).norm(p).item()

    def norm():
        mesh = Mesh("tp=2 pp=2")
        return grad_norm(parameters(mesh, "tp", stages[mesh.rank("pp")]).values(), p, mesh=mesh).item()

    assert run_local(norm, 4) == [pytest.approx(wanted, rel=1e-12)] * 4


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_trap_6_the_coefficient_has_the_same_bits_on_every_rank(p):
    """Also where a reduction has rounded replicated gradients differently, by a bit."""

    def clip():
        mesh = Mesh("dp=2 tp=2")
        params = parameters(mesh, "dp", dtype=torch.float32)
        for param in params.values():
            if param.grad is not None:
                param.grad *= 1 + commlayer.world().rank * torch.finfo(torch.float32).eps
        probe = nn.Parameter(torch.zeros(()))
        probe.grad = torch.tensor(1e-3)  # alike everywhere, and so it must stay
        total = clip_grad_norm_([*params.values(), probe], 0.1, p, mesh=mesh)
        return total.item(), probe.grad.item()

    ranks = run_local(clip, 4)
    assert len(set(ranks)) == 1
    assert ranks[0][1] == pytest.approx(1e-3 * 0.1 / ranks[0][0], rel=1e-4)


@pytest.mark.parametrize("max_norm", [0.3, 1e3])
@pytest.mark.parametrize("p", [2.0, math.inf])
def test_clipped_gradients_are_the_serial_ones(max_norm, p):
    serial = {name: nn.Parameter(torch.zeros_like(grad)) for name, grad in whole_gradients().items()}
    for name, grad in whole_gradients().items():
        serial[name].grad = None if name == "unused" else grad
    wanted = nn.utils.clip_grad_norm_([q for q in serial.values() if q.numel()], max_norm, p)

    def clip():
        mesh = Mesh("cp=2 tp=2")
        module = nn.Module()
        params = parameters(mesh, "cp")
        for name, param in params.items():
            module.register_parameter(name, param)
        total = clip_grad_norm_(module, max_norm, p, mesh=mesh)
        return total, {n: None if q.grad is None else gather_full(q.grad, q) for n, q in params.items()}

    for total, grads in run_local(clip, 4):
        torch.testing.assert_close(total, wanted, rtol=1e-12, atol=0)
        for name, grad in grads.items():
            if name == "unused":
                assert grad is None
            else:
                torch.testing.assert_close(grad, serial[name].grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_one_number_is_reduced_once(monkeypatch, p):
    calls, real = [], commlayer.all_reduce

    def counted(x, *args, group, **kwargs):
        calls.append((group.size, x.numel()))
        return real(x, *args, group=group, **kwargs)

    monkeypatch.setattr(commlayer, "all_reduce", counted)
    run_local(lambda: grad_norm(parameters(Mesh("dp=2 tp=2"), "dp").values(), p, mesh=Mesh("dp=2 tp=2")), 4)
    assert calls == [(4, 1)] * 4


def test_without_a_mesh_nothing_is_communicated_for_whole_parameters(monkeypatch):
    monkeypatch.setattr(commlayer, "all_reduce", None)
    linear = nn.Linear(4, 3)
    mark_sharded(linear.weight, 0, axis="tp", group=Group.alone(), sizes=[3])  # as layers that run serially do
    linear(torch.rand(2, 4)).sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in linear.parameters()]).norm().item()
    assert not commlayer.is_initialized()
    assert grad_norm(linear).item() == pytest.approx(wanted, rel=1e-6)
    assert grad_norm(p for p in linear.parameters()).item() == pytest.approx(wanted, rel=1e-6)
    assert grad_norm(linear.weight).item() == pytest.approx(linear.weight.grad.norm().item(), rel=1e-6)


def test_parameters_of_layers_that_are_alone_are_replicated_on_a_mesh():
    def norm():
        param = nn.Parameter(torch.zeros(4))
        param.grad = torch.ones(4)
        mark_sharded(param, 0, axis="tp", group=Group.alone(), sizes=[4])
        return grad_norm([param], mesh=Mesh("tp=2")).item()

    assert run_local(norm, 2) == [2.0, 2.0]


@pytest.mark.parametrize("with_mesh", [True, False])
def test_no_gradient_at_all(with_mesh):
    def clip():
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))]
        params[1].grad = torch.ones(0)
        mesh = Mesh("tp=2") if with_mesh else None
        return clip_grad_norm_(params, 1.0, mesh=mesh).item(), clip_grad_norm_([], 1.0, math.inf, mesh=mesh).item()

    assert run_local(clip, 2) == [(0.0, 0.0)] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("p", [2.0, math.inf])
def test_what_is_not_finite_on_one_rank_is_known_to_all(value, p):
    def clip():
        mesh = Mesh("dp=2 tp=2")
        params = parameters(mesh, "dp", dtype=torch.float32)
        if commlayer.world().rank == 2:
            params["over both"].grad[0, 0] = value
        before = params["replicated"].grad.clone()
        with pytest.raises(RuntimeError, match=f"the norm of the gradients is {abs(value)}"):
            clip_grad_norm_(params.values(), 1.0, p, mesh=mesh, error_if_nonfinite=True)
        assert torch.equal(params["replicated"].grad, before)
        total = clip_grad_norm_(params.values(), 1.0, p, mesh=mesh)
        return total.item(), params["scalar"].grad.item()

    for total, clipped in run_local(clip, 4):
        assert math.isnan(total) if math.isnan(value) else total == math.inf
        assert math.isnan(clipped) if math.isnan(value) else clipped == 0  # as torch's


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    param = nn.Parameter(torch.zeros(3000, dtype=dtype))
    param.grad = torch.linspace(1000, 5000, 3000).to(dtype)  # a norm that fp16 cannot hold, and bf16 only roughly
    grad = param.grad.double()
    other = nn.Parameter(torch.zeros(2))  # and another dtype beside it
    other.grad = torch.tensor([3.0, 4.0])
    total = clip_grad_norm_([param, other], 1000.0)
    assert total.item() == pytest.approx(math.hypot(grad.norm().item(), 5), rel=1e-5)
    clipped = grad * 1000 / total
    assert param.grad.dtype == dtype
    assert (param.grad.double() / clipped - 1).abs().max() <= torch.finfo(dtype).eps / 2 * 1.001
    torch.testing.assert_close(other.grad, torch.tensor([3.0, 4.0]) * (1000 / total.item()))


@pytest.mark.parametrize("p", [0, 0.5, -1, math.nan])
def test_bad_norm(p):
    with pytest.raises(ValueError, match=f"norm_type: .*{p}"):
        grad_norm([], p)


def test_a_mesh_that_does_not_fit():
    def misfit():
        world = commlayer.world()
        param = mark_sharded(nn.Parameter(torch.ones(2)), 0, axis="tp", group=world, sizes=[2, 2])
        with pytest.raises(ValueError, match=r"cut into 2 parts, which do not fit the 1 ranks of Mesh\('tp=1'"):
            grad_norm([param], mesh=Mesh("tp=1", group=world.subgroup([world.rank])))

    run_local(misfit, 2)
