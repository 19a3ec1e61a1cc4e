"""How the first communicator comes about: which backend, and how its ranks find each other."""

from __future__ import annotations

import importlib.util
import os
import socket
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from commlayer.backends import process_groups, torch_native
from commlayer.backends.base import Communicator
from commlayer.backends.single import Single
from commlayer.capability import EVERYTHING, CapabilitySet, Profile, load_profile, parse_disabled, profile_for
from commlayer.errors import BackendUnavailable, CommTimeout, LaunchError
from commlayer.launch import Launch, bind_device
from commlayer.settings import Settings

# Backends whose shipped profile the test suite proves; a replayed profile narrows it. For the others the
# replayed profile is all there is.
TRUSTED = frozenset({"gloo", "mpi", "nccl"})


_NEEDS = {
    "nccl": "a CUDA build of torch and a visible NVIDIA GPU",
    "xccl": "an XPU build of torch >= 2.7 and a visible Intel GPU",
    "ccl": "an Intel GPU and the binding that pip install 'commlayer[intel]' brings",
}


def choose(launch: Launch) -> str:
    """What ``auto`` means: the accelerator's own library, else MPI where it started us, else gloo."""
    if launch.launcher == "none":
        return "single"
    if dist.is_nccl_available() and torch.cuda.is_available():
        return "nccl"
    if dist.is_xccl_available() and torch.xpu.is_available():
        return "xccl"
    return "mpi" if launch.mpi and mpi_importable() else "gloo"


def mpi_importable() -> bool:
    return importlib.util.find_spec("mpi4py") is not None


def connect(backend: str, launch: Launch, timeout: float, generation: int) -> Communicator:
    """The communicator of all ranks. Raises BackendUnavailable or LaunchError, with the remedy.

    ``generation`` counts the calls of init in this process: the store may outlive what was said in an earlier one.
    """
    if backend == "single":
        if launch.size not in (None, 1):
            raise LaunchError(f"backend single is for one process, but {launch.launcher} started {launch.size}")
        return Single(_own_device(), timeout)
    if backend == "threads":
        raise BackendUnavailable("backend threads: its ranks are threads; start them with commlayer.run_local(fn)")
    if backend == "mpi":
        from commlayer.backends import mpi

        comm = mpi.world(timeout)
        if launch.size not in (None, comm.size) or (launch.launcher != "none" and launch.rank != comm.rank):
            raise LaunchError(
                f"MPI says rank {comm.rank} of {comm.size}, but {launch.launcher} says {launch.rank} of {launch.size}: "
                "mpi4py is built for another MPI than the launcher's"
            )
        return comm
    rank, size = launch.rank, launch.size
    if size is None:
        from commlayer.backends import mpi

        rank, size = mpi.place()
    device = _device(backend, launch)
    if size == 1:
        # Nothing to communicate: and NCCL, for one, does AVG and premul_sum wrongly on a group of one.
        process_groups.constructor(backend)
        return Single(device, timeout, backend)
    store = dist.PrefixStore(f"commlayer/{generation}", _store(launch, rank, size, timeout))
    return torch_native.create(backend, store, rank, size, device, timeout)


def _own_device() -> torch.device:
    """Where one process alone keeps its tensors: on the accelerator in use, if there is one."""
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        if module.is_available():
            return torch.device(kind, module.current_device())
    return torch.device("cpu")


