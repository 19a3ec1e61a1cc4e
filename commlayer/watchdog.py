"""Sees to it that no rank waits in vain: deadlines, lost peers, calls that do not match.

A ``Watchdog`` listens to the control channel for this process; a ``Watch`` is what it knows of one group. An
operation that fails on one rank fails on all ranks of its group, with one explanation, and so does every later one.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from commlayer import errors, mismatch
from commlayer.backends.base import Communicator
from commlayer.control.ranks import compact
from commlayer.control.seat import Control
from commlayer.errors import CollectiveMismatch, CommError, CommTimeout, NonFinite, PeerLost, UnsupportedOperation
from commlayer.recorder import Details, Operation, Recorder
from commlayer.reduce_op import ReduceOp

ASKING = 0.3  # seconds for the others to say where they are
NEWS = 1.0  # seconds that news of a lost rank may take, when the backend has noticed first
GRACE = 1.0  # seconds for messages of a rank that has left to arrive


class Watchdog:
    """One per process, or per thread of run_local. ``control`` is None where there is nobody else."""

    def __init__(
        self,
        recorder: Recorder,
        control: Control | None = None,
        generation: int = 1,
        *,
        rank: int = 0,
        debug: bool = False,
        check_nan: bool = False,
        trace: Any = None,
    ) -> None:
        self.recorder, self.control, self.generation, self.rank = recorder, control, generation, rank
        self.debug, self.check_nan, self.trace = debug, check_nan, trace
        self.watches: dict[str, Watch] = {}
        self.lost: dict[int, str] = {}
        self.left: dict[int, dict[str, int]] = {}
        self.broken = False  # any of the groups
        self.ends: dict[str, int] = {}  # of groups that were closed: the collectives they had
        self.changed = threading.Condition()
        self._made: dict[tuple[int, ...], int] = {}

    def label(self, ranks: Sequence[int]) -> str:
        """The name of the next group of these ranks, the same on each of them."""
        members = tuple(ranks)
        self._made[members] = count = self._made.get(members, 0) + 1
        return compact(members) + (f"#{count}" if count > 1 else "")

    def on_event(self, event: dict[str, Any]) -> None:
        """News from the control channel, in its thread."""
        kind = event["event"]
        if kind == "where":
            watch = self.watches.get(event["group"])
            assert self.control is not None
            with suppress(CommError):
                self.control.here(event["token"], None if watch is None else watch.place())
        elif kind == "lost":
            self._lose(event["rank"], event["why"])
        elif kind == "failed":  # of threads; the hub makes it a loss
            self._lose(event["from"], event["why"])
        elif kind == "left" and event["generation"] == self.generation:
            self._leave(event["rank"], event["ends"])
        elif kind == "broken" and event["generation"] == self.generation:
            watch = self.watches.get(event["group"])
            if watch is not None:
                watch.fail(getattr(errors, event["error"]), event["why"], event["origin"])

    def _lose(self, rank: int, why: str) -> None:
        if rank in self.left or rank in self.lost:
            return
        self.lost[rank] = why
        for watch in list(self.watches.values()):
            watch.lose(rank, why)
        with self.changed:
            self.changed.notify_all()

    def _leave(self, rank: int, ends: dict[str, int]) -> None:
        self.left[rank] = ends
        for watch in list(self.watches.values()):
            watch.leave(rank, ends)

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank ends with an error."""
        self.broken = True
        self.tell({"event": "failed", "why": said(error)})

    def bye(self) -> None:
        """This rank takes part in nothing more."""
        if self.trace is not None:
            self.trace.close()
        if self.control is not None:
            with suppress(CommError):
                now = {label: watch.seq for label, watch in self.watches.items()}
                self.control.bye(self.generation, self.ends | now)

    def everybody_gone(self) -> bool:
        """Whether no other rank is left, or none can be heard of."""
        gone = self.control is None or bool(self.control.gone)
        return gone or len(self.lost.keys() | self.left.keys()) >= self.recorder.size - 1

    def tell(self, event: dict[str, Any]) -> None:
        if self.control is not None:
            with suppress(CommError):
                self.control.tell({**event, "generation": self.generation})

    def report(self, reason: str) -> None:
        """Write the flight recorder to a file and say where."""
        try:
            path = self.recorder.dump(reason)
            where = f"flight recorder: {path}"
        except Exception as error:  # the news is the failure, not this
            where = f"the flight recorder could not be written: {error}"
        sys.stderr.write(f"commlayer: rank {self.rank}: {reason.splitlines()[0]} ({where})\n")
        sys.stderr.flush()


