"""commlayer bench: its arithmetic, its checks of results, its report, its command line."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import commlayer
from benchmarks import check as guard
from benchmarks import collectives
from commlayer.bench import contenders as rivals
from commlayer.bench import page, report
from commlayer.bench.groups import without
from commlayer.bench.measure import Effort, Run, Series, measure, speedup, summary
from commlayer.bench.operations import OPERATIONS, ROOT, Case, cases, fill, parse_dtypes, parse_ops, parse_size, wrong
from commlayer.bench.sweep import LIMIT, SCHEMA, case_rows, sweep, wrong_rows
from commlayer.capability import DTYPES
from commlayer.cli import app
from commlayer.cli import bench as cli
from commlayer.reduce_op import AVG, MAX, PRODUCT, SUM
from tests.unit.test_cli import OURS
from tests.unit.test_cli import ROOT as REPOSITORY

FAST = Effort(iters=2, warmup=0, check=1, seconds=0.0)


@pytest.fixture
def bare(monkeypatch):
    """No launcher, no settings."""
    for name in filter(OURS.match, list(os.environ)):
        monkeypatch.delenv(name)


def case(op, ranks=4, elements=24, dtype=torch.float32, reduce=SUM):
    return Case(op, dtype, 0 if op == "barrier" else elements, ranks, reduce)


# arithmetic -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "nbytes", "us", "algbw", "busbw"),
    [
        (256, 33554432, 1464.2, 22.92, 45.65),  # printed by all_reduce_perf in NVIDIA/nccl-tests issue 78
        (256, 268435456, 7946.8, 33.78, 67.29),
        (8, 33554432, 195.40, 171.72, 300.51),  # kvcache-ai/Mooncake pull request 3484
        (2, 65536, 67.93, 0.96, 0.96),  # NVIDIA/dgx-spark-playbooks pull request 103
    ],
)
def test_bandwidths_are_those_that_nccl_tests_prints(ranks, nbytes, us, algbw, busbw):
    one = case("all_reduce", ranks, nbytes // 4)
    assert one.algbw(us * 1e-6) == pytest.approx(algbw, abs=0.011)
    assert one.busbw(us * 1e-6) == pytest.approx(busbw, abs=0.011)


def test_bus_bandwidth_and_traffic_of_every_operation():
    found = {op: (row.bus(4), row.traffic(4), row.kernel) for op, row in OPERATIONS.items()}
    assert found == {
        "all_reduce": (1.5, 2.0, "add"),
        "reduce": (1.0, 1.25, "add"),
        "broadcast": (1.0, 1.5, "copy"),
        "all_gather": (0.75, 2.0, "copy"),
        "reduce_scatter": (0.75, 1.25, "add"),
        "all_to_all": (0.75, 2.0, "copy"),
        "gather": (0.75, 0.5, "copy"),
        "scatter": (0.75, 0.5, "copy"),
        "sendrecv": (1.0, 2.0, "copy"),
        "barrier": (1.0, 0.0, "copy"),
    }


def test_sizes_are_of_the_whole_array():
    made = cases(["all_gather", "barrier"], [torch.float32, torch.int16], 8, 1024, 4, 4, SUM)
    assert [one.nbytes for one in made if one.dtype == torch.float32] == [
        16,
        32,
        128,
        512,
    ]  # an element a rank, at least
    assert [one.nbytes for one in made if one.dtype == torch.int16] == [8, 32, 128, 512]
    assert [one.op for one in made if one.dtype == torch.uint8] == ["barrier"]
    assert (made[1].inputs, made[1].outputs) == (2, 8)
    assert [(one.inputs, one.outputs) for one in cases(["scatter"], [torch.float32], 64, 64, 2, 4, SUM)] == [(16, 4)]
    assert cases(["all_reduce"], [torch.int32], 8, 64, 2, 2, AVG) == []
    assert len(cases(["all_gather"], [torch.int32], 8, 64, 2, 2, AVG)) == 4


def test_statistics():
    assert summary([4.0, 1.0, 3.0, 2.0, 100.0]) == (3.0, 2.0, 4.0, 1.0)
    assert summary([7.0]) == (7.0, 7.0, 7.0, 7.0)
    # A machine that is ten times as slow for a while slows both: the ratio stays.
    assert speedup([2.0, 20.0, 2.0, 20.0], [1.0, 10.0, 1.0, 10.0]) == 2.0


@pytest.mark.parametrize(("text", "size"), [("8", 8), ("64K", 65536), ("1m", 1 << 20), ("2GiB", 2 << 30), ("16 B", 16)])
def test_sizes_as_users_write_them(text, size):
    assert parse_size(text) == size


def test_names_as_users_write_them():
    assert parse_ops("allreduce, all_to_all") == ["all_reduce", "all_to_all"]
    assert parse_ops("all") == list(OPERATIONS)
    assert parse_dtypes("float,half,bfloat16,float32") == [torch.float32, torch.float16, torch.bfloat16]


# checks of results ----------------------------------------------------------------------------------------


def outputs(one):
    """What every rank must get, from all inputs, by NumPy."""
    inputs = []
    for rank in range(one.ranks):
        x = torch.empty(one.inputs, dtype=one.dtype)
        fill(one, rank, x)
        inputs.append(x.numpy())
    stacked = np.stack(inputs)
    total = {"sum": stacked.sum(0), "product": stacked.prod(0), "max": stacked.max(0), "avg": stacked.mean(0)}
    own = [slice(rank * one.part, (rank + 1) * one.part) for rank in range(one.ranks)]
    return {
        "all_reduce": lambda rank: total[one.reduce.name],
        "reduce": lambda rank: total[one.reduce.name] if rank == ROOT else None,
        "broadcast": lambda rank: inputs[ROOT],
        "all_gather": lambda rank: np.concatenate(inputs),
        "reduce_scatter": lambda rank: total[one.reduce.name][own[rank]],
        "all_to_all": lambda rank: np.concatenate([x[own[rank]] for x in inputs]),
        "gather": lambda rank: np.concatenate(inputs) if rank == ROOT else None,
        "scatter": lambda rank: inputs[ROOT][own[rank]],
        "sendrecv": lambda rank: inputs[rank - 1],
    }[one.op]


COMES_OUT = [(op, SUM) for op in OPERATIONS if op != "barrier"]
COMES_OUT += [(op, reduce) for op, row in OPERATIONS.items() if row.reduces for reduce in (PRODUCT, MAX, AVG)]


@pytest.mark.parametrize(("op", "reduce"), COMES_OUT, ids=str)
def test_every_rank_knows_what_must_come_out(op, reduce):
    one = case(op, ranks=3, elements=300_000 if reduce == SUM else 300, dtype=torch.float64, reduce=reduce)
    for rank in range(3):
        right = outputs(one)(rank)
        if right is None:
            assert wrong(one, rank, None) == 0
            continue
        result = torch.from_numpy(right).clone()
        assert wrong(one, rank, result) == 0
        result[-1] += 1
        result[0] = float("nan")
        assert wrong(one, rank, result) == 2
        rolled = torch.from_numpy(right).roll(len(right) // 2)  # blocks in the wrong place
        assert wrong(one, rank, rolled) > len(right) // 4


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_inputs_have_a_meaning_in_every_dtype(dtype):
    one = case("all_gather", ranks=2, elements=2000, dtype=dtype)
    parts = [torch.empty(1000, dtype=dtype) for _ in range(2)]
    for rank, x in enumerate(parts):
        fill(one, rank, x)
    whole = torch.cat([x.view(torch.uint8) for x in parts]).view(dtype)
    assert wrong(one, 1, whole) == 0
    swapped = torch.cat([x.view(torch.uint8) for x in reversed(parts)]).view(dtype)
    assert wrong(one, 1, swapped) > 400


def test_sums_of_halves_are_exact():
    for dtype in (torch.bfloat16, torch.float16):
        one = case("all_reduce", ranks=7, elements=7000, dtype=dtype)
        rows = [torch.empty(7000, dtype=dtype) for _ in range(7)]
        for rank, x in enumerate(rows):
            fill(one, rank, x)
        assert wrong(one, 0, torch.stack(rows).sum(0)) == 0  # in the half type itself, in whatever order
        assert wrong(one, 0, torch.stack(rows[::-1]).float().sum(0).to(dtype)) == 0


def run_of(one, call, out):
    return Run(call, lambda: out.fill_(-1), out)


def test_a_result_that_is_wrong_is_found():
    one = case("all_gather", ranks=2, elements=1000)

    def rank():
        world = commlayer.world()
        x, right, late, lazy = torch.empty(500), torch.empty(1000), torch.empty(1000), torch.empty(1000)
        fill(one, world.rank, x)

        def once_wrong():  # on one rank, in one element
            commlayer.all_gather(x, out=late)
            late[7] += world.rank

        runs = {
            "right": run_of(one, lambda: commlayer.all_gather(x, out=right), right),
            "wrong": run_of(one, once_wrong, late),
            "nothing": run_of(one, lambda: None, lazy),
        }
        return measure(one, runs, world, FAST)

    for found in commlayer.run_local(rank, ranks=2):
        # In the last of the samples and in one more call; the same is known on all ranks.
        assert {name: series.wrong for name, series in found.items()} == {"right": 0, "wrong": 2, "nothing": 4000}
        assert {len(series.seconds) for series in found.values()} == {2}


def test_without_checks_nothing_is_said_of_results():
    one = case("all_reduce", ranks=2)

    def rank():
        runs = {"nothing": run_of(one, lambda: None, torch.zeros(24))}
        return measure(one, runs, commlayer.world(), Effort(2, 0, 0, 0.0))

    assert commlayer.run_local(rank, ranks=2)[0]["nothing"].wrong is None


# sweeps and reports ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept():
    """A report of every operation, on ranks that are threads."""

    def rank():
        curves = ["all_reduce", "all_to_all"]
        todo = cases(curves, [torch.float32], 16, 8192, 512, 3, SUM)
        todo += cases([op for op in OPERATIONS if op not in curves], [torch.float32], 8192, 8192, 2, 3, SUM)
        todo += cases(["all_gather"], [torch.bool], 8192, 8192, 2, 3, SUM)
        return sweep(commlayer.world(), todo, FAST, disabled=("all_to_all",))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # else a thread that waits holds up those it waits for
    try:
        first, *others = commlayer.run_local(rank, ranks=3)
    finally:
        sys.setswitchinterval(before)
    assert all([row["us"] for row in other["rows"]] == [row["us"] for row in first["rows"]] for other in others)
    return first


def test_the_report_is_plain_data(swept):
    again = json.loads(json.dumps(swept))
    assert again == swept
    assert swept["schema"] == SCHEMA
    assert (swept["ranks"], swept["backend"]) == (3, "threads")
    assert {"cpu", "cores"} <= swept["host"].keys()
    assert {"commlayer", "torch", "threads"} <= swept["versions"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", swept["date"])
    assert all(row["copy"] > 0 and row["add"] > 0 for row in swept["limits"]["bandwidth"])
    for row in swept["rows"]:
        assert row["implementation"] in swept["implementations"]
        assert 0 < row["us_least"] <= row["us_low"] <= row["us"] <= row["us_high"]
        assert row["wrong"] == (None if row["implementation"] == LIMIT else 0), row
    assert wrong_rows(swept) == []
    assert {row["op"] for row in swept["rows"]} == set(OPERATIONS)


def test_an_emulation_is_measured_where_it_is_one(swept):
    emulated = [row for row in swept["rows"] if row["implementation"] == "without all_to_all"]
    assert {row["op"] for row in emulated} == {"all_to_all"}
    assert {row["how"] for row in emulated} == {"pairwise"}


def test_the_fallbacks_of_an_emulation_are_named():
    def rank():
        group = without(commlayer.world(), "broadcast")
        return [rivals.plan(group, case(op)) for op in ("broadcast", "all_reduce")]

    assert commlayer.run_local(rank, ranks=4)[0] == ["same_bits_as_integers, sum_with_zeros", "native"]


def test_rows_say_how_fast_each_is():
    one = case("all_reduce", ranks=2, elements=250_000)  # 1 MB
    series = {
        "gloo": Series([4e-3, 4e-3, 5e-3], 1, 0),
        "commlayer": Series([1e-3, 1e-3, 1.25e-3], 2, 3),
        LIMIT: Series([0.5e-3 - 1e-6, 0.5e-3 - 1e-6, 0.5e-3 - 1e-6], 1, 0),
    }
    base, ours, limit = case_rows(one, series, {"commlayer": "shared memory"}, flag_us=1.0)
    assert (ours["op"], ours["reduce"], ours["dtype"], ours["bytes"]) == ("all_reduce", "sum", "float32", 1_000_000)
    assert (ours["us"], ours["speedup"], ours["how"], ours["calls"]) == (1000.0, 4.0, "shared memory", 2)
    assert (ours["algbw"], ours["busbw"], ours["wrong"]) == (1.0, 1.0, 3)
    assert ours["of_limit"] == pytest.approx(0.5)
    assert (base["speedup"], base["how"]) == (1.0, "")
    assert limit["us"] == pytest.approx(500.0)
    assert limit["wrong"] is None


def test_a_barrier_is_limited_by_a_flag_alone():
    one = case("barrier")
    rows = case_rows(one, {"commlayer": Series([8e-6], 1, 0), LIMIT: Series([1e-6], 1, 0)}, {}, flag_us=0.5)
    assert rows[-1]["us"] == pytest.approx(0.5)
    assert rows[0]["speedup"] is None  # there is no gloo


def text_of(rendered):
    from rich.console import Console

    out = Console(width=250, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    out.print(*rendered, sep="\n")
    out.file.close()
    return out.export_text()


def test_tables_show_every_operation_and_what_is_wrong(swept):
    text = text_of(report.tables(swept))
    assert "WRONG" not in text
    for words in ("all_reduce sum float32", "all_gather bool", "barrier", "symmetric", "limit of the machine", "µs"):
        assert words in text
    spoilt = json.loads(json.dumps(swept))
    spoilt["rows"][0]["wrong"] = 17
    assert "WRONG: 17" in text_of(report.tables(spoilt))


@pytest.mark.parametrize(("us", "text"), [(0.514, "0.514 µs"), (12345.6, "12.3 ms"), (2.5e6, "2.5 s")])
def test_durations(us, text):
    assert report.duration(us) == text


@pytest.mark.parametrize(("gbs", "text"), [(12.34, "12.3 GB/s"), (0.25, "250 MB/s"), (2e-6, "2 kB/s")])
def test_rates(gbs, text):
    assert report.rate(gbs) == text


def test_the_page_needs_no_other_file(swept, tmp_path):
    pytest.importorskip("matplotlib")
    (file,) = page.save(swept, tmp_path / "bench.html")
    text = file.read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)=["']?([^"'> ]{5})""", text)
    assert len(sources) == 3  # two operations of several sizes, and an overview
    assert set(sources) == {"data:"}
    assert "http" not in re.sub(r'src="[^"]*"', "", text)
    for name, _ in report.panels(swept):
        assert f"<h2>{name}</h2>" in text
    index, *pictures = page.save(swept, tmp_path / "folder")
    assert index == tmp_path / "folder" / "index.html"
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert tmp_path / "folder" / "all_reduce-sum-float32.png" in pictures


