"""benchmarks/gpu.py on a CPU: that it runs, what it compares, and what its figures are made of."""

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

import commlayer
from benchmarks import gpu, gpu_calls, gpu_models, gpu_timing
from models.flops import flops_per_token
from models.moe_sizes import LanguageModelConfig

ROOT = Path(__file__).parents[2]


def job(ranks, *arguments):
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "benchmarks.gpu", "--device", "cpu", "--rounds", "1", *arguments]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("COMMLAYER_", "PMI", "OMPI_"))}
    env = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_two_ranks_have_all_parts(tmp_path):
    made = job(2, "--json", str(tmp_path / "gpu.json"))
    assert made.returncode == 0, made.stdout + made.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert (record["device"], record["ranks"], record["backend"]) == ("CPU", 2, "gloo")
    assert record["torch"] == torch.__version__
    found = record["found"]
    assert list(found) == list(gpu.PARTS)
    assert all(row["host"] > 0 and row["device"] > 0 for row in found["overhead"])
    cases = {(row["op"], row["bytes"]) for row in found["overhead"]}
    assert cases == {(op.__name__, size) for op in gpu_calls.OPERATIONS for size in gpu_calls.QUICK.nbytes}
    assert [row["published"] for row in found["vit"]] == [9.2, 12.0, 37.5, 41.0]
    assert [row["way"] for row in found["moe"]] == ["no EP", "dense", "EP 2"]
    assert "no figures" in made.stdout
    assert "there is no MFU" in made.stdout


def test_one_rank_has_no_step_to_compare():
    made = job(1, "--only", "step")
    assert made.returncode == 0, made.stdout + made.stderr
    assert "One rank has nothing to communicate" in made.stdout
    assert "DDP on" not in made.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="--device cpu"):
        gpu.main([])


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("CPU", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name, peak):
    assert gpu_models.bf16_peak(name) == peak


def test_mfu_is_flops_over_the_peak(monkeypatch):
    monkeypatch.setattr(gpu_models, "device_name", lambda group: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu_models, "step_seconds", lambda *_: 0.25)
    (rows,) = commlayer.run_local(lambda: gpu_models.moe(commlayer.world(), gpu_models.QUICK, 1), ranks=1)
    row = rows[0]
    assert row["tokens_per_second"] == 2 * 16 / 0.25
    flops = flops_per_token(LanguageModelConfig.named("tiny"), 16)
    assert row["mfu"] == pytest.approx(128 * flops / 989.4e12)


def test_half_the_batch_where_it_does_not_fit(monkeypatch):
    """On all ranks, where it does not on one."""
    tried = []

    def step(rung, config, group, batch):
        def one(together=True):
            if not together and batch > 2 and group.rank == 1:
                tried.append(batch)
                raise torch.OutOfMemoryError("no memory")

        return one

    monkeypatch.setattr(gpu_models, "vit_step", step)
    sizes = gpu_models.QUICK._replace(batch=8)
    for rows in commlayer.run_local(lambda: gpu_models.vit(commlayer.world(), sizes, 1), ranks=2):
        assert [row["batch"] for row in rows] == [2] * 4
    assert tried == [8, 4] * 4


def test_ways_that_differ_are_not_compared():
    def compare():
        x, part = torch.zeros(4), torch.zeros(4)
        ways = {gpu_calls.RAW: lambda: x, "other": lambda: x + 1}
        with pytest.raises(AssertionError, match=r"other differs from torch\.distributed"):
            gpu_calls.agree(ways, x, part, commlayer.world())

    commlayer.run_local(compare, ranks=1)


def test_costs_are_medians_of_the_slowest_rank(monkeypatch):
    times = {0: [9, 9, 1, 5, 2], 1: [9, 9, 4, 3, 8]}

    def measure():
        group = commlayer.world()
        mine = iter(times[group.rank])
        monkeypatch.setattr(gpu_timing, "_timed", lambda call, *_: gpu_timing.Cost(call(), 1.0))
        return gpu_timing.interleaved({"one": lambda: next(mine)}, group, rounds=3, count=1)

    for found in commlayer.run_local(measure, ranks=2):
        assert found == {"one": gpu_timing.Cost(4.0, 1.0)}


def test_the_record_of_a_gpu_is_shown():
    row = {"op": "all_reduce", "bytes": 2**18, "way": gpu_calls.RAW, "host": 10.0, "device": 20.0}
    rows = [row, row | {"way": "commlayer", "host": 12.5}]
    moe = {"model": "deepseek-1b", "way": "EP 8", "batch": 4, "tokens": 512, "ms": 10.0, "tokens_per_second": 1e6}
    moe |= {"mfu": 0.25, "GiB": 9.0, "parameters": 1e9}
    record = {"device": "NVIDIA H200", "ranks": 8, "backend": "nccl", "torch": "2.13", "cuda": "13.0", "nccl": "2.30.7"}
    text = StringIO()
    gpu.report(record | {"quick": False, "found": {"overhead": rows, "moe": [moe]}}, Console(file=text, width=100))
    assert "device NVIDIA H200, ranks 8, backend nccl, torch 2.13, cuda 13.0, nccl 2.30.7" in text.getvalue()
    for words in ("256 KiB", "+2.5", "25.0%"):
        assert words in text.getvalue()
    assert "no MFU" not in text.getvalue()


def test_the_ladder_has_a_config_of_the_tutorial():
    config = gpu_models.FULL.vit
    assert (config.embed, config.depth, config.heads, config.patch, config.grid) == (384, 12, 8, 8, (360, 720))
    assert (config.in_channels, gpu_models.FULL.batch) == (20, 16)
    assert not config.drop_path
