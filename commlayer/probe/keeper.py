"""The clean process between whoever wants to know and the ranks that may hang or die.

It loads torch and the module that registers the backend once, starts no communicator itself, and runs every request on
a crew of ranks. A crew that found something wrong is killed and replaced: a failed call may poison a communicator.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from commlayer.capability import DTYPES, Request
from commlayer.errors import CommError
from commlayer.probe.cache import Identity
from commlayer.probe.checks import SIZES, Verdict, sizes_of
from commlayer.probe.crew import Crew, ForkedCrew, MpiCrew
from commlayer.probe.origin import Origin
from commlayer.probe.processes import die_with_parent
from commlayer.probe.table import NATIVE, NOT_PROBED, profile_of

DEADLINE = 5.0  # seconds without a sign of life
DEADLINE_AGAIN = 1.0  # for other dtypes of an operation that has hung once


def main(channel: str, parent: str) -> None:
    """Read a job from the channel, and answer with progress, then with a profile or an error."""
    die_with_parent(int(parent), signal.SIGTERM)
    signal.signal(signal.SIGTERM, _leave)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    link = Connection(int(channel))
    os.set_inheritable(int(channel), False)

    def tell(message: dict[str, Any]) -> None:
        link.send_bytes(json.dumps(message).encode())

    job = json.loads(link.recv_bytes())
    try:
        # A program that is imported here must not start its own job.
        vars(sys.modules["commlayer"])["init"] = _refuse
        for name in job["modules"]:
            Origin(name).bring()
        if job["origin"] is not None:
            Origin(**job["origin"]).bring(job["backend"])
        with tempfile.TemporaryDirectory(prefix="commlayer-probe-") as folder:
            profile = _probe(job, Path(folder), tell)
        tell({"profile": profile})
    except (CommError, ValueError, OSError) as error:
        tell({"error": str(error)})


def _probe(job: dict[str, Any], folder: Path, tell: Callable[[dict[str, Any]], None]) -> str:
    backend, ranks, until = job["backend"], job["ranks"], job["until"]
    wanted = [Request(op, reduce, DTYPES[dtype], *rest) for op, reduce, dtype, *rest in job["requests"]]
    start = MpiCrew if backend == "mpi" else ForkedCrew
    verdicts: dict[Request, Verdict] = {}
    hung: set[tuple[Any, ...]] = set()
    late = Verdict("absent", f"{NOT_PROBED}: the time of {job['seconds']:g} s was over")
    crew: Crew | None = None
    identity: Identity | None = None
    try:
        for request in wanted:
            if crew is None and time.monotonic() < until:
                try:
                    crew = start(backend, ranks, folder, until)
                    identity = crew.identity
                except CommError:
                    if identity is None or time.monotonic() < until:
                        raise
            if crew is None or time.monotonic() >= until:
                verdicts[request] = late
                continue
            tell({"done": len(verdicts), "of": len(wanted), "now": str(request)})
            kind = (request.op, request.reduce, request.layout)
            deadline = DEADLINE_AGAIN if kind in hung else DEADLINE
            found = crew.ask(request, sizes_of(request), deadline, until)
            if found is not None and found.status == "hang":
                hung.add(kind)
                if time.monotonic() >= until:
                    found = late
            if found is not None and found.status != "absent":
                crew.stop()
                crew = None
            verdicts[request] = found or NATIVE
    finally:
        if crew is not None:
            crew.stop()
    assert identity is not None
    how = f"{identity.version}, {ranks} ranks of one host, {len(SIZES)} sizes from {SIZES[0]} to {SIZES[-1]} elements"
    return profile_of(verdicts, backend, identity.versions(), how).to_json()


def _leave(*_: Any) -> None:
    """Unwind, so that the ranks and the folder go too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _refuse(*_: Any, **__: Any) -> None:
    raise CommError(
        "the prober imports the program to learn of its backend, and the program calls commlayer.init() when it is "
        "imported: put the call under if __name__ == '__main__', or register the backend in a module of its own"
    )
