"""Traces: what a rank writes, what is left of it when it dies, one file of all, and the straggler."""

import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

import commlayer
from commlayer.cli import app
from commlayer.trace import Job, TraceFile, merge
from commlayer.trace_summary import summary
from tests.unit.test_jobs import job as execute
from tests.unit.test_jobs import needs_mpiexec

WORLD = [0, 1, 2, 3]
MS = 1_000_000


def operation(op="all_reduce", start=0, end=MS, *, ranks=WORLD, **other):
    """One operation as the recorder hands it over."""
    group = "world" if ranks == WORLD else "-".join(map(str, ranks))
    plain = {"reduce": None, "dtype": "float32", "shape": [4, 3], "bytes": 48, "sent": 72, "peer": None}
    plain |= {"plan": "native", "seq": None, "site": "train.py:30", "error": None}
    return {"group": group, "ranks": ranks, "op": op, "start": start, "end": end, **plain, **other}


def write(directory, operations, size=4, job="monday", **other):
    """A job whose rank r does ``operations[r]``."""
    for rank, todo in operations.items():
        file = TraceFile(directory, rank, size, host=f"node{rank // 2}", backend="gloo", job=job, **other)
        for done in todo:
            file.write(done)
        file.close()


def job(directory, steps=10, late=2, by=5 * MS):
    """Four ranks that do the same, except that one of them comes late."""
    now = time.perf_counter_ns() + 1000 * MS  # after the files are made

    def steps_of(rank):
        for step in range(steps):
            start = now + 20 * step * MS + (by if rank == late else 0)
            yield operation("all_reduce", start, now + (20 * step + 6) * MS, seq=step, reduce="sum")
            yield operation("send", start + 10 * MS, start + 11 * MS, peer=(rank + 1) % 4)

    write(directory, {rank: steps_of(rank) for rank in WORLD})


def read(path):
    return json.loads(Path(path).read_text())


def operations_in(path):
    return [event for event in read(path) if event["ph"] == "X"]


