"""Marks on parameters: what they say, that they last, and that gradients are reduced accordingly."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import commlayer
from commlayer import CommError, Group, Mesh, balanced_sizes, run_local
from parallel import verify_gradients
from parallel.data import DataParallel
from parallel.mappings import copy_to_region, gather_from_region, reduce_from_region, scatter_to_region
from parallel.placement import (
    full_shape,
    gather_full,
    initialise,
    mark_replicated,
    mark_sharded,
    part_of,
    placement,
)

TOKENS, FEATURES, SAMPLES = 7, 6, 5


class Serial(nn.Module):
    """Tokens through a norm and two linear layers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.up = nn.Linear(FEATURES, 2 * FEATURES, bias=False)
        self.down = nn.Linear(2 * FEATURES, 3, bias=False)
        self.never = nn.Linear(2, 2)
        self.double()

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.normed(x))))

    def normed(self, x):
        return self.norm(x)


class Parallel(Serial):
    """The same with tokens cut over cp and hidden features over tp, by hand."""

    def __init__(self, mesh, marked=True):
        super().__init__()
        self.cp, self.tp = mesh["cp"], mesh["tp"]
        self.tokens = balanced_sizes(TOKENS, self.cp.size)
        sizes = balanced_sizes(2 * FEATURES, self.tp.size)
        for linear, dim in ((self.up, 0), (self.down, 1)):
            whole = linear.weight.data
            linear.weight = nn.Parameter(whole.split(sizes, dim)[self.tp.rank].clone())
            mark_sharded(linear.weight, dim, axis="tp", group=self.tp, sizes=sizes)
        if marked:
            mark_replicated(self, ("cp",))

    def forward(self, x):
        x = scatter_to_region(x, 1, self.cp, self.tokens)
        return gather_from_region(reduce_from_region(super().forward(x), self.tp), 1, self.cp, self.tokens)

    def normed(self, x):
        return copy_to_region(self.norm(x), self.tp)


def samples():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SAMPLES, TOKENS, FEATURES, generator=generator, dtype=torch.float64)


def compare(mesh, model, **options):
    """Against the serial model, on uneven shares of the samples."""
    x, dp = samples(), mesh["dp"]
    mine = x.split(balanced_sizes(SAMPLES, dp.size))[dp.rank]
    return verify_gradients(
        model,
        Serial(),
        lambda m: m(mine).pow(2).sum() * dp.size / SAMPLES,
        lambda m: m(x).pow(2).sum() / SAMPLES,
        mesh=mesh,
        **options,
    )


@pytest.mark.parametrize(
    "spec", ["dp=1 cp=2 tp=1", "dp=2 cp=2 tp=1", "dp=3 cp=1 tp=1", "dp=1 cp=2 tp=2", "dp=1 cp=3 tp=1"]
)
@pytest.mark.parametrize("bucket_mb", [1e-6, 25.0])
def test_trap_2_marked_gradients_are_summed_once_with_the_mean(spec, bucket_mb):
    def rank():
        mesh = Mesh(spec)
        torch.manual_seed(commlayer.world().rank)  # different values: rank 0's count
        errors = compare(mesh, DataParallel(Parallel(mesh), mesh=mesh, bucket_mb=bucket_mb))
        assert errors.keys() == dict(Serial().named_parameters()).keys()
        assert max(errors.values()) < 1e-13

    run_local(rank, ranks=Mesh(spec).world_size)


@pytest.mark.parametrize("spec", ["dp=1 cp=2 tp=1", "dp=2 cp=2 tp=1"])
def test_trap_2_without_the_mark_each_parameter_is_named_with_the_cause(spec):
    def rank():
        mesh = Mesh(spec)
        with pytest.raises(AssertionError) as caught:
            compare(mesh, DataParallel(Parallel(mesh, marked=False), mesh=mesh))
        return str(caught.value)

    for text in run_local(rank, ranks=Mesh(spec).world_size):
        assert text.startswith("4 of 6 gradients differ")
        assert "norm.weight: off by" in text
        assert text.count("a partial sum over cp; mark_replicated(…, axes=('cp',)) would add it up") == 4


