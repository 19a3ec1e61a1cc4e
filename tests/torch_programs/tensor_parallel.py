"""Tensor and sequence parallelism by torch's own plans, alone and with FSDP2."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from tests.torch_programs.catalogue import Results, program
from tests.torch_programs.data import Transformer, fit, mlp, next_token, sample, tokens


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def grid() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))


def same_samples(model: nn.Module, step: int) -> torch.Tensor:
    return next_token(model, step, seed=0)


def alone() -> Results:
    return fit(Transformer(), same_samples, steps=2)


PLAIN = {"query": ColwiseParallel(), "key": ColwiseParallel(), "value": ColwiseParallel(), "proj": RowwiseParallel()}
PLAIN |= {"up": ColwiseParallel(), "down": RowwiseParallel()}


def with_sequences() -> dict[str, object]:
    """Between the blocks each rank has a part of the sequence."""
    return {
        "norm1": SequenceParallel(),
        "query": ColwiseParallel(input_layouts=Shard(1)),
        "key": ColwiseParallel(input_layouts=Shard(1)),
        "value": ColwiseParallel(input_layouts=Shard(1)),
        "proj": RowwiseParallel(output_layouts=Shard(1)),
        "norm2": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }


def cut(mesh: DeviceMesh, sequences: bool = False, keep_shards: bool = False) -> nn.Module:
    model = Transformer()
    if sequences:
        ends = {
            "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(
                input_layouts=Shard(1),
                output_layouts=Shard(-1) if keep_shards else Replicate(),
                use_local_output=not keep_shards,
            ),
        }
        parallelize_module(model, mesh, ends)
    for block in model.blocks:
        parallelize_module(block, mesh, with_sequences() if sequences else PLAIN)
    return model


def regression_of_all(model: nn.Module, step: int) -> torch.Tensor:
    x = sample(4, 12, seed=step)
    return (model(x) - x.flip(-1)).square().mean()


@program(lambda: fit(mlp(), regression_of_all))
def two_layers() -> Results:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(output_layouts=Replicate())}
    return fit(parallelize_module(mlp(), line(), plan), regression_of_all, whole=True)


@program(alone)
def transformer() -> Results:
    return fit(cut(line()), same_samples, steps=2, whole=True)


@program(alone)
def sequences() -> Results:
    return fit(cut(line(), sequences=True), same_samples, steps=2, whole=True)


@program(alone)
def loss_on_shards() -> Results:
    """Logits stay cut by the vocabulary, and the cross entropy is computed on the parts."""

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        x = tokens(100 * step)
        logits = model(x)
        assert isinstance(logits, DTensor)
        return nn.functional.cross_entropy(logits.flatten(0, 1), x.roll(-1, 1).flatten())

    with loss_parallel():
        return fit(cut(line(), sequences=True, keep_shards=True), loss_of, steps=2, whole=True)


def seen_by_dp(model: nn.Module, step: int) -> torch.Tensor:
    """Ranks of one row of the grid see the same samples."""
    return next_token(model, step, seed=dist.get_rank() // 2)


@program()
def with_fsdp() -> Results:
    return cut_twice(torch.float32)


@program(sums_in=torch.bfloat16)
def with_fsdp_in_bf16() -> Results:
    return cut_twice(torch.bfloat16)


def cut_twice(dtype: torch.dtype) -> Results:
    """Tensor parallelism inside the rows of a grid, FSDP2 down its columns, gradients clipped over both."""
    mesh = grid()
    model = cut(mesh["tp"], sequences=True)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
    fully_shard(model, mesh=mesh["dp"], mp_policy=policy)
    norms: list[torch.Tensor] = []

    def clip(model: nn.Module) -> None:
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).full_tensor())

    return fit(model, seen_by_dp, steps=2, before_step=clip) | {"norm": norms[-1]}
