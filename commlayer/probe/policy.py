"""Which measured profile counts when a job starts; one rank of each node may have to find out."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable

from commlayer.backends.base import Communicator
from commlayer.capability import Profile
from commlayer.errors import BackendUnavailable
from commlayer.probe.cache import Identity, cached, keep
from commlayer.probe.start import SECONDS, probe
from commlayer.probe.table import incomplete, merge


def obtain(comm: Communicator, policy: str, trusted: bool, shipped: Callable[[], Profile]) -> Profile:
    """The profile of a backend on this machine. Collective where ``policy`` and ``trusted`` let it be probed.

    A probe kept from earlier counts first, then for a trusted backend, or where nothing may be probed, the shipped one.
    """
    if policy == "never" or (policy == "auto" and trusted):
        return cached(Identity.of(comm)) or shipped()
    # By host: the first rank on each asks, the others wait for its answer.
    hosts = [host.decode() for host in comm.share(socket.gethostname().encode())]
    here = hosts[comm.rank]
    probed = False

    def answer() -> bytes:
        nonlocal probed
        if comm.rank != hosts.index(here):
            return b""
        found = None if policy == "always" else cached(Identity.of(comm))
        if found is None:
            try:
                found, probed = _probe(comm), True
            except BackendUnavailable as error:
                found = _without_a_probe(shipped, error)
        return found.to_json().encode()

    texts = zip(hosts, agree(comm, answer), strict=True)
    profiles = {host: Profile.from_json(text.decode(), f"of {host}") for host, text in texts if text}
    mine = profiles[here]
    if probed:
        _keep(merge(mine, profiles.values()), cut_short=_seconds(comm) < SECONDS)
    return mine


def _without_a_probe(shipped: Callable[[], Profile], error: BackendUnavailable) -> Profile:
    """The shipped profile, if there is one; with one device for each process, say, two ranks cannot be tried."""
    try:
        found = shipped()
    except BackendUnavailable:
        raise error from None
    _say(f"{error}; so its shipped profile {found.name} counts, which nobody has tried here")
    return found


def agree(comm: Communicator, make: Callable[[], bytes]) -> list[bytes]:
    """What every rank makes; if one of them cannot, its error on all of them, so that nobody waits."""
    error = ""
    kind, data = "made", b""
    try:
        data = make()
    except (ValueError, OSError, BackendUnavailable) as problem:
        kind = "ValueError" if isinstance(problem, ValueError) else "BackendUnavailable"
        error = str(problem)
    answers = comm.share(json.dumps([kind, error]).encode() + b"\n" + data)
    results = []
    for answer in answers:
        head, _, data = answer.partition(b"\n")
        kind, error = json.loads(head)
        if kind != "made":
            raise ValueError(error) if kind == "ValueError" else BackendUnavailable(error)
        results.append(data)
    return results


def _seconds(comm: Communicator) -> float:
    """What a probe may take: the others wait for it within the job's timeout."""
    return min(SECONDS, comm.timeout / 2)


def _probe(comm: Communicator) -> Profile:
    seconds = _seconds(comm)
    _say(
        f"probing backend {comm.name} on {socket.gethostname()}, {seconds:g} s at most; the answer is kept "
        "(COMMLAYER_PROBE=never avoids this)"
    )
    return probe(comm.name, seconds=seconds)


def _keep(profile: Profile, cut_short: bool) -> None:
    if cut_short and incomplete(profile):
        _say(f"cut short, and so not kept: commlayer probe --backend {profile.backend} takes the time it needs")
        return
    try:
        keep(profile)
    except OSError as error:
        _say(f"the probe cannot be kept: {error}")


def _say(text: str) -> None:
    sys.stderr.write(f"commlayer: {text}\n")
    sys.stderr.flush()