class Watch:
    """One group as the watchdog sees it; ``ranks`` are those of the world."""

    def __init__(
        self,
        dog: Watchdog,
        comm: Communicator,
        ranks: Sequence[int],
        label: str,
        plan_of: Callable[[Operation], str],
    ) -> None:
        self.dog, self.comm, self.ranks, self.label = dog, comm, tuple(ranks), label
        self.plan_of = plan_of
        self.seq = 0
        self.failure: tuple[type[CommError], str, str] | None = None  # kind, reason, and the call that met it first
        self.trace = dog.trace
        self.bound = math.inf  # collectives that can still happen
        # Under COMMLAYER_DEBUG, counted by source, destination and tag.
        self.messages: Counter[tuple[int, int, int]] = Counter()
        self._checks = (dog.debug or dog.check_nan) and comm.size > 1
        self._record = dog.recorder.operations.append
        if comm.size > 1:
            dog.watches[label] = self
            for rank, why in list(dog.lost.items()):
                self.lose(rank, why)
            for rank, ends in list(dog.left.items()):
                self.leave(rank, ends)

    def close(self, end: float) -> None:
        """Collectives that nobody has waited for may go on until ``end``, for the sake of the others."""
        if self.dog.watches.pop(self.label, None) is not None:
            self.dog.ends[self.label] = self.seq
        operations = [op for op in self.dog.recorder.unfinished() if op.watch is self and op.seq is not None]
        handles = [op.handle() for op in operations if op.handle is not None]
        # Each is asked every time, since asking is what makes MPI progress.
        try:
            while self.failure is None and not all([handle.done() for handle in handles if handle is not None]):  # noqa: C419
                if time.monotonic() > end:
                    self.fail(CommError, f"closed while {operations[0]} was unfinished")
                time.sleep(0.002)
        except CommError as error:
            self.fail(type(error), str(error))

    def begin(
        self,
        name: str,
        x: torch.Tensor | None = None,
        reduce: ReduceOp | None = None,
        details: Details = (),
        timeout: float | None = None,
        peers: tuple[int, ...] = (),
    ) -> Operation:
        """Record a call, and refuse it where the group is broken. ``peers`` make it a message."""
        op = Operation(self, name, x, reduce, details, peers, timeout)
        if not peers:
            self.seq = op.seq = self.seq + 1
        self._record(op)
        if self.seq > self.bound or (peers and self.dog.left):
            self._refuse(op)
        if self._checks:
            self._check(op, x)
        return op

    def place(self) -> dict[str, Any]:
        """Where this rank is, for others."""
        last = self.dog.recorder.last(self.label)
        return {"seq": self.seq, "last": "" if last is None else f"{last}{'' if last.end else ', unfinished'}"}

    # Failures

    def fail(self, kind: type[CommError], why: str, origin: str = "") -> None:
        """Break the group: whoever waits in it is woken, and nobody can use it any more."""
        if self.failure is None:
            self.failure = (kind, why, origin)
            self.bound = -1
            self.dog.broken = True
            for comm in (self.comm, *self.comm.parts):
                comm.fail(kind(why))
            with self.dog.changed:
                self.dog.changed.notify_all()

    def lose(self, rank: int, why: str) -> None:
        if rank in self.ranks:
            self.fail(PeerLost, f"rank {rank} is lost: {why}")

    def leave(self, rank: int, ends: dict[str, int]) -> None:
        """A rank has finalized, having taken part in so many collectives of this group."""
        if rank not in self.ranks:
            return
        self.bound = min(self.bound, ends.get(self.label, 0))
        for op in self.dog.recorder.unfinished():
            if op.watch is self and (op.seq or 0) > self.bound:
                self.fail(PeerLost, self._left(rank))
            elif op.watch is self and op.waiting:
                self.expect(op)

    def _left(self, rank: int) -> str:
        count = self.dog.left[rank].get(self.label, 0)
        return f"rank {rank} is lost: it has left the job after {count} collectives of this group"

    def expect(self, op: Operation) -> None:
        """Somebody waits for a message; where its rank has left, it may be under way, for ``GRACE`` seconds."""
        rank = next((self.ranks[peer] for peer in op.peers if self.ranks[peer] in self.dog.left), None)
        if rank is None:
            return
        timer = threading.Timer(GRACE, lambda: None if op.end else self.fail(PeerLost, self._left(rank)))
        timer.daemon = True
        timer.start()

    def _refuse(self, op: Operation) -> None:
        if self.failure is None and op.peers:
            return self.expect(op)
        if self.failure is None:
            left = [rank for rank in self.dog.left if rank in self.ranks]
            gone = min(left, key=lambda rank: self.dog.left[rank].get(self.label, 0))
            self.fail(PeerLost, self._left(gone))
        assert self.failure is not None
        kind, why, origin = self.failure
        op.error, op.end = kind.__name__, op.start
        raise kind(f"{op}: this group is broken{origin and ' since ' + origin}: {why}")

    def explain(self, op: Operation, error: CommError) -> CommError:
        """What to raise for a backend's error, once it is known what happened; breaks the group, on all ranks."""
        if isinstance(error, UnsupportedOperation):  # before anything was communicated, and on every rank
            return error
        if self.failure is None and (isinstance(error, PeerLost) or type(error) is CommError):
            # The backend has noticed first: the control channel will tell who it is.
            with self.dog.changed:
                self.dog.changed.wait_for(lambda: self.failure is not None, NEWS if self.dog.control else 0)
            gone = next((rank for rank in self.ranks if rank in self.dog.left), None)
            if gone is not None and isinstance(error, PeerLost):
                self.fail(PeerLost, self._left(gone))
        if self.failure is None:
            if isinstance(error, CollectiveMismatch) and op.peers:
                return CollectiveMismatch(f"{op}: {error}")  # one message is gone, and nothing else
            self._break(op, type(error), self._missing(op) if isinstance(error, CommTimeout) else str(error))
        assert self.failure is not None
        kind, why, origin = self.failure
        explained = kind(f"{op}: {why}" if not origin or origin.startswith(op.label()) else f"{op}: {origin}: {why}")
        self.dog.report(f"{kind.__name__}: {explained}")
        return explained

    def explain_native(self, name: str, error: RuntimeError) -> CommError:
        """The same for an operation of the backend's own that was not recorded, and is known by its name alone."""
        op = Operation(self, name, None, None, (), (), None)
        return self.explain(op, self.comm.translated(error, name))

    def interrupt(self, op: Operation, error: BaseException) -> None:
        """Something else than the layer ended an operation half way (Ctrl-C, memory): it cannot be taken up again."""
        op.error, op.end = said(error), time.perf_counter_ns()
        if not isinstance(error, Warning):  # made an error before anything was communicated
            self._break(op, PeerLost, f"rank {self.ranks[self.comm.rank]} is lost: {said(error)}")

    def _break(self, op: Operation, kind: type[CommError], why: str) -> None:
        origin = f"{op.label()} at {op.site()} on rank {self.ranks[self.comm.rank]}"
        self.dog.tell({"event": "broken", "group": self.label, "error": kind.__name__, "why": why, "origin": origin})
        self.fail(kind, why, origin)

    def _missing(self, op: Operation) -> str:
        """Why an operation has timed out: who is where."""
        text = f"not finished after {op.timeout or self.comm.timeout:g} s"
        others = [rank for rank in self.ranks if rank != self.ranks[self.comm.rank]]
        if op.peers:
            others = [rank for rank in dict.fromkeys(self.ranks[peer] for peer in op.peers) if rank in others]
        control = self.dog.control
        if control is None or control.gone or not others:
            return text + (f"; nobody knows more, since {control.gone}" if control is not None and control.gone else "")
        try:
            answers = control.where(self.label, others, ASKING)
        except CommError:
            return f"{text}; rank 0, which keeps the control channel, does not answer: it is stopped, or out of reach"
        reasons = []
        for rank in others:
            at = answers.get(rank)
            if rank not in answers:
                reasons.append(f"rank {rank} does not answer: it is stopped, or out of reach")
            elif at is None:
                reasons.append(f"rank {rank} never arrived (it has not made this group)")
            elif op.seq is None or at["seq"] < op.seq:
                verb = "is elsewhere" if op.seq is None else "never arrived"
                reasons.append(f"rank {rank} {verb} (last: {at['last'] or 'nothing yet'})")
        if not reasons:
            return f"{text}, although every rank has arrived: the backend is stuck, or a link between two ranks"
        shown = "; ".join(reasons[:16]) + (f"; and {len(reasons) - 16} more" if len(reasons) > 16 else "")
        return f"{text}; {shown}"

    def compare_message(self, op: Operation) -> None:
        """CollectiveMismatch, on all ranks, where the sender does not send what is expected here."""
        differing = mismatch.message(op)
        if differing:
            self._break(op, CollectiveMismatch, differing)
            raise CollectiveMismatch(differing)

    def _check(self, op: Operation, x: torch.Tensor | None) -> None:
        """What COMMLAYER_DEBUG and COMMLAYER_CHECK_NAN ask for, before anything is communicated."""
        differing = ""
        try:
            if self.dog.debug and op.seq is not None:
                differing = mismatch.compare(op)
            elif self.dog.debug:
                mismatch.announce(op, self.messages)
            if not differing and self.dog.check_nan and x is not None and (count := mismatch.nonfinite(op, x)):
                me = self.ranks[self.comm.rank]
                raise NonFinite(f"rank {me} was about to send {count} of {x.numel()} values that are NaN or infinite")
        except CommError as error:
            raise op.failed(error) from None
        if differing:  # on all ranks, and nothing was communicated: the group can go on
            op.error, op.end = differing, time.perf_counter_ns()
            raise CollectiveMismatch(differing)


def said(error: BaseException) -> str:
    """What the other ranks are told of an error."""
    text = (str(error).splitlines() or [""])[0]
    return f"it raised {type(error).__name__}: {text}"[:500]
