"""Process groups for torch, over the world or some of its ranks; and back."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from commlayer import bootstrap, runtime
from commlayer.backends import process_groups, torch_native
from commlayer.errors import CommError, UnsupportedOperation
from commlayer.group import Group
from commlayer.settings import Settings
from commlayer.torch_backend import NAME, meeting
from commlayer.torch_backend.process_group import ProcessGroup

_ready = threading.local()  # .group: for which torch is about to make a process group


def create(options: Any) -> ProcessGroup:
    """The process group that ``init_process_group`` and ``new_group`` ask for; called by its members."""
    ranks = tuple(options.global_ranks_in_group)
    group: Group | None = getattr(_ready, "group", None)
    if group is not None:
        made = _process_group(group, options)
    elif ranks:
        if not runtime.is_initialized():
            raise CommError('new_group(backend="commlayer"): call commlayer.init() first, on every rank')
        timeout = Settings.from_env().timeout or options.timeout.total_seconds()
        group = runtime.world()._child(ranks, timeout)
        made = _process_group(group, options)
        made.at_shutdown(group.close)
    else:
        owned = not runtime.is_initialized()
        made = _process_group(_world(options), options)
        made.at_shutdown(runtime.with_the_world(dist.destroy_process_group, owned))
    return made


def _world(options: Any) -> Group:
    """The layer's world: the one that is there, or one over the ranks that torch has brought together."""
    rank, size = options.group_rank, options.group_size
    if not runtime.is_initialized():
        met = meeting.launch  # which may know more than the environment: PALS does not say how many ranks there are
        launch = met if met is not None and (met.rank, met.size) == (rank, size) else bootstrap.placed(rank, size)
        return runtime.start(None, options.timeout.total_seconds(), (options.store, launch))
    world = runtime.world()
    if (world.rank, world.size) != (rank, size):
        raise CommError(
            f"init_process_group: this is rank {rank} of {size}, but commlayer runs already, as rank {world.rank} "
            f"of {world.size}"
        )
    return world


def _process_group(group: Group, options: Any) -> ProcessGroup:
    return ProcessGroup(group, _beside(group, options))


def _beside(group: Group, options: Any) -> dict[str, Any]:
    """torch's own backends for tensors on devices that the group's backend does not work on, by device type."""
    if group.size == 1:
        return {}
    if group.device.type != "cpu":
        names = {"cpu": "gloo"}
    else:
        usable = {"nccl": dist.is_nccl_available, "xccl": dist.is_xccl_available}
        kinds = {kind: name for name, kind in process_groups.DEVICE_OF.items() if name in usable}
        names = {kind: name for kind, name in kinds.items() if usable[name]() and getattr(torch, kind).is_available()}
    address = getattr(group._comm, "address", None)
    return {
        kind: process_groups.constructor(name, address)(
            dist.PrefixStore(f"{kind}/", options.store), group.rank, group.size, options.timeout
        )
        for kind, name in names.items()
    }


def start_torch_distributed() -> None:
    """See to it that torch.distributed runs over the world's ranks; collective where it does not yet.

    Raises ``UnsupportedOperation`` under ``run_local``.
    """
    if dist.is_initialized():
        return
    if runtime.inside_run_local():
        raise UnsupportedOperation("torch.distributed knows processes only, and ranks under run_local are threads")
    world = runtime.world()
    store = runtime.store_for_torch()
    timeout = timedelta(seconds=world.timeout)
    dist.init_process_group(NAME, store=store, rank=world.rank, world_size=world.size, timeout=timeout)


def to_process_group(group: Group) -> dist.ProcessGroup:
    """The group as torch.distributed knows it: for FSDP, DTensor and all that takes a ``ProcessGroup``.

    Called by every member. Starts torch.distributed over the world where the program has not.
    """
    if not isinstance(group, Group):
        raise TypeError(f"group: expected a commlayer Group, got {type(group).__name__}")
    if not group.is_member:
        raise ValueError(f"group: this process is not a member of the group of ranks {list(group.ranks)}")
    start_torch_distributed()
    for made in dist.distributed_c10d._world.pg_map:
        if isinstance(made, ProcessGroup) and made.group is group:
            return made
    _ready.group = group
    try:
        # Local synchronisation: called by the members alone.
        return dist.new_group(list(group.ranks), backend=NAME, use_local_synchronization=True, sort_ranks=False)
    finally:
        del _ready.group


def from_process_group(group: dist.ProcessGroup) -> Group:
    """The layer's group on a process group of torch's, of any backend; called by every member.

    Calls ``init`` where it was not yet, which then has to be called by every rank. The process group stays its owner's.
    """
    if isinstance(group, ProcessGroup):
        return group.group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed ProcessGroup, got {type(group).__name__}")
    world = runtime.init()
    if group is dist.group.WORLD:
        return world
    store = dist.PrefixStore(f"commlayer/{group.group_name}", torch_native.host_store())
    comm = torch_native.wrap(group, store, world.timeout)
    settings = Settings.from_env()
    return world.around(dist.get_process_group_ranks(group), comm, lambda: bootstrap.capabilities(comm, settings))
