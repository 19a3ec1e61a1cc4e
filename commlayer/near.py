"""Finds out what a group can do through the memory of its hosts: all of it on one, the inner steps on several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from commlayer.backends.base import Communicator
from commlayer.backends.shared import Hosts, connect
from commlayer.backends.shared.hierarchy import Hierarchy, Neighbours, grid
from commlayer.capability import OVER_HOSTS, SHARED_MEMORY, CapabilitySet
from commlayer.control.seat import Seat
from commlayer.planned import Near, Planned
from commlayer.volume import Counted


def find(
    comm: Communicator,
    ranks: Sequence[int],
    hosts: Hosts,
    capabilities: CapabilitySet,
    count: Callable[[int], None] | None,
) -> Near | None:
    """The channel of a group of these ranks of the world, made by all of them; None where there is nothing to gain.

    ``count`` is told of the bytes that leave this rank.
    """
    if comm.size == 1 or comm.device.type != "cpu":
        return None
    places = hosts.of(ranks)
    channel: Any = None
    shared, profile = None, SHARED_MEMORY
    if len({*places}) == 1:
        channel = shared = connect(comm, hosts)
    elif (layout := grid(places)) is not None:
        channel, profile = _over_hosts(comm, ranks, hosts, layout, capabilities), OVER_HOSTS
    if channel is None:
        return None
    counted: Any = channel if count is None else Counted(channel, count)
    return Near(counted, CapabilitySet((profile,), capabilities.disabled), hosts.crowded, shared)


def _over_hosts(
    comm: Communicator, ranks: Sequence[int], hosts: Hosts, layout: list[list[int]], capabilities: CapabilitySet
) -> Hierarchy | None:
    own = next(host for host in layout if comm.rank in host)
    rail = [host[own.index(comm.rank)] for host in layout]
    near = Neighbours(comm, own, _seat(comm, ranks, own, "host"))
    local = connect(near, hosts)
    # Its steps may be made by a thread, which has to be able to call the backend.
    able = local is not None and comm.threads
    if not all(answer == b"1" for answer in comm.share(b"1" if able else b"0")) or local is None:
        return None
    seat = _seat(comm, ranks, rail, "rail")
    seat.meet("made", b"", comm.timeout)  # making a communicator blocks, on MPI without a deadline
    across = comm.subgroup(rail, seat)
    comm.parts = (across,)
    return Hierarchy(comm, layout, near, local, Planned(across, capabilities))


def _seat(comm: Communicator, ranks: Sequence[int], part: Sequence[int], name: str) -> Seat:
    assert comm.seat is not None
    whole = comm.seat
    return Seat(
        whole.control, whole.generation, f"{whole.label} {name} {part[0]}", [ranks[r] for r in part], comm.progress
    )
