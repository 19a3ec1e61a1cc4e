"""What the members of a job ask the hub for: keys and values, meetings, news, questions.

It knows members by rank and no connection; the hub carries what it sends.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

from commlayer.control import wire
from commlayer.control.meetings import Answers, Meetings
from commlayer.control.ranks import expanded

KNOT = 1.0  # seconds after which meetings that wait for each other are given up
MAX_ASKING = 60.0  # seconds that a question may stay open

Header = dict[str, Any]


class Service:
    """``send(rank, header, body)`` reaches a member, ``after(seconds, action)`` calls later."""

    def __init__(
        self,
        members: Collection[int],
        send: Callable[[int, Header, bytes], None],
        after: Callable[[float, Callable[[], Any]], None],
    ) -> None:
        self._members, self._carry, self._after = members, send, after
        self.lost: dict[int, str] = {}
        self._left: dict[int, int] = {}  # by rank: the last generation that it has finalized
        self._values: dict[str, bytes] = {}
        self._wanted: dict[str, list[Callable[[], None]]] = {}  # by key: who waits for it
        self._meetings = Meetings()
        self._questions: dict[int, tuple[set[int], dict[str, Any], Callable[[], None]]] = {}
        self._numbers = itertools.count()

    def handle(self, rank: int, header: Header, body: bytes) -> None:
        """Do what a member asks for. Raises whatever its nonsense leads to."""
        action = getattr(self, f"_do_{header.get('do')}", None)
        if action is None:
            raise wire.Malformed(f"the request {header.get('do')!r}")
        action(rank, header, body)

    def lose(self, rank: int, why: str) -> None:
        """A member is gone, or will be, and nobody expected it."""
        if rank not in self.lost:
            self.lost[rank] = why
            self._tell({"event": "lost", "rank": rank, "why": why}, but=rank)
            self._absent(rank, why)

    def leave(self, rank: int) -> None:
        """A member is gone as it said it would."""
        self._left[rank] = sys.maxsize
        self._absent(rank, "it has left the job")

    def _send(self, rank: int, header: Header, body: bytes = b"") -> None:
        if rank in self._members:
            self._carry(rank, header, body)

    def _tell(self, event: Header, but: int) -> None:
        for rank in list(self._members):
            if rank != but:
                self._send(rank, event)

    def _do_set(self, rank: int, header: Header, body: bytes) -> None:
        self._values[_text(header["key"])] = body
        for attempt in self._wanted.pop(header["key"], []):
            attempt()

    def _do_add(self, rank: int, header: Header, body: bytes) -> None:
        total = int(self._values.get(header["key"], b"0")) + int(header["by"])
        self._do_set(rank, header, str(total).encode())
        self._send(rank, {"id": header["id"], "total": total})

    def _do_swap(self, rank: int, header: Header, body: bytes) -> None:
        """Compare and set: the body is the expected value and, after so many bytes, the one to put there."""
        expected, wanted = body[: header["split"]], body[header["split"] :]
        now = self._values.get(header["key"])
        if now == expected or (now is None and not expected):
            self._do_set(rank, header, wanted)
            now = wanted
        self._send(rank, {"id": header["id"]}, expected if now is None else now)

    def _do_delete(self, rank: int, header: Header, body: bytes) -> None:
        self._send(rank, {"id": header["id"], "found": self._values.pop(header["key"], None) is not None})

    def _do_check(self, rank: int, header: Header, body: bytes) -> None:
        self._send(rank, {"id": header["id"], "found": all(key in self._values for key in header["keys"])})

    def _do_get(self, rank: int, header: Header, body: bytes) -> None:
        """Answered once all keys are there, or one of the ranks concerned is lost."""
        keys, number = [_text(key) for key in header["keys"]], header["id"]
        ranks = frozenset(expanded(_text(header["ranks"]))) if header["ranks"] else frozenset()

        def attempt() -> None:
            missing = next((key for key in keys if key not in self._values), None)
            gone = {} if missing is None else self._gone(missing)
            if lost := sorted(ranks & gone.keys()):
                self._send(rank, {"id": number, "lost": lost[0], "why": gone[lost[0]]})
            elif missing is None:
                values = [self._values[key] for key in keys]
                for key in keys if header.get("take") is True else ():
                    self._values.pop(key, None)
                self._send(rank, {"id": number, "sizes": [len(value) for value in values]}, b"".join(values))
            else:
                self._wanted.setdefault(missing, []).append(attempt)

        attempt()

    def _do_meet(self, rank: int, header: Header, body: bytes) -> None:
        """Answered to all with everybody's body, once everybody has come; with who is missing, if that cannot be."""
        key, ranks = _text(header["key"]), expanded(_text(header["ranks"]))
        self._answer(self._meetings.join(key, rank, header["id"], ranks, body, self._gone(key)))
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

    def _do_give_up(self, rank: int, header: Header, body: bytes) -> None:
        self._answer(self._meetings.give_up(_text(header["key"]), rank))

    def _answer(self, answers: Answers) -> None:
        for rank, number, header, body in answers:
            self._send(rank, {"id": number, **header}, body)

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

    def _do_bye(self, rank: int, header: Header, body: bytes) -> None:
        """A rank has finalized: what it took part in, by group."""
        self._left[rank] = max(self._left.get(rank, 0), int(header["generation"]))
        prefix = f"{header['generation']}/"
        self._answer(self._meetings.absent(rank, "it has left the job", prefix))
        self._tell({"event": "left", "rank": rank, **_some(header, "generation", "ends")}, but=rank)

    def _do_tell(self, rank: int, header: Header, body: bytes) -> None:
        event = header["event"]
        if not isinstance(event["event"], str) or "id" in event:
            raise wire.Malformed("an event without a name, or like an answer")
        if event["event"] == "failed":
            self.lose(rank, str(event["why"]))
        else:
            self._tell({**event, "from": rank}, but=rank)

    def _do_time(self, rank: int, header: Header, body: bytes) -> None:
        self._send(rank, {"id": header["id"], "time": time.time_ns()})

    def _do_where(self, rank: int, header: Header, body: bytes) -> None:
        """Ask these ranks where they are in a group; answered with what has come when the time is over."""
        within = float(header["within"])
        if not 0 <= within <= MAX_ASKING:
            raise wire.Malformed(f"a question for {within} s")
        token, waiting_for = next(self._numbers), set(header["ranks"]) & set(self._members)
        answers: dict[str, Any] = {}

        def answer() -> None:
            if self._questions.pop(token, None) is not None:
                self._send(rank, {"id": header["id"], "answers": answers})

        self._questions[token] = (waiting_for, answers, answer)
        for other in list(waiting_for):
            self._send(other, {"event": "where", "token": token, "group": header["group"]})
        if not waiting_for:
            answer()
        self._after(within, answer)

    def _do_here(self, rank: int, header: Header, body: bytes) -> None:
        question = self._questions.get(header["token"])
        if question is not None:
            waiting_for, answers, answer = question
            at = header["at"]
            answers[str(rank)] = None if at is None else {"seq": int(at["seq"]), "last": str(at["last"])}
            waiting_for.discard(rank)
            if not waiting_for:
                answer()


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise wire.Malformed(f"{key!r} in place of a text")
    return key


def _some(header: Header, *names: str) -> Header:
    return {name: header[name] for name in names}


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
