"""Whole jobs, started as users start them: how they begin, end, and fail."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import commlayer
from commlayer import BackendUnavailable, LaunchError

BIN = Path(sys.executable).parent
HYDRA = (BIN / "mpiexec").exists()
needs_mpiexec = pytest.mark.skipif(not HYDRA, reason="no mpiexec beside this interpreter: pip install 'commlayer[mpi]'")


def job(launcher: str, ranks: int, program: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    commands = {
        "mpiexec": [str(BIN / "mpiexec"), "-n", str(ranks), sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)],
        "none": [sys.executable],
    }
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("COMMLAYER_", "PMI", "OMPI_"))}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **env}
    command = [*commands[launcher], str(script)]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=90, check=False)


def lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stdout + result.stderr
    return sorted(line for line in result.stdout.splitlines() if line.startswith("said"))


HELLO = """
    import sys
    import torch, commlayer
    world = commlayer.init()
    total = commlayer.all_reduce(torch.tensor(world.rank + 1)).item()
    sys.stdout.write(f"said {world.backend} {world.rank}/{world.size} {total}\\n")
"""


def test_without_a_launcher_one_process_runs_alone(tmp_path: Path) -> None:
    assert lines(job("none", 1, HELLO, tmp_path)) == ["said single 0/1 1"]


def test_torchrun_means_gloo(tmp_path: Path) -> None:
    assert lines(job("torchrun", 2, HELLO, tmp_path)) == ["said gloo 0/2 3", "said gloo 1/2 3"]


@needs_mpiexec
def test_mpiexec_means_mpi_and_a_variable_changes_that(tmp_path: Path) -> None:
    assert lines(job("mpiexec", 2, HELLO, tmp_path)) == ["said mpi 0/2 3", "said mpi 1/2 3"]
    switched = job("mpiexec", 2, HELLO, tmp_path, COMMLAYER_BACKEND="gloo")
    assert lines(switched) == ["said gloo 0/2 3", "said gloo 1/2 3"]


def test_the_host_programs_own_default_group_is_wrapped_and_left_alone(tmp_path: Path) -> None:
    program = """
        import sys
        import torch, torch.distributed as dist, commlayer
        dist.init_process_group("gloo")
        world = commlayer.init()
        pair = world.split(0, key=-world.rank)          # ranks in reverse
        mesh = commlayer.Mesh("dp=2 tp=1")
        first = commlayer.broadcast(torch.tensor(world.rank), src=0, group=pair).item()
        in_mesh = commlayer.all_reduce(torch.tensor(1), group=mesh["dp"]).item()
        names = mesh.to_device_mesh().mesh_dim_names
        commlayer.finalize()
        x = torch.ones(1); dist.all_reduce(x)           # still the host's
        sys.stdout.write(f"said {world.backend} {pair.ranks} {first} {in_mesh} {sorted(names)} {x.item()}\\n")
        dist.destroy_process_group()
    """
    assert lines(job("torchrun", 2, program, tmp_path)) == ["said gloo (1, 0) 1 2 ['dp', 'tp'] 2.0"] * 2


@pytest.mark.parametrize("finalize", [True, False])
def test_gloo_subgroups_do_not_outlive_the_interpreter(tmp_path: Path, finalize: bool) -> None:
    # A worker thread of a group that was never closed ends in std::terminate at exit, one time in two.
    program = f"""
        import torch, commlayer
        world = commlayer.init()
        for _ in range(4):
            half = world.split(world.rank % 2)
            commlayer.all_reduce(torch.ones(2), group=half)
        if {finalize}:
            commlayer.finalize()
    """
    result = job("torchrun", 4, program, tmp_path)
    assert result.returncode == 0, result.stderr


@needs_mpiexec
def test_an_uncaught_exception_on_one_rank_ends_an_mpi_job(tmp_path: Path) -> None:
    program = """
        import torch, commlayer
        world = commlayer.init()
        if world.rank == 1:
            raise RuntimeError("lost my data")
        commlayer.all_reduce(torch.ones(1))
    """
    start = time.monotonic()
    result = job("mpiexec", 2, program, tmp_path)
    assert result.returncode != 0
    assert "lost my data" in result.stderr
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpiexec", marks=needs_mpiexec)])
def test_a_rank_that_never_comes_is_a_timeout(tmp_path: Path, launcher: str) -> None:
    program = """
        import os, sys, time
        import torch, commlayer
        world = commlayer.init(timeout=3)
        if world.rank == 0:
            try:
                commlayer.all_reduce(torch.ones(1))
            except commlayer.CommTimeout as error:
                sys.stdout.write(f"said {type(error).__name__} {'all_reduce' in str(error)}\\n")
                sys.stdout.flush()
        else:
            time.sleep(8)
        os._exit(0)                                     # the group is broken: leave at once
    """
    result = job(launcher, 2, program, tmp_path)
    assert "said CommTimeout True" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpiexec", marks=needs_mpiexec)])
def test_messages_whose_handle_was_dropped_arrive(tmp_path: Path, launcher: str) -> None:
    program = """
        import gc, sys
        import torch, commlayer
        world = commlayer.init(timeout=30)
        other = 1 - world.rank
        for number in range(20):
            commlayer.send(torch.full((5000,), number), other, tag=number, async_op=True)
        gc.collect()
        got = [int(commlayer.recv(torch.empty(5000, dtype=torch.int64), other, tag=n).unique()) for n in range(20)]
        sys.stdout.write(f"said {got == list(range(20))}\\n")
    """
    assert lines(job(launcher, 2, program, tmp_path)) == ["said True"] * 2


@pytest.mark.parametrize(
    ("variable", "value", "error", "words"),
    [
        ("COMMLAYER_BACKEND", "nccl", BackendUnavailable, "backend nccl"),
        ("COMMLAYER_BACKEND", "xccl", BackendUnavailable, "backend xccl"),
        ("COMMLAYER_BACKEND", "ccl", BackendUnavailable, r"backend ccl.*commlayer\[intel\]"),
        ("COMMLAYER_BACKEND", "carrier-pigeon", BackendUnavailable, "backend 'carrier-pigeon'.*gloo"),
        ("COMMLAYER_BACKEND", "threads", BackendUnavailable, "run_local"),
        ("COMMLAYER_PROFILE", "nowhere", ValueError, "capability profile 'nowhere'.*xccl-2.8"),
        ("COMMLAYER_DISABLE", "all_to_nobody", ValueError, "'all_to_nobody'"),
        ("COMMLAYER_FALLBACK", "loud", ValueError, "COMMLAYER_FALLBACK='loud'.*warn"),
        ("COMMLAYER_TIMEOUT", "soon", ValueError, "COMMLAYER_TIMEOUT='soon'"),
        ("COMMLAYER_LAUNCHER", "postman", LaunchError, "postman"),
    ],
)
def test_settings_and_backends_that_are_not_there_are_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, error: type[Exception], words: str
) -> None:
    if value in ("nccl", "xccl") and (torch.cuda.is_available() or torch.xpu.is_available()):
        pytest.skip("it is there")
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=f"(?s){words}"):
        commlayer.init()
    assert not commlayer.is_initialized()


def test_forbidden_and_announced_emulation(tmp_path: Path) -> None:
    program = """
        import os, sys, warnings
        import torch, commlayer
        for policy in ("silent", "warn", "error"):
            os.environ["COMMLAYER_FALLBACK"] = policy
            commlayer.init("gloo")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    for _ in range(2):
                        commlayer.all_reduce(torch.ones(2), commlayer.premul_sum(0.5))
                    commlayer.broadcast(torch.zeros(2, dtype=torch.int16))   # the same bits: not an emulation
                except commlayer.UnsupportedOperation as error:
                    sys.stdout.write(f"said {policy}: error {'scale_and_sum' in str(error)}\\n")
            ours = [w for w in caught if issubclass(w.category, commlayer.FallbackWarning)]
            sys.stdout.write(f"said {policy}: warnings {len(ours)}\\n")
            commlayer.finalize()
    """
    expected = ["silent: warnings 0", "warn: warnings 1", "error: error True", "error: warnings 0"]
    assert lines(job("torchrun", 2, program, tmp_path)) == sorted(f"said {words}" for words in expected * 2)


def test_init_may_follow_finalize_while_another_rank_is_late(tmp_path: Path) -> None:
    # The launcher's store outlives the first world: what was said there must not be taken for the second's.
    program = """
        import sys, time
        import torch, commlayer
        world = commlayer.init()
        world.split(world.rank)
        commlayer.finalize()
        if world.rank == 1:
            time.sleep(1)
        world = commlayer.init(timeout=30)
        half = world.split(0, key=-world.rank)
        total = commlayer.all_reduce(torch.tensor(world.rank + 1), group=half).item()
        sys.stdout.write(f"said {half.ranks} {total}\\n")
    """
    assert lines(job("torchrun", 2, program, tmp_path)) == ["said (1, 0) 3"] * 2


@needs_mpiexec
def test_a_letter_survives_the_end_of_the_rank_that_serves_the_store(tmp_path: Path) -> None:
    program = """
        import sys, time
        import torch, commlayer
        world = commlayer.init()
        if world.rank == 0:
            commlayer.send(torch.arange(3), 1)
        else:
            time.sleep(2)
            sys.stdout.write(f"said {commlayer.recv(torch.zeros(3, dtype=torch.int64), 0).tolist()}\\n")
    """
    env = {"COMMLAYER_BACKEND": "gloo", "COMMLAYER_PROFILE": "only-all-reduce"}
    assert lines(job("mpiexec", 2, program, tmp_path, **env)) == ["said [0, 1, 2]"]


@needs_mpiexec
def test_a_message_of_another_length_is_a_mismatch_on_mpi(tmp_path: Path) -> None:
    program = """
        import os, sys
        import torch, commlayer
        world = commlayer.init()
        for sent, expected in [(2, 3), (4, 3)]:
            if world.rank == 0:
                commlayer.send(torch.ones(sent), 1)
            else:
                try:
                    commlayer.recv(torch.zeros(expected), 0)
                except commlayer.CollectiveMismatch:
                    sys.stdout.write(f"said {sent} for {expected}\\n")
    """
    assert lines(job("mpiexec", 2, program, tmp_path)) == ["said 2 for 3", "said 4 for 3"]