def test_a_wrong_factor_is_named():
    def rank():
        mesh = Mesh("dp=2 cp=1 tp=1")
        model = DataParallel(Parallel(mesh), mesh=mesh)
        x = samples()[:4]
        mine = x.split(2)[mesh["dp"].rank]
        for scale, words in ((0.5, "too small by the size of dp, 2"), (2, "too large by the size of dp, 2")):
            with pytest.raises(AssertionError, match=words):
                verify_gradients(
                    model, Serial(), lambda m, s=scale: m(mine).sum() * 2 * s, lambda m: m(x).sum(), mesh=mesh
                )

    run_local(rank, ranks=2)


def test_what_is_wrong_on_one_rank_is_an_error_on_all():
    def rank():
        mesh = Mesh("dp=2 cp=1 tp=1")
        model = Parallel(mesh)  # not reduced at all, and only rank 1 is off
        x = samples()
        factor = 1 + mesh.rank("dp")
        with pytest.raises(AssertionError, match=r"on ranks \[1\]"):
            verify_gradients(model, Serial(), lambda m: m(x).sum() * factor, lambda m: m(x).sum(), mesh=mesh)

    run_local(rank, ranks=2)


def test_models_that_do_not_correspond():
    def rank():
        mesh = Mesh("dp=1 cp=1 tp=2")
        other = Serial()
        other.extra = nn.Linear(1, 1)
        with pytest.raises(ValueError, match=r"only one of the two models has the parameters extra.bias, extra.weight"):
            verify_gradients(Parallel(mesh), other, torch.sum, torch.sum, mesh=mesh)
        wide = Serial()
        wide.up = nn.Linear(FEATURES, 5, bias=False)
        with pytest.raises(ValueError, match=r"serial: up.weight is \[5, 6\], but the model's is \[12, 6\]"):
            verify_gradients(Parallel(mesh), wide, torch.sum, torch.sum, mesh=mesh)

    run_local(rank, ranks=2)


def test_marks_survive_copies_and_conversions():
    linear = mark_replicated(nn.Linear(3, 4), ("cp",))
    mark_sharded(linear.weight, -2, axis="tp", group=Group.alone(), sizes=[4])
    for other in (copy.deepcopy(linear), copy.deepcopy(copy.deepcopy(linear)), linear.to(torch.bfloat16).float()):
        assert placement(other.weight).partial == placement(other.bias).partial == ("cp",)
        assert placement(other.weight).shards[0].dim == 0
        assert other.weight.shape == (4, 3)
    assert copy.deepcopy(linear).weight is not linear.weight
    tied = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    tied[1].weight = tied[0].weight
    mark_replicated(tied, ("cp",))
    mark_replicated(tied, ("tp",))
    copied = copy.deepcopy(tied)
    assert copied[0].weight is copied[1].weight
    assert placement(copied[0].weight).partial == ("cp", "tp")


def test_marks_of_modules_survive_the_meta_device_and_assignment():
    def rank():
        mesh = Mesh("dp=1 cp=2 tp=1")
        with torch.device("meta"):
            model = Parallel(mesh)
        model.to_empty(device="cpu")
        model.load_state_dict(Serial().state_dict(), assign=True)
        assert max(compare(mesh, DataParallel(model, mesh=mesh)).values()) < 1e-13
        only = mark_replicated(nn.Sequential(nn.Linear(1, 1)), ("cp",), recurse=False)
        assert placement(only[0].weight).partial == ()

    run_local(rank, ranks=2)


def test_a_marked_parameter_goes_with_its_module():
    linear = mark_replicated(nn.Linear(3, 4), ("cp",))
    weight = weakref.ref(linear.weight)
    gc.disable()
    try:
        del linear
        assert weight() is None
    finally:
        gc.enable()


def test_a_group_is_not_pickled():
    with pytest.raises(TypeError, match="belongs to its process"):
        pickle.dumps(Group.alone())