# the guard ------------------------------------------------------------------------------------------------


def reported(**times):
    """A report of one case on the base and on ours, as the guard reads it."""
    return {
        "rows": [
            {"op": "all_reduce", "dtype": "float32", "bytes": 8, "implementation": key, "us_least": us}
            for key, us in times.items()
        ]
    }


def test_the_guard_sees_twice_as_slow_and_no_noise():
    case = "all_reduce float32 8 commlayer"
    recorded = guard.ratios(guard.pooled({}, reported(gloo=100.0, mpi4py=2.0, commlayer=10.0)))
    assert recorded == {case: {"gloo": 0.1, "mpi4py": 5.0}}

    def slower(*reports):
        least = {}
        for one in reports:
            least = guard.pooled(least, one)
        return guard.slower(recorded, guard.ratios(least))

    assert slower(reported(gloo=100.0, mpi4py=2.0, commlayer=10.0)) == {}
    assert slower(reported(gloo=100.0, mpi4py=2.0, commlayer=20.0)) == {case: 2.0}
    assert slower(reported(gloo=200.0, mpi4py=4.0, commlayer=20.0)) == {}  # a slower machine
    assert slower(reported(gloo=100.0, mpi4py=1.0, commlayer=10.0)) == {}  # a faster mpi4py is no fault of ours
    busy, quiet = (reported(gloo=100.0, mpi4py=2.0, commlayer=us) for us in (900.0, 11.0))
    assert slower(busy) == {case: 90.0}
    assert slower(busy, quiet) == {}
    assert slower(reported(gloo=100.0, mpi4py=2.0)) == {case: float("inf")}  # it was not even measured


