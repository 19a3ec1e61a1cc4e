"""Handles: operations under way, their futures, and what is chained to them."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import mine, of_all, sample


def total(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.stack(of_all(*shape, seed=seed)).double().sum(0).float()


@program(lambda: {"sum": total(5), "rows": torch.cat(of_all(3, 2)), "root": sample(4), "done": True})
def wait() -> Results:
    """Several under way at once, waited for in another order."""
    x, root, rows = mine(5), mine(4), torch.empty(3 * dist.get_world_size(), 2)
    works = [
        dist.all_reduce(x, async_op=True),
        dist.all_gather_into_tensor(rows, mine(3, 2), async_op=True),
        dist.broadcast(root, 0, async_op=True),
    ]
    for work in reversed(works):
        assert work is not None
        work.wait()
    return {"sum": x, "rows": rows, "root": root, "done": all(work.is_completed() for work in works)}


@program(lambda: {"twice": 2 * total(6), "list": True})
def then() -> Results:
    """A chain of callbacks on the future of a handle that is dropped, as DDP's hooks do it."""
    x = mine(6)
    future = dist.all_reduce(x, async_op=True).get_future()
    kind = isinstance(future.value() if future.done() else future.wait(), list)
    doubled = dist.all_reduce(y := mine(6), async_op=True).get_future().then(lambda f: f.value()[0] * 2)
    assert torch.allclose(x * 2, doubled.wait())
    return {"twice": doubled.wait() + 0 * y, "list": kind}


@program(lambda: {"both": total(3) + total(3, seed=1) * dist.get_world_size()})
def collective_in_a_callback() -> Results:
    """The callback of one collective starts the next and waits for it: PowerSGD's hook does so."""
    first, second = mine(3), mine(3, seed=1)
    dist.all_reduce(second)

    def more(future: torch.futures.Future) -> torch.Tensor:
        summed = future.value()[0]
        dist.all_reduce(second)
        return summed + second

    return {"both": dist.all_reduce(first, async_op=True).get_future().then(more).wait()}


@program(lambda: {str(number): total(4, seed=number) for number in range(8)})
def futures_alone() -> Results:
    """Handles are dropped at once, and only their futures kept."""
    tensors = [mine(4, seed=number) for number in range(8)]
    futures = [dist.all_reduce(x, async_op=True).get_future() for x in tensors]
    torch.futures.wait_all(futures)
    return {str(number): x for number, x in enumerate(tensors)}


@program(lambda: {str(number): total(4, seed=number) for number in range(8)})
def dropped() -> Results:
    """Nobody keeps anything: what comes after on the same group waits its turn."""
    tensors = [mine(4, seed=number) for number in range(8)]
    for x in tensors[:-1]:
        dist.all_reduce(x, async_op=True)
    dist.all_reduce(tensors[-1])
    dist.barrier()
    return {str(number): x for number, x in enumerate(tensors)}


def every_kind_alone() -> Results:
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = of_all(size, 2)
    here = rank == 0
    return {
        "all_gather": torch.stack([part[0] for part in parts]),
        "reduce_scatter": total(size, 2)[rank],
        "reduce_scatter_tensor": total(size, 2)[rank][None],
        "all_to_all": torch.stack([part[rank] for part in parts]),
        "all_to_all_single": torch.stack([part[rank] for part in parts]),
        "reduce": total(2) if here else "elsewhere",
        "gather": torch.stack([part[0] for part in parts]) if here else "elsewhere",
        "scatter": parts[0][rank],
    }


