"""What the ranks see of a peer's failure; on threads, where nothing else can fail, and in whole jobs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import commlayer as c
from tests.unit.test_jobs import job, lines, needs_mpiexec

LAUNCHERS = ["torchrun", pytest.param("mpiexec", marks=needs_mpiexec)]


def local(program, ranks=3, timeout=30.0):
    """Each rank's result, or the error it ended with."""

    def guarded():
        try:
            return program(c.world())
        except c.CommError as error:
            return error

    return c.run_local(guarded, ranks, timeout=timeout)


def here(word):
    """This file and the line that holds a word, as a call site."""
    text = Path(__file__).read_text().splitlines()
    return f"{os.path.relpath(__file__)}:{next(n for n, line in enumerate(text, 1) if line.endswith('# ' + word))}"


def test_a_timeout_names_the_call_its_place_and_who_never_arrived():
    def program(world):
        c.all_reduce(torch.ones(1))
        if world.rank == 1:
            time.sleep(1.2)
            return c.barrier()
        return c.all_reduce(torch.ones(1), timeout=0.3)  # waits

    start = time.monotonic()
    errors = local(program)
    assert time.monotonic() - start < 3
    assert all(type(error) is c.CommTimeout for error in errors)
    for error in (errors[0], errors[2]):
        assert f"all_reduce #2 of group 0-2 at {here('waits')}: not finished after 0.3 s" in str(error)
        assert "; rank 1 never arrived" in str(error)
        assert "last: all_reduce #1" in str(error)
    assert "this group is broken since all_reduce #2" in str(errors[1])


def test_a_broken_group_refuses_at_once_and_others_go_on():
    def program(world):
        pair = world.new_group([0, 1])
        if world.rank == 2:
            time.sleep(1)
            return 0
        with pytest.raises(c.CommTimeout):
            c.barrier(timeout=0.2)
        start = time.monotonic()
        with pytest.raises(c.CommTimeout, match="broken since barrier #2"):
            c.all_gather(torch.ones(1))
        with pytest.raises(c.CommTimeout, match="broken"):
            c.send(torch.ones(1), 1 - world.rank)
        assert time.monotonic() - start < 0.5
        return c.all_reduce(torch.tensor(1), group=pair).item()

    assert local(program) == [2, 2, 0]


