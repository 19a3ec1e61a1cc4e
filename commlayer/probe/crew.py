"""The ranks of one group as child processes, asked together and killed together.

torch's backends are forked from the keeper, which has loaded everything and started nothing: a fresh crew costs some
hundredths of a second. MPI's ranks need mpiexec. Nothing here listens but a Unix socket in a private folder.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import struct
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from commlayer.backends import process_groups, torch_native
from commlayer.backends.base import Communicator
from commlayer.capability import Request
from commlayer.errors import BackendUnavailable
from commlayer.probe.cache import Identity
from commlayer.probe.checks import Verdict
from commlayer.probe.processes import die_with_parent, find_mpiexec, python, scrubbed
from commlayer.probe.rank import TIMEOUT, counted, printable, serve

START = 60.0  # seconds for the ranks to meet
GRACE = 0.05  # seconds for the other ranks to say what they saw, after the first that saw something
# Where ranks saw different things, the gravest is the cause of the others.
_GRAVITY = ("absent", "error", "mutates-input", "wrong-value", "hang", "crash")


class Crew(ABC):
    """So many ranks on one backend."""

    def __init__(self, ranks: int, folder: Path, until: float) -> None:
        self.ranks, self.folder = ranks, folder
        self.links: list[Connection] = []
        self.output = open(folder / "output", "w+b")  # noqa: SIM115 - of all ranks, until stop
        try:
            self._start(until)
            self.identity = self._meet(until)
        except BaseException:
            self.stop()
            raise

    @abstractmethod
    def _start(self, until: float) -> None:
        """Start the processes and fill ``links``."""

    @abstractmethod
    def _end(self, rank: int) -> str:
        """How a rank ended that has hung up."""

    @abstractmethod
    def _kill(self) -> None:
        """End all processes, and return when they have ended."""

    def stop(self) -> None:
        self._kill()
        for link in self.links:
            link.close()
        self.output.close()

    def ask(self, request: Request, sizes: tuple[int, ...], deadline: float, until: float) -> Verdict | None:
        """What the ranks find about a request: None, or the worst that any saw.

        They count as hanging when none of them has begun another size for ``deadline`` seconds, or at the time
        ``until``. After a verdict that is not None nobody knows the state of the group: stop this crew.
        """
        for link in self.links:
            with suppress(OSError):
                link.send((request, sizes))
        at = dict.fromkeys(range(self.ranks), sizes[0])
        found: list[tuple[int, Verdict]] = []
        while at:
            left = max(0.0, until - time.monotonic())
            ready = wait([self.links[rank] for rank in at], min(GRACE if found else deadline, left))
            if not ready:
                break
            for rank in [rank for rank in at if self.links[rank] in ready]:
                try:
                    kind, value = self.links[rank].recv()
                except (EOFError, OSError):
                    kind = "verdict"
                    value = Verdict("crash", f"at {counted(at[rank])}: {self._end(rank)}")
                if kind == "at":
                    at[rank] = value
                    continue
                del at[rank]
                if value is not None:
                    found.append((rank, value))
        if at and not found:
            size = min(at.values())
            late = ", ".join(str(rank) for rank in at if at[rank] == size)
            return Verdict("hang", f"at {counted(size)}", f"rank {late} of {self.ranks} not done after {deadline:g} s")
        if not found:
            return None
        rank, worst = max(found, key=lambda item: (_GRAVITY.index(item[1].status), -item[0]))
        return worst._replace(example=f"{worst.example} on rank {rank} of {self.ranks}") if worst.example else worst

    def _meet(self, until: float) -> Identity:
        """Wait until every rank is connected; BackendUnavailable with the first one's reason."""
        deadline = min(time.monotonic() + START, until)
        for rank, link in enumerate(self.links):
            if not link.poll(max(0.0, deadline - time.monotonic())):
                raise BackendUnavailable(f"rank {rank} of the prober did not connect in the time there was")
            try:
                kind, value = link.recv()
            except (EOFError, OSError):
                kind, value = "failed", f"{self._end(rank)}; {self.said()}"
            if kind == "failed":
                raise BackendUnavailable(f"rank {rank} of the prober could not connect: {value}")
        return value

    def said(self) -> str:
        """The line of the ranks' output that tells most about their end."""
        self.output.seek(0)
        lines = [line.strip() for line in self.output.read().decode(errors="replace").splitlines()]
        lines = [line for line in lines if line and not line.startswith("=")]  # mpiexec's frame
        telling = [line for line in lines if re.search(r"what\(\)|error|fatal|abort", line, re.IGNORECASE)]
        return printable((telling or lines or [""])[0])


