"""Functional collectives, those with gradients among them, and torch.distributed.nn's."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import mine, of_all, sample

with warnings.catch_warnings():  # it is deprecated, and used
    warnings.simplefilter("ignore")
    import torch.distributed.nn.functional as nn_functional


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def collectives_alone() -> Results:
    rank, size = dist.get_rank(), dist.get_world_size()
    parts, total = of_all(2 * size, 3), torch.stack(of_all(2 * size, 3)).double().sum(0).float()
    return {
        "sum": total,
        "avg": total / size,
        "largest": torch.stack(parts).amax(0),
        "rows": torch.cat(parts),
        "columns": torch.cat(parts, 1),
        "part": total.split(2)[rank],
        "columns of transposed": total.t().chunk(size, 1)[rank].contiguous(),
        "exchanged": torch.cat([part.split(2)[rank] for part in parts]),
        "permuted": parts[(rank - 1) % size].flatten(),
        "root": parts[size - 1],
        "from int": torch.full((2,), size),
    }


@program(collectives_alone)
def collectives() -> Results:
    size, group = dist.get_world_size(), world()
    x, before = mine(2 * size, 3), mine(2 * size, 3)
    results = {
        "sum": funcol.all_reduce(x, "sum", group),
        "avg": funcol.all_reduce(x, "avg", group),
        "largest": funcol.all_reduce(x, "max", group),
        "rows": funcol.all_gather_tensor(x, 0, group),
        "columns": funcol.all_gather_tensor(x, 1, group),
        "part": funcol.reduce_scatter_tensor(x, "sum", 0, group),
        "columns of transposed": funcol.reduce_scatter_tensor(x.t(), "sum", 1, group),
        "exchanged": funcol.all_to_all_single(x, None, None, group),
        "permuted": funcol.permute_tensor(x.flatten(), [(rank + 1) % size for rank in range(size)], group),
        "root": funcol.broadcast(x, size - 1, group),
        "from int": funcol.all_reduce(torch.ones(2, dtype=torch.int64), "sum", group),
    }
    results = {name: funcol.wait_tensor(result).clone() for name, result in results.items()}
    assert torch.equal(x, before), "a functional collective changed its input"
    return results


@program(lambda: {"a": torch.cat(of_all(2)), "b": torch.cat(of_all(3, 2)),
                  "c": torch.stack(of_all(4)).double().sum(0).float()})  # fmt: skip
def coalesced() -> Results:
    a, b = funcol.all_gather_into_tensor_coalesced([mine(2), mine(3, 2)], world())
    (c,) = funcol.all_reduce_coalesced([mine(4)], "sum", world())
    size = dist.get_world_size()
    (d,) = funcol.reduce_scatter_tensor_coalesced([mine(size)], "sum", [0], world())
    assert torch.allclose(d, torch.stack(of_all(size)).sum(0)[dist.get_rank()])
    return {"a": a.clone(), "b": b.clone(), "c": c.clone()}


@program(lambda: {"rows": torch.cat(of_all(2)), "sum": torch.stack(of_all(2)).double().sum(0).float()})
def in_place() -> Results:
    """What torch.distributed's in-place functions become when they are traced; out= of all_gather."""
    rows, x = torch.empty(2 * dist.get_world_size()), mine(2)
    torch.ops._c10d_functional.all_gather_into_tensor_out(x, dist.get_world_size(), world().group_name, out=rows)
    torch.ops._c10d_functional.wait_tensor(rows)
    torch.ops._c10d_functional.all_reduce_(x, "sum", world().group_name)
    torch.ops._c10d_functional.wait_tensor(x)
    return {"rows": rows, "sum": x}


def weights(*shape: int) -> torch.Tensor:
    """To make the incoming gradient of each rank's result another one."""
    return mine(*shape, seed=5)


def splits(rank: int) -> list[int]:
    """How many rows a rank sends to each."""
    return [1 + (dst + rank) % 3 for dst in range(dist.get_world_size())]


@program()
def gradients() -> Results:
    rank, size, group = dist.get_rank(), dist.get_world_size(), world()
    come, elsewhere = [splits(src)[rank] for src in range(size)], torch.tensor(rank != 1)
    functions = {
        "all_gather": (lambda x: funcol.all_gather_tensor_autograd(x, 0, group), mine(3, 2)),
        "all_gather columns": (lambda x: funcol.all_gather_tensor_autograd(x, 1, group), mine(3, 2)),
        "reduce_scatter": (lambda x: funcol.reduce_scatter_tensor_autograd(x, "sum", 0, group), mine(2 * size, 3)),
        "all_to_all": (lambda x: funcol.all_to_all_single_autograd(x, None, None, group), mine(size, 2)),
        "all_to_all uneven": (
            lambda x: funcol.all_to_all_single_autograd(x, come, splits(rank), group),
            mine(sum(splits(rank)), 2),
        ),
        "nn.all_reduce": (lambda x: nn_functional.all_reduce(x, group=group), mine(4)),
        "nn.broadcast": (lambda x: nn_functional.broadcast(x, 1, group), mine(4)),
        "nn.all_gather": (lambda x: torch.cat(nn_functional.all_gather(x, group)), mine(4)),
        "nn.reduce": (lambda x: nn_functional.reduce(x, 1, group=group).masked_fill(elsewhere, 0.0), mine(4)),
        "nn.reduce_scatter": (
            lambda x: nn_functional.reduce_scatter(torch.empty(3), list(x.unbind()), group=group),
            mine(size, 3),
        ),
        "nn.all_to_all": (
            lambda x: torch.stack(nn_functional.all_to_all([torch.empty(2) for _ in range(size)], list(x), group)),
            mine(size, 2),
        ),
        "nn.all_to_all_single": (
            lambda x: nn_functional.all_to_all_single(torch.empty(size, 2), x, group=group),
            mine(size, 2),
        ),
    }
    results = {}
    for name, (function, x) in functions.items():
        y = function(x.requires_grad_())
        (y * weights(*y.shape)).sum().backward()
        results |= {f"{name} result": y.detach().clone(), f"{name} gradient": x.grad}
    return results


@program(lambda: {"got": sample(6, seed=(dist.get_rank() ^ 1)), "sum": torch.stack(of_all(6)).double().sum(0).float()})
def on_a_mesh() -> Results:
    """A group is also given as a mesh, or a mesh and the number of its axis."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    x = mine(6)
    got = funcol.all_gather_tensor(x, 0, (mesh, 1)).view(2, 6)[1 - mesh.get_local_rank("tp")]
    total = funcol.all_reduce(funcol.all_reduce(x, "sum", mesh["tp"]), "sum", mesh.get_group("dp"))
    return {"got": got.clone(), "sum": total.clone()}
