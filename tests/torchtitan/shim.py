"""What torchtitan 0.3.0 takes for granted and torch 2.13 on CPUs has not.

All substitutes are here. One of them computes, attention; sharding, dispatch and communication are torchtitan's own.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention.flex_attention import create_block_mask, create_mask


def install(backend: str) -> None:
    """Before all other imports of torchtitan: CPU ranks, over this backend of torch.distributed."""
    # torchtitan takes the backend that torch names for the device: this is the one word.
    dist.Backend.default_device_backend_map["cpu"] = backend
    # Its launcher is torchrun, which numbers devices; mpiexec does not, and CPUs need no number.
    os.environ.setdefault("LOCAL_RANK", "0")
    # It calls this by a public name; torch 2.13 has the private one only.
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = dist.distributed_c10d._set_pg_timeout
    # torch for CPUs comes without Triton. These kernels are imported always, but used by another dispatcher only.
    kernels = "torchtitan.distributed.minimal_async_ep.kernels"
    sys.modules[kernels] = _NoKernels(kernels)

    from torchtitan.tools import utils

    # It looks for an accelerator, and takes CUDA if there is none.
    utils.device_type, utils.device_module = "cpu", _cpu()

    from torchtitan.models.common import attention

    # Flex attention has no backward on CPUs, and compiling its mask takes ten seconds.
    attention.FlexAttention._compiled_flex_attn = _attention
    attention._compiled_create_block_mask = create_block_mask


class _NoKernels(ModuleType):
    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _cpu() -> SimpleNamespace:
    """torch.cpu, with what the memory monitor asks of an accelerator."""
    return SimpleNamespace(
        **vars(torch.cpu)
        | {
            "current_device": lambda: 0,
            "get_device_name": lambda device: "cpu",
            "get_device_properties": lambda device: SimpleNamespace(total_memory=1),
            "memory_stats": lambda device: {},
            "reset_peak_memory_stats": lambda: None,
            "empty_cache": lambda: None,
        }
    )


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **flex: Any) -> tuple[torch.Tensor, None]:
    """The same attention, by a dense mask."""
    mask = create_mask(flex["block_mask"].mask_mod, q.shape[0], None, q.shape[2], k.shape[2], device=q.device)
    assert flex["score_mod"] is None
    assert not flex["enable_gqa"]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=flex["scale"]), None
