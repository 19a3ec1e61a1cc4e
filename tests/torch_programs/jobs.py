"""Jobs of the programs, and their records."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.faults.job import BIN, ROOT, clean_environment

LIMIT = 250.0  # seconds of a job


@dataclass(frozen=True)
class Layer:
    """What is under the backend "commlayer"."""

    name: str
    backend: str = "gloo"
    profile: str = ""

    def command(self, ranks: int) -> list[str]:
        if self.backend == "mpi":
            return [str(BIN / "mpiexec"), "-n", str(ranks), sys.executable, "-m", "tests.torch_programs"]
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        return [*run, "-m", "tests.torch_programs"]

    def options(self) -> list[str]:
        """The name that the programs get from outside."""
        return ["--backend", "gloo"] if self == REFERENCE else ["--backend", "commlayer", "--import", "commlayer"]

    def environment(self) -> dict[str, str]:
        env = clean_environment() | {"COMMLAYER_BACKEND": self.backend, "PYTHONWARNINGS": "ignore"}
        return env | ({"COMMLAYER_PROFILE": self.profile} if self.profile else {})


REFERENCE = Layer("torch's own gloo, with nothing on it")


def run(layer: Layer, ranks: int, folder: Path, *options: str) -> list[dict[str, Any]]:
    """The records of each rank: name of the program -> what it computed."""
    command = [*layer.command(ranks), *layer.options(), "--out", str(folder), *options]
    said = folder / "said"
    with said.open("w") as out:  # a file, which is there also if the job must be killed
        process = subprocess.Popen(command, cwd=ROOT, env=layer.environment(), stdout=out, stderr=out)
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher, which ends its ranks
            status = process.wait(20)
    assert status == 0, f"{' '.join(command)}\n{said.read_text()[-20_000:]}"
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(ranks)]
