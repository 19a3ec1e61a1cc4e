"""Groups of some of the ranks, meshes of devices, and what torch and libraries on it ask a group for."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import of_all


def total(group: dist.ProcessGroup | None) -> list[int]:
    """Which ranks of the world are in it, in its order, by communication; and by torch's books."""
    parts = [torch.empty((), dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, torch.tensor(dist.get_rank()), group=group)
    ranks = [int(part) for part in parts]
    assert ranks == dist.get_process_group_ranks(group), (ranks, dist.get_process_group_ranks(group))
    dist.all_reduce(x := torch.tensor(dist.get_rank()), group=group)
    assert int(x) == sum(ranks)
    return ranks


def half() -> list[int]:
    """The ranks of this rank's parity."""
    return list(range(dist.get_rank() % 2, dist.get_world_size(), 2))


@program(lambda: {"even": str(half() if dist.get_rank() % 2 == 0 else None), "one": str([dist.get_rank()])})
def new_group() -> Results:
    """A group that only some are in, and one of each rank alone; a rank that is not in a group gets no handle."""
    size, rank = dist.get_world_size(), dist.get_rank()
    even = dist.new_group(list(range(0, size, 2)))
    alone = [dist.new_group([other]) for other in range(size)]
    assert (even is dist.GroupMember.NON_GROUP_MEMBER) == (rank % 2 == 1)
    return {"even": str(total(even) if rank % 2 == 0 else None), "one": str(total(alone[rank]))}


@program(lambda: {"reverse": str(list(range(dist.get_world_size()))[::-1]), "root": dist.get_world_size() - 1})
def order_of_ranks() -> Results:
    size = dist.get_world_size()
    reverse = dist.new_group(list(range(size))[::-1], sort_ranks=False)
    dist.broadcast(x := torch.tensor(dist.get_rank()), group=reverse, group_src=0)
    return {"reverse": str(total(reverse)), "root": int(x)}


@program(lambda: {"ranks": str(half())})
def members_alone_create_it() -> Results:
    """With use_local_synchronization nobody else takes part, and the parities make theirs at different times."""
    if dist.get_rank() % 2:
        dist.barrier(dist.new_group(half(), use_local_synchronization=True))
    return {"ranks": str(total(dist.new_group(half(), use_local_synchronization=True)))}


def subgroups_alone() -> Results:
    rank = dist.get_rank()
    return {"pair": str([rank // 2 * 2, rank // 2 * 2 + 1]), "parity": str(half()), "count": dist.get_world_size() // 2}


@program(subgroups_alone)
def new_subgroups() -> Results:
    size = dist.get_world_size()
    pair, all_pairs = dist.new_subgroups(group_size=2)
    parities = [list(range(parity, size, 2)) for parity in range(2)]
    parity, _ = dist.new_subgroups_by_enumeration(parities)
    return {"pair": str(total(pair)), "parity": str(total(parity)), "count": len(all_pairs)}


@program(lambda: {str(number): str(list(range(dist.get_world_size()))) for number in range(12)})
def made_and_destroyed() -> Results:
    results = {}
    for number in range(12):
        group = dist.new_group()
        results[str(number)] = str(total(group))
        dist.destroy_process_group(group)
    return results


def concurrent_alone() -> Results:
    size = dist.get_world_size()
    return {str(number): torch.stack(of_all(3, seed=number)).double().sum(0).float() for number in range(4 * size)}


@program(concurrent_alone)
def several_groups_at_once() -> Results:
    """Operations under way on four groups of all ranks, begun in one order and waited for in another."""
    groups = [dist.new_group() for _ in range(4)]
    tensors = [of_all(3, seed=number)[dist.get_rank()] for number in range(4 * dist.get_world_size())]
    works = [dist.all_reduce(x, group=groups[number % 4], async_op=True) for number, x in enumerate(tensors)]
    for work in sorted(works, key=lambda work: works.index(work) % 4):
        work.wait()
    return {str(number): x for number, x in enumerate(tensors)}


def grid() -> tuple[int, int]:
    """This rank's row and column, two ranks a row."""
    return divmod(dist.get_rank(), 2)


def mesh_alone() -> Results:
    size, (row, column) = dist.get_world_size(), grid()
    return {
        "dp": str([column + 2 * other for other in range(size // 2)]),
        "tp": str([2 * row, 2 * row + 1]),
        "both": str(list(range(size))),
        "place": str((row, column)),
    }


@program(mesh_alone)
def device_mesh() -> Results:
    """A mesh of two axes, its slices, and the flat one of both."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    flat = mesh["dp", "tp"]._flatten("dp_tp")
    results = {axis: str(total(mesh[axis].get_group())) for axis in ("dp", "tp")}
    return results | {"both": str(total(flat.get_group())), "place": str(tuple(mesh.get_coordinate() or ()))}


@program(lambda: {"dp": str(half()), "mixed": str(list(range(dist.get_world_size())))})
def device_mesh_of_three_axes() -> Results:
    """One axis of a single rank; a mesh out of ranks in another order; a mesh from a group."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, 2, size // 2), mesh_dim_names=("pp", "tp", "dp"))
    strided = DeviceMesh("cpu", torch.arange(size).view(size // 2, 2).t(), mesh_dim_names=("tp", "dp"))
    ranks = strided["dp"].mesh.tolist()
    from_group = DeviceMesh.from_group(strided.get_group("dp"), "cpu", mesh=ranks)
    assert total(from_group.get_group()) == ranks == half(), ranks
    assert total(mesh.get_group("pp")) == [dist.get_rank()]
    return {"dp": str(total(strided.get_group("dp"))), "mixed": str(total(mesh["tp", "dp"]._flatten().get_group()))}


@program(lambda: {"rank": dist.get_rank(), "size": dist.get_world_size(), "group rank": len(half()) - 1})
def what_libraries_ask() -> Results:
    """Names, options and places that torch's own layers and libraries read from a group."""
    world, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    assert world is not None
    group = dist.new_group(list(range(size)), timeout=timedelta(seconds=5), group_desc="a description")
    parity = [dist.new_group(list(range(parity, size, 2))) for parity in range(2)][rank % 2]
    names = {world.group_name, group.group_name, parity.group_name}
    assert len(names) == 3, names
    assert group.group_desc == "a description"
    assert dist.distributed_c10d._resolve_process_group(parity.group_name) is parity
    assert dist.distributed_c10d._get_process_group_name(group) == group.group_name
    assert dist.get_backend(group) == dist.get_backend() == world.name(), (dist.get_backend(), world.name())
    assert dist.get_backend_config(group)
    assert dist.get_process_group_ranks(parity) == half()
    assert dist.get_group_rank(parity, half()[-1]) == len(half()) - 1
    assert dist.get_global_rank(parity, 0) == half()[0]
    assert torch.device("cpu") in group._device_types
    assert dist.distributed_c10d._get_pg_default_device(group) == torch.device("cpu")
    assert dist.distributed_c10d._get_object_coll_device(group) == "cpu"
    assert group._get_backend(torch.device("cpu")) is not None
    assert group.bound_device_id is None
    assert (parity.rank(), parity.size()) == (half().index(rank), len(half()))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=7), group)
    dist.barrier(group)
    assert isinstance(repr(group), str)
    assert len({world, group, parity}) == 3
    return {"rank": world.rank(), "size": world.size(), "group rank": dist.get_group_rank(parity, half()[-1])}


@program(lambda: {"sum": float(sum(range(dist.get_world_size()))), "gathered": torch.arange(dist.get_world_size())})
def methods_of_the_group() -> Results:
    """The methods of ProcessGroup itself, which some libraries call without torch.distributed's functions."""
    world, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert world is not None
    world.allreduce([x := torch.tensor([float(rank)])]).wait()
    parts = [torch.empty(1, dtype=torch.int64) for _ in range(size)]
    world.allgather([parts], [torch.tensor([rank])]).wait()
    world._allgather_base(flat := torch.empty(size, dtype=torch.int64), torch.tensor([rank])).wait()
    world.broadcast(y := torch.tensor([rank]), 0).wait()
    world.barrier().wait()
    assert torch.equal(flat, torch.cat(parts))
    assert y.item() == 0
    return {"sum": float(x), "gathered": flat}


@program(lambda: {"counted": dist.get_world_size()})
def the_store() -> Results:
    """The default group's key-value store, which libraries use besides."""
    store = dist.distributed_c10d._get_default_store()
    store.add("counted", 1)
    dist.barrier()
    return {"counted": store.add("counted", 0)}