@pytest.mark.parametrize(
    ("times", "others", "status", "runs"),
    [
        ([10.0], [0.9], 0, 1),  # fine, even beside other load
        ([30.0, 10.5], [0.9, 0.9], 0, 2),
        ([30.0, 30.0, 30.0], [0.0, 0.0, 0.0], 1, 3),
        ([30.0] * 5, [0.0, 0.9, 0.0, 0.9, 0.0], 1, 5),
        ([30.0] * 5, [0.9] * 5, 2, 5),
    ],
)
def test_the_guard_convicts_on_a_quiet_machine_alone(monkeypatch, times, others, status, runs):
    recorded = {"host": {}, "ratios": {"gloo": {"all_reduce float32 8 commlayer": {"gloo": 0.1}}}}
    done = [({**reported(gloo=100.0, commlayer=us), "host": {}}, part) for us, part in zip(times, others, strict=True)]
    rest = iter(done)
    monkeypatch.setattr(guard, "run", lambda backend: next(rest))
    monkeypatch.setattr(guard, "BACKENDS", ("gloo",))
    assert guard.check(recorded) == status
    assert len(done) - len(list(rest)) == runs


def test_what_others_take_of_the_cores_is_seen():
    first, own, _ = guard.usage()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert guard.usage()[0] - first > 0.2  # this very process is no child of its own
    assert guard.usage()[1] == own