def run(*arguments, status=0):
    result = CliRunner().invoke(app, ["trace", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return " ".join(result.output.split())


def test_a_file_is_a_chrome_trace(tmp_path):
    now = time.perf_counter_ns()
    waits = [operation("all_gather", now, now + 9 * MS, seq=0, ranks=[1, 3])]  # asynchronous, waited for last
    during = [operation(start=now + i * MS, end=now + (i + 1) * MS, seq=i, ranks=[1, 3]) for i in range(1, 5)]
    alone = [operation("recv", now, now + 1, peer=0)]
    write(tmp_path, {1: [*during, *waits, *alone]})
    events = read(tmp_path / "trace-rank00001.json")
    names = {(e["name"], e["tid"]): e["args"] for e in events if e["ph"] == "M"}
    assert names["process_name", 0]["name"] == "rank 1 (node0)"
    assert names["process_sort_index", 0] == {"sort_index": 1}
    done = [event for event in events if event["ph"] == "X"]
    assert len(done) == 6
    assert len(names) + len(done) == len(events)
    for event in done:
        assert event["pid"] == 1
        assert event["cat"] == ("message" if event["name"] == "recv" else "collective")
        assert all(isinstance(event[key], float) and event[key] >= 0 for key in ("ts", "dur"))
        assert names["thread_name", event["tid"]]["group"] == event["args"]["group"]
    # Perfetto drops what overlaps another event of its thread.
    by_thread = sorted((e["tid"], e["ts"], e["ts"] + e["dur"]) for e in done)
    assert all(a[0] != b[0] or a[2] <= b[1] + 0.5 for a, b in pairwise(by_thread))
    assert sorted(args["name"] for (kind, _), args in names.items() if kind == "thread_name") == [
        "1-3",
        "1-3 (2)",
        "world",
    ]
    assert done[0]["args"] == {
        "group": "1-3", "seq": 1, "dtype": "float32", "shape": [4, 3], "bytes": 48, "sent": 72,
        "plan": "native", "site": "train.py:30",
    }  # fmt: skip


def test_times_are_on_the_clock_of_rank_0(tmp_path):
    before, start = time.time(), time.perf_counter_ns()
    write(tmp_path, {0: [operation(start=start, end=start + 1234567)]}, clock_offset_ns=3600 * 10**9)
    [event] = operations_in(tmp_path / "trace-rank00000.json")
    assert before - 1 < event["ts"] / 1e6 - 3600 < time.time()
    assert event["dur"] == 1234.567


def test_nanoseconds_survive(tmp_path):
    now = time.perf_counter_ns()
    write(tmp_path, {0: [operation(start=now + i * 1001, end=now + i * 1001 + 7) for i in range(100)]})
    merge(tmp_path)
    starts = [event["ts"] for event in operations_in(tmp_path / "merged.json")]
    assert [round((b - a) * 1000) for a, b in pairwise(starts)] == [1001] * 99


def test_what_is_written_reaches_the_file_within_a_second(tmp_path):
    file = TraceFile(tmp_path, 0, 1, host="here", backend="gloo")
    file.write(operation())
    deadline = time.monotonic() + 10
    while "all_reduce" not in (tmp_path / "trace-rank00000.json").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for seq in range(1000):  # more than is held back
        file.write(operation(seq=seq))
    assert (tmp_path / "trace-rank00000.json").read_text().count("all_reduce") > 500
    file.close()
    file.close()
    file.write(operation())
    assert len(operations_in(tmp_path / "trace-rank00000.json")) == 1001


KILLED = """
import os, signal, sys, time
from commlayer.trace import TraceFile
from tests.unit.test_trace import operation
file = TraceFile(sys.argv[1], 0, 1, host="here", backend="mpi")
for seq in range(700):
    file.write(operation(start=seq * 10**6, end=(seq + 1) * 10**6, seq=seq))
if sys.argv[2] == "kill":
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("end", "status"), [("kill", -signal.SIGKILL), ("exit", 0)])
def test_a_process_that_ends_without_closing(tmp_path, end, status):
    root = Path(commlayer.__file__).parents[1]
    made = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), end], cwd=root, timeout=120)
    assert made.returncode == status
    text = (tmp_path / "trace-rank00000.json").read_text()
    assert len(json.loads(text + "]" * (end == "kill"))) == 4 + 700
    assert summary(tmp_path)["operations"][0]["calls"] == 700


def test_a_full_disk_ends_the_trace_and_not_the_job(tmp_path):
    (tmp_path / "trace-rank00000.json").symlink_to("/dev/full")
    with pytest.warns(RuntimeWarning, match="tracing stops.*trace-rank00000.*No space left"):
        file = TraceFile(tmp_path, 0, 1, host="here", backend="gloo")
    for _ in range(1000):
        file.write(operation())
    file.close()


def test_a_file_that_is_cut_off_anywhere(tmp_path):
    write(tmp_path, {0: [operation(seq=seq) for seq in range(3)]}, size=1)
    path = tmp_path / "trace-rank00000.json"
    whole = path.read_bytes()
    head = whole.index(b"\n", 2)
    counts = set()
    for length in range(head, len(whole) + 1):
        path.write_bytes(whole[:length])
        found = [event["args"]["seq"] for event in Job.open(tmp_path).files[0].events() if event["ph"] == "X"]
        assert found == list(range(whole[:length].count(b'"dur": 1000.000}')))
        counts.add(len(found))
    assert counts == {0, 1, 2, 3}
    for length in range(head - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"trace-rank00000\.json"):
            Job.open(tmp_path)


def test_merging_keeps_every_event(tmp_path):
    job(tmp_path)
    each = {rank: operations_in(tmp_path / f"trace-rank0000{rank}.json") for rank in WORLD}
    made = merge(tmp_path)
    assert made == {
        "file": str(tmp_path / "merged.json"),
        "operations": 80,
        "ranks": WORLD,
        "missing": [],
        "left_out": [],
    }
    merged = operations_in(made["file"])
    for rank, events in each.items():
        mine = [event for event in merged if event["pid"] == rank]
        assert [(e["name"], e["args"], e["dur"]) for e in mine] == [(e["name"], e["args"], e["dur"]) for e in events]
        shift = {round(a["ts"] - b["ts"]) for a, b in zip(events, mine, strict=True)}
        assert max(shift) - min(shift) <= 1
    assert min(event["ts"] for event in merged) >= 0
    assert {e["pid"] for e in read(made["file"]) if e["name"] == "process_name"} == set(WORLD)
    assert merge(tmp_path, tmp_path / "other.json")["operations"] == 80  # merged.json is not taken for a rank's
    with pytest.raises(ValueError, match=r"trace-rank00009\.json.*choose another"):
        merge(tmp_path, tmp_path / "trace-rank00009.json")


def test_the_straggler_is_found(tmp_path):
    job(tmp_path, steps=10, late=2, by=5 * MS)
    found = summary(tmp_path)
    rows = {row["rank"]: row for row in found["ranks"]}
    assert found["collectives"] == 10
    for rank in (0, 1, 3):
        assert rows[rank]["waited"] == pytest.approx(0.05, abs=0.01)
        assert (rows[rank]["caused"], rows[rank]["last"]) == (0, 0)
    assert rows[2]["waited"] == 0
    assert rows[2]["caused"] == pytest.approx(0.15, abs=0.03)
    assert rows[2]["last"] == 10
    assert rows[2]["total"] == pytest.approx(10 * (0.001 + 0.001))
    [reduction] = [row for row in found["operations"] if row["op"] == "all_reduce"]
    assert (reduction["reduce"], reduction["group_size"], reduction["plan"]) == ("sum", 4, "native")
    assert (reduction["calls"], reduction["bytes"], reduction["sent"]) == (40, 40 * 48, 40 * 72)
    assert reduction["median"] == pytest.approx(0.006)
    said = run("summary", tmp_path)
    assert "Straggler: rank 2 on node1, last in 10 of 10 collectives; 100% of all waiting was for it." in said


@pytest.mark.parametrize(
    ("op", "algbw", "busbw"),  # of 4 ranks, each with 1 MB in 1 ms: by nccl-tests' tables
    [
        ("all_reduce", 1.0, 1.5),
        ("reduce_scatter", 1.0, 0.75),
        ("all_to_all", 1.0, 0.75),
        ("all_gather", 4.0, 3.0),
        ("gather", 4.0, 3.0),
        ("scatter", 1.0, 0.75),
        ("broadcast", 1.0, 1.0),
        ("reduce", 1.0, 1.0),
        ("send", 1.0, 1.0),
        ("barrier", None, None),
    ],
)
def test_bandwidths(tmp_path, op, algbw, busbw):
    size = 0 if op == "barrier" else 10**6
    write(tmp_path, {rank: [operation(op, 0, MS, bytes=size)] * 3 for rank in WORLD})
    [row] = summary(tmp_path)["operations"]
    assert row["bytes"] == 12 * size
    assert (row["algbw"], row["busbw"]) == (algbw and pytest.approx(algbw), busbw and pytest.approx(busbw))


def test_failed_operations_are_told_apart(tmp_path):
    failed = operation(seq=7, start=time.perf_counter_ns(), end=None, error="CommTimeout: rank 1 never arrived")
    open_ended = operation("recv", time.perf_counter_ns(), None, peer=3)
    write(tmp_path, {0: [operation(seq=6), failed, open_ended]})
    found = summary(tmp_path)
    assert found["operations"][0]["calls"] == 1
    assert [call["error"] for call in found["failed"]] == [failed["error"], "did not finish"]
    assert "rank 0: all_reduce #7 of world at train.py:30: CommTimeout: rank 1 never arrived" in run(
        "summary", tmp_path
    )


def test_missing_ranks_are_said_and_cause_no_waiting(tmp_path):
    job(tmp_path)
    (tmp_path / "trace-rank00001.json").unlink()
    found = summary(tmp_path)
    assert (found["missing"], found["collectives"]) == ([1], 0)
    for said in (run("summary", tmp_path), run("merge", tmp_path)):
        assert "no trace of rank 1" in said
    assert "No rank waited" in run("summary", tmp_path)


@pytest.mark.parametrize("again", [{"size": 2}, {"size": 4, "job": "tuesday"}])
def test_an_earlier_job_in_the_same_directory(tmp_path, again):
    job(tmp_path)
    write(tmp_path, {rank: [operation("barrier")] for rank in (0, 1)}, **again)
    found = summary(tmp_path)
    assert [row["op"] for row in found["operations"]] == ["barrier"]
    assert found["left_out"] == ["trace-rank00002.json", "trace-rank00003.json"]
    assert found["missing"] == list(range(2, again["size"]))
    assert "left out, of an earlier job: trace-rank00002.json, trace-rank00003.json" in run("merge", tmp_path)


EVENT = '{"name": "all_reduce", "ph": "X", "pid": 0, "tid": 1, "args": {"group": "world"}, "ts": 1.0, "dur": 1.0}'
FOREIGN = {
    "empty": "",
    "no JSON": "hello",
    "an object": '{"traceEvents": [\n{"ph": "X"}\n]}\n',
    "another trace": '[\n{"name": "f", "ph": "X", "ts": 1, "dur": 1, "pid": 1, "tid": 1, "args": {}}\n]\n',
    "no arguments": '[\n{"name": "f", "ph": "B"}\n]\n',
    "a list": "[\n[1, 2]\n]\n",
    "deep": "[\n" + "[" * 100_000 + "\n]\n",
    "binary": "[\n\x00\x01\n]\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_named(tmp_path, name):
    write(tmp_path, {0: [operation()]})
    (tmp_path / "trace-rank00001.json").write_text(FOREIGN[name])
    for command in ("merge", "summary"):
        assert "trace-rank00001.json" in run(command, tmp_path, status=2)


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        EVENT,  # of a lane that has not been named
        EVENT.replace("1.0, ", '"soon", '),
        EVENT.replace("1.0, ", "NaN, "),
        EVENT.replace("1.0, ", "1e999999, "),
        EVENT.replace('"all_reduce"', "[3]"),
        '{"name": "thread_name", "ph": "M", "args": {"group": ["world"], "ranks": [0]}}',
        '{"name": "thread_name", "ph": "M", "args": {"group": "world", "ranks": 4}}',
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    write(tmp_path, {0: [operation(seq=0)]}, size=1)
    path = tmp_path / "trace-rank00000.json"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:3], line + ",", *lines[3:]]))
    with pytest.raises(ValueError, match=r"trace-rank00000\.json, line 4: no event"):
        summary(tmp_path)


def test_a_renamed_file_is_named(tmp_path):
    write(tmp_path, {0: [operation()]})
    (tmp_path / "trace-rank00000.json").rename(tmp_path / "trace-rank00001.json")
    with pytest.raises(ValueError, match=r"trace-rank00001\.json: holds the trace of rank 0"):
        merge(tmp_path)


def test_the_command(tmp_path):
    job(tmp_path)
    said = run("merge", tmp_path, "-o", tmp_path / "all.json")
    assert "all.json: 80 operations of 4 ranks" in said
    assert "ui.perfetto.dev" in said
    said = run("summary", tmp_path)
    assert "all_reduce sum native 4 40 1.88 KiB 2.81 KiB 190 ms 6 ms 6 ms" in said
    assert "2 node1 20 20 ms 0 µs 10 150 ms" in said
    assert json.loads(CliRunner().invoke(app, ["trace", "summary", str(tmp_path), "--json"]).stdout)["size"] == 4
    assert "COMMLAYER_TRACE" in run("summary", tmp_path / "none", status=2)
    assert "nowhere" in run("merge", tmp_path, "-o", tmp_path / "nowhere" / "all.json", status=2)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpiexec", marks=needs_mpiexec)])
@pytest.mark.parametrize(
    ("disable", "plan", "sent"),  # by rank 0, which has 3 rows of 8 bytes to send, and by rank 1, which has 5
    [
        ("", "shared memory", [2 * 8, 5 * 8]),
        ("all_to_all", "pairwise", [2 * 8, 5 * 8]),
        ("all_to_all,send,recv,broadcast,all_reduce", "padded_all_gather", [2 * 5 * 8 + 2 * 8] * 2),
    ],
)
def test_a_job_counts_what_its_ranks_send(tmp_path, launcher, disable, plan, sent):
    program = """
        import torch, commlayer
        splits = ([1, 2], [1, 5]) if commlayer.init().rank == 0 else ([5, 0], [2, 0])
        commlayer.all_to_all(torch.ones(sum(splits[0]), 2), input_splits=splits[0], output_splits=splits[1])
    """
    traces = tmp_path / "traces"
    result = execute(launcher, 2, program, tmp_path, COMMLAYER_TRACE=str(traces), COMMLAYER_DISABLE=disable)
    assert result.returncode == 0, result.stderr
    each = [operations_in(traces / f"trace-rank0000{rank}.json")[0]["args"] for rank in (0, 1)]
    assert [(call["plan"], call["bytes"], call["sent"]) for call in each] == [(plan, 24, sent[0]), (plan, 40, sent[1])]
    [row] = summary(traces)["operations"]
    assert (row["plan"], row["bytes"], row["sent"]) == (plan, 64, sum(sent))
