"""How a rank reaches the hub: both ends prove that they know the job's secret before anything else is said."""

from __future__ import annotations

import secrets
import socket
import time
from typing import Any

from commlayer.control import wire
from commlayer.errors import CommTimeout, LaunchError

_RETRY = 0.05  # seconds between attempts to connect
_REMEDY = "where hosts do not share the user's files, set COMMLAYER_SECRET to the same random text on every rank"

# The connection, what came after the proof, and the name of the job.
Introduced = tuple[socket.socket, bytearray, str]


def introduced(address: str, port: int, secret: bytes, rank: int, timeout: float) -> Introduced:
    """A connection on which both ends have proved that they know the secret."""
    end = time.monotonic() + timeout
    while True:
        left = end - time.monotonic()
        try:
            sock = socket.create_connection((address, port), timeout=max(min(left, 5.0), 0.01))
            try:
                return _introduce(sock, secret, rank)
            except BaseException:
                sock.close()
                raise
        except (OSError, EOFError) as error:  # not there yet, or too many strangers at its door
            if time.monotonic() + _RETRY > end:
                raise CommTimeout(
                    f"rank {rank} could not reach the control channel at {address}:{port} within {timeout:g} s: {error}"
                ) from error
            time.sleep(_RETRY)


def _introduce(sock: socket.socket, secret: bytes, rank: int) -> Introduced:
    wire.watch_link(sock)
    buffer = bytearray()

    def next_frame() -> dict[str, Any]:
        while True:
            found = wire.take(buffer, stranger=True)
            if found is not None:
                return found[0]
            data = sock.recv(1 << 12)
            if not data:
                raise EOFError("it closed the connection")
            buffer.extend(data)

    try:
        hello = next_frame()
        theirs = hello.get("nonce")
        if hello.get("commlayer") != 1 or not isinstance(theirs, str):
            raise wire.Malformed(f"it says {hello}")
        mine = secrets.token_hex(16)
        sock.sendall(
            wire.frame({"rank": rank, "nonce": mine, "proof": wire.proof(secret, f"rank {rank}", theirs, mine)})
        )
        answer = next_frame()
    except wire.Malformed as error:
        raise LaunchError(f"what listens at {sock.getpeername()} is no commlayer hub: {error}") from error
    if "refused" in answer:
        raise LaunchError(f"rank 0 does not admit rank {rank}: {answer['refused']}; {_REMEDY}")
    if not wire.proves(secret, answer.get("proof"), "hub", mine, theirs):
        raise LaunchError(f"what listens at {sock.getpeername()} does not know the job's secret; {_REMEDY}")
    sock.settimeout(None)
    return sock, buffer, str(answer.get("job"))
