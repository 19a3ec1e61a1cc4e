"""Wrong use of ZeRO is an error that says what is wrong, on all ranks: no hang, no wrong number."""

import copy
import io

import pytest
import torch
from torch import nn

import commlayer
from commlayer import Mesh, UnsupportedOperation, run_local
from parallel import DataParallel, ZeRO
from parallel.placement import mark_replicated
from tests.contracts.tensor import drawn
from tests.contracts.zero import INPUTS, Plain, sgd

STAGES = (1, 2, 3)
every_stage = pytest.mark.parametrize("stage", STAGES)


def refused(match, make, error=ValueError, ranks=2):
    """``make()`` raises on every rank, and these can go on together afterwards."""

    def rank():
        with pytest.raises(error, match=match):
            make()
        return commlayer.all_reduce(torch.ones(())).item()

    assert run_local(rank, ranks=ranks, timeout=10) == [float(ranks)] * ranks


def zero(net, optimizer=None, stage=1, **options):
    return ZeRO(net, optimizer or torch.optim.SGD(net.parameters(), lr=0.1), stage=stage, **options)


# Settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stage": 4}, "stage: expected 1, 2 or 3, got 4"),
        ({"stage": 0}, "stage: expected 1, 2 or 3, got 0"),
        ({"stage": "3"}, "stage: expected 1, 2 or 3, got '3'"),
        ({"offload": "nvme"}, "offload: expected one of none, cpu, disk, got 'nvme'"),
        ({"offload": "disk"}, "folder: needed for offload='disk'"),
        ({"folder": "/nowhere"}, "folder: needed for offload='disk', and only there"),
        ({"bucket_mb": 0}, "bucket_mb: must be positive, got 0"),
        ({"replicas": 3}, "replicas: expected a divisor of the 4 data ranks, got 3"),
        ({"replicas": 0}, "replicas: expected a divisor of the 4 data ranks, got 0"),
        ({"replicas": 8}, "replicas: expected a divisor of the 4 data ranks, got 8"),
        ({"replicas": -1}, "replicas: expected a divisor of the 4 data ranks, got -1"),
        ({"dtype": torch.int32}, "dtype: expected a floating-point type, got torch.int32"),
        ({"reduce_dtype": torch.bool}, "reduce_dtype: expected a floating-point type"),
        ({"stage": 2, "units": []}, "units: of stage 3 alone, and this is stage 2"),
        ({"stage": 3, "units": [nn.Linear(2, 2)]}, "units: Linear is not a module of Linear"),
    ],
)
def test_settings(options, match):
    refused(match, lambda: zero(nn.Linear(2, 2), **options), ranks=4)


def test_a_group_beside_a_mesh_and_experts_without_one():
    refused("give a group or a mesh", lambda: zero(nn.Linear(2, 2), group=commlayer.world(), mesh=Mesh("dp=2")))
    refused("mesh: needed beside experts", lambda: zero(nn.Linear(2, 2), experts=Mesh("dp=2").fold("ep=2")))


def test_marks_of_axes_that_are_not_there():
    def make():
        net = mark_replicated(nn.Linear(2, 2), ("cp",))
        return zero(net)

    refused("mesh: needed, since weight is replicated over cp", make)


@pytest.mark.parametrize(
    "other",
    [
        lambda me: {"stage": 1 + me},
        lambda me: {"bucket_mb": 1 + me},
        lambda me: {"replicas": 1 + me},
        lambda me: {"dtype": (None, torch.bfloat16)[me]},
        lambda me: {"reduce_dtype": (None, torch.bfloat16)[me]},
        lambda me: {"offload": ("none", "cpu")[me]},
    ],
)
def test_settings_that_differ_between_ranks(other):
    refused("module: rank 0 has .*, rank 1 has ", lambda: zero(nn.Linear(2, 2), **other(commlayer.world().rank)))


@every_stage
def test_models_that_differ_between_ranks(stage):
    def shapes():
        return zero(nn.Linear(2, 3 + commlayer.world().rank), stage=stage)

    def frozen():
        return zero(nn.Linear(2, 2).requires_grad_(commlayer.world().rank == 0), stage=stage)

    refused(r"rank 0 has weight: float32 \[3, 2\], rank 1 has weight: float32 \[4, 2\]", shapes)
    refused(r"rank 1 has weight: float32 \[2, 2\] frozen", frozen)


def test_units_that_differ_between_ranks():
    def make():
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        return zero(net, stage=3, units=[net[commlayer.world().rank]])

    refused("rank 0 has .*, rank 1 has", make)


@every_stage
def test_wrapped_twice(stage):
    def rank():
        model = zero(nn.Linear(2, 2), stage=stage)
        for again in (zero, DataParallel):
            with pytest.raises((ValueError, UnsupportedOperation), match=r"weight is (reduced by ZeRO|released)"):
                again(model.module)
        assert model.stage == stage

    run_local(rank, ranks=2)


# Optimisers --------------------------------------------------------------------------------------------------


