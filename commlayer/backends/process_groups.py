"""The process groups that this torch can make, by name; those that it cannot, with the remedy."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from commlayer.errors import BackendUnavailable

DEVICE_OF = {"gloo": "cpu", "mpi": "cpu", "nccl": "cuda", "xccl": "xpu", "ccl": "xpu"}

# (store, rank, size, timeout) -> a torch.distributed backend of its own, registered nowhere, so that it meets
# no other program's groups.
Constructor = Callable[[Any, int, int, timedelta], Any]


def constructor(name: str, address: str | None = None) -> Constructor:
    """How to make a process group of this kind; BackendUnavailable where this torch cannot.

    ``address`` is this host's, as the other ranks know it.
    """
    if name == "gloo":
        if not dist.is_gloo_available():
            raise BackendUnavailable("backend gloo: this build of torch has none; use mpi")
        return lambda *place: _gloo(address, *place)
    if name == "nccl":
        if not (dist.is_nccl_available() and torch.cuda.is_available()):
            raise BackendUnavailable("backend nccl: needs a CUDA build of torch and a visible NVIDIA GPU")
        return lambda *place: _with_options(dist.ProcessGroupNCCL, *place)
    if name == "xccl":
        if not (dist.is_xccl_available() and torch.xpu.is_available()):
            raise BackendUnavailable("backend xccl: needs an XPU build of torch >= 2.7 and a visible Intel GPU")
        return lambda *place: _with_options(dist.ProcessGroupXCCL, *place)
    return _plugin(name)


def _gloo(address: str | None, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    # gloo itself looks the hostname up, and takes the loopback where that fails: ranks of other hosts wait in vain.
    if address is None or "GLOO_SOCKET_IFNAME" in os.environ:
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    options._timeout = timeout
    options._devices = [kind.create_device(hostname=address)]
    return kind(store, rank, size, options)


def _with_options(kind: Any, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = kind.Options()
    options._timeout = timeout
    return kind(store, rank, size, options)


def _plugin(name: str) -> Constructor:
    """The constructor of a backend that registered itself with torch.distributed."""
    if name == "ccl":
        try:
            importlib.import_module("oneccl_bindings_for_pytorch")
        except ImportError as error:
            raise BackendUnavailable(
                f"backend ccl: {error}; pip install 'commlayer[intel]' (torch >= 2.7 has xccl built in instead)"
            ) from error
    plugin = dist.Backend._plugins.get(name.upper())
    if plugin is None or name == "commlayer":  # which is the layer itself
        known = ", ".join(sorted({*DEVICE_OF, *(key.lower() for key in dist.Backend._plugins)} - {"commlayer"}))
        raise BackendUnavailable(f"backend {name!r}: torch.distributed knows none of that name (known: {known})")
    if not plugin.extended_api:
        return plugin.creator_fn

    def extended(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        options = c10d._DistributedBackendOptions()
        options.store, options.group_rank, options.group_size, options.timeout = store, rank, size, timeout
        options.group_id, options.global_ranks_in_group = "commlayer", list(range(size))
        return plugin.creator_fn(options, None)

    return extended
