"""torchtitan 0.3.0, unmodified: its MoE debug model under FSDP2 and expert parallelism, on the backend "commlayer".

The reference is plain gloo where gradients are reduced by SUM, torch's own way around what gloo lacks.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="make test-torchtitan")

Run = dict[str, Any]  # "steps": losses and norms of every step; "gradients" of the first


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, text, and the weights that all runs begin with."""
    folder = tmp_path_factory.mktemp("torchtitan")
    result = launch(folder, "--seed", ranks=1)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[..., Run]:
    return cache(lambda experts, ranks=2: trained(folder, "gloo", "--sum", experts=experts, ranks=ranks))


def launch(
    folder: Path, *options: str, below: str = "gloo", profile: str = "", ranks: int = 2
) -> subprocess.CompletedProcess[str]:
    program = ["-m", "tests.torchtitan.train", str(folder), *options]
    command = [sys.executable, "-m", "commlayer", "launch", "-n", str(ranks), "--backend", below, "--", *program]
    env = {key: value for key, value in os.environ.items() if not key.startswith("COMMLAYER_")}
    env |= {"COMMLAYER_PROFILE": profile} if profile else {}
    env |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


def trained(folder: Path, backend: str, *options: str, experts: int, **how: Any) -> Run:
    out = folder / "run.pt"
    result = launch(folder, "--backend", backend, "--experts", str(experts), "--out", str(out), *options, **how)
    assert result.returncode == 0, result.stdout + result.stderr
    run: Run = torch.load(out)
    out.unlink()  # 130 MB
    return run


def assert_identical(run: Run, expected: Run) -> None:
    assert run["steps"] == expected["steps"]
    assert run["gradients"].keys() == expected["gradients"].keys()
    assert [name for name, g in run["gradients"].items() if not g.equal(expected["gradients"][name])] == []


def assert_agree(run: Run, expected: Run) -> None:
    """To rounding. Losses alone say little: with every token one row off they still agree to 5e-5."""
    assert run["steps"][0] == pytest.approx(expected["steps"][0], rel=1e-6)
    # From then on the weights differ by the roundings before.
    assert run["steps"] == [pytest.approx(step, rel=1e-3) for step in expected["steps"]]
    assert run["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        # Experts compute in bf16: without expert parallelism each rank rounds its share of their gradients.
        tolerance = 2**-8 if "inner_experts" in name else 1e-6
        assert (run["gradients"][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("experts", [1, 2])
def test_it_fails_on_plain_gloo(folder: Path, experts: int) -> None:
    result = launch(folder, "--backend", "gloo", "--experts", str(experts))
    assert result.returncode != 0
    assert "Cannot use ReduceOp.PREMUL_SUM with Gloo" in result.stderr


@pytest.mark.parametrize("below", ["gloo", "mpi"])
def test_it_trains_with_and_without_expert_parallelism(folder: Path, reference: Callable[..., Run], below: str) -> None:
    one, two = (trained(folder, "commlayer", experts=experts, below=below) for experts in (1, 2))
    assert_agree(two, one)
    assert_identical(one, reference(1))  # of two ranks, a sum has one order only
    assert_identical(two, reference(2))


@pytest.mark.parametrize("below", ["gloo", "mpi"])
@pytest.mark.parametrize("profile", ["xccl-2.7", "only-send-recv"])
def test_it_trains_on_what_a_backend_lacks(
    folder: Path, reference: Callable[..., Run], below: str, profile: str
) -> None:
    run = trained(folder, "commlayer", experts=2, below=below, profile=profile)
    assert_identical(run, reference(2))


@pytest.mark.parametrize(("below", "experts"), [("gloo", 4), ("mpi", 2)])
def test_it_trains_on_four_ranks(folder: Path, reference: Callable[..., Run], below: str, experts: int) -> None:
    run = trained(folder, "commlayer", experts=experts, below=below, ranks=4)
    assert_agree(run, reference(1, ranks=4))
