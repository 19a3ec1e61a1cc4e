"""The hub of the control channel: a thread of rank 0 that every rank is connected to.

It keeps keys and values, brings ranks together (``meet``), carries questions and news, and tells everybody when a
connection ends. One thread and non-blocking sockets: nobody, member or stranger, can make it wait.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import resource
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from commlayer.control import wire
from commlayer.control.meetings import Answers, Meetings
from commlayer.control.ranks import expanded
from commlayer.errors import LaunchError

MAX_STRANGERS = 64  # connections that have proved nothing; the oldest goes when more come
MAX_ASKING = 60.0  # seconds that a question may stay open
KNOT = 1.0  # seconds after which meetings that wait for each other are given up
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
        self.lost: dict[int, str] = {}
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
        self._values: dict[str, bytes] = {}
        self._meetings = Meetings()
        self._left: dict[int, int] = {}  # by rank: the last generation that it has finalized
        self._wanted: dict[str, list[Callable[[], None]]] = {}  # by key: who waits for it
        self._questions: dict[int, tuple[set[int], dict[str, Any], Callable[[], None]]] = {}
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
                else:
                    getattr(self, f"_do_{found[0].get('do')}", self._unknown)(peer, *found)
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
        for other, why in self.lost.items():
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
            self._absent(peer.rank, "it has left the job")
        else:
            self._lose(peer.rank, why)

    def _lose(self, rank: int, why: str) -> None:
        if rank not in self.lost:
            self.lost[rank] = why
            self._tell({"event": "lost", "rank": rank, "why": why}, but=rank)
            self._absent(rank, why)

    def _tell(self, event: Header, but: int | None = None) -> None:
        for rank, member in list(self._members.items()):
            if rank != but:
                self._send(member, event)

    def _after(self, seconds: float, action: Callable[[], Any]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), action))

    # What members ask for

    def _unknown(self, peer: _Peer, header: Header, body: bytes) -> None:
        raise wire.Malformed(f"the request {header.get('do')!r}")

    def _do_set(self, peer: _Peer, header: Header, body: bytes) -> None:
        self._values[_text(header["key"])] = body
        for attempt in self._wanted.pop(header["key"], []):
            attempt()

    def _do_add(self, peer: _Peer, header: Header, body: bytes) -> None:
        total = int(self._values.get(header["key"], b"0")) + int(header["by"])
        self._do_set(peer, header, str(total).encode())
        self._send(peer, {"id": header["id"], "total": total})

    def _do_swap(self, peer: _Peer, header: Header, body: bytes) -> None:
        """Compare and set: the body is the expected value and, after so many bytes, the one to put there."""
        expected, wanted = body[: header["split"]], body[header["split"] :]
        now = self._values.get(header["key"])
        if now == expected or (now is None and not expected):
            self._do_set(peer, header, wanted)
            now = wanted
        self._send(peer, {"id": header["id"]}, expected if now is None else now)

    def _do_delete(self, peer: _Peer, header: Header, body: bytes) -> None:
        self._send(peer, {"id": header["id"], "found": self._values.pop(header["key"], None) is not None})

    def _do_check(self, peer: _Peer, header: Header, body: bytes) -> None:
        self._send(peer, {"id": header["id"], "found": all(key in self._values for key in header["keys"])})

    def _do_get(self, peer: _Peer, header: Header, body: bytes) -> None:
        """Answered once all keys are there, or one of the ranks concerned is lost."""
        keys, number = [_text(key) for key in header["keys"]], header["id"]
        ranks = frozenset(expanded(_text(header["ranks"]))) if header["ranks"] else frozenset()

        def attempt() -> None:
            missing = next((key for key in keys if key not in self._values), None)
            gone = {} if missing is None else self._gone(missing)
            if lost := sorted(ranks & gone.keys()):
                self._send(peer, {"id": number, "lost": lost[0], "why": gone[lost[0]]})
            elif missing is None:
                values = [self._values[key] for key in keys]
                self._send(peer, {"id": number, "sizes": [len(value) for value in values]}, b"".join(values))
            else:
                self._wanted.setdefault(missing, []).append(attempt)

        attempt()

    def _do_meet(self, peer: _Peer, header: Header, body: bytes) -> None:
        """Answered to all with everybody's body, once everybody has come; with who is missing, if that cannot be."""
        key, ranks = _text(header["key"]), expanded(_text(header["ranks"]))
        assert peer.rank is not None
        self._answer(self._meetings.join(key, peer.rank, header["id"], ranks, body, self._gone(key)))
        # A rank's other thread may be about to come: what is stuck for this long will stay so.
        if stuck := self._meetings.stuck():
            self._after(KNOT, lambda: self._untie(stuck))

    def _untie(self, before: set[str]) -> None:
        self._answer(self._meetings.untie(before & self._meetings.stuck()))

    def _gone(self, key: str) -> dict[int, str]:
        """Who will not come to a meeting or set a key, since it is lost or has left; keys begin with a generation."""
        generation = _number(key.split("/")[0])
        left = {rank: "it has left the job" for rank, last in self._left.items() if last >= generation}
        return left | self.lost

    def _do_give_up(self, peer: _Peer, header: Header, body: bytes) -> None:
        assert peer.rank is not None
        self._answer(self._meetings.give_up(_text(header["key"]), peer.rank))

    def _answer(self, answers: Answers) -> None:
        for rank, number, header, body in answers:
            if rank in self._members:
                self._send(self._members[rank], {"id": number, **header}, body)

    def _absent(self, rank: int, why: str) -> None:
        """This rank will come to no meeting and answer no question."""
        self._answer(self._meetings.absent(rank, why))
        waiting, self._wanted = self._wanted, {}
        for attempts in waiting.values():
            for attempt in attempts:
                attempt()
        for waiting_for, _, answer in list(self._questions.values()):
            waiting_for.discard(rank)
            if not waiting_for:
                answer()

    def _do_bye(self, peer: _Peer, header: Header, body: bytes) -> None:
        """A rank has finalized: what it took part in, by group."""
        assert peer.rank is not None
        self._left[peer.rank] = max(self._left.get(peer.rank, 0), int(header["generation"]))
        prefix = f"{header['generation']}/"
        self._answer(self._meetings.absent(peer.rank, "it has left the job", prefix))
        self._tell({"event": "left", "rank": peer.rank, **_some(header, "generation", "ends")}, but=peer.rank)

    def _do_exit(self, peer: _Peer, header: Header, body: bytes) -> None:
        peer.exiting = True
        assert peer.rank is not None
        self._left[peer.rank] = sys.maxsize
        self._drop(peer, "it has left the job")

    def _do_tell(self, peer: _Peer, header: Header, body: bytes) -> None:
        event = header["event"]
        if not isinstance(event["event"], str) or "id" in event:
            raise wire.Malformed("an event without a name, or like an answer")
        if event["event"] == "failed":
            assert peer.rank is not None
            self._lose(peer.rank, str(event["why"]))
        else:
            self._tell({**event, "from": peer.rank}, but=peer.rank)

    def _do_time(self, peer: _Peer, header: Header, body: bytes) -> None:
        self._send(peer, {"id": header["id"], "time": time.time_ns()})

    def _do_where(self, peer: _Peer, header: Header, body: bytes) -> None:
        """Ask these ranks where they are in a group; answered with what has come when the time is over."""
        within = float(header["within"])
        if not 0 <= within <= MAX_ASKING:
            raise wire.Malformed(f"a question for {within} s")
        token, waiting_for = next(self._numbers), set(header["ranks"]) & set(self._members)
        answers: dict[str, Any] = {}

        def answer() -> None:
            if self._questions.pop(token, None) is not None:
                self._send(peer, {"id": header["id"], "answers": answers})

        self._questions[token] = (waiting_for, answers, answer)
        for rank in list(waiting_for):
            self._send(self._members[rank], {"event": "where", "token": token, "group": header["group"]})
        if not waiting_for:
            answer()
        self._after(within, answer)

    def _do_here(self, peer: _Peer, header: Header, body: bytes) -> None:
        question = self._questions.get(header["token"])
        if question is not None:
            waiting_for, answers, answer = question
            at = header["at"]
            answers[str(peer.rank)] = None if at is None else {"seq": int(at["seq"]), "last": str(at["last"])}
            waiting_for.discard(peer.rank)
            if not waiting_for:
                answer()


def _allow_descriptors(count: int) -> None:
    """The usual limit of 1024 open files is too low for the hub of a large job."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise LaunchError(f"rank 0 needs {count} open files for its connections, and may have {hard} (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise wire.Malformed(f"{key!r} in place of a text")
    return key


def _some(header: Header, *names: str) -> Header:
    return {name: header[name] for name in names}


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
