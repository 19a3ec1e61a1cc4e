"""The control channel by itself: its hub and clients in one process."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from commlayer import CommTimeout, LaunchError, PeerLost
from commlayer.control import Client, Hub, secret, wire
from commlayer.control.client import Knot
from commlayer.control.store import HubStore

SECRET = b"the job's"


class Job:
    """A hub and its clients, each with the events it has heard."""

    def __init__(self, size: int) -> None:
        self.hub = Hub("127.0.0.1", 0, SECRET, size)
        self.events: list[list[dict[str, Any]]] = [[] for _ in range(size)]
        self.clients = [
            Client("127.0.0.1", self.hub.port, SECRET, rank, 10, self.hub if rank == 0 else None)
            for rank in range(size)
        ]
        for client, events in zip(self.clients, self.events, strict=True):
            client.listen(events.append)

    def together(self, call: Callable[[int], Any]) -> list[Any]:
        """``call(rank)`` on every rank at once; its result, or what it raised."""
        results: list[Any] = [None] * len(self.clients)

        def run(rank: int) -> None:
            try:
                results[rank] = call(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self.clients))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def kill(self, rank: int) -> None:
        """End a rank's connection as its death would."""
        self.clients[rank]._sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def job():
    made = Job(3)
    yield made
    for client in reversed(made.clients):
        client.close(0)


def wait_for(what: Callable[[], Any]) -> None:
    end = time.monotonic() + 5
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_keys_and_values(job):
    a, b, c = job.clients
    a.set("x", b"1\0")
    assert b.get(["x"], 5) == [b"1\0"]
    assert (b.add("n", 3), c.add("n", -1)) == (3, 2)
    assert (a.check(["x", "n"]), a.check(["x", "y"])) == (True, False)
    assert (c.delete("x"), c.delete("x")) == (True, False)
    assert (b.swap("s", b"", b"new"), b.swap("s", b"other", b"no")) == (b"new", b"new")
    late = threading.Timer(0.1, lambda: c.set("late", b"!"))
    late.start()
    assert a.get(["n", "late"], 5) == [b"2", b"!"]
    with pytest.raises(CommTimeout, match="never"):
        a.get(["never"], 0.1)


def test_the_hub_is_a_torch_store(job):
    inner = HubStore(job.clients[1], 5, "q/", [0, 1])  # C++ alone would not keep it alive
    store = dist.PrefixStore("p", inner)
    store.set("a", "text")
    assert store.get("a") == b"text"
    assert store.add("n", 2) == 2
    assert job.clients[0].get(["q/p/a"], 5) == [b"text"]
    assert store.compare_set("c", "", "first") == b"first"
    assert store.check(["a"])
    assert store.delete_key("a")
    assert not store.check(["a"])
    threading.Timer(0.1, lambda: job.kill(2)).start()
    with pytest.raises(CommTimeout):  # rank 2 has nothing to do with it
        store.wait(["never"], timedelta(seconds=0.4))
    threading.Timer(0.1, lambda: job.kill(0)).start()
    with pytest.raises(PeerLost, match="rank 0 is lost"):
        store.wait(["never"], timedelta(seconds=30))


def test_a_meeting_brings_everybody_everything(job):
    rows = job.together(lambda rank: job.clients[rank].meet("m", [0, 1, 2], bytes([rank]) * rank, 5))
    assert rows == [[b"", b"\1", b"\2\2"]] * 3
    assert len(job.hub.service._meetings) == 0


def test_a_meeting_names_who_never_came(job):
    start = time.monotonic()
    errors = job.together(lambda rank: rank == 1 or job.clients[rank].meet("m", [0, 1, 2], b"", 0.3))
    assert isinstance(errors[0], CommTimeout)
    assert isinstance(errors[2], CommTimeout)
    assert "rank 1 never came" in str(errors[0])
    assert time.monotonic() - start < 1.0
    with pytest.raises(CommTimeout, match="rank 1 never came"):  # who comes late hears the same, and at once
        job.clients[1].meet("m", [0, 1, 2], b"", 60)


def test_a_meeting_ends_when_a_rank_dies_and_all_hear_of_it(job):
    threading.Timer(0.1, lambda: job.kill(2)).start()
    errors = job.together(lambda rank: rank == 2 or job.clients[rank].meet("m", [0, 1, 2], b"", 30))
    assert isinstance(errors[0], PeerLost)
    assert "rank 2 is lost" in str(errors[1])
    wait_for(lambda: job.events[0] and job.events[1])
    assert all(events[0]["event"] == "lost" and events[0]["rank"] == 2 for events in job.events[:2])


