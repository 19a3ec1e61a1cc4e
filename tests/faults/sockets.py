"""The TCP sockets of this very process, from /proc."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

STATES = {"01": "established", "0A": "listening"}


def sockets() -> list[tuple[str, str, str]]:
    """(state, own address, other's address) of each that is established or listening."""
    mine = set()
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            mine.add(os.readlink(f"/proc/self/fd/{entry}"))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in mine and fields[3] in STATES:
                found.append((STATES[fields[3]], _address(fields[1]), _address(fields[2])))
    return sorted(found)


def _address(text: str) -> str:
    """The kernel's hexadecimal, each 32-bit word in the machine's order; an IPv4 address in IPv6 is that address."""
    words = [int(text[place : place + 8], 16).to_bytes(4, "little") for place in range(0, text.index(":"), 8)]
    raw = b"".join(words)
    if len(raw) == 4:
        return socket.inet_ntop(socket.AF_INET, raw)
    return socket.inet_ntop(socket.AF_INET6, raw).removeprefix("::ffff:")
