"""What ranks of a torch program are told when one is lost, how torch finds the backend, and what cannot be."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import commlayer
from commlayer import BackendUnavailable
from commlayer.backends.torch_requests import Native, translate
from tests.unit.test_jobs import job

LOST = """
    import os, sys, time
    import torch, torch.distributed as dist, commlayer
    dist.init_process_group("commlayer")
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.5)
        os._exit(0)  # any other status, and torchrun would end the other rank as well
    work = dist.all_reduce(torch.ones(1), async_op=True)
    try:
        work.get_future().wait()
    except RuntimeError as error:
        sys.stdout.write(f"said {type(error).__name__}: {error}\\n")
        sys.stdout.flush()
    os._exit(0)
"""


def test_a_lost_rank_is_named_where_torchs_own_backend_works(tmp_path: Path) -> None:
    result = job("torchrun", 2, LOST, tmp_path)
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


class JustLate:
    """A work of gloo's that ends between the end of a part of a wait and the next look at it."""

    def __init__(self, error: str = "") -> None:
        self.error, self.waits = error, 0

    def wait(self, timeout: timedelta | None = None) -> None:
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise RuntimeError(self.error)

    def is_completed(self) -> bool:
        return True


@pytest.mark.parametrize("error", ["", "Connection reset by peer"])
def test_what_ends_just_after_a_part_of_a_wait_has_not_timed_out(error: str) -> None:
    comm = SimpleNamespace(
        asynchronous=False, failure=None, limit=lambda timeout: 20.0, translated=translate, adopt=lambda *_: None
    )
    work = Native(comm, JustLate(error), "broadcast")
    if error:
        with pytest.raises(commlayer.PeerLost, match="reset by peer"):
            work.wait()
    else:
        work.wait()