def test_what_the_guard_measures_exists(bare, monkeypatch):
    """Its command line is one that the command takes."""
    monkeypatch.setattr(cli, "start", lambda *arguments: None)
    options = ["--ops", guard.OPS, *guard.SIZES, "-n", "15", "-r", "2", "--backend", "gloo", "--json", "guard.json"]
    assert CliRunner().invoke(app, ["bench", *options]).exit_code == 0
    line = collectives.command(4, "gloo", ["-f", "8"])
    assert CliRunner().invoke(app, line[3:]).exit_code == 0


# the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ops", "all_to_nobody"], "--ops: expected all, or some of all_reduce"),
        (["-d", "float31"], "--datatype: expected some of bool"),
        (["-o", "mean"], "--op: expected one of sum"),
        (["-b", "8 eggs"], "--minbytes: expected a number of bytes such as 8, 64K or 256M, got '8 eggs'"),
        (["-e", "0"], "--maxbytes: expected a number of bytes"),
        (["-b", "1M", "-e", "1K"], "--minbytes 1M: more than --maxbytes 1K"),
        (["--disable", "flying"], "'flying' matches nothing"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at/all.json: no folder to write to"),
        (["--report", "/nowhere/at/all"], "/nowhere/at/all: no folder to write to"),
        (["--json", "/tmp"], "--json /tmp: is a folder"),
        (["--report", __file__], "test_bench.py: is no folder"),
        (["-r", "2", "--backend", "threads"], "--backend threads"),
    ],
)
def test_bad_input_is_an_error_of_one_line(bare, arguments, words):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_it_starts_ranks_where_no_launcher_did(bare, monkeypatch):
    started = []
    monkeypatch.setattr(cli, "start", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["commlayer", "bench", "--quick", "-r", "3"])
    assert CliRunner().invoke(app, ["bench", "--quick", "-r", "3", "--backend", "gloo"]).exit_code == 0
    assert started == [(3, ["-m", "commlayer", "bench", "--quick", "-r", "3"], "gloo", {})]


