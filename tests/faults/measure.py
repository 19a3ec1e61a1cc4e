"""One fault on one backend: play it, and judge what the other ranks saw."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.faults.catalogue import AT, CATALOGUE, UNCHECKED, VICTIM, Promise
from tests.faults.hosts import Hosts
from tests.faults.job import Zygote, run
from tests.faults.outcome import Outcome, RankOutcome

RANKS = 4
# Only the keepalive of the control channel finds out, and does not know which of the ranks over there it was.
CUT_OFF = Promise(("PeerLost",), 15.0, says=(r"rank \d", AT))
# On MPI, after MPI_Abort: by mpiexec, or by a rank itself that cannot reach it.
ABORTED = (-signal.SIGKILL, -signal.SIGALRM)
FINE = Promise(("none",))

# How the table says it.
WORDS = {"none": "no error", "WrongAnswer": "wrong number", "died": "process died", "ended": "ended by mpiexec"}


@dataclass
class Row:
    """A line of the table, and what is wrong with it."""

    fault: str
    backend: str
    errors: str
    seconds: float | None  # from the fault until the last rank knew
    status: str
    left: str
    wrong: list[str] = field(default_factory=list)
    outcome: Outcome | None = None

    def __str__(self) -> str:
        seconds = "–" if self.seconds is None else f"{self.seconds:.2f}"
        return f"| {self.fault} | {self.backend} | {self.errors} | {seconds} | {self.status} | {self.left} |"


def by_a_rank(zygote: Zygote, name: str, backend: str) -> Row:
    """A fault of the catalogue, on ranks of one host."""
    fault = CATALOGUE[name]
    outcome = run([zygote] * RANKS, "fault", backend, env=fault.env, limit=30.0, name=name)
    judged = [rank for number, rank in enumerate(outcome.ranks) if number != VICTIM or fault.victim_too]
    return judge(name, backend, outcome, outcome.ranks[VICTIM].when("fault"), judged, fault.promise)


def cut_link(hosts: Hosts, zygotes: Sequence[Zygote], backend: str) -> Row:
    """The link to the second host passes nothing any more, and nobody is told."""
    return _by_the_network(
        "link between two hosts cut", hosts, zygotes, backend, lambda: hosts.cut(1), lambda ranks: ranks
    )


def dead_host(hosts: Hosts, zygotes: Sequence[Zygote], backend: str) -> Row:
    """The second host goes down: its link, then all its processes, so that no FIN gets out."""
    return _by_the_network(
        "one of two hosts down", hosts, zygotes, backend, lambda: hosts.kill(1, zygotes[1].pid), lambda ranks: ranks[:2]
    )


def slow_link(hosts: Hosts, zygotes: Sequence[Zygote], backend: str) -> Row:
    """The link to the second host is slow and loses packets: nothing may fail, and all answers must be right."""
    how = hosts.slow(1)
    try:
        outcome = on_two(hosts, zygotes, "answer", backend, rounds=1, size=10_000)
    finally:
        hosts.mend(1)
    return judge(f"slow link that loses packets ({how})", backend, outcome, 0.0, outcome.ranks, FINE)


def _by_the_network(
    name: str,
    hosts: Hosts,
    zygotes: Sequence[Zygote],
    backend: str,
    fault: Callable[[], None],
    judged: Callable[[list[RankOutcome]], list[RankOutcome]],
) -> Row:
    struck: list[float] = []

    def strike(ranks: list[RankOutcome]) -> None:
        if not struck and all(rank.find("ready") for rank in ranks):
            time.sleep(0.3)
            struck.append(time.monotonic())
            fault()

    try:
        outcome = on_two(hosts, zygotes, "endure", backend, meanwhile=strike, timeout=30.0)
    finally:
        hosts.mend(1)
    when = struck[0] if struck else None
    return judge(name, backend, outcome, when, judged(outcome.ranks), CUT_OFF)


def on_two(hosts: Hosts, zygotes: Sequence[Zygote], program: str, backend: str, **arguments: object) -> Outcome:
    """A job of two ranks on each of two hosts."""
    mpiexec = ["-launcher", "ssh", "-launcher-exec", hosts.ssh(), "-hosts", "host0:2,host1:2", "-iface", "eth0"]
    # Ranks of one machine would find each other's shared memory across namespaces.
    env = {"UCX_TLS": "tcp,self"}
    places = [zygotes[0], zygotes[0], zygotes[1], zygotes[1]]
    return run(places, program, backend, env=env, master=hosts.addresses[0], mpiexec=mpiexec, limit=45.0, **arguments)


def judge(
    name: str, backend: str, outcome: Outcome, struck: float | None, judged: Sequence[RankOutcome], promise: Promise
) -> Row:
    """The line of the table for what the ``judged`` ranks saw of a fault at the time ``struck``."""
    wrong = [f"left running: {what}" for what in outcome.left]
    errors = [rank.find("error") for rank in judged]
    seen = [_seen(rank, outcome) for rank in judged]
    times = [error["time"] for error in errors if error]
    seconds = max(times) - struck if times and struck else None
    wrong += [f"saw {what}" for what in seen if what not in promise.errors]
    if struck is None:
        wrong.append("the fault never came about")
    if seconds is not None and seconds > promise.within:
        wrong.append(f"known after {seconds:.1f} s, not {promise.within:g}")
    for rank, error in zip(judged, errors, strict=True):
        if rank.status is None:
            wrong.append("did not end")
        if error is None:
            if promise == FINE and rank.status != 0:
                wrong.append(f"status {rank.status} although nothing went wrong")
            continue
        if rank.status not in (1, *(ABORTED if outcome.launched else ())) and promise != UNCHECKED:
            wrong.append(f"status {rank.status} after an error")
        wrong += [
            f"does not say {what}: {error['text']}" for what in promise.says if not re.search(what, error["text"])
        ]
        again = rank.find("again")
        if promise.breaks and (again is None or again["time"] - error["time"] > 0.5):
            wrong.append(f"the next call on the group: {again}")
    left = ", ".join(outcome.left) or "nothing"
    statuses = ", ".join(sorted({str(rank.status) for rank in judged}))
    if outcome.launched is not None and any(errors):
        # MPI_Abort ends the job through the launcher, which kills whoever has not left yet: its status counts.
        statuses = str(outcome.launched)
    errors_seen = ", ".join(sorted({WORDS.get(what, what) for what in seen}))
    return Row(name, backend, errors_seen, seconds, statuses, left, wrong, outcome)


def _seen(rank: RankOutcome, outcome: Outcome) -> str:
    error = rank.find("error")
    if error is not None:
        return error["type"]
    if rank.status is not None and rank.status < 0:
        return "ended" if outcome.launched and rank.status == -signal.SIGKILL else "died"
    return "none" if rank.find("end") else "nothing"