def _device(backend: str, launch: Launch) -> torch.device:
    kind = process_groups.DEVICE_OF.get(backend, "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    module = getattr(torch, kind)
    if not module.is_available():
        raise BackendUnavailable(f"backend {backend}: no {kind} device is usable; it needs {_NEEDS[backend]}")
    index = bind_device(launch, kind, module.device_count())
    assert index is not None
    module.set_device(index)
    return torch.device(kind, index)


def _store(launch: Launch, rank: int, size: int, timeout: float) -> Any:
    """The key-value store through which ranks exchange addresses, and its control channel later."""
    limit = timedelta(seconds=timeout)
    if size == 1:
        return dist.HashStore()
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun keeps the store itself
            return next(iter(dist.rendezvous("env://", rank, size, timeout=limit)))[0]
        if launch.master_addr and launch.master_port:
            address, port = launch.master_addr, launch.master_port
            return _tcp_store(address, port, size, rank == 0, limit)
        if launch.mpi and mpi_importable():
            return _store_by_mpi(launch, rank, size, limit)
    except (RuntimeError, OSError) as error:
        raise CommTimeout(
            f"rank {rank} of {size} could not reach the store at {launch.master_addr}:{launch.master_port}: {error}"
        ) from error
    remedy = "set MASTER_ADDR and MASTER_PORT on every rank"
    if launch.mpi:
        remedy += ", or install mpi4py, through which rank 0 tells"
    raise LaunchError(f"{launch.launcher} does not say where rank 0 is: {remedy}")


def leave(comm: Communicator) -> None:
    """What the end of the job needs of a communicator of all ranks, before it is closed; a few seconds at most."""
    served_by_us = "TORCHELASTIC_RUN_ID" not in os.environ
    if isinstance(comm, torch_native.TorchCommunicator) and comm.owned and served_by_us:
        comm.farewell()


def start_torch_distributed(comm: Communicator, launch: Launch, timeout: float, generation: int) -> None:
    """Start torch.distributed's default group over the same ranks, for what can only live there (DeviceMesh).

    On the same backend where that is torch's, else on gloo.
    """
    backend = comm.name if isinstance(comm, torch_native.TorchCommunicator) else "gloo"
    store = dist.PrefixStore(f"torch.distributed/{generation}", _store(launch, comm.rank, comm.size, timeout))
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=comm.rank, world_size=comm.size, timeout=limit)


@cache
def _tcp_store(address: str, port: int, size: int, serves: bool, limit: timedelta) -> Any:
    # Kept for the life of the process: others may still need what rank 0 serves when it finalizes.
    return dist.TCPStore(address, port, size, serves, limit, multi_tenant=True)


@cache
def _store_by_mpi(launch: Launch, rank: int, size: int, limit: timedelta) -> Any:
    from commlayer.backends import mpi

    store = None
    where: tuple[str, int] | None = None
    if rank == 0:
        one_node = launch.local_size == size
        address = "127.0.0.1" if one_node else launch.master_addr or _own_address()
        store = dist.TCPStore(address, 0, size, True, limit, wait_for_workers=False)
        where = (address, store.port)
    address, port = mpi.broadcast_object(where)
    return store or dist.TCPStore(address, port, size, False, limit)


def _own_address() -> str:
    """This host as others reach it: by number, or by name where the number means the host itself."""
    name = socket.gethostname()
    number = socket.gethostbyname(name)
    return name if number.startswith("127.") else number


def check(settings: Settings) -> None:
    """Raise ValueError for a profile or a disabled set that cannot be read, before any rank waits for this one."""
    if settings.profile is not None:
        load_profile(settings.profile)
    parse_disabled(settings.disable)


def capabilities(comm: Communicator, settings: Settings) -> CapabilitySet:
    """What the communicator does natively: its profile, narrowed by the settings, agreed by all ranks."""
    profiles: list[Profile] = []
    if comm.size == 1 or comm.name in ("single", "threads"):
        profiles.append(EVERYTHING)
    elif comm.name in TRUSTED or settings.profile is None:
        profiles.append(_shipped(comm))
    if settings.profile is not None:
        profiles.append(load_profile(settings.profile))
    mine = CapabilitySet(tuple(profiles), parse_disabled(settings.disable))
    return mine.agreed(dict.fromkeys(comm.share(mine.to_bytes())))


def _shipped(comm: Communicator) -> Profile:
    version = {"nccl": comm.version, "mpi": lambda: "4"}.get(comm.name, lambda: torch.__version__)()
    # The old binding drives the same library as torch 2.7's built-in backend does.
    name, version = ("xccl", "2.7") if comm.name == "ccl" else (comm.name, version)
    found = profile_for(name, version)
    if found is None:
        raise BackendUnavailable(
            f"backend {comm.name}: no capability profile is shipped for it; name one with COMMLAYER_PROFILE=FILE "
            "(see commlayer/profiles/README.md)"
        )
    return found
