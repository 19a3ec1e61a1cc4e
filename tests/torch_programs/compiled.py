"""torch.compile around collectives, DDP and FSDP2; the eager program says what must come out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import Transformer, fit, mine, mlp, next_token, sample

COMPILERS = [("eager",), ("aot_eager",), ("inductor",)]  # the last one runs a C++ compiler


def compiled(function: Callable, compiler: str, **options: object) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, backend=compiler, **options)


def movements(x: torch.Tensor) -> torch.Tensor:
    size, group = dist.get_world_size(), dist.group.WORLD
    rows = funcol.all_gather_tensor_autograd(x.sin(), 0, group)
    parts = funcol.reduce_scatter_tensor_autograd(rows * 2, "sum", 0, group)
    swapped = funcol.all_to_all_single_autograd(parts.cos(), None, None, group)
    return swapped * size + funcol.all_reduce(x.detach(), "sum", group)


@program(cases=COMPILERS)
def functional_collectives(compiler: str) -> Results:
    function = compiled(movements, compiler, fullgraph=True)
    x = mine(dist.get_world_size(), 3).requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return {"result": y.detach().clone(), "gradient": x.grad}


def in_place(x: torch.Tensor) -> torch.Tensor:
    """torch.distributed's own functions, which dynamo replaces by functional ones."""
    y = x * 2
    dist.all_reduce(y)
    rows = torch.empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(rows, y + 1)
    part = torch.empty_like(x)
    dist.reduce_scatter_tensor(part, rows)
    return part + y


@program(cases=[("aot_eager",)])
def in_place_collectives(compiler: str) -> Results:
    return {"result": compiled(in_place, compiler)(mine(2, 3))}


@program(cases=[("aot_eager",)])
def data_parallel(compiler: str) -> Results:
    """The graph is cut at the buckets, which no first one of a MiB may exceed."""
    return fit(compiled(DDP(mlp(hidden=520), bucket_cap_mb=1), compiler), steps=2)


@program(cases=[("aot_eager",)])
def fully_sharded(compiler: str) -> Results:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Transformer()
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=compiler)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return fit(model, next_token, steps=2)


@program(cases=[("aot_eager",)])
def tensor_parallel(compiler: str) -> Results:
    """Products of DTensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    a = distribute_tensor(sample(4, 8), mesh, [Shard(1)])
    b = distribute_tensor(sample(8, 3, seed=1), mesh, [Shard(0)]).requires_grad_()
    y = compiled(lambda a, b: (a @ b).relu().sum(), compiler)(a, b)
    y.full_tensor().backward()
    return {"result": y.full_tensor().detach(), "gradient": b.grad.full_tensor()}