class ForkedCrew(Crew):
    """Ranks of a torch.distributed backend."""

    def __init__(self, backend: str, ranks: int, folder: Path, until: float) -> None:
        self.backend = backend
        self._processes: list[Any] = []
        super().__init__(ranks, folder, until)

    def _start(self, until: float) -> None:
        context = multiprocessing.get_context("fork")
        keeper = os.getpid()
        (self.folder / "store").unlink(missing_ok=True)

        def run(rank: int, link: Connection) -> None:
            die_with_parent(keeper)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for stream in (1, 2):
                os.dup2(self.output.fileno(), stream)
            serve(link, lambda: self._connect(rank))
            os._exit(0)

        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=run, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()  # so that its end is heard
            self._processes.append(process)
            self.links.append(ours)

    def _connect(self, rank: int) -> Communicator:
        device = torch.device(process_groups.DEVICE_OF.get(self.backend, "cpu"))
        if device.type != "cpu":
            module = getattr(torch, device.type)
            if self.ranks > module.device_count():
                raise BackendUnavailable(f"{self.ranks} ranks need as many devices, found {module.device_count()}")
            module.set_device(rank)
            device = torch.device(device.type, rank)
        store = dist.FileStore(str(self.folder / "store"), self.ranks)
        store.set_timeout(timedelta(seconds=START))
        return torch_native.create(self.backend, store, rank, self.ranks, device, TIMEOUT, "127.0.0.1")

    def _end(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(1.0)
        code = process.exitcode
        end = "closed its pipe" if code is None else f"exit status {code}" if code >= 0 else _killed(-code)
        return ": ".join(filter(None, (end, self.said())))

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


class MpiCrew(Crew):
    """Ranks that mpiexec starts, of whatever MPI mpi4py is built for."""

    def __init__(self, backend: str, ranks: int, folder: Path, until: float) -> None:
        self._pids: list[int] = []
        self._launcher: subprocess.Popen[bytes] | None = None
        super().__init__(ranks, folder, until)

    def _start(self, until: float) -> None:
        mpiexec = find_mpiexec()
        if mpiexec is None:
            raise BackendUnavailable("no mpiexec beside the interpreter nor on the PATH")
        path = self.folder / "socket"
        path.unlink(missing_ok=True)
        keeper = os.getpid()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen(self.ranks)
            server.settimeout(0.2)
            self._launcher = subprocess.Popen(
                [mpiexec, "-n", str(self.ranks), *python("commlayer.probe.rank:main", str(path))],
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                # More ranks than cores are no fault here; Open MPI refuses them otherwise.
                env=scrubbed() | {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"},
                preexec_fn=lambda: die_with_parent(keeper),
            )
            deadline = min(time.monotonic() + START, until)
            while len(self.links) < self.ranks:
                try:
                    end, _ = server.accept()
                except TimeoutError:
                    if self._launcher.poll() is not None:
                        raise BackendUnavailable(f"mpiexec ended at once: {self.said()}") from None
                    if time.monotonic() > deadline:
                        raise BackendUnavailable("the ranks did not start in the time there was") from None
                    continue
                credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                self._pids.append(struct.unpack("3i", credentials)[0])
                self.links.append(Connection(end.detach()))

    def _end(self, rank: int) -> str:
        assert self._launcher is not None
        with suppress(subprocess.TimeoutExpired):
            self._launcher.wait(2.0)
        self.output.seek(0)
        found = re.search(rb"signal:? (\d+)", self.output.read(), re.IGNORECASE)
        end = _killed(int(found[1])) if found else f"mpiexec ended with status {self._launcher.returncode}"
        return ": ".join(filter(None, (end, self.said())))

    def _kill(self) -> None:
        if self._launcher is None:
            return
        # The ranks first, which are mpiexec's grandchildren in sessions of their own.
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._launcher.terminate()
        try:
            self._launcher.wait(2.0)
        except subprocess.TimeoutExpired:
            self._launcher.kill()
            self._launcher.wait()


def _killed(number: int) -> str:
    return f"killed by {signal.Signals(number).name}"