def test_an_exception_reaches_the_groups_of_that_rank_alone():
    def program():
        world = c.world()
        half = world.split(world.rank // 2)
        if world.rank == 3:
            raise ArithmeticError("mine")
        if world.rank == 2:
            with pytest.raises(c.PeerLost, match="rank 3 is lost: it raised ArithmeticError: mine"):
                c.barrier(group=half)
            return
        for _ in range(50):
            assert c.all_reduce(torch.tensor(1), group=half) == 2

    with pytest.raises(ArithmeticError):
        c.run_local(program, 4)


def test_who_leaves_after_its_last_call_is_not_missed():
    """Ranks end one after the other; what they took part in is finished by the rest."""

    def program(world):
        total = c.broadcast(torch.tensor(world.rank), src=0)
        time.sleep(0.05 * world.rank)
        return total.item()

    assert local(program, 4) == [0, 0, 0, 0]


def test_a_message_from_a_rank_that_has_left_arrives_or_is_an_error():
    def program(world):
        if world.rank == 0:
            c.send(torch.ones(2), 1, tag=5)
            return None
        time.sleep(0.2)
        assert c.recv(torch.zeros(2), 0, tag=5).sum() == 2
        start = time.monotonic()
        with pytest.raises(c.PeerLost, match="rank 0 is lost: it has left the job"):
            c.recv(torch.zeros(2), 0, tag=6)
        return time.monotonic() - start

    assert local(program, 2)[1] < 5


def test_a_handle_keeps_its_own_deadline_and_its_failure():
    def program(world):
        if world.rank:
            time.sleep(1)
            return
        work = c.all_reduce(torch.ones(1), async_op=True, timeout=0.2)
        assert not work.done()
        with pytest.raises(c.CommTimeout, match=r"after 0\.2 s"):
            work.wait()
        with pytest.raises(c.CommError, match="has failed before"):
            work.wait()

    local(program, 2)


def test_polling_a_handle_ends_when_the_peer_is_lost():
    def program(world):
        if world.rank:
            time.sleep(0.3)
            return True
        work = c.all_reduce(torch.ones(1), async_op=True)
        while not work.done():
            time.sleep(0.01)
        with pytest.raises(c.PeerLost, match="rank 1 is lost"):
            work.wait()
        return True

    assert local(program, 2) == [True, True]


@pytest.mark.parametrize("timeout", [0, -1.0, "3", True, float("nan")])
def test_timeouts_are_positive_numbers(timeout):
    def program(world):
        x = torch.ones(2)
        for call in (
            lambda: c.all_reduce(x, timeout=timeout),
            lambda: c.broadcast(x, timeout=timeout),
            lambda: c.all_to_all(x, timeout=timeout),
            lambda: c.send(x, 0, timeout=timeout),
            lambda: c.barrier(timeout=timeout),
            lambda: c.all_gather_object(1, timeout=timeout),
        ):
            with pytest.raises(ValueError, match="timeout: expected a positive number of seconds"):
                call()

    local(program, 1)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_timeouts_of_emulated_and_native_operations(tmp_path, launcher):
    """One deadline for all the steps of an emulation, on a real backend."""
    program = """
        import sys, time
        import torch, commlayer
        world = commlayer.init(timeout=60)
        trio = world.new_group([0, 1, 2])
        for name, group in (("reduce_scatter", world), ("all_gather", trio)):
            if world.rank == 1:
                time.sleep(3)
                continue
            start = time.monotonic()
            try:
                getattr(commlayer, name)(torch.ones(300_000), group=group, timeout=1)
            except commlayer.CommTimeout as error:
                late = time.monotonic() - start
                sys.stdout.write(f"said {name} {0.5 < late < 2.0} {'rank 1 never arrived' in str(error)}\\n")
            time.sleep(2)
        sys.stdout.flush()
        import os; os._exit(0)
    """
    result = job(launcher, 3, program, tmp_path, COMMLAYER_PROFILE="only-send-recv")
    said = sorted(line for line in result.stdout.splitlines() if line.startswith("said"))
    assert said == ["said all_gather True True"] * 2 + ["said reduce_scatter True True"] * 2, result.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_operation_has_its_deadline(tmp_path, launcher):
    """gloo's reduce_scatter, for one, passes the limit of a wait on to nobody."""
    program = """
        import os, sys, time
        import torch, commlayer as c
        world = c.init(timeout=60)
        x = torch.ones(12)
        calls = {
            "all_reduce": {}, "reduce": {}, "broadcast": {"src": 1}, "all_gather": {}, "reduce_scatter": {},
            "all_to_all": {}, "gather": {}, "scatter": {"src": 1}, "sendrecv": {"src": 1, "dst": 1}, "barrier": None,
        }
        groups = [world.new_group([0, 1]) for _ in range(2 * len(calls))]
        for uneven in (False, True):
            for name, more in calls.items():
                group, start = groups.pop(), time.monotonic()
                if world.rank or (uneven and name not in ("all_gather", "reduce_scatter", "all_to_all")):
                    continue
                if uneven:
                    splits = {"input_splits": [6, 6], "output_splits": [6, 6]}
                    more = splits if name == "all_to_all" else {"sizes": [6, 6]}
                    y = x[:6] if name == "all_gather" else x
                else:
                    y = x
                try:
                    getattr(c, name)(*(() if more is None else (y,)), **(more or {}), group=group, timeout=0.5)
                except c.CommTimeout:
                    if 0.4 < time.monotonic() - start < 1.5:
                        sys.stdout.write(f"said {name} {uneven}\\n")
        sys.stdout.flush()
        done = __file__ + ".done"
        if world.rank == 0:
            open(done, "w").close()
        while not os.path.exists(done):
            time.sleep(0.05)
        os._exit(0)
    """
    said = [line for line in job(launcher, 2, program, tmp_path).stdout.splitlines() if line.startswith("said")]
    assert len(said) == 13


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_debug_compares_what_ranks_call(tmp_path, launcher):
    program = """
        import sys
        import torch, commlayer as c
        world = c.init(timeout=20)
        x, odd = torch.ones(6), world.rank == 1
        calls = {
            "operation": lambda: c.barrier() if odd else c.all_reduce(x),
            "reduce op": lambda: c.all_reduce(x, "max" if odd else "sum"),
            "dtype": lambda: c.all_reduce(x.double() if odd else x),
            "shape": lambda: c.all_reduce(x[:3] if odd else x),
            "root": lambda: c.broadcast(x, src=int(odd)),
            "splits": lambda: c.all_to_all(x, input_splits=[3, 3], output_splits=[2, 3] if odd else [3, 3]),
            "sizes": lambda: c.reduce_scatter(x, sizes=[2, 4] if odd else [3, 3]),
        }
        for name, call in calls.items():
            try:
                call()
            except c.CollectiveMismatch as error:
                rows = [f"rank {rank}: " in str(error) and "program.py:" in str(error) for rank in range(2)]
                sys.stdout.write(f"said {name} {'differ in ' + name in str(error)} {rows}\\n")
        sys.stdout.write(f"said {c.all_reduce(x).sum().item()}\\n")  # the group goes on
    """
    said = lines(job(launcher, 2, program, tmp_path, COMMLAYER_DEBUG="1"))
    assert said.count("said 12.0") == 2
    for name in ("operation", "reduce op", "dtype", "shape", "root", "splits"):
        assert said.count(f"said {name} True [True, True]") == 2
    assert said.count("said sizes False [True, True]") == 2  # splits, in its words


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_debug_compares_messages_with_what_is_expected(tmp_path, launcher):
    """Plain gloo would leave a stale tail, or abort."""
    program = """
        import sys
        import torch, commlayer as c
        world = c.init(timeout=20)
        other = 1 - world.rank
        late = c.recv(torch.zeros(4), other, tag=9, async_op=True)
        c.send(torch.ones(4), other, tag=9)
        assert late.wait().sum() == 4
        assert c.sendrecv(torch.ones(3), dst=other, src=other).sum() == 3
        pair = world.new_group([0, 1])
        try:
            for length in (60, 120) if world.rank else (120, 60):
                c.sendrecv(torch.ones(length), dst=other, src=other, group=pair)
        except c.CollectiveMismatch as error:
            found = [f"{n} elements of float32 are sent at" in str(error) for n in (60, 120)]
            sys.stdout.write(f"said {any(found)} {c.all_reduce(torch.ones(1)).item()}\\n")
    """
    result = job(launcher, 2, program, tmp_path, COMMLAYER_DEBUG="1")
    assert sorted(line for line in result.stdout.splitlines() if line.startswith("said")) == ["said True 2.0"] * 2


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_may_meet_while_messages_are_under_way(tmp_path, launcher):
    """On MPI, messages move only while somebody calls it."""
    program = """
        import torch, commlayer as c
        world = c.init(timeout=20)
        x = torch.ones(1 << 20)
        if world.rank == 0:
            work = c.all_reduce(x, async_op=True)
            world.new_group([0, 1])
            work.wait()
        else:
            c.all_reduce(x)
            world.new_group([0, 1])
    """
    lines(job(launcher, 2, program, tmp_path))


@needs_mpiexec
def test_check_nan_names_the_first_rank(tmp_path):
    program = """
        import sys
        import torch, commlayer as c
        world = c.init(timeout=20)
        x = torch.ones(6)
        c.broadcast(x if world.rank == 0 else x * float("inf"), src=0)   # values off src do not count
        x[3] = float("nan") if world.rank == 1 else 0.0
        try:
            c.all_reduce(x)
        except c.CommError as error:
            sys.stdout.write(f"said {type(error).__name__} {str(error).split(': ', 1)[1][:63]}\\n")
            raise
    """
    result = job("mpiexec", 2, program, tmp_path, COMMLAYER_CHECK_NAN="1")
    assert result.returncode != 0
    assert result.stdout.count("said NonFinite rank 1 was about to send 1 of 6 values that are NaN or infinite") == 2


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_flight_recorder_is_written_on_sigusr1_even_inside_a_wait(tmp_path, launcher):
    program = """
        import os, signal, sys, threading, time
        import torch, commlayer
        world = commlayer.init(timeout=20)
        commlayer.all_reduce(torch.ones(4))
        if world.rank == 0:
            threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        else:
            time.sleep(1.5)
        commlayer.barrier()
    """
    result = job(launcher, 2, program, tmp_path, COMMLAYER_TRACE=str(tmp_path / "trace"))
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "trace").glob("flight-rank00000-*.json")
    data = json.loads(path.read_text())
    assert (data["schema"], data["rank"], data["reason"]) == ("commlayer.flight/1", 0, "SIGUSR1")
    first, second = data["operations"]
    assert (first["op"], first["seq"], first["bytes"], first["dtype"]) == ("all_reduce", 1, 16, "float32")
    assert first["end"] > first["start"]
    assert (second["op"], second["end"]) == ("barrier", None)
    assert second["site"].endswith("program.py:10")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_listens_on_the_loopback_alone(tmp_path, launcher):
    """On one host, nothing of the layer's can be reached from another."""
    program = """
        import os, sys
        import torch, commlayer
        if "PMI_RANK" in os.environ:
            from mpi4py import MPI          # listens for itself
        before = {line.split()[9] for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}")}
        world = commlayer.init()
        commlayer.all_reduce(torch.ones(1))
        files = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        mine = {os.readlink(file) for file in files if os.path.lexists(file)}
        for name in ("tcp", "tcp6"):
            for line in list(open(f"/proc/net/{name}"))[1:]:
                words = line.split()
                if words[3] == "0A" and f"socket:[{words[9]}]" in mine and words[9] not in before:
                    sys.stdout.write(f"said {words[1].split(':')[0]}\\n")
    """
    result = lines(job(launcher, 2, program, tmp_path, COMMLAYER_BACKEND="gloo"))
    assert result
    assert set(result) <= {"said 0100007F", "said 0000000000000000FFFF00000100007F"}


