"""The hub of the control channel: a thread of rank 0 that every rank is connected to.

It admits who knows the job's secret, carries what members ask to its ``Service``, and notices when a connection ends.
One thread and non-blocking sockets: nobody, member or stranger, can make it wait.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import resource
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from commlayer.control import wire
from commlayer.control.service import Service
from commlayer.errors import LaunchError

MAX_STRANGERS = 64  # connections that have proved nothing; the oldest goes when more come
PATIENCE = 10.0  # seconds for a stranger to prove that it belongs here
_CHUNK = 1 << 18

Header = dict[str, Any]


class _Peer:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rank: int | None = None  # until it has proved that it belongs here
        self.nonce = secrets.token_hex(16)
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.exiting = False


class Hub(threading.Thread):
    """Serves the ranks of one job. Raises OSError where it cannot listen at ``address``."""

    def __init__(self, address: str, port: int, secret: bytes, size: int) -> None:
        super().__init__(name="commlayer-hub", daemon=True)
        _allow_descriptors(size + MAX_STRANGERS + 256)
        self.size = size
        self.job = secrets.token_hex(8)  # tells this job from others
        self._secret = secret
        self._listener = socket.create_server((address, port), family=_family(address), backlog=max(128, size))
        self._listener.setblocking(False)
        self.address, self.port = self._listener.getsockname()[:2]
        self._bell, self._ring = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._peers: dict[socket.socket, _Peer] = {}
        self._strangers: dict[socket.socket, _Peer] = {}
        self._members: dict[int, _Peer] = {}
        self.service = Service(
            self._members.keys(), lambda rank, header, body: self._send(self._members[rank], header, body), self._after
        )
        self._timers: list[tuple[float, int, Callable[[], Any]]] = []
        self._numbers = itertools.count()
        self._stopping = False
        self._empty = threading.Condition()
        self.start()

    def drain(self, seconds: float) -> None:
        """Wait until every member but rank 0 has gone, for so long at most."""
        with self._empty:
            self._empty.wait_for(lambda: not (self._members.keys() - {0}), seconds)

    def close(self) -> None:
        """Tell the members that there is no hub from now on, and end."""
        self._stopping = True
        with suppress(OSError):
            self._ring.send(b"!")
        self.join(2.0)

    def abandon(self) -> None:
        """In a forked child: let go of the parent's sockets, so that their end is seen when the parent dies."""
        for sock in (self._listener, self._bell, self._ring, *self._peers):
            sock.close()

    def run(self) -> None:
        while not self._stopping:
            pause = self._timers[0][0] - time.monotonic() if self._timers else None
            for key, events in self._selector.select(None if pause is None else max(pause, 0)):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._bell:
                    self._bell.recv(16)
                else:
                    peer = self._peers.get(key.fileobj)  # type: ignore[call-overload]
                    if peer is not None and events & selectors.EVENT_WRITE:
                        self._flush(peer)
                    if peer is not None and events & selectors.EVENT_READ and peer.sock in self._peers:
                        self._read(peer)
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()
        for peer in list(self._members.values()):
            peer.sock.setblocking(True)
            peer.sock.settimeout(1.0)
            with suppress(OSError):
                peer.sock.sendall(bytes(peer.outgoing) + wire.frame({"event": "closing"}))
        for sock in (self._listener, self._bell, self._ring, *self._peers):
            sock.close()
        self._selector.close()

    # Connections

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # until some are free again, there is nothing to listen for
                self._selector.unregister(self._listener)
                self._after(0.1, lambda: self._selector.register(self._listener, selectors.EVENT_READ))
            return  # or the stranger has gone again
        sock.setblocking(False)
        wire.watch_link(sock)
        peer = self._peers[sock] = self._strangers[sock] = _Peer(sock)
        self._selector.register(sock, selectors.EVENT_READ)
        if len(self._strangers) > MAX_STRANGERS:
            self._drop(next(iter(self._strangers.values())), "too many strangers")
        self._after(PATIENCE, lambda: self._drop(peer, "did not prove anything") if peer.rank is None else None)
        self._send(peer, {"commlayer": 1, "nonce": peer.nonce})

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.sock.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            return self._drop(peer, f"the connection to it broke: {error.strerror or error}")
        if not data:
            return self._drop(peer, "its process died, or ended without commlayer.finalize()")
        peer.incoming += data
        try:
            while peer.sock in self._peers:
                found = wire.take(peer.incoming, stranger=peer.rank is None)
                if found is None:
                    break
                if peer.rank is None:
                    self._admit(peer, found[0])
                elif found[0].get("do") == "exit":
                    peer.exiting = True
                    self._drop(peer, "it has left the job")
                else:
                    self.service.handle(peer.rank, *found)
        except Exception as error:  # a member's nonsense, of whatever kind, ends that member and not the hub
            self._send(peer, {"event": "refused", "why": f"{type(error).__name__}: {error}"})
            self._drop(peer, f"it sent what the control channel cannot read: {type(error).__name__}: {error}")

    def _admit(self, peer: _Peer, header: Header) -> None:
        rank, nonce = header.get("rank"), header.get("nonce")
        if not isinstance(nonce, str) or type(rank) is not int or not 0 <= rank < self.size:
            raise wire.Malformed("an introduction without rank and nonce")
        if not wire.proves(self._secret, header.get("proof"), f"rank {rank}", peer.nonce, nonce):
            self._send(peer, {"refused": "it does not know the job's secret"})
            return self._drop(peer, "wrong secret")
        if rank in self._members:
            self._send(peer, {"refused": f"rank {rank} is connected already: is another job using this port?"})
            return self._drop(peer, "a second one")
        peer.rank = rank
        del self._strangers[peer.sock]
        self._members[rank] = peer
        self._send(peer, {"proof": wire.proof(self._secret, "hub", nonce, peer.nonce), "job": self.job})
        for other, why in self.service.lost.items():
            self._send(peer, {"event": "lost", "rank": other, "why": why})

    def _send(self, peer: _Peer, header: Header, body: bytes = b"") -> None:
        if peer.sock in self._peers:
            peer.outgoing += wire.frame(header, body)
            self._flush(peer)

    def _flush(self, peer: _Peer) -> None:
        try:
            while peer.outgoing:
                del peer.outgoing[: peer.sock.send(peer.outgoing[:_CHUNK])]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            return  # its end will be read
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.outgoing else 0)
        self._selector.modify(peer.sock, events)

    def _drop(self, peer: _Peer, why: str) -> None:
        if self._peers.pop(peer.sock, None) is None:
            return
        self._strangers.pop(peer.sock, None)
        self._selector.unregister(peer.sock)
        peer.sock.close()
        if peer.rank is None:
            return
        with self._empty:
            del self._members[peer.rank]
            self._empty.notify_all()
        if peer.exiting:
            self.service.leave(peer.rank)
        else:
            self.service.lose(peer.rank, why)

    def _after(self, seconds: float, action: Callable[[], Any]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), action))


def _allow_descriptors(count: int) -> None:
    """The usual limit of 1024 open files is too low for the hub of a large job."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise LaunchError(f"rank 0 needs {count} open files for its connections, and may have {hard} (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
