"""How torch programs come to "commlayer" and leave it: launchers, rendezvous, groups of two backends, sudden ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.faults.job import BIN, MPI, clean_environment
from tests.torch_programs.test_layers import ALL

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MPIEXEC = [str(BIN / "mpiexec"), "-n", "2", sys.executable]
needs_mpiexec = pytest.mark.skipif(not MPI, reason="no mpiexec beside this interpreter: pip install 'commlayer[mpi]'")
at_length = pytest.mark.skipif(not ALL, reason="COMMLAYER_TEST_PROGRAMS=all")

# Begun three times under other names, beside a group of torch's own, and never ended.
PROGRAM = """
import os, sys, torch, torch.distributed as dist, commlayer
for name in ("commlayer", "cpu:commlayer", "cpu:commlayer,cuda:nccl"):
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(name)
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    assert dist.get_backend() == name
beside = dist.new_group(backend="gloo")
dist.all_reduce(total, group=beside)
dist.all_gather_object(names := [None, None], dist.get_backend(beside), group=beside)
under_way = [dist.all_reduce(torch.ones(3), async_op=True) for _ in range(2)]
sys.stdout.write(f"said {total} {names} {commlayer.world().backend}\\n")
"""

SPAWNED = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
def rank(number, where):
    import commlayer
    dist.init_process_group("commlayer", init_method=where, rank=number, world_size=2)
    dist.all_reduce(total := torch.tensor(number + 1))
    sys.stdout.write(f"said {total} {commlayer.world().backend}\\n")
    sys.stdout.flush()
    dist.destroy_process_group()
if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1],), 2)
"""

ONE_RAISES = """
import torch, torch.distributed as dist, commlayer
dist.init_process_group("commlayer")
if dist.get_rank() == 1:
    raise ValueError("lost my data")
dist.all_reduce(torch.ones(1))
"""

ONE_IS_LATE = """
import datetime, sys, torch, torch.distributed as dist, commlayer
dist.init_process_group("commlayer")
group = dist.new_group(timeout=datetime.timedelta(seconds=1))
if dist.get_rank() == 0:
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        sys.stdout.write(f"said {type(error).__name__}\\n")
dist.all_reduce(total := torch.ones(1))
sys.stdout.write(f"said {total.item()}\\n")
dist.destroy_process_group()
"""

ALONE = """
import sys, torch, torch.distributed as dist, commlayer
dist.init_process_group("commlayer", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
dist.all_reduce(x := torch.tensor(3.0), dist.ReduceOp.AVG)
sys.stdout.write(f"said {x.item()}\\n")
"""


def outcome(folder, command, program, *arguments, **env):
    script = folder / "program.py"
    script.write_text(program)
    env = clean_environment() | {"PYTHONWARNINGS": "ignore"} | env
    return subprocess.run(
        [*command, str(script), *arguments], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def said(result, status=0):
    assert status is None or result.returncode == status, result.stdout + result.stderr
    return sorted(line for line in result.stdout.splitlines() if line.startswith("said"))


@pytest.mark.parametrize(
    ("launcher", "backend"),
    [
        pytest.param(TORCHRUN, "gloo", id="torchrun", marks=at_length),
        pytest.param(MPIEXEC, "gloo", id="mpiexec and gloo", marks=[needs_mpiexec, at_length]),
        pytest.param(MPIEXEC, "mpi", id="mpiexec and MPI", marks=needs_mpiexec),
    ],
)
def test_begun_again_beside_another_backend_and_left_without_an_end(tmp_path, launcher, backend):
    result = outcome(tmp_path, launcher, PROGRAM, COMMLAYER_BACKEND=backend)
    assert said(result) == [f"said 6 ['gloo', 'gloo'] {backend}"] * 2


@pytest.mark.parametrize("where", ["file", pytest.param("tcp", marks=at_length)])
def test_ranks_that_the_program_starts_itself(tmp_path, where):
    place = f"file://{tmp_path}/meeting" if where == "file" else f"tcp://127.0.0.1:{20_000 + os.getpid() % 10_000}"
    assert said(outcome(tmp_path, [sys.executable], SPAWNED, place)) == ["said 3 gloo"] * 2


def test_one_process_alone(tmp_path):
    assert said(outcome(tmp_path, [sys.executable], ALONE)) == ["said 3.0"]


@at_length
@pytest.mark.parametrize(
    "launcher", [pytest.param(TORCHRUN, id="torchrun"), pytest.param(MPIEXEC, id="mpiexec", marks=needs_mpiexec)]
)
def test_an_exception_on_one_rank_ends_the_job(tmp_path, launcher):
    result = outcome(tmp_path, launcher, ONE_RAISES)
    assert result.returncode != 0
    assert "ValueError: lost my data" in result.stderr


@at_length
@pytest.mark.parametrize(
    ("launcher", "backend", "status"),
    [
        pytest.param(TORCHRUN, "gloo", 0, id="torchrun"),
        # An MPI collective that others never enter can be neither cancelled nor finalized.
        pytest.param(MPIEXEC, "mpi", None, id="mpiexec", marks=needs_mpiexec),
    ],
)
def test_a_group_whose_operation_timed_out_is_lost_and_the_world_is_not(tmp_path, launcher, backend, status):
    result = outcome(tmp_path, launcher, ONE_IS_LATE, COMMLAYER_BACKEND=backend)
    assert said(result, status) == ["said 2.0", "said 2.0", "said CommTimeout"], result.stderr