def test_a_handle_finds_its_group_as_long_as_it_exists():
    group = Group.alone()
    handle = group.handle
    assert Group.of(handle) is group is copy.deepcopy(group)
    del group
    gc.collect()
    with pytest.raises(CommError, match=f"handle: {handle} is of no group that still exists"):
        Group.of(handle)


def test_buffers_are_those_of_the_data_axis():
    def rank():
        mesh = Mesh("dp=2 tp=2")
        model = nn.BatchNorm1d(1)
        model.running_mean.fill_(commlayer.world().rank)
        DataParallel(model, mesh=mesh)
        return model.running_mean.item()

    assert run_local(rank, ranks=4) == [0, 1, 0, 1]


def test_contradictions_are_refused():
    alone = Group.alone()
    p = mark_sharded(nn.Parameter(torch.zeros(4, 2)), 0, axis="tp", group=alone, sizes=[4])
    with pytest.raises(ValueError, match="is cut over tp, so it is not replicated over tp"):
        mark_replicated(p, ("tp",))
    with pytest.raises(ValueError, match="marked as cut over tp already, so it cannot be cut over tp"):
        mark_sharded(p, 1, axis="tp", group=alone, sizes=[2])
    with pytest.raises(ValueError, match=r"sizes: \[3\] for 1 ranks, but dim 1 of the parameter has 2"):
        mark_sharded(p, 1, axis="ep", group=alone, sizes=[3])
    with pytest.raises(TypeError, match="axes: expected a sequence"):
        mark_replicated(p, "cp")


def test_data_parallel_refuses_marks_it_cannot_honour():
    def rank():
        model = mark_replicated(Serial(), ("cp",))
        with pytest.raises(ValueError, match=r"mesh: needed, since norm.weight is replicated over cp"):
            DataParallel(model)
        with pytest.raises(ValueError, match=r"norm.weight is cut or replicated over cp, but the axes are"):
            DataParallel(model, mesh=Mesh("dp=2"))
        with pytest.raises(ValueError, match=r"norm.weight is marked for dp, over which"):
            DataParallel(mark_replicated(Serial(), ("dp",)), mesh=Mesh("dp=2"))
        with pytest.raises(ValueError, match="give a group or a mesh, not both"):
            DataParallel(Serial(), commlayer.world(), mesh=Mesh("dp=2"))
        marked = Serial()
        if commlayer.world().rank == 1:
            mark_replicated(marked.norm, ("cp",))
        with pytest.raises(ValueError, match="partial over cp"):
            DataParallel(marked, mesh=Mesh("dp=1 cp=2"))

    run_local(rank, ranks=2)


@pytest.mark.parametrize("keep", [True, False])
def test_wrapped_twice_it_is_reduced_once(keep):
    def rank():
        mesh = Mesh("dp=1 cp=2 tp=1")
        model = Parallel(mesh)
        first = DataParallel(model, mesh=mesh)
        if not keep:
            del first
        second = DataParallel(model, mesh=mesh)
        assert max(compare(mesh, second).values()) < 1e-13
        if keep:
            with pytest.raises(CommError, match="was replaced by a newer one"):
                first(samples())
        with pytest.raises(ValueError, match=r"weight is reduced by another DataParallel, of a larger module"):
            DataParallel(mark_replicated(model.norm, ("cp",)), mesh=mesh)

    run_local(rank, ranks=2)


def test_sharded_twice_and_put_together_again():
    def rank():
        mesh = Mesh("tp=2 ep=2")
        whole = torch.arange(35.0).view(7, 5)
        p = nn.Parameter(torch.zeros([4, 3][mesh.rank("tp")], [3, 2][mesh.rank("ep")]))
        mark_sharded(p, 0, axis="tp", group=mesh["tp"], sizes=[4, 3])
        mark_sharded(p, 1, axis="ep", group=mesh["ep"], sizes=[3, 2])
        assert full_shape(p) == [7, 5]
        initialise(p, lambda t: t.copy_(whole))
        assert torch.equal(p, part_of(whole, p))
        assert torch.equal(gather_full(p, p), whole)

    run_local(rank, ranks=4)
