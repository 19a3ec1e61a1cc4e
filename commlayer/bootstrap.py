"""How the first communicator comes about: which backend, over which ranks, with what it can do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from commlayer import probe, rendezvous
from commlayer.backends import process_groups, shared, torch_native
from commlayer.backends.base import Communicator
from commlayer.backends.single import Single
from commlayer.capability import EVERYTHING, CapabilitySet, Profile, load_profile, parse_disabled, profile_for
from commlayer.control import Client
from commlayer.control.store import HubStore
from commlayer.errors import BackendUnavailable, LaunchError
from commlayer.launch import Launch, bind_device, discover, mpi_importable
from commlayer.settings import Settings

# Backends whose shipped profile the test suite proves; a replayed profile narrows it. For the others a replayed
# profile is all there is, and without one they are probed.
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


def placed(rank: int, size: int) -> Launch:
    """The launch of a process whose rank and size the program has said itself, to ``init_process_group``."""
    try:
        found = discover()
    except LaunchError:  # incomplete, or more than one: nothing that the program does not know better
        return Launch("init_process_group", rank, size)
    if found.launcher != "none" and (found.rank, found.size) == (rank, size):
        return found
    return Launch("init_process_group", rank, size)


def connect(
    backend: str, launch: Launch, timeout: float, generation: int, store: Any = None
) -> tuple[Communicator, Client | None]:
    """The communicator of all ranks, and the control channel. Raises BackendUnavailable, LaunchError, with the remedy.

    ``generation`` counts the calls of init in this process: the channel outlives what was said in an earlier one.
    ``store``: of a program that has brought its ranks together itself.
    """
    if backend == "single":
        if launch.size not in (None, 1):
            raise LaunchError(f"backend single is for one process, but {launch.launcher} started {launch.size}")
        return Single(_own_device(), timeout), None
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
        return comm, rendezvous.join(launch, comm.rank, comm.size, timeout, by_mpi=True) if comm.size > 1 else None
    rank, size = launch.rank, launch.size
    if size is None:
        from commlayer.backends import mpi_job

        rank, size = mpi_job.place()
    device = _device(backend, launch)
    if size == 1:
        # Nothing to communicate: and NCCL, for one, does AVG and premul_sum wrongly on a group of one.
        process_groups.constructor(backend)
        return Single(device, timeout, backend), None
    process_groups.constructor(backend)  # a backend that is not here is an error before anybody is waited for
    client = rendezvous.join(launch, rank, size, timeout, by_mpi=False, store=store)
    said = f"init {generation} on {backend}".encode()
    client.meet(f"{generation}/init", range(size), said, timeout)  # names who is missing, as the store does not
    if backend == "gloo":
        store = HubStore(client, timeout, f"{generation}/store/", range(size))
    else:
        native = rendezvous.native_store(client, launch, size, timeout)
        store = dist.PrefixStore(f"commlayer/{generation}", native)
    return torch_native.create(backend, store, rank, size, device, timeout, client.address), client


def wrap(timeout: float | None, generation: int) -> tuple[Communicator, Client | None, Launch]:
    """The same over the default group of a program that has initialised torch.distributed itself."""
    store = torch_native.host_store()
    comm = torch_native.wrap(dist.group.WORLD, dist.PrefixStore(f"commlayer/{generation}", store), timeout)
    launch = Launch("host program", comm.rank, comm.size)
    if comm.size == 1:
        return comm, None, launch
    client = rendezvous.join(launch, comm.rank, comm.size, comm.timeout, by_mpi=False, store=store)
    comm.address = client.address
    return comm, client, launch


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
    if launch.launcher == "init_process_group":
        return torch.device(kind, module.current_device())  # which the program has chosen
    index = bind_device(launch, kind, module.device_count())
    assert index is not None
    module.set_device(index)
    return torch.device(kind, index)


def check(settings: Settings) -> None:
    """Raise ValueError for a profile or a disabled set that cannot be read, before any rank waits for this one."""
    if settings.profile is not None:
        load_profile(settings.profile)
    parse_disabled(settings.disable)


def capabilities(comm: Communicator, settings: Settings) -> CapabilitySet:
    """What the communicator does natively: its profile, narrowed by the settings, agreed by all ranks."""

    def mine() -> bytes:
        profiles: list[Profile] = []
        trusted = comm.name in TRUSTED
        if comm.size == 1 or comm.name in ("single", "threads"):
            profiles.append(EVERYTHING)
        elif trusted or settings.profile is None:
            profiles.append(probe.obtain(comm, settings.probe, trusted, lambda: _shipped(comm)))
        if settings.profile is not None:
            profiles.append(load_profile(settings.profile))
        return CapabilitySet(tuple(profiles), parse_disabled(settings.disable)).to_bytes()

    return CapabilitySet(()).agreed(dict.fromkeys(probe.agree(comm, mine)))


def hosts(comm: Communicator, settings: Settings) -> shared.Hosts | None:
    """Which ranks can share memory; None where none can or shall: a replayed profile takes its machine's paths."""
    if comm.size == 1 or comm.name not in shared.SHARING:
        return None
    return shared.survey(comm, wanted=settings.shm and settings.profile is None)


def _shipped(comm: Communicator) -> Profile:
    version = {"nccl": comm.version, "mpi": lambda: "4"}.get(comm.name, lambda: torch.__version__)()
    # The old binding drives the same library as torch 2.7's built-in backend does.
    name, version = ("xccl", "2.7") if comm.name == "ccl" else (comm.name, version)
    found = profile_for(name, version)
    if found is None:
        raise BackendUnavailable(
            f"backend {comm.name}: no capability profile is shipped for it; name one with COMMLAYER_PROFILE=FILE "
            f"(see commlayer/profiles/README.md), or make one with: commlayer probe --backend {comm.name}"
        )
    return found
