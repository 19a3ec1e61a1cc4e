"""DTensor: every change of placement, and operators whose results are partial sums."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.experimental import implicit_replication, local_map

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import full, mine, of_all, sample


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def grid() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))


PLACES: dict[str, Placement] = {"rows": Shard(0), "columns": Shard(1), "all": Replicate()}


@program(cases=list(itertools.product(PLACES, repeat=2)), moves=True)
def move(start: str, end: str) -> Results:
    """From any placement to any, with extents that do not divide by the ranks, and back by autograd."""
    x = distribute_tensor(sample(7, 5), line(), [PLACES[start]]).requires_grad_()
    y = x.redistribute(placements=[PLACES[end]])
    y.backward(distribute_tensor(sample(7, 5, seed=1), line(), [PLACES[end]]))
    assert x.grad is not None
    return {"result": y.to_local().detach().clone(), "gradient": x.grad.full_tensor().clone()}


def partial_alone(kind: str) -> Results:
    parts = torch.stack(of_all(7, 5))
    total = {"sum": parts.double().sum(0), "avg": parts.double().mean(0), "max": parts.amax(0), "min": parts.amin(0)}
    return {name: total[kind].float() for name in ("all", "gathered")}


@program(partial_alone, cases=[("sum",), ("avg",), ("max",), ("min",)])
def reduce(kind: str) -> Results:
    x = DTensor.from_local(mine(7, 5), line(), [Partial(kind)])
    rows = x.redistribute(placements=[Shard(0)])
    return {"all": full(x), "gathered": full(rows)}


@program(moves=True)
def two_axes() -> Results:
    """Nested shards on both axes, exchanged for each other."""
    x = distribute_tensor(sample(6, 10), grid(), [Shard(0), Shard(1)])
    results: Results = {"first": x.to_local().clone()}
    for number, places in enumerate([(Shard(1), Shard(0)), (Shard(0), Shard(0)), (Replicate(), Shard(1))]):
        x = x.redistribute(placements=places)
        results[str(number)] = x.to_local().clone()
    return results | {"full": x.full_tensor()}


@program()
def operators() -> Results:
    """Products, norms, softmax, sorting and indexing on shards."""
    a = distribute_tensor(sample(8, 12), line(), [Shard(0)]).requires_grad_()
    b = distribute_tensor(sample(12, 6, seed=1), line(), [Shard(0)]).requires_grad_()
    product = (a.redistribute(placements=[Shard(1)]) @ b).redistribute(placements=[Shard(0)])
    with implicit_replication():
        shifted = product + torch.ones(6)
    weights = shifted.softmax(-1)
    loss = (weights * weights).sum() + torch.linalg.vector_norm(shifted) + a.mean() + b.std(0).amax()
    loss.backward()
    values, order = torch.sort(distribute_tensor(sample(9), line(), [Shard(0)]))
    results = {"product": product, "weights": weights, "loss": loss, "grad a": a.grad, "grad b": b.grad}
    results |= {"sorted": values, "order": order, "cumulative": a.cumsum(0), "stacked": torch.cat([a, a])}
    return {name: full(value) for name, value in results.items()}


@program(lambda: {"sum": sample(6, 4).double().sum(0).float()})
def mapped() -> Results:
    """A function on the shards, whose result is a part of a sum."""
    function = local_map(lambda x: x.sum(0), out_placements=[Partial()], in_placements=([Shard(0)],))
    return {"sum": function(distribute_tensor(sample(6, 4), line(), [Shard(0)])).full_tensor()}


@program(lambda: {"checked": sample(4)}, moves=True)
def from_local_with_a_check() -> Results:
    """``run_check`` broadcasts rank 0's."""
    return {"checked": DTensor.from_local(mine(4), line(), [Replicate()], run_check=True).to_local()}
