"""Start a job of a few ranks on gloo or MPI, see how each of them ends, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.faults import leftovers
from tests.faults.leftovers import MARK
from tests.faults.outcome import Outcome, RankOutcome

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MPI = (BIN / "mpiexec").exists()
BACKENDS = ["gloo", *(["mpi"] if MPI else [])]


class Zygote:
    """The process that forks ranks (see zygote.py), on this host or, by ``prefix``, inside another namespace."""

    def __init__(self, folder: Path, prefix: Sequence[str] = ()) -> None:
        self.folder, self.prefix = folder, list(prefix)
        command = [*prefix, sys.executable, "-m", "tests.faults.zygote", str(folder)]
        env = clean_environment()
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = 0
        self._path = ""

    def ready(self) -> Zygote:
        """Wait until it can fork."""
        assert self._process.stdout is not None
        if not self.pid:
            pid, self._path = self._process.stdout.readline().decode().split()
            self.pid = int(pid)
        return self

    def start(self, folder: Path, env: dict[str, str]) -> socket.socket:
        """Start a rank; it is killed when the returned connection is closed."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self._path)
        connection.send(json.dumps({"folder": str(folder), "env": env}).encode())
        return connection

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


@contextmanager
def zygote(prefix: Sequence[str] = ()) -> Iterator[Zygote]:
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        process = Zygote(Path(folder), prefix)
        try:
            yield process.ready()
        finally:
            process.close()


def clean_environment() -> dict[str, str]:
    """This process's environment without what would steer the layer or tell of another launch."""
    foreign = ("COMMLAYER_", "PMI", "OMPI_", "MPI_", "HYDRA_", "SLURM_", "TORCHELASTIC_", "MASTER_", "RANK", "WORLD_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(
    zygotes: Sequence[Zygote],
    program: str,
    backend: str,
    *,
    env: dict[str, str] | None = None,
    limit: float = 60.0,
    meanwhile: Any = None,
    mpiexec: Sequence[str] = (),
    master: str = "127.0.0.1",
    **arguments: Any,
) -> Outcome:
    """Run ``program`` (of rank.PROGRAMS) with one rank on each of ``zygotes``, until all have ended or ``limit``.

    A rank that a fault has stopped is killed once the others have ended. ``meanwhile(ranks)`` is called over and over
    with what is known so far. mpiexec runs with -disable-auto-cleanup, or it would kill every rank as soon as one dies.
    """
    begin = time.monotonic()
    size = len(zygotes)
    with tempfile.TemporaryDirectory(prefix="faults") as name, ExitStack() as stack:
        folder = Path(name)
        settings = {"COMMLAYER_BACKEND": backend, **(env or {})}
        (folder / "job.json").write_text(json.dumps({"program": program, "arguments": arguments, "env": settings}))
        common = clean_environment() | {MARK: name}
        launcher = None
        if backend == "mpi":
            launcher = _start_by_mpiexec(zygotes, folder, common, mpiexec)
            stack.callback(_end, launcher)
        else:
            for connection in _start_by_hand(zygotes, folder, common, master):
                stack.callback(connection.close)
        stack.callback(_kill, folder, size)
        outcome = Outcome(_watch(folder, size, begin + limit, launcher, meanwhile), [], 0.0)
        outcome.left = leftovers.find(name, outcome.ranks)
        stack.close()
        leftovers.remove(outcome.ranks)
        if launcher is not None:
            outcome.launcher, outcome.launched = (folder / "mpiexec.out").read_text(), launcher.returncode
        outcome.seconds = time.monotonic() - begin
        return outcome


def _start_by_hand(zygotes: Sequence[Zygote], folder: Path, env: dict[str, str], master: str) -> list[socket.socket]:
    port = str(free_port())
    connections = []
    for rank, zygote in enumerate(zygotes):
        local, here = zygotes[:rank].count(zygote), zygotes.count(zygote)
        place = {"RANK": str(rank), "WORLD_SIZE": str(len(zygotes)), "LOCAL_RANK": str(local)}
        place |= {"LOCAL_WORLD_SIZE": str(here), "MASTER_ADDR": master, "MASTER_PORT": port}
        connections.append(zygote.start(folder, env | place))
    return connections


def _start_by_mpiexec(
    zygotes: Sequence[Zygote], folder: Path, env: dict[str, str], options: Sequence[str]
) -> subprocess.Popen[bytes]:
    mpiexec = [*zygotes[0].prefix, str(BIN / "mpiexec"), "-disable-auto-cleanup", *options, "-n", str(len(zygotes))]
    stub = [sys.executable, "-S", "-E", str(Path(__file__).with_name("stub.py")), str(zygotes[0].folder), str(folder)]
    with (folder / "mpiexec.out").open("w") as said:
        return subprocess.Popen(
            mpiexec + stub, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )


def _end(launcher: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired):
        launcher.wait(2)
    with suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()


def _watch(folder: Path, size: int, deadline: float, launcher: Any, meanwhile: Any) -> list[RankOutcome]:
    while True:
        ranks = [_read(folder, rank) for rank in range(size)]
        running = [rank for rank in ranks if rank.status is None]
        stopped = [rank for rank in running if (fault := rank.find("fault")) and fault.get("stops")]
        if meanwhile is not None:
            meanwhile(ranks)
        if running == stopped or time.monotonic() > deadline:
            break
        if launcher is not None and launcher.poll() is not None and not any(rank.events for rank in ranks):
            raise RuntimeError("mpiexec: " + (folder / "mpiexec.out").read_text())
        time.sleep(0.01)
    if running:
        for rank in stopped:
            _kill_rank(rank)
        end = time.monotonic() + 2
        while time.monotonic() < end and any(_read(folder, rank).status is None for rank in range(size)):
            time.sleep(0.01)
    return [_read(folder, rank) for rank in range(size)]


def _read(folder: Path, rank: int) -> RankOutcome:
    path = folder / f"rank-{rank}.jsonl"
    if not path.exists():
        return RankOutcome()
    errors = path.with_suffix(".err")
    events = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return RankOutcome(events, errors.read_text(errors="replace") if errors.exists() else "")


def _kill(folder: Path, size: int) -> None:
    for rank in range(size):
        _kill_rank(_read(folder, rank))


def _kill_rank(rank: RankOutcome) -> None:
    # The whole session, while its leader is there: afterwards its number may be another's.
    start = rank.find("start")
    if start is not None and rank.status is None:
        with suppress(ProcessLookupError):
            os.killpg(start["pid"], signal.SIGKILL)


def free_port() -> int:
    """The first of two free ports in a row: the launcher's and the layer's own."""
    while True:
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            second.bind(("127.0.0.1", port + 1))
            return port