def test_init_names_who_is_missing(tmp_path):
    program = """
        import os, sys, time
        import commlayer
        if os.environ["RANK"] == "1":
            time.sleep(6)
            os._exit(0)
        try:
            commlayer.init(timeout=2)
        except commlayer.CommTimeout as error:
            sys.stdout.write(f"said {'rank 1' in str(error)}\\n")
        os._exit(0)
    """
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29641", "COMMLAYER_BACKEND": "gloo", "COMMLAYER_LAUNCHER": ""}
    assert "said True" in job("torchrun", 3, program, tmp_path, **env).stdout


@pytest.mark.parametrize("work", ["pass", "commlayer.all_reduce(torch.ones(1), async_op=True)"])
def test_finalize_and_exit_wait_for_nobody(tmp_path, work):
    """Rank 1 sleeps long after rank 0 has ended its work, perhaps with an operation that rank 1 never joins."""
    program = f"""
        import os, sys, time
        import torch, commlayer
        world = commlayer.init(timeout=6)
        commlayer.all_reduce(torch.ones(1))
        if world.rank == 1:
            time.sleep(40)
        {work}
        start = time.monotonic()
        commlayer.finalize()
        sys.stdout.write(f"said {{time.monotonic() - start < 8}}\\n")
        sys.stdout.flush()
    """
    script = tmp_path / "program.py"
    script.write_text("\n".join(line[8:] for line in program.splitlines()))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("COMMLAYER_", "PMI", "OMPI_"))}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    ranks = []
    for rank in "01":
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env = {**clean, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": os.getcwd()}
        env |= {"OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(tmp_path)}
        ranks.append(subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE))
    try:
        assert ranks[0].stdout.readline() == b"said True\n"  # however long it took to start
        assert ranks[0].communicate(timeout=20) == (b"", None)
        assert ranks[0].returncode == 0
        assert ranks[1].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
