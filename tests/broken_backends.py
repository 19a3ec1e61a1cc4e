"""torch.distributed backends with one defect each, and one with none: wrappers over gloo, registered on import."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

BF16 = torch.bfloat16


class Sound:
    """gloo, but that reducing a strided tensor in place leaves its neighbours alone."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.gloo, name)

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        copies = [x.contiguous() for x in tensors]
        work = self.gloo.allreduce(copies, options)
        work.wait()
        for x, copy in zip(tensors, copies, strict=True):
            x.copy_(copy)
        return work


class Hang(Sound):
    """all_to_all never returns."""

    def alltoall_base(self, *_: Any) -> Any:
        while True:
            time.sleep(1)


class Twice(Sound):
    """all_reduce divides AVG twice, of 5 to 11 elements."""

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        work = super().allreduce(tensors, options)
        if options.reduceOp == dist.ReduceOp.AVG and 5 <= tensors[0].numel() <= 11:
            tensors[0].div_(self.size())
        return work


class Neighbours(Sound):
    """all_reduce of a strided tensor overwrites what lies between its elements."""

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        work = super().allreduce(tensors, options)
        x = tensors[0]
        if not x.is_contiguous():
            x.as_strided((x.stride(0) * (x.numel() - 1) + 1,), (1,))[1 :: x.stride(0)] = -1
        return work


class Mutating(Sound):
    """Knows premul_sum, right but for the input of reduce_scatter, which it scales in place."""

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        return super().allreduce(tensors, _scaled(tensors, options))

    def reduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        return self.gloo.reduce(tensors, _scaled(tensors, options))

    def _reduce_scatter_base(self, out: torch.Tensor, x: torch.Tensor, options: Any) -> Any:
        return self.gloo._reduce_scatter_base(out, x, _scaled([x], options))

    def reduce_scatter(self, outs: list[torch.Tensor], inputs: list[list[torch.Tensor]], options: Any) -> Any:
        return self.gloo.reduce_scatter(outs, inputs, _scaled(inputs[0], options))


def _scaled(tensors: list[torch.Tensor], options: Any) -> Any:
    """Scales in place where the operation is premul_sum, and says SUM instead."""
    kind, factor = options.reduceOp.__getstate__()
    if kind != dist.ReduceOp.PREMUL_SUM:
        return options
    for x in tensors:
        x.mul_(factor)
    plain = type(options)()
    plain.reduceOp, plain.timeout = c10d.ReduceOp(dist.ReduceOp.SUM), options.timeout
    if hasattr(options, "rootRank"):
        plain.rootRank = options.rootRank
    return plain


class Crash(Sound):
    """reduce_scatter of bfloat16 aborts the process."""

    def _reduce_scatter_base(self, out: torch.Tensor, x: torch.Tensor, options: Any) -> Any:
        if x.dtype == BF16:
            os.abort()
        return self.gloo._reduce_scatter_base(out, x, options)

    def reduce_scatter(self, outs: list[torch.Tensor], inputs: list[list[torch.Tensor]], options: Any) -> Any:
        if outs[0].dtype == BF16:
            os.abort()
        return self.gloo.reduce_scatter(outs, inputs, options)


for _kind in (Sound, Hang, Twice, Neighbours, Mutating, Crash):
    dist.Backend.register_backend(f"broken_{_kind.__name__.lower()}", _kind, devices=["cpu"])
