"""Hosts as network namespaces: each with an address, a name and processes of its own, joined by links that can fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.faults.job import Zygote

# Enough to lose segments and to reorder. Where the kernel has no netem, a narrow link with a short queue: when the
# queue is full, packets are lost too.
NETEM = "netem delay 15ms 5ms loss 1%"
NARROW = "tbf rate 20mbit burst 16kb limit 48kb"


def missing() -> str | None:
    """Why hosts cannot be built here."""
    tools = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if tools:
        return f"no {' or '.join(tools)} here"
    name = f"faults{os.getpid()}t"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return None


class Hosts:
    """``count`` hosts, host0 to host(count-1), at 10.77.0.1 and up, on a bridge in a namespace of its own."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder = folder
        self.names = [f"host{number}" for number in range(count)]
        self.addresses = [f"10.77.0.{number + 1}" for number in range(count)]
        self._space = f"faults{os.getpid()}"
        self._switch = f"{self._space}-switch"

    def build(self) -> None:
        _ip("netns", "add", self._switch)
        self._in_switch("ip", "link", "add", "bridge", "type", "bridge")
        self._in_switch("ip", "link", "set", "bridge", "up")
        for name, address in zip(self.names, self.addresses, strict=True):
            space = self._of(name)
            _ip("netns", "add", space)
            names = Path("/etc/netns") / space
            names.mkdir(parents=True)
            lines = ["127.0.0.1 localhost", *(f"{a} {n}" for n, a in zip(self.names, self.addresses, strict=True))]
            (names / "hosts").write_text("\n".join(lines) + "\n")
            self._in_switch("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._in_switch("ip", "link", "set", name, "master", "bridge", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def prefix(self, host: int) -> list[str]:
        """What to put before a command to run it on that host."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.names[host]]
        return ["ip", "netns", "exec", self._of(self.names[host]), *named]

    def ssh(self) -> str:
        """A program to call as ``ssh HOST COMMAND``, for launchers."""
        script = self.folder / "ssh"
        script.write_text(
            '#!/bin/sh\nwhile [ "$1" != "${1#-}" ]; do shift; done\nhost=$1; shift\n'
            f'exec ip netns exec "{self._space}-$host" unshare --uts sh -c "hostname $host; $*"\n'
        )
        script.chmod(0o700)
        return str(script)

    def cut(self, host: int) -> None:
        """From now on nothing passes, and nobody is told."""
        self._in_switch("ip", "link", "set", self.names[host], "nomaster")

    def mend(self, host: int) -> None:
        self._in_switch("ip", "link", "set", self.names[host], "master", "bridge")
        self._in_switch("tc", "qdisc", "del", "dev", self.names[host], "root", check=False)

    def slow(self, host: int) -> str:
        """Make the link to a host a bad one; returns how, as tc says it."""
        for how in (NETEM, NARROW):
            made = self._in_switch("tc", "qdisc", "add", "dev", self.names[host], "root", *how.split(), check=False)
            if made.returncode == 0:
                return how
        raise RuntimeError(made.stderr)

    def kill(self, host: int, spare: int) -> None:
        """The host is gone from one moment to the next; only process ``spare``, which keeps the records, is not."""
        self.cut(host)
        pids = subprocess.run(
            ["ip", "netns", "pids", self._of(self.names[host])], capture_output=True, text=True, check=True
        )
        for pid in map(int, pids.stdout.split()):
            if pid != spare:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        for space in [*map(self._of, self.names), self._switch]:
            pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
            for pid in map(int, pids.stdout.split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _ip("netns", "del", space, check=False)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)

    def _of(self, name: str) -> str:
        return f"{self._space}-{name}"

    def _in_switch(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return _run(["ip", "netns", "exec", self._switch, *command], check)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return _run(["ip", *arguments], check)


def _run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done


@contextmanager
def hosts(count: int) -> Iterator[tuple[Hosts, list[Zygote]]]:
    """Hosts, and on each the process that forks ranks. Nothing of them is left afterwards."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults")))
        built = Hosts(count, folder)
        stack.callback(built.close)
        built.build()
        zygotes = []
        for number in range(count):
            zygotes.append(Zygote(folder, built.prefix(number)))
            stack.callback(zygotes[-1].close)
        yield built, [zygote.ready() for zygote in zygotes]