def test_ranks_that_wait_for_each_other_are_told(job):
    def call(rank: int) -> Any:
        first, second = ("a", "b") if rank == 0 else ("b", "a")
        job.clients[rank].meet(first, [0, 1], f"call {rank}".encode(), 30)
        return job.clients[rank].meet(second, [0, 1], b"", 30)

    start = time.monotonic()
    errors = job.together(lambda rank: None if rank == 2 else call(rank))
    assert time.monotonic() - start < 5
    assert all(isinstance(error, Knot) for error in errors[:2])
    assert errors[0].payloads == {0: "call 0", 1: "call 1"}


def test_a_longer_way_is_no_knot(job):
    """0 waits for 1 in one meeting, 1 for 2 in another, and 2 comes."""

    def call(rank: int) -> Any:
        time.sleep(0.1 * rank)
        if rank > 0:
            job.clients[rank].meet("b", [1, 2], b"", 10)
        return job.clients[rank].meet("a", [0, 1], b"", 10) if rank < 2 else None

    assert job.together(call) == [[b"", b""], [b"", b""], None]


def test_the_death_of_the_hub_is_the_loss_of_rank_0(job):
    for sock in list(job.hub._peers):
        sock.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: job.events[1])
    assert job.events[1][-1]["rank"] in (0, 2)
    with pytest.raises(PeerLost, match="control channel is gone"):
        job.clients[1].get(["x"], 30)


def test_leaving_is_no_loss(job):
    job.clients[1].bye(1, {"0-2": 7})
    wait_for(lambda: job.events[0])
    assert job.events[0] == [{"event": "left", "rank": 1, "generation": 1, "ends": {"0-2": 7}}]
    job.clients[1].close(0)
    job.clients[2].close(0)
    job.hub.drain(5)
    assert job.hub.service.lost == {}


def test_a_question_is_answered_by_who_can(job):
    me = job.clients[1]
    me.listen(lambda event: me.here(event["token"], {"seq": 4, "last": ""}) if event["event"] == "where" else None)
    start = time.monotonic()
    assert job.clients[0].where("0-2", [1, 2], 0.3) == {1: {"seq": 4, "last": ""}}
    assert 0.2 < time.monotonic() - start < 1.0


def test_who_does_not_know_the_secret_is_not_admitted(job):
    with pytest.raises(LaunchError, match="does not know the job's secret"):
        Client("127.0.0.1", job.hub.port, b"another", 1, 5)
    with pytest.raises(LaunchError, match="rank 1 is connected already"):
        Client("127.0.0.1", job.hub.port, SECRET, 1, 5)
    assert job.clients[1].check([]) is True


def test_a_false_hub_gets_nothing():
    """It is asked for its own proof, and sees none that it could use elsewhere."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(wire.frame({"commlayer": 1, "nonce": "00"}))
                connection.recv(4096)
                connection.sendall(wire.frame({"proof": "0" * 64, "size": 2}))
                connection.recv(4096)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(LaunchError, match="does not know the job's secret"):
            Client("127.0.0.1", server.getsockname()[1], SECRET, 1, 5)


def test_nobody_there_is_a_timeout():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(CommTimeout, match=r"within 0\.5 s"):
        Client("127.0.0.1", port, SECRET, 1, 0.5)
    assert time.monotonic() - start < 2


def test_a_forked_child_does_not_keep_a_dead_parent_alive():
    """As a data loader's worker would, whose parent is killed."""
    hub = Hub("127.0.0.1", 0, SECRET, 2)
    program = f"""
import os, signal, time
from commlayer.control import Client
client = Client("127.0.0.1", {hub.port}, {SECRET!r}, 1, 10)
child = os.fork()
if child == 0:
    time.sleep(20)
    os._exit(0)
client.set("child", str(child).encode())
client.get(["go"], 10)
os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    client = Client("127.0.0.1", hub.port, SECRET, 0, 10, hub)
    events: list[dict[str, Any]] = []
    client.listen(events.append)
    child = int(client.get(["child"], 30)[0])
    try:
        client.set("go", b"")
        wait_for(lambda: events)
        assert events[0]["rank"] == 1
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)
        parent.wait()
        client.close(0)


def test_the_users_key(tmp_path):
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    keys: list[bytes] = []
    threads = [threading.Thread(target=lambda: keys.append(secret.of_job("job 1", env))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1
    path = secret.key_file(env)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["key"]
    assert secret.of_job("job 2", env) != keys[0]
    path.chmod(0o644)
    with pytest.raises(LaunchError, match="chmod 600"):
        secret.of_job("job 1", env)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(LaunchError, match="damaged"):
        secret.of_job("job 1", env)
    assert secret.of_job("job 1", {"COMMLAYER_SECRET": "x"}) == secret.of_job("job 1", {"COMMLAYER_SECRET": "x"})
