"""How programs of torch's come to run on the layer, and what their ranks are told when one is lost."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import commlayer
from commlayer import BackendUnavailable
from tests.unit.test_jobs import job, lines, needs_mpiexec

HELLO = """
    import sys
    import torch, torch.distributed as dist, commlayer
    dist.init_process_group("commlayer")
    x = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(x, dist._make_nccl_premul_sum(2.0))  # which plain gloo refuses
    sys.stdout.write(f"said {commlayer.world().backend} {dist.get_rank()}/{dist.get_world_size()} {x.item()}\\n")
"""


@needs_mpiexec
def test_under_mpiexec_no_variables_of_torchs_are_needed(tmp_path: Path) -> None:
    assert lines(job("mpiexec", 2, HELLO, tmp_path)) == ["said mpi 0/2 6.0", "said mpi 1/2 6.0"]


def test_under_torchrun(tmp_path: Path) -> None:
    assert lines(job("torchrun", 2, HELLO, tmp_path)) == ["said gloo 0/2 6.0", "said gloo 1/2 6.0"]


SPAWNED = """
    import sys
    import torch, torch.distributed as dist, torch.multiprocessing as mp, commlayer

    def main(rank, folder):
        for time in range(2):  # and again, in the same process
            dist.init_process_group("commlayer", init_method=f"file://{folder}/{time}", rank=rank, world_size=2)
            x = torch.ones(1)
            dist.all_reduce(x)
            half = dist.new_group([rank])
            dist.barrier(group=half)
            dist.destroy_process_group()
            assert not commlayer.is_initialized()
            sys.stdout.write(f"said {rank} {x.item()}\\n")

    if __name__ == "__main__":
        mp.spawn(main, args=(sys.argv[0].rsplit("/", 1)[0],), nprocs=2)
"""


def test_processes_of_ones_own_making_meet_as_the_program_says(tmp_path: Path) -> None:
    assert lines(job("none", 2, SPAWNED, tmp_path)) == ["said 0 2.0"] * 2 + ["said 1 2.0"] * 2


LOST = """
    import os, sys, time
    import torch, torch.distributed as dist, commlayer
    dist.init_process_group("commlayer")
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.5)
        os._exit(7)
    work = dist.all_reduce(torch.ones(1), async_op=True)
    try:
        {wait}
    except RuntimeError as error:
        sys.stdout.write(f"said {{type(error).__name__}}: {{error}}\\n")
        sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.parametrize("wait", ["work.wait()", "work.get_future().wait()"], ids=["work", "future"])
def test_a_lost_rank_is_named_where_torchs_own_backend_works(wait: str, tmp_path: Path) -> None:
    result = job("torchrun", 2, LOST.format(wait=wait), tmp_path)
    said = [line for line in result.stdout.splitlines() if line.startswith("said")]
    assert len(said) == 1, result.stdout + result.stderr
    assert said[0].startswith("said PeerLost: ")
    assert "rank 1 is lost" in said[0]


def test_where_the_package_is_installed_torch_finds_it_by_itself() -> None:
    try:
        importlib.metadata.version("commlayer")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("commlayer is not installed, but imported from a folder")
    program = "import torch.distributed as d; print('commlayer' in d.Backend.backend_list)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="RANK expected"):  # torch's own words, where no launcher says
        dist.init_process_group("commlayer")
    monkeypatch.setenv("COMMLAYER_BACKEND", "commlayer")
    with pytest.raises(BackendUnavailable, match="knows none of that name"):
        dist.init_process_group("commlayer", store=dist.HashStore(), rank=0, world_size=1)
    assert not dist.is_initialized()
    monkeypatch.delenv("COMMLAYER_BACKEND")
    group = commlayer.Group.alone()
    with pytest.raises(commlayer.CommError, match="not initialised"):
        commlayer.to_process_group(group)
