"""torch.distributed on the layer: the ways between its groups and ours, and what its futures promise."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_reduce as functional_all_reduce

import commlayer
from commlayer import Group, Mesh

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


@pytest.fixture
def torch_world(everyone):
    """torch.distributed over the ranks of this session, ended again."""
    yield commlayer.to_process_group(everyone)
    dist.destroy_process_group()
    assert commlayer.is_initialized()  # the layer was there before


def test_torch_takes_the_layers_groups_and_gives_them_back(torch_world, everyone, agreed):
    half = everyone.size // 2
    mine = range(half) if everyone.rank < half else range(half, everyone.size)
    group = everyone.subgroup(list(reversed(mine)))

    def body():
        assert torch_world is dist.group.WORLD
        assert (dist.get_backend(), dist.get_world_size()) == ("commlayer", everyone.size)
        made = commlayer.to_process_group(group)
        assert commlayer.to_process_group(group) is made
        assert Group.from_process_group(made) is group
        assert (dist.get_rank(made), dist.get_world_size(made)) == (group.rank, group.size)
        assert dist.get_process_group_ranks(made) == list(group.ranks)
        x = torch.tensor([float(everyone.rank)])
        dist.all_reduce(x, group=made)
        assert x.item() == sum(mine)

    agreed(body)


def test_a_group_of_another_backend_can_be_the_layers(torch_world, everyone, agreed):
    theirs = dist.new_group(backend="gloo")

    def body():
        group = Group.from_process_group(theirs)
        assert (group.backend, group.rank, group.size) == ("gloo", everyone.rank, everyone.size)
        x = commlayer.all_reduce(torch.tensor([1.0, float("nan")]), "max", group=group)
        assert x[0] == 1
        assert x[1].isnan()
        theirs.barrier().wait()  # it is still its owner's

    agreed(body)
    with pytest.raises(TypeError, match="ProcessGroup, got int"):
        Group.from_process_group(3)
    with pytest.raises(TypeError, match="expected a commlayer Group, got str"):
        commlayer.to_process_group("world")


def test_meshes_there_and_back(torch_world, everyone, agreed):
    mesh = Mesh(f"dp=2 tp={everyone.size // 2}", group=everyone)
    device_mesh = mesh.to_device_mesh()

    def body():
        back = Mesh.from_device_mesh(device_mesh)
        assert (back.axes, back.sizes) == (mesh.axes, mesh.sizes)
        for axis in ("tp", "dp", "tp-dp"):
            assert back[axis].ranks == mesh[axis].ranks
        assert back["dp"] is Group.from_process_group(device_mesh.get_group("dp"))  # and no communicator more
        part = Mesh.from_device_mesh(device_mesh["dp"])
        assert commlayer.all_reduce(torch.ones(1), group=part["dp"]) == 2

    agreed(body)
    with pytest.raises(ValueError, match="need names to be axes"):
        Mesh.from_device_mesh(dist.device_mesh.DeviceMesh("cpu", torch.arange(everyone.size)))


def test_callbacks_run_in_one_order_and_may_communicate(torch_world, everyone, agreed):
    """As PowerSGD's do: more of them than any backend has threads, and each waits for what it starts."""

    def body():
        order = []

        def again(place):
            def callback(future):
                order.append(place)
                x = future.value()[0].clone()
                return dist.all_reduce(x, async_op=True).get_future().then(lambda inner: inner.value()[0] * 2).wait()

            return callback

        works = [dist.all_reduce(torch.full((3,), float(place)), async_op=True) for place in range(6)]
        results = [work.get_future().then(again(place)) for place, work in enumerate(works)]
        for _ in range(6):
            dist.all_reduce(torch.ones(1))  # beside them, of the program's own
        for place, result in enumerate(results):
            assert result.wait().tolist() == [2 * place * everyone.size**2] * 3
        assert order == list(range(6))

    agreed(body)


def test_a_failing_callback_is_the_futures_error(torch_world, agreed):
    def body():
        future = dist.all_reduce(torch.ones(1), async_op=True).get_future()
        failed = future.then(lambda done: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            failed.wait()
        assert future.value()[0].numel() == 1

    agreed(body)


def test_what_has_no_memory_yet_is_waited_for_and_what_has_none_is_refused(torch_world, everyone, agreed):
    def body():
        x = functional_all_reduce(torch.ones(2), "sum", dist.group.WORLD)
        dist.all_reduce(x)
        assert x.tolist() == [everyone.size**2] * 2
        mesh = dist.device_mesh.init_device_mesh("cpu", (everyone.size,))
        cut = dist.tensor.distribute_tensor(torch.ones(everyone.size), mesh, [dist.tensor.Shard(0)])
        with pytest.raises(TypeError, match="a DTensor has no memory of its own"):
            dist.all_reduce(cut)

    agreed(body)


def test_one_rank_lies_transposed(torch_world, everyone, agreed):
    """Native on one rank and through a buffer on another are one and the same operation."""

    def body():
        for _ in range(3):
            x = torch.arange(6.0).view(2, 3)
            if everyone.rank == 1:
                x = x.t().contiguous().t()
            dist.all_reduce(x)
            assert torch.equal(x, torch.arange(6.0).view(2, 3) * everyone.size)
            rows = [torch.empty(3, 2).t() if everyone.rank == 1 else torch.empty(2, 3) for _ in range(everyone.size)]
            dist.all_gather(rows, x)
            assert all(torch.equal(row, x) for row in rows)

    agreed(body)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: dist.all_to_all_single(torch.empty(n), torch.empty(n), [1] * n, [2] + [1] * (n - 1)), "add up to"),
        (lambda n: dist.all_reduce(torch.ones(2, dtype=torch.float8_e5m2)), "but not reduced"),
        (lambda n: dist.isend(torch.ones(1), (dist.get_rank() + 1) % n, tag=1 << 15), "tag: expected 0 to 32767"),
        (lambda n: dist.all_gather_into_tensor(torch.empty(n), torch.empty(2)), "one must be . times the other"),
    ],
    ids=["splits", "fp8", "tag", "shapes"],
)
def test_bad_arguments_are_named_before_anything_is_communicated(torch_world, everyone, agreed, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(everyone.size)
    agreed(lambda: dist.barrier())
