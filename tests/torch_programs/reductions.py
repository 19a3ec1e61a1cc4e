"""Every reduction of torch.distributed on many dtypes, and what one process makes of all ranks' inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import COMPLEX, INTEGERS, REALS, last, mine, of_all, sample, text

REDUCTIONS: dict[str, tuple[list[torch.dtype], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "SUM": ([*INTEGERS, *REALS, *COMPLEX], torch.add),
    "AVG": ([*REALS, *COMPLEX], torch.add),
    "PRODUCT": ([torch.bool, *INTEGERS, *REALS], torch.mul),
    "MIN": ([torch.bool, *INTEGERS, *REALS], torch.minimum),
    "MAX": ([torch.bool, *INTEGERS, *REALS], torch.maximum),
    "BAND": (INTEGERS, torch.bitwise_and),
    "BOR": (INTEGERS, torch.bitwise_or),
    "BXOR": (INTEGERS, torch.bitwise_xor),
}
CASES = [(name,) for name in REDUCTIONS]


def combine(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The reduction of one tensor from each rank, in double precision."""
    dtype = parts[0].dtype
    if dtype.is_floating_point:
        parts = [part.double() for part in parts]
    total = reduce(REDUCTIONS[name][1], parts)
    return (total / len(parts) if name == "AVG" else total).to(dtype)


def all_reduce_alone(name: str) -> Results:
    return {text(dtype): combine(name, of_all(3, 5, dtype=dtype)) for dtype in REDUCTIONS[name][0]}


@program(all_reduce_alone, cases=CASES)
def all_reduce(name: str) -> Results:
    results = {text(dtype): mine(3, 5, dtype=dtype) for dtype in REDUCTIONS[name][0]}
    for x in results.values():
        dist.all_reduce(x, getattr(ReduceOp, name))
    return results


@program(lambda: {"largest": combine("MAX", of_all(4, dtype=torch.int16))}, refused="Invalid scalar type")
def all_reduce_of_int16() -> Results:
    x = mine(4, dtype=torch.int16)
    dist.all_reduce(x, ReduceOp.MAX)
    return {"largest": x}


def sum_of_bool_alone() -> Results:
    return {"or": combine("MAX", of_all(6, dtype=torch.bool))}


@program(sum_of_bool_alone)
def sum_of_bool() -> Results:
    x = mine(6, dtype=torch.bool)
    dist.all_reduce(x)
    return {"or": x}


def premul_sum_alone() -> Results:
    both = torch.stack(of_all(7)).double()
    return {"all_reduce": (both * 0.25).sum(0).float(), "reduce_scatter": (both[:, 3:4] * 3.0).sum(0).float()}


@program(premul_sum_alone, refused="PREMUL_SUM")
def premul_sum() -> Results:
    x = mine(7)
    parts, part = mine(7)[3:4].repeat(dist.get_world_size()), torch.empty(1)
    dist.all_reduce(x, dist._make_nccl_premul_sum(0.25))
    dist.reduce_scatter_tensor(part, parts, dist._make_nccl_premul_sum(torch.tensor(3.0)))
    return {"all_reduce": x, "reduce_scatter": part}


def reduce_to_root_alone(name: str) -> Results:
    totals = {text(dtype): combine(name, of_all(6, dtype=dtype)) for dtype in REDUCTIONS[name][0]}
    return totals if dist.get_rank() == last() else {}


@program(reduce_to_root_alone, cases=CASES)
def reduce_to_root(name: str) -> Results:
    results = {text(dtype): mine(6, dtype=dtype) for dtype in REDUCTIONS[name][0]}
    for x in results.values():
        dist.reduce(x, last(), getattr(ReduceOp, name))
    return results if dist.get_rank() == last() else {}


def reduce_scatter_alone(name: str) -> Results:
    results = {}
    for dtype in REDUCTIONS[name][0]:
        parts = combine(name, of_all(3 * dist.get_world_size(), 2, dtype=dtype)).split(3)
        results[f"list {text(dtype)}"] = results[f"tensor {text(dtype)}"] = parts[dist.get_rank()]
    return results


