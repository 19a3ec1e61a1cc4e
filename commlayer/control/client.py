"""A rank's end of the control channel."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from commlayer.control import wire
from commlayer.control.hub import Hub
from commlayer.control.introduction import introduced
from commlayer.control.ranks import compact, named
from commlayer.errors import CollectiveMismatch, CommError, CommTimeout, PeerLost

Event = dict[str, Any]
_GRACE = 0.2  # seconds that the hub may take to answer what it has at hand


class Knot(CollectiveMismatch):
    """Ranks came to different meetings, so that none can happen; ``payloads`` are what each of them brought."""

    def __init__(self, payloads: dict[int, str]) -> None:
        super().__init__(f"ranks wait for each other in different operations: {payloads}")
        self.payloads = payloads


class _Slot:
    """Where a request waits for its answer."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.header: Event = {}
        self.body = b""


class Client:
    """Connected to the hub as ``rank``. On rank 0 it keeps the hub as well.

    What the hub tells unasked (``lost``, ``left``, ``where``, and what other ranks ``tell``) goes to who listens.
    """

    def __init__(
        self, address: str, port: int, secret: bytes, rank: int, timeout: float, hub: Hub | None = None
    ) -> None:
        self.rank = rank
        self.hub = hub
        self.gone = ""  # why there is no connection any more
        self._on_event: Callable[[Event], None] | None = None
        self._events: list[Event] = []  # before somebody listened
        self._numbers = itertools.count()
        self._slots: dict[int, _Slot] = {}
        self._sending = threading.Lock()
        self._sock, self._buffer, self.job = introduced(address, port, secret, rank, timeout)
        self.address: str = self._sock.getsockname()[0]
        self._reader = threading.Thread(target=self._read, name="commlayer-control", daemon=True)
        self._reader.start()
        _alive.add(self)

    def listen(self, on_event: Callable[[Event], None]) -> None:
        """Call this with every event, also with what came before, in the channel's own thread.

        It must not ask the hub anything, since the same thread would bring the answer.
        """
        with self._sending:
            self._on_event = on_event
            earlier, self._events = self._events, []
        for event in earlier:
            on_event(event)

    # Requests

    def set(self, key: str, value: bytes) -> None:
        self._send({"do": "set", "key": key}, value)

    def get(
        self,
        keys: Sequence[str],
        timeout: float,
        ranks: Sequence[int] = (),
        idle: Callable[[], None] | None = None,
        take: bool = False,
    ) -> list[bytes]:
        """The values of these keys, once all are there; with ``take`` they are gone then.

        Raises CommTimeout; PeerLost where one of ``ranks`` dies.
        """
        request = {"do": "get", "keys": list(keys), "ranks": compact(tuple(ranks)), "take": take}
        header, body = self._ask(request, timeout=timeout, what=f"waiting for {keys[0]}", idle=idle)
        if "lost" in header:
            raise PeerLost(f"waiting for {keys[0]}: rank {header['lost']} is lost: {header['why']}")
        return _split(body, header["sizes"])

    def add(self, key: str, by: int) -> int:
        return self._ask({"do": "add", "key": key, "by": by})[0]["total"]

    def swap(self, key: str, expected: bytes, wanted: bytes) -> bytes:
        """Set the key to ``wanted`` if it holds ``expected`` (or nothing, for b""); its value afterwards."""
        return self._ask({"do": "swap", "key": key, "split": len(expected)}, expected + wanted)[1]

    def delete(self, key: str) -> bool:
        return self._ask({"do": "delete", "key": key})[0]["found"]

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask({"do": "check", "keys": list(keys)})[0]["found"]

    def meet(
        self, key: str, ranks: Sequence[int], payload: bytes, timeout: float, idle: Callable[[], None] | None = None
    ) -> list[bytes]:
        """Everybody's payload, once all these ranks (world ranks) have come with the same key.

        ``idle`` is called now and then meanwhile. Raises CommTimeout naming who has not come, PeerLost for who will
        not, Knot where ranks wait for each other in different meetings.
        """
        number, slot = self._slot()
        self._send({"do": "meet", "id": number, "key": key, "ranks": compact(tuple(ranks))}, payload)
        if not _idled(slot.ready, timeout, idle):
            self._send({"do": "give_up", "key": key})
            if not slot.ready.wait(_GRACE):
                raise CommTimeout(f"{key}: not finished after {timeout:g} s, and the control channel does not answer")
        header, body = self._taken(number, slot)
        if "missing" in header:
            raise CommTimeout(f"{key}: not finished after {timeout:g} s; {named(header['missing'])} never came")
        if "lost" in header:
            raise PeerLost(f"{key}: rank {header['lost']} is lost: {header['why']}")
        if "knot" in header:
            raise Knot({int(rank): text for rank, text in header["knot"].items()})
        if "same" in header:
            return [body] * header["same"]
        return _split(body, header["sizes"])

    def where(self, group: str, ranks: Sequence[int], within: float) -> dict[int, Any]:
        """What these ranks say of their place in a group; who does not answer in time is not in it.

        Raises CommTimeout, PeerLost where it is the hub that does not answer.
        """
        request = {"do": "where", "group": group, "ranks": list(ranks), "within": within}
        answers = self._ask(request, timeout=within + _GRACE)[0]["answers"]
        return {int(rank): at for rank, at in answers.items()}

    def tell(self, event: Event) -> None:
        """Send an event to every other rank."""
        self._send({"do": "tell", "event": event})

    def here(self, token: int, at: Any) -> None:
        """Answer a ``where``."""
        self._send({"do": "here", "token": token, "at": at})

    def bye(self, generation: int, ends: dict[str, int]) -> None:
        """This rank takes part in nothing more; ``ends`` says in how much it did, by group."""
        self._send({"do": "bye", "generation": generation, "ends": ends})

    def clock_offset(self) -> int:
        """Nanoseconds to add to this host's clock to have that of rank 0 (Cristian's algorithm, the best of five)."""
        if self.hub is not None:
            return 0
        best: tuple[int, int] | None = None
        for _ in range(5):
            before = time.time_ns()
            theirs = self._ask({"do": "time"})[0]["time"]
            after = time.time_ns()
            best = min(
                best or (after - before, 0), (after - before, theirs - (before + after) // 2), key=lambda b: b[0]
            )
        assert best is not None
        return best[1]

    def close(self, linger: float) -> None:
        """Leave. Rank 0 serves the others for up to ``linger`` seconds more."""
        with suppress(CommError):
            self._send({"do": "exit"})
        if self.hub is not None:
            self.hub.drain(linger)
            self.hub.close()
        self.gone = self.gone or "this rank has left"
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the reader
        self._reader.join(1.0)  # a thread must not come back from C++ to an interpreter that has ended
        self._sock.close()
        _alive.discard(self)

    def abandon(self) -> None:
        """In a forked child, which is no rank."""
        self.gone = "this process is a fork of a rank"
        self._sock.close()
        if self.hub is not None:
            self.hub.abandon()

    # The connection

    def _slot(self) -> tuple[int, _Slot]:
        number, slot = next(self._numbers), _Slot()
        self._slots[number] = slot
        return number, slot

    def _send(self, header: Event, body: bytes = b"") -> None:
        data = wire.frame(header, body)
        if self.gone:
            raise PeerLost(f"the control channel is gone: {self.gone}")
        try:
            with self._sending:
                self._sock.sendall(data)
        except OSError as error:
            raise PeerLost(f"the control channel is gone: {self.gone or error}") from error

    def _ask(
        self,
        request: Event,
        body: bytes = b"",
        timeout: float = 60.0,
        what: str = "the control channel",
        idle: Callable[[], None] | None = None,
    ) -> tuple[Event, bytes]:
        number, slot = self._slot()
        self._send({**request, "id": number}, body)
        if not _idled(slot.ready, timeout, idle):
            self._slots.pop(number, None)
            raise CommTimeout(f"{what}: no answer after {timeout:g} s")
        return self._taken(number, slot)

    def _taken(self, number: int, slot: _Slot) -> tuple[Event, bytes]:
        self._slots.pop(number, None)
        if not slot.header:
            raise PeerLost(f"the control channel is gone: {self.gone}")
        return slot.header, slot.body

    def _read(self) -> None:
        why = ""
        try:
            while True:
                found = wire.take(self._buffer)
                if found is None:
                    data = self._sock.recv(1 << 18)
                    if not data:
                        break
                    self._buffer += data
                elif "id" in found[0]:
                    slot = self._slots.get(found[0]["id"])
                    if slot is not None:
                        slot.header, slot.body = found
                        slot.ready.set()
                elif found[0].get("event") == "closing":
                    why = "rank 0 has left the job"
                elif found[0].get("event") == "refused":
                    why = f"the hub refused what this rank sent: {found[0].get('why')}"
                else:
                    self._deliver(found[0])
        except (OSError, wire.Malformed) as error:
            why = why or f"the connection to it broke: {error}"
        except Exception as error:  # a defect of ours: then nothing can be heard any more, and everybody must know
            traceback.print_exc()
            why = f"this rank's end of it failed: {error}"
        quietly = bool(why.startswith("rank 0 has left") or self.gone)
        self.gone = self.gone or why or "its process died, or ended without commlayer.finalize()"
        for slot in list(self._slots.values()):
            slot.ready.set()
        if not quietly:
            self._deliver({"event": "lost", "rank": 0, "why": self.gone})

    def _deliver(self, event: Event) -> None:
        with self._sending:
            if self._on_event is None:
                self._events.append(event)
                return
        try:
            self._on_event(event)
        except Exception:  # whatever this event held, the next one counts
            traceback.print_exc()


def _idled(ready: threading.Event, timeout: float, idle: Callable[[], None] | None) -> bool:
    """Wait like ``ready.wait(timeout)``."""
    if idle is None:
        return ready.wait(timeout)
    end, pause = time.monotonic() + timeout, 1e-3
    while not ready.wait(min(pause, max(end - time.monotonic(), 0))):
        if time.monotonic() >= end:
            return False
        idle()
        pause = min(pause * 1.5, 0.02)
    return True


def _split(body: bytes, sizes: Sequence[int]) -> list[bytes]:
    ends = list(itertools.accumulate(sizes))
    return [body[end - size : end] for end, size in zip(ends, sizes, strict=True)]


# A forked child (a data loader's worker, say) holds the same sockets: as long as it lives, the death of its parent
# would go unseen.
_alive: weakref.WeakSet[Client] = weakref.WeakSet()


def _abandon_all() -> None:
    for client in list(_alive):
        client.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