class Lamb(torch.optim.Optimizer):
    """A step as long as the parameter (You et al. 2020, without moments)."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * (group["lr"] * p.norm() / (p.grad.norm() + 1e-9)))


class ByRows(torch.optim.Optimizer):
    """Of matrices alone it divides each row by its norm."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    update = p.grad / p.grad.norm(dim=-1, keepdim=True) if p.ndim == 2 else p.grad
                    p.sub_(group["lr"] * update)


class Centred(torch.optim.Optimizer):
    """Of matrices it takes the mean off the gradient (Yong et al. 2020)."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * (p.grad - p.grad.mean() if p.ndim > 1 else p.grad))


class Clipping(torch.optim.Optimizer):
    """Clips to the norm of all of a group, before it steps."""

    def __init__(self, params, lr=0.1, limit=0.01):
        super().__init__(params, {"lr": lr, "limit": limit})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], group["limit"])
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)


@every_stage
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.Adafactor(p, lr=0.1, foreach=False),
        lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.1),
        lambda p: torch.optim.LBFGS(p),
        Lamb,
        ByRows,
        Centred,
    ],
)
def test_optimizers_that_are_not_elementwise(stage, make):
    def wrap():
        net = drawn(Plain).float()
        optimizer = make([*net.parameters()])
        return ZeRO(net, optimizer, stage=stage)

    refused("optimizer: (Adafactor|Muon|LBFGS|Lamb|ByRows|Centred) is not element-wise", wrap)


def test_an_optimizer_of_which_a_later_group_is_not_elementwise():
    class Mixed(ByRows):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(group["lr"] * (p.grad / p.grad.norm() if group.get("muon") else p.grad))

    def wrap():
        net = drawn(Plain)
        by_size = [p for p in net.parameters() if p.ndim == 1], [p for p in net.parameters() if p.ndim == 2]
        return ZeRO(net, Mixed([{"params": by_size[0]}, {"params": by_size[1], "muon": True}]), stage=2)

    refused("optimizer: Mixed is not element-wise", wrap)


def test_the_trial_leaves_the_optimizer_alone():
    """Neither refused nor accepted optimisers have made a step, or drawn a number."""

    def rank():
        net = drawn(Plain)
        before = [p.clone() for p in net.parameters()]
        for make in (Lamb, ByRows):
            optimizer = make(net.parameters())
            with pytest.raises(ValueError, match="element-wise"):
                ZeRO(net, optimizer, stage=1)
            assert not optimizer.state
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        assert all(p.grad is None for p in net.parameters())
        optimizer = torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.1))
        ZeRO(net, optimizer, stage=1)
        assert not optimizer.state
        assert optimizer.param_groups[0]["lr"] == 0.1

    state = torch.get_rng_state()
    run_local(rank, ranks=1)
    del state


@every_stage
def test_an_optimizer_of_other_parameters(stage):
    def others():
        net = nn.Linear(2, 2)
        return ZeRO(net, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), stage=stage)

    def one_more():
        net = nn.Linear(2, 2)
        extra = nn.Parameter(torch.ones(3))
        return ZeRO(net, torch.optim.SGD([*net.parameters(), extra], lr=0.1), stage=stage)

    def copied():
        net = nn.Linear(2, 2)
        return ZeRO(copy.deepcopy(net), torch.optim.SGD(net.parameters(), lr=0.1), stage=stage)

    refused("optimizer: a parameter of shape", others)
    refused(r"optimizer: a parameter of shape \[3\]", one_more)
    refused("optimizer: a parameter of shape", copied)


@every_stage
def test_an_optimizer_twice(stage):
    """It has pieces already."""

    def make():
        net = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        ZeRO(net, optimizer, stage=stage)
        return ZeRO(net, optimizer, stage=stage)

    refused(None, make, error=(ValueError, UnsupportedOperation))


# Use ---------------------------------------------------------------------------------------------------------


@every_stage
def test_sparse_embeddings(stage):
    refused(
        "0: an embedding with sparse=True",
        lambda: zero(nn.Sequential(nn.Embedding(3, 2, sparse=True)), stage=stage),
        UnsupportedOperation,
    )


@every_stage
def test_a_sparse_gradient_names_the_parameter(stage):
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(4, 2))

        def forward(self, i):
            return nn.functional.embedding(i, self.table, sparse=True)

    model = []

    def use():
        model.append(zero(Lookup(), stage=stage))
        model[-1](torch.tensor([1])).sum().backward()

    refused("gradient of table is sparse", use, UnsupportedOperation)


@every_stage
def test_a_second_derivative_through_grad(stage):
    def use():
        model = zero(nn.Linear(2, 2), stage=stage)
        model(torch.ones(1, 2)).square().sum().backward(create_graph=True)

    refused(r"gradient of (weight|bias) has a graph", use, UnsupportedOperation)


@every_stage
@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.double(),
        lambda m: m.to("cpu"),
        lambda m: m.half(),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.share_memory(),
    ],
)
def test_converting_the_wrapper(stage, convert):
    refused("cannot be moved or converted", lambda: convert(zero(nn.Linear(2, 2), stage=stage)), UnsupportedOperation)


@every_stage
@pytest.mark.parametrize("convert", [lambda m: m.double(), lambda m: m.half()])
def test_converting_the_wrapped_module(stage, convert):
    """Past the wrapper: an error, then or in the next forward."""

    def use():
        model = zero(nn.Linear(2, 2), stage=stage)
        convert(model.module)
        model(torch.ones(1, 2, dtype=model.module.weight.dtype)).sum().backward()

    refused(None, use, (UnsupportedOperation, ValueError))


@every_stage
def test_state_dicts_of_the_wrapper(stage):
    refused("parallel.checkpoint", lambda: zero(nn.Linear(2, 2), stage=stage).state_dict(), UnsupportedOperation)
    refused("parallel.checkpoint", lambda: zero(nn.Linear(2, 2), stage=stage).load_state_dict({}), UnsupportedOperation)


@every_stage
def test_a_copy_which_would_reduce_nothing(stage):
    refused("copy the module", lambda: copy.deepcopy(zero(nn.Linear(2, 2), stage=stage)), TypeError)


@every_stage
def test_unfreezing_later(stage):
    def use():
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
        model = zero(net, torch.optim.SGD(net[0].parameters(), lr=0.1), stage=stage)
        net[1].requires_grad_()
        model(torch.ones(1, 2))

    refused(r"requires_grad of one of 1\.weight, 1\.bias was set", use)


def saved(module):
    torch.save(module.state_dict(), io.BytesIO())


USES = {
    "sum": lambda net: net.head.weight.sum(),
    "copy": lambda net: copy.deepcopy(net),
    "save": saved,
    "clone": lambda net: net.head.weight.clone(),
    "norm": lambda net: torch.linalg.vector_norm(net.head.weight),
    "list": lambda net: net.head.weight.tolist(),
    "item": lambda net: net.head.bias[0].item(),
    "index": lambda net: net.head.weight[0],
    "data": lambda net: net.head.weight.data.sum(),
    "detach": lambda net: net.head.weight.detach().sum(),
    "numpy": lambda net: net.head.weight.detach().numpy().sum(),
    "fill": lambda net: nn.init.zeros_(net.head.weight),
    "write": lambda net: net.head.weight.data.copy_(torch.ones(3, 7)),
    "add": lambda net: net.head.weight + 1,
    "vector": lambda net: nn.utils.parameters_to_vector(net.parameters()),
    "load": lambda net: net.load_state_dict(drawn(Plain).state_dict()),
    "double": lambda net: net.float(),
    "foreach": lambda net: torch._foreach_norm([*net.parameters()]),
    "linear": lambda net: nn.functional.linear(torch.ones(1, 7).double(), net.head.weight),
    "matmul": lambda net: torch.ones(1, 7).double() @ net.head.weight.T,
    "print": lambda net: f"{net.head.weight.sum():.3f}",
    "compare": lambda net: torch.equal(net.head.weight, torch.ones(3, 7)),
    "all_reduce": lambda net: commlayer.all_reduce(net.head.weight),
    "broadcast": lambda net: commlayer.broadcast(net.head.weight, src=0),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("when", ["at the start", "after a step", "in evaluation"])
def test_a_released_parameter(use, when):
    """Between passes it has no values. Whoever asks for them hears of it, and the model is as it was."""

    def rank():
        net = drawn(Plain)
        optimizer = sgd(net)
        model = ZeRO(net, optimizer, stage=3)
        x = torch.ones(2, INPUTS, dtype=torch.float64)
        if when == "after a step":
            model(x).sum().backward()
            optimizer.step()
        elif when == "in evaluation":
            with torch.no_grad():
                model(x)
        with model.gathered():
            before = [p.detach().clone() for p in net.parameters()]
        with pytest.raises((UnsupportedOperation, RuntimeError), match=r"released|gathered"):
            USES[use](net)
        with model.gathered():
            for p, q in zip(net.parameters(), before, strict=True):
                assert torch.equal(p, q)

    run_local(rank, ranks=2)


def test_what_needs_no_values_of_released_parameters():
    def rank():
        net = drawn(Plain)
        ZeRO(net, sgd(net), stage=3)
        p = net.head.weight
        assert p.shape == (3, 7)
        assert p.size(0) == 3
        assert p.numel() == 21
        assert p.ndim == p.dim() == 2
        assert p.dtype == torch.float64
        assert p.device.type == "cpu"
        assert p.requires_grad
        assert p.is_leaf
        assert p.grad is None
        assert isinstance(p, nn.Parameter)
        assert "released" in repr(p).lower()
        assert sum(q.numel() for q in net.parameters()) == sum(q.numel() for q in drawn(Plain).parameters())
        assert "Linear" in repr(net)

    run_local(rank, ranks=2)


# Meta --------------------------------------------------------------------------------------------------------


@every_stage
def test_some_parameters_on_meta(stage):
    def make():
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
        return zero(net, stage=stage)

    refused(r"module: 1.bias is on the meta device, 0.bias is not; move all, or none", make)