@program(every_kind_alone)
def every_kind() -> Results:
    """Each operation that has a list or a root, asynchronously, all started before any is waited for."""
    size, here = dist.get_world_size(), dist.get_rank() == 0
    x, reduced = mine(size, 2), mine(2)
    rows = [row.clone() for row in x]
    gathered, exchanged, at_root = ([torch.empty(2) for _ in range(size)] for _ in range(3))
    part, part_of_tensor, single, scattered = torch.empty(2), torch.empty(1, 2), torch.empty(size, 2), torch.empty(2)
    works = [
        dist.all_gather(gathered, rows[0], async_op=True),
        dist.reduce_scatter(part, rows, async_op=True),
        dist.reduce_scatter_tensor(part_of_tensor, x, async_op=True),
        dist.all_to_all(exchanged, rows, async_op=True),
        dist.all_to_all_single(single, x, async_op=True),
        dist.reduce(reduced, 0, async_op=True),
        dist.gather(rows[0], at_root if here else None, dst=0, async_op=True),
        dist.scatter(scattered, rows if here else None, src=0, async_op=True),
    ]
    for work in works:
        work.wait()
    return {
        "all_gather": torch.stack(gathered),
        "reduce_scatter": part,
        "reduce_scatter_tensor": part_of_tensor,
        "all_to_all": torch.stack(exchanged),
        "all_to_all_single": single,
        "reduce": reduced if here else "elsewhere",
        "gather": torch.stack(at_root) if here else "elsewhere",
        "scatter": scattered,
    }


@program(lambda: {"a": total(3), "b": total(2, 2, seed=1)})
def all_reduces_coalesced() -> Results:
    a, b = mine(3), mine(2, 2, seed=1)
    with dist.distributed_c10d._coalescing_manager():
        dist.all_reduce(a)
        dist.all_reduce(b)
    return {"a": a, "b": b}


@program(lambda: {"a": torch.cat(of_all(3)), "b": torch.cat(of_all(2, 2, seed=1))}, moves=True)
def all_gathers_coalesced() -> Results:
    size = dist.get_world_size()
    a, b = torch.empty(3 * size), torch.empty(2 * size, 2)
    with dist.distributed_c10d._coalescing_manager(async_ops=True) as coalesced:
        dist.all_gather_into_tensor(a, mine(3))
        dist.all_gather_into_tensor(b, mine(2, 2, seed=1))
    coalesced.wait()
    return {"a": a, "b": b}


def reduce_scatters_coalesced_alone() -> Results:
    rank, size = dist.get_rank(), dist.get_world_size()
    return {"a": total(2 * size).split(2)[rank], "b": total(size, 2, seed=1)[rank : rank + 1]}


@program(reduce_scatters_coalesced_alone)
def reduce_scatters_coalesced() -> Results:
    size = dist.get_world_size()
    a, b = torch.empty(2), torch.empty(1, 2)
    with dist.distributed_c10d._coalescing_manager(async_ops=True) as coalesced:
        dist.reduce_scatter_tensor(a, mine(2 * size))
        dist.reduce_scatter_tensor(b, mine(size, 2, seed=1))
    coalesced.wait()
    return {"a": a, "b": b}


@program(lambda: {"a": total(3), "largest": torch.stack(of_all(2, seed=2)).amax(0)})
def all_reduce_coalesced() -> Results:
    """The older function, with a list."""
    a, b, c = mine(3), mine(2, seed=2), mine(2, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.all_reduce_coalesced([a])
        dist.all_reduce_coalesced([b, c], ReduceOp.MAX)
    return {"a": a, "largest": b}


@program(lambda: {"sum": total(4), "all": 2 * total(4, seed=1), "success": True})
def what_handles_say() -> Results:
    """Waited for with a timeout, asked how it went, and collected as futures."""
    work = dist.all_reduce(x := mine(4), async_op=True)
    assert work.wait(timedelta(seconds=10))
    pair = [dist.all_reduce(mine(4, seed=1), async_op=True).get_future() for _ in range(2)]
    collected = torch.futures.collect_all(pair).wait()
    return {"sum": x, "all": sum(f.value()[0] for f in collected), "success": work.is_completed()}


@program(lambda: {str(number): total(3, seed=number) for number in range(6)})
def threads() -> Results:
    """Three threads with a group each, as a checkpoint that is saved in the background."""
    groups = [dist.new_group() for _ in range(3)]

    def work(number: int) -> torch.Tensor:
        x = mine(3, seed=number)
        dist.all_reduce(x, group=groups[number % 3])
        return x

    with ThreadPoolExecutor(3) as pool:
        first = list(pool.map(work, range(3)))
        return {str(number): x for number, x in enumerate(first + list(pool.map(work, range(3, 6))))}
