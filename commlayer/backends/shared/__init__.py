"""Shared memory between the ranks of one host: a channel beside the backend's own, for tensors on the CPU."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from commlayer.backends.base import Communicator
from commlayer.backends.shared import host, kernel, memory
from commlayer.backends.shared.channel import Shared
from commlayer.backends.shared.meeting import Meeting
from commlayer.backends.shared.ranks import Ranks
from commlayer.backends.shared.rounds import HALF, HALF_CROWDED, Rounds, space
from commlayer.backends.shared.symmetric import Symmetric

SHARING = frozenset({"gloo", "mpi"})  # backends whose tensors are on the CPU, and whose ranks are processes


@dataclass(frozen=True)
class Hosts:
    """What the ranks of the world have told each other of where they run; the same on all of them."""

    places: tuple[int, ...]  # for each rank the number of its host
    crowded: bool  # whether a host has more ranks than cores
    compiled: bool  # whether all of them have the kernel

    def of(self, ranks: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.places[rank] for rank in ranks)


def able() -> str:
    """Whether ranks on this host can share memory, and how they would: for people."""
    if not host.identity():
        return "no: it needs Linux, and /proc"
    if kernel.load() is not None:
        return "yes, with the compiled kernel"
    if host.keeps_order():
        return "yes, with torch's operations: no C compiler (cc, or what CC names)"
    return "no: on this processor it needs a C compiler (cc, or what CC names)"


def survey(comm: Communicator, wanted: bool) -> Hosts | None:
    """Find out which ranks share hosts; called by all ranks of the world.

    None where no two can share memory, or a rank does not want to.
    """
    mine = json.dumps([host.identity() if wanted else "", host.keeps_order(), host.cores()])
    answers = [json.loads(answer) for answer in comm.share(mine.encode())]
    places = host.places([identity for identity, _, _ in answers])
    if len({*places}) == comm.size or not all(identity for identity, _, _ in answers):
        return None
    cores: dict[int, set[int]] = {}
    for place, (_, _, own) in zip(places, answers, strict=True):
        cores.setdefault(place, set()).update(own)
    crowded = any(places.count(place) > len(found) for place, found in cores.items())
    first = places.index(places[comm.rank]) == comm.rank
    if first:  # of its host: it compiles the kernel, if nobody has, and the others find it
        kernel.load()
    assert comm.seat is not None
    comm.seat.share(b"", comm.timeout + kernel.COMPILING)
    compiled = all(answer == b"1" for answer in comm.share(b"1" if kernel.load() is not None else b"0"))
    if not compiled and not all(ordered for _, ordered, _ in answers):
        return None
    return Hosts(places, crowded, compiled)


def connect(comm: Ranks, hosts: Hosts) -> Shared | None:
    """The channel of ranks that are all on one host; called by all of them.

    None, and a warning, where they cannot map common memory.
    """
    half = HALF_CROWDED if hosts.crowded else HALF
    made = memory.common(comm, space(comm.size, half))
    if isinstance(made, str):
        if comm.rank == 0:
            warnings.warn(f"commlayer goes on without shared memory ({made})", RuntimeWarning, stacklevel=2)
        return None
    library = kernel.load() if hosts.compiled else None
    meeting = Meeting(library, made.address, comm, hosts.crowded)
    symmetric = Symmetric(comm.rank, comm.size)
    copy_past = None if library is None else library.copy_past
    return Shared(comm, Rounds(made, half, meeting, symmetric, copy_past), symmetric, library)