def test_without_matplotlib_no_report(bare, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "--report", "page.html"])
    assert result.exit_code == 1
    assert "pip install 'commlayer[bench]'" in result.stderr


def test_a_contender_that_does_nothing_is_reported(monkeypatch):
    monkeypatch.setattr(rivals, "commlayer_spellings", lambda g: {"all_gather": lambda c, x, out: lambda: None})

    def rank():
        return sweep(commlayer.world(), cases(["all_gather"], [torch.float32], 64, 64, 2, 2, SUM), FAST)

    found = wrong_rows(commlayer.run_local(rank, ranks=2)[0])
    assert {row["implementation"] for row in found} == {"commlayer", "symmetric"}
    assert all(row["wrong"] == 64 for row in found)  # 16 elements, on 2 ranks, in 2 comparisons


def test_two_ranks_of_this_machine(tmp_path):
    env = {key: value for key, value in os.environ.items() if not OURS.match(key)}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    sizes = ["-b", "8", "-e", "64K", "-f", "8192", "-n", "3", "-w", "1", "--disable", "all_to_all"]
    options = ["--ops", "all_reduce,all_to_all,barrier", "--json", "out.json", "--report", "out.html"]
    command = [sys.executable, "-m", "commlayer", "bench", *sizes, *options, "-r", "2"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert wrong_rows(found) == []
    assert found["ranks"] == 2
    expected = {"gloo", "commlayer", "symmetric", "without all_to_all", LIMIT}
    assert expected <= {row["implementation"] for row in found["rows"]} <= set(found["implementations"])
    assert ("mpi4py" in found["implementations"]) == (found["backend"] == "mpi")
    assert {(row["op"], row["bytes"]) for row in found["rows"]} == {
        *((op, size) for op in ("all_reduce", "all_to_all") for size in (8, 65536)),
        ("barrier", 0),
    }
    assert all(row["speedup"] > 0 for row in found["rows"])
    assert "<img" in (tmp_path / "out.html").read_text()
    assert result.stdout.count("all_reduce sum float32") == 1  # rank 0 alone speaks
    assert result.stderr == ""
