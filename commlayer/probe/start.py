"""Start the keeper, listen to it, and see to it that nothing of it remains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch

from commlayer.backends.process_groups import DEVICE_OF
from commlayer.capability import NAME_OF, OPS, REDUCING, Profile, Request, requests
from commlayer.errors import BackendUnavailable
from commlayer.probe.origin import Origin
from commlayer.probe.processes import python, scrubbed

RANKS = 3  # enough for a root, a neighbour and somebody else
SECONDS = 240.0  # gloo takes one to two minutes on two cores
# If the time does not suffice, the most used are known, and other dtypes can travel as their bits.
_FIRST = ("float32", "uint8", "int32", "int64", "bfloat16", "float64", "float16")
Progress = Callable[[int, int, str], None]  # done, of how many, what is probed now


def probe(
    backend: str,
    *,
    ranks: int | None = None,
    wanted: Iterable[Request] | None = None,
    seconds: float = SECONDS,
    modules: Sequence[str] = (),
    progress: Progress | None = None,
) -> Profile:
    """The profile of a backend, measured in child processes within ``seconds``; what they do not suffice for is absent.

    ``modules`` are imported first, and may register the backend. Raises BackendUnavailable where it cannot be run.
    """
    device = DEVICE_OF.get(backend, "cpu")
    origin = Origin.of(backend)
    until = time.monotonic() + seconds  # one clock for all processes of a machine
    job = {
        "backend": backend,
        "ranks": ranks or _default_ranks(backend, device),
        "until": until,
        "seconds": seconds,
        "modules": list(modules),
        "origin": None if origin is None else asdict(origin),
        "requests": [[*r[:2], NAME_OF[r.dtype], *r[3:]] for r in wanted or everything(device)],
    }
    ours, theirs = Pipe()
    with ours, tempfile.TemporaryFile() as log:
        command = python("commlayer.probe.keeper:main", str(theirs.fileno()), str(os.getpid()))
        process = subprocess.Popen(
            command,
            env=scrubbed(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a Ctrl-C at the terminal is for us, and we tell it
        )
        theirs.close()
        try:
            ours.send_bytes(json.dumps(job).encode())
            answer = _listen(ours, until + min(5.0, seconds / 4), progress)
        except (EOFError, OSError):
            answer = {"error": f"the prober ended unexpectedly: {_last_line(log) or 'it left no message'}"}
        finally:
            _stop(process)
    if "error" in answer:
        raise BackendUnavailable(f"backend {backend} cannot be probed: {answer['error']}")
    return Profile.from_json(answer["profile"], "of the prober")


def everything(device: str) -> list[Request]:
    """All requests, the most used dtypes first; and strided tensors, of each operation once."""
    order = {name: place for place, name in enumerate(_FIRST)}
    rows = sorted(requests(device), key=lambda request: order.get(NAME_OF[request.dtype], len(order)))
    strided = [Request(op, "sum" if op in REDUCING else None, torch.float32, device, "strided") for op in OPS[:-1]]
    return [*rows, *strided]


def _default_ranks(backend: str, device: str) -> int:
    if device == "cpu":
        return RANKS
    count = getattr(torch, device).device_count()
    if count < 2:
        raise BackendUnavailable(
            f"backend {backend} cannot be probed: it takes two devices of a machine, and {count} is visible; "
            "name a profile with COMMLAYER_PROFILE, or take the shipped one with COMMLAYER_PROBE=never"
        )
    return min(RANKS, count)


def _listen(link: Connection, until: float, progress: Progress | None) -> dict[str, Any]:
    while link.poll(max(0.0, until - time.monotonic())):
        message = json.loads(link.recv_bytes())
        if "done" not in message:
            return message
        if progress is not None:
            progress(message["done"], message["of"], message["now"])
    return {"error": "it did not end in time"}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the keeper, which ends its ranks; whatever else is in its session as well."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(log: Any) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
