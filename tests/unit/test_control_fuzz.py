"""The control channel under attack: strangers change nothing, and a member that sends nonsense ends alone."""

import os
import resource
import socket
import struct
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commlayer.control import Client, Hub, hub, wire
from commlayer.control.service import Service
from commlayer.errors import CommError, LaunchError

EXAMPLES = int(os.environ.get("COMMLAYER_TEST_EXAMPLES", "800")) // 10
SECRET = b"s" * 32
SIZE = 4  # ranks of the job; the last one is free, for who wants to be it
SECONDS = 1.0  # for the hub to answer its members
MEBIBYTES = 128  # that strangers may cost


fuzz = settings(
    max_examples=max(30, EXAMPLES),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Job:
    """A hub, the members 0 … 2 of its four ranks, and what they were told."""

    def __init__(self):
        self.hub = Hub("127.0.0.1", 0, SECRET, SIZE)
        self.events = []
        self.members = [self.member(rank) for rank in range(SIZE - 1)]
        self.meetings = 0

    def member(self, rank):
        made = Client(self.hub.address, self.hub.port, SECRET, rank, 5.0, self.hub if rank == 0 else None)
        made.listen(self.events.append)
        return made

    def stranger(self):
        made = socket.create_connection((self.hub.address, self.hub.port), timeout=5)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def check(self):
        """The members work as ever, at once."""
        self.meetings += 1
        key, began = f"check {self.meetings}", time.monotonic()
        found = {}

        def meet(member):
            found[member.rank] = member.meet(key, range(SIZE - 1), bytes([member.rank]), 5.0)

        threads = [threading.Thread(target=meet, args=(member,)) for member in self.members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert list(found.values()) == [[bytes([rank]) for rank in range(SIZE - 1)]] * (SIZE - 1)
        self.members[1].set(key, b"value")
        assert self.members[2].get([key], 5.0) == [b"value"]
        assert time.monotonic() - began < SECONDS
        assert self.hub.is_alive()

    def untouched(self):
        self.check()
        assert self.events == []
        assert self.hub.service.lost == {}

    def close(self):
        for member in reversed(self.members):
            member.close(1.0)


@contextmanager
def running():
    made = Job()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def job():
    with running() as made:
        yield made


def frames(sock):
    """What comes, until the connection ends or nothing comes in time."""
    buffer = bytearray()
    with suppress(OSError):
        while data := sock.recv(1 << 16):
            buffer += data
            while (found := wire.take(buffer)) is not None:
                yield found[0]


def first(sock):
    return next(frames(sock), None)


def ended(sock, seconds=5.0):
    """Whether the other end closes the connection within this time."""
    sock.settimeout(seconds)
    try:
        while sock.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:  # reset
        pass
    return True


def introduction(sock, rank=3, secret=SECRET, **other):
    """The frame by which a rank is admitted on this connection."""
    theirs = first(sock)["nonce"]
    proof = wire.proof(secret, f"rank {rank}", theirs, "mine")
    return wire.frame({"rank": rank, "nonce": "mine", "proof": proof, **other})


def admitted(job, rank=3):
    """A connection that is a member, to send what a Client would not."""
    sock = job.stranger()
    sock.sendall(introduction(sock, rank))
    assert "proof" in first(sock)
    return sock


# Strangers ------------------------------------------------------------------------------------------------

LENGTHS = st.sampled_from([0, 1, 2, 511, 512, 513, 1 << 16, 1 << 24, 1 << 31, (1 << 32) - 1])
REQUESTS = [
    {"do": "set", "key": "check 1"},
    {"do": "exit"},
    {"do": "tell", "event": {"event": "lost", "rank": 1, "why": "a lie"}},
    {"do": "bye", "generation": 1, "ends": {}},
    {"rank": 3},
    {"rank": 3, "nonce": "n", "proof": None},
    {"rank": 3, "nonce": "n", "proof": "0" * 64},
    {"rank": 3, "nonce": "\ud800", "proof": "\ud800"},
    {"rank": -1, "nonce": "n", "proof": "p"},
    {"rank": 10**300, "nonce": "n", "proof": "p"},
    {"rank": True, "nonce": "n", "proof": "p"},
    {"rank": [0], "nonce": {}, "proof": 1},
]
BLOBS = st.one_of(
    st.binary(max_size=100),
    st.builds(
        lambda header, body, rest: struct.pack("!II", header, body) + rest, LENGTHS, LENGTHS, st.binary(max_size=600)
    ),
    st.sampled_from(REQUESTS).map(wire.frame),
    st.sampled_from(REQUESTS).map(lambda request: wire.frame(request, b"body")),
    st.sampled_from(REQUESTS).flatmap(lambda r: st.integers(0, 40).map(lambda cut: wire.frame(r)[:-cut])),
    st.sampled_from([b"[" * 500, b'{"a":' * 100, b"9" * 510, b"NaN", b"\xff\xfe", b"{}", b"3", b"null"]).map(
        lambda text: struct.pack("!II", len(text), 0) + text
    ),
    st.just(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    st.just(b"\x00" * (1 << 20)),
)


@fuzz
@given(
    st.lists(st.tuples(st.lists(BLOBS, max_size=3), st.sampled_from(["close", "half", "reset", "keep"])), max_size=5)
)
def test_strangers_change_nothing(job, attempts):
    with ExitStack() as kept:
        for blobs, end in attempts:
            stranger = kept.enter_context(job.stranger())
            with suppress(OSError):  # it has been shown the door
                for blob in blobs:
                    stranger.sendall(blob)
                if end == "half":
                    stranger.shutdown(socket.SHUT_WR)
            if end == "reset":
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if end in ("close", "reset"):
                stranger.close()
        job.untouched()


def test_who_does_not_know_the_secret_is_refused(job):
    for secret in (b"", b"wrong", SECRET[:-1], SECRET + b"s"):
        with job.stranger() as sock:
            sock.sendall(introduction(sock, secret=secret))
            assert first(sock) == {"refused": "it does not know the job's secret"}
            assert ended(sock)
    with pytest.raises(LaunchError, match="does not know the job's secret"):
        Client(job.hub.address, job.hub.port, b"wrong", 3, 5.0)
    job.untouched()


def test_what_was_overheard_cannot_be_used_again(job):
    with job.stranger() as one, job.stranger() as other:
        overheard = introduction(one)
        first(other)
        other.sendall(overheard)
        assert first(other) == {"refused": "it does not know the job's secret"}
    job.untouched()


def test_a_rank_that_is_here_cannot_be_replaced(job):
    with job.stranger() as sock:
        sock.sendall(introduction(sock, rank=1))
        assert "connected already" in first(sock)["refused"]
        assert ended(sock)
    job.untouched()


def test_a_false_hub_is_recognised():
    """It knows the protocol, not the secret: by its own nonces, and by echoing those of who connects."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend():
            for _ in range(2):
                sock, _ = listener.accept()
                with sock:
                    sock.sendall(wire.frame({"commlayer": 1, "nonce": "n"}))
                    answer = first(sock)
                    sock.sendall(wire.frame({"proof": answer["proof"], "size": 4}))
                    ended(sock)

        thread = threading.Thread(target=pretend)
        thread.start()
        for _ in range(2):
            with pytest.raises(LaunchError, match="does not know the job's secret"):
                Client(*listener.getsockname(), SECRET, 1, 5.0)
        thread.join()


def test_a_flood_of_connections(job):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ExitStack() as kept:
        flood = [kept.enter_context(job.stranger()) for _ in range(500)]
        job.untouched()
        for sock in flood:
            with suppress(OSError):
                sock.sendall(b"\x00\x00\x01\xff\x00\x00\x00\x00" + b"x" * 100)
        job.untouched()
        assert len(job.hub._peers) <= SIZE - 1 + hub.MAX_STRANGERS + 1
        with job.stranger() as sock:  # and who belongs here still comes in
            sock.sendall(introduction(sock, rank=1))
            assert "connected already" in first(sock)["refused"]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEBIBYTES


def test_connections_that_come_and_go(job):
    for _ in range(500):
        job.stranger().close()
    job.untouched()


def test_one_byte_at_a_time(monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    with running() as job, job.stranger() as slow, job.stranger() as silent:
        frame = introduction(slow)
        began = time.monotonic()
        with suppress(OSError):
            for byte in frame:
                slow.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - began < 3.0
        assert ended(silent, 0.5)
        job.untouched()
        time.sleep(0.6)
        job.untouched()  # members are not held to that patience


def test_a_stranger_that_reads_nothing_and_sends_much(job):
    with job.stranger() as sock:
        sock.settimeout(0.2)
        sent = 0
        with suppress(OSError):
            while sent < 1 << 26:
                sent += sock.send(b"\x00\x00\x01\x00" + b"\x00" * (1 << 16))
        assert sent < 1 << 26
        job.untouched()


# Members --------------------------------------------------------------------------------------------------

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        [10**400, -1, 1e308, "\ud800", "check 1", [], [0, 1], [9], ["a"], {}, [float("inf")], {"event": "x"}]
    ),
)
NAMES = ["exit", *(name.removeprefix("_do_") for name in dir(Service) if name.startswith("_do_"))]
FIELDS = ["key", "keys", "by", "id", "split", "ranks", "generation", "ends", "event", "group", "within", "token", "at"]
# Ordinary values that let a request reach its last line, one or two of which are spoilt.
PLAIN = {
    "key": "k", "keys": ["k"], "by": 1, "id": 1, "split": 0, "ranks": [0, 1], "generation": 1, "ends": {},
    "event": {"event": "news"}, "group": "world", "within": 0.05, "token": 1, "at": None,
}  # fmt: skip


def send_and_check(data):
    """Send this as rank 3: whatever becomes of it, the hub serves the others on."""
    with running() as job:
        with admitted(job) as sock:
            sock.sendall(data + wire.frame({"do": "time", "id": "last"}))
            any(frame.get("id") == "last" for frame in frames(sock))  # until it has read all, or refused
        job.check()


@fuzz
@given(
    st.sampled_from(NAMES),
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=2),
    st.sets(st.sampled_from(FIELDS), max_size=1),
)
def test_a_member_that_sends_nonsense_ends_alone(name, spoilt, left_out):
    request = {"do": name, **PLAIN, **spoilt}
    for field in left_out:
        del request[field]
    send_and_check(wire.frame(request, b"body"))


MALFORMED = {
    "no request": (wire.frame({}), "None"),
    "unknown": (wire.frame({"do": "rm"}), "rm"),
    "unknown by type": (wire.frame({"do": ["set"]}), "set"),
    "dunder": (wire.frame({"do": "_class__"}), "_class__"),
    "a list": (struct.pack("!II", 2, 0) + b"[]", "list"),
    "no JSON": (struct.pack("!II", 4, 0) + b"nope", "no JSON"),
    "not UTF-8": (struct.pack("!II", 2, 0) + b"\xff\xff", "no JSON"),
    "a huge header": (struct.pack("!II", (1 << 32) - 1, 0), "4294967295"),
    "a huge body": (struct.pack("!II", 2, (1 << 32) - 1) + b"{}", "4294967295"),
    "a huge number": (struct.pack("!II", 5000, 0) + b"9" * 5000, "no JSON"),
    "no key": (wire.frame({"do": "set"}), "key"),
    "a key that is no text": (wire.frame({"do": "set", "key": [1]}), "in place of a text"),
    "no number": (wire.frame({"do": "get", "keys": ["x"]}), "id"),
    "ranks no text": (wire.frame({"do": "meet", "key": "k", "id": 1, "ranks": 3}), "in place of a text"),
    "far too many": (wire.frame({"do": "meet", "key": "k", "id": 1, "ranks": "0-99999999999"}), "0-99999999999"),
    "add infinity": (wire.frame({"do": "add", "key": "k", "id": 1, "by": float("inf")}), "infinity"),
    "deep": (struct.pack("!II", 100_000, 0) + b"[" * 100_000, "no JSON"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_answered_by_what_is_wrong(name):
    data, word = MALFORMED[name]
    with running() as job:
        with admitted(job) as sock:
            sock.sendall(data)
            sock.settimeout(2.0)
            told = first(sock)
        job.check()
        assert told is not None
        assert told["event"] == "refused"
        assert word in told["why"]
        lost = [event for event in job.events if event["event"] == "lost"]
        assert {event["rank"] for event in lost} == {3}
        assert all("cannot read" in event["why"] for event in lost)


@pytest.mark.parametrize("within", [float("inf"), float("-inf"), float("nan"), 1e300, -1e300])
def test_a_question_that_ends_at_no_time(within, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.1)  # so that no other timer comes before
    with running() as job:
        with admitted(job) as sock:
            sock.sendall(wire.frame({"do": "where", "group": "g", "ranks": [0], "within": within, "id": 1}))
            time.sleep(0.3)
            job.check()
        job.check()


def test_news_as_deep_as_can_be_read():
    """Some can be read and not be written again."""
    for depth in range(sys.getrecursionlimit() - 25, sys.getrecursionlimit()):
        event = '{"event": "news", "at": ' + "[" * depth + "]" * depth + "}"
        text = ('{"do": "tell", "event": ' + event + "}").encode()
        send_and_check(struct.pack("!II", len(text), 0) + text)


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 30])
def test_a_member_that_ends_in_the_middle_of_a_frame(cut):
    frame = wire.frame({"do": "meet", "key": "k", "id": 1, "ranks": [0, 3]}, b"payload")
    with running() as job:
        admitted_then_gone = admitted(job)
        admitted_then_gone.sendall(frame[:cut])
        admitted_then_gone.close()
        job.check()
        deadline = time.monotonic() + 2
        while not job.hub.service.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        assert set(job.hub.service.lost) == {3}


def test_the_client_says_why_it_was_refused():
    with running() as job:
        member = job.member(3)
        member._send({"do": "nonsense"})
        with pytest.raises(CommError, match="nonsense"):
            member.get(["a key that nobody sets"], 2.0)
        member.close(0)
        job.check()


def test_a_request_split_over_many_packets_is_one_request():
    frame = wire.frame({"do": "add", "key": "n", "by": 2, "id": 7})
    with running() as job, admitted(job) as sock:
        for byte in frame * 2:
            sock.sendall(bytes([byte]))
        sock.settimeout(2.0)
        assert list(islice(frames(sock), 2)) == [{"id": 7, "total": 2}, {"id": 7, "total": 4}]
        job.check()
