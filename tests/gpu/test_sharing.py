"""The same tests in jobs of several ranks, started from one process: on GPUs of their own, and sharing one.

NCCL refuses two ranks on one GPU, until 2.30 always, since then unless NCCL_MULTI_RANK_GPU_ENABLE=1. Their kernels take
turns, or run at once under NVIDIA's MPS; few blocks each (NCCL_MAX_CTAS), so that one leaves room for the other.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
MINUTES = 20  # of a job: ranks that share a GPU take turns on it
SHARED = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "2"}


def job(ranks, *tests, **env):
    """Run these files of the folder under torchrun; AssertionError with the end of what it said where one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "pytest", "-q", "-p", "no:xdist", *(str(HERE / test) for test in tests)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("COMMLAYER_", "PYTEST_"))}
    told = {**clean, "OMP_NUM_THREADS": "1", **env}
    made = subprocess.run(command, env=told, cwd=HERE.parents[1], capture_output=True, text=True, timeout=60 * MINUTES)
    assert made.returncode == 0, (made.stdout + made.stderr)[-8000:]
    assert " passed" in made.stdout, made.stdout[-8000:]


def first_gpu():
    """The only one that the ranks see, so that the layer gives it to all of them."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


CONTRACTS = ("test_contracts.py", "test_parallel.py", "test_streams.py")


@pytest.mark.timeout(60 * MINUTES + 60)
def test_nccl_with_a_gpu_for_each_rank():
    gpus = torch.cuda.device_count()
    if gpus < 2:
        pytest.skip(f"needs two GPUs, and {gpus} is visible")
    job(min(gpus, 4), *CONTRACTS)


@pytest.mark.timeout(60 * MINUTES + 60)
@pytest.mark.parametrize("tests", CONTRACTS)
def test_nccl_with_two_ranks_on_one_gpu(tests):
    version = torch.cuda.nccl.version()
    if version < (2, 30):
        pytest.skip(f"needs NCCL 2.30 or newer, and this torch has {'.'.join(map(str, version))}")
    job(2, tests, **first_gpu(), **SHARED)


@pytest.mark.timeout(60 * MINUTES + 60)
@pytest.mark.parametrize("ranks", [2, 3])
def test_gloo_with_several_ranks_on_one_gpu(ranks):
    job(ranks, "test_staged.py", **first_gpu(), COMMLAYER_BACKEND="gloo")