@program(reduce_scatter_alone, cases=CASES)
def reduce_scatter(name: str) -> Results:
    op, results = getattr(ReduceOp, name), {}
    for dtype in REDUCTIONS[name][0]:
        x = mine(3 * dist.get_world_size(), 2, dtype=dtype)
        dist.reduce_scatter_tensor(result := torch.empty(3, 2, dtype=dtype), x, op)
        results[f"tensor {text(dtype)}"] = result
        dist.reduce_scatter(result := torch.empty(3, 2, dtype=dtype), list(x.split(3)), op)
        results[f"list {text(dtype)}"] = result
    return results


def reduce_scatter_in_place_alone() -> Results:
    rank = dist.get_rank()
    return {"part": combine("SUM", of_all(2 * dist.get_world_size()))[2 * rank : 2 * rank + 2]}


@program(reduce_scatter_in_place_alone)
def reduce_scatter_in_place() -> Results:
    x, rank = mine(2 * dist.get_world_size()), dist.get_rank()
    part = x[2 * rank : 2 * rank + 2]
    dist.reduce_scatter_tensor(part, x)
    return {"part": part}


def uneven_reduce_scatter_alone() -> Results:
    rank = dist.get_rank()
    return {"part": combine("SUM", of_all(sum(range(dist.get_world_size() + 1)))).split(widths())[rank]}


def widths() -> list[int]:
    return [rank + 1 for rank in range(dist.get_world_size())]


@program(uneven_reduce_scatter_alone)
def uneven_reduce_scatter() -> Results:
    part = torch.empty(dist.get_rank() + 1)
    dist.reduce_scatter(part, list(mine(sum(widths())).split(widths())))
    return {"part": part}


def shapes_alone() -> Results:
    return {
        "scalar": combine("SUM", of_all()),
        "empty": torch.empty(0, 3),
        "long": combine("SUM", of_all(70_001)),
    }


@program(shapes_alone)
def shapes() -> Results:
    """Without dims, without elements, and longer than one message's buffer."""
    scalar, empty, long = mine(), torch.empty(0, 3), mine(70_001)
    for x in (scalar, empty, long):
        dist.all_reduce(x)
    dist.broadcast(empty, 0)
    return {"scalar": scalar, "empty": empty, "long": long}


@program(lambda: {"transposed": combine("SUM", of_all(3, 4)), "column": sample(4, 3)[:, 1]})
def layouts() -> Results:
    """A transposed tensor, and a part of one that must come to no harm beside it."""
    transposed = mine(3, 4).t().contiguous().t()
    dist.all_reduce(transposed)
    column = mine(4, 3).t().contiguous()[1]
    dist.broadcast(column, 0)
    return {"transposed": transposed, "column": column}


def sparse_alone() -> Results:
    return {"sum": combine("SUM", [part.to_dense() for part in map(sparse, range(dist.get_world_size()))])}


def sparse(rank: int) -> torch.Tensor:
    """A row of each rank's own and one that all have."""
    return torch.sparse_coo_tensor(torch.tensor([[rank, 7]]), sample(2, 3, seed=rank), (8, 3))


@program(sparse_alone)
def sparse_all_reduce() -> Results:
    """As DDP does it with the gradients of a sparse embedding."""
    x = sparse(dist.get_rank())
    dist.all_reduce(x)
    return {"sum": x.to_dense()}


@program(lambda: {"broadcast": sample(4), "sum": combine("SUM", of_all(4)), "leaves": True})
def parameters() -> Results:
    """Tensors that require gradients are data like any other here, and are changed in place."""
    first, second = torch.nn.Parameter(mine(4)), torch.nn.Parameter(mine(4))
    dist.broadcast(first, 0)
    dist.all_reduce(second)
    return {"broadcast": first.detach(), "sum": second.detach(), "leaves": first.is_leaf and second.is_leaf}


@program(lambda: {"sum": combine("SUM", of_all(4)), "rows": torch.cat(of_all(4))})
def inference_mode() -> Results:
    """Metrics are reduced so."""
    with torch.inference_mode():
        x = mine(4)
        dist.all_reduce(x)
        parts = [torch.empty(4) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine(4))
        return {"sum": x.clone(), "rows": torch.cat(parts)}


@program(lambda: {"sum": combine("SUM", of_all(2_000_003))[::1000].clone()})
def large() -> Results:
    """Eight megabytes."""
    x = mine(2_000_003)
    dist.all_reduce(x)
    return {"sum": x[::1000].clone()}
