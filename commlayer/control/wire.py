"""What travels: frames of a JSON object and a body of bytes, and the proof that both ends know the job's secret.

A frame is two lengths (4 bytes each, network order), the JSON object, the body.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import struct
from typing import Any

_LENGTHS = struct.Struct("!II")
MAX_HEADER = 1 << 24
MAX_BODY = 1 << 31
MAX_STRANGER = 1 << 9  # for a header from who has not proved anything yet; a body is refused

# A dead host or a cut link shows after about 10 seconds: the kernel asks, so a busy or stopped process does not count
# as dead, and the silence of an idle one does not either.
_KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 10_000}


class Malformed(ValueError):
    """The other end does not speak this protocol."""


def frame(header: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), len(body)) + text + body


def take(buffer: bytearray, stranger: bool = False) -> tuple[dict[str, Any], bytes] | None:
    """The first frame of the buffer, removed from it; None where it is not complete. Raises Malformed."""
    if len(buffer) < _LENGTHS.size:
        return None
    header_size, body_size = _LENGTHS.unpack_from(buffer)
    if header_size > (MAX_STRANGER if stranger else MAX_HEADER) or body_size > (0 if stranger else MAX_BODY):
        raise Malformed(f"a frame of {header_size} + {body_size} bytes")
    begin = _LENGTHS.size + header_size
    if len(buffer) < begin + body_size:
        return None
    try:
        header = json.loads(buffer[_LENGTHS.size : begin])
    except (ValueError, RecursionError) as error:
        raise Malformed(f"a frame that is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise Malformed(f"a frame that holds a {type(header).__name__}")
    body = bytes(buffer[begin : begin + body_size])
    del buffer[: begin + body_size]
    return header, body


def proof(secret: bytes, who: str, *nonces: str) -> str:
    """That ``who`` knows the secret, for these nonces alone (challenge and response, RFC 2104)."""
    return hmac.new(secret, "|".join((who, *nonces)).encode(), hashlib.sha256).hexdigest()


def proves(secret: bytes, given: Any, who: str, *nonces: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(), proof(secret, who, *nonces).encode())


def watch_link(sock: socket.socket) -> None:
    """Send small frames at once, and have the kernel notice that the other host is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has them all
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
