"""Operators of compiled graphs that go past the methods of a Python process group in torch's C++, led back to them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

# torch._inductor reuses buffers by the first one, and traces batch_isend_irecv as the second (torch >= 2.13).
_OPERATORS = ("all_gather_into_tensor_out", "batch_p2p_ops")


@cache
def install() -> None:
    """For every process group of this process: what is called is the group's own method."""
    library = torch.library.Library("_c10d_functional", "IMPL")
    for name in _OPERATORS:
        if hasattr(torch.ops._c10d_functional, name):
            for key in ("CPU", "CUDA", "XPU"):
                library.impl(name, globals()[name], key)
    _libraries.append(library)  # what it holds is undone when it dies


_libraries: list[Any] = []


def all_gather_into_tensor_out(x: torch.Tensor, size: int, group_name: str, *, out: torch.Tensor) -> torch.Tensor:
    work = _group(group_name)._allgather_base(out, x)
    torch._C._distributed_c10d._register_work(out, work)  # wait_tensor waits for it
    return out


def batch_p2p_ops(
    ops: list[str], peers: list[int], tags: list[int], tensors: list[torch.Tensor], group_name: str
) -> list[torch.Tensor]:
    group = _group(group_name)
    outputs = []
    for op, peer, tag, x in zip(ops, peers, tags, tensors, strict=True):
        output = x if op == "irecv" else x.new_empty(0)
        work = group.recv([x], peer, tag) if op == "irecv" else group.send([x], peer, tag)
        torch._C._distributed_c10d._register_work(output, work)
        outputs.append(output)
    return outputs


def _group(name: str) -> dist.ProcessGroup:
    return c10d._resolve_process_group(name)  # type: ignore[arg-type]
