"""Traces: every operation of every rank on one time line, in the Chrome Trace Event Format.

A rank's file is its own: an array with one event a line, whose end may be missing where the process was killed.
Perfetto and chrome://tracing open it as it is; ``merge`` makes one file of all ranks, ``summary`` counts.
Source: Trace Event Format, Duricu et al., 2016 (complete events, metadata events).
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

_FLUSH_SECONDS = 1.0
_FLUSH_EVENTS = 256  # about 64 KiB
_ARGUMENTS = {
    **{"group": str, "seq": int, "reduce": str, "dtype": str, "shape": list, "bytes": int, "sent": int},
    **{"peer": int, "plan": str, "site": str, "error": str},
}


class TraceFile:
    """What one rank did, appended to ``directory/trace-rank00003.json`` within a second of its end.

    A file that is there already is overwritten. ``job``: the same on all ranks of a job and in no other, so that
    files which an earlier job left are told apart. ``clock_offset_ns``: from this host's clock to that of rank 0.
    """

    def __init__(
        self,
        directory: str | Path,
        rank: int,
        size: int,
        *,
        host: str,
        backend: str,
        clock_offset_ns: int = 0,
        job: str = "",
    ):
        # The largest of several: between the two readings, the process may have been interrupted.
        epoch = max(time.time_ns() - time.perf_counter_ns() for _ in range(5))
        self._epoch = epoch + clock_offset_ns
        self._rank = rank
        self._process = os.getpid()
        self._waiting: deque[dict[str, Any]] = deque()
        self._lanes: dict[str, list[_Lane]] = {}
        self._lock = threading.Lock()  # of the file and the lanes
        self._closing = threading.Event()
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        self._file = open(path / _file_name(rank), "w", encoding="ascii")  # noqa: SIM115
        started = self._epoch + time.perf_counter_ns()
        about = {"rank": rank, "size": size, "host": host, "backend": backend, "job": job, "started_ns": started}
        self._put("[\n" + self._metadata("process_name", 0, name=f"rank {rank} ({host})", **about))
        self._put(",\n" + self._metadata("process_sort_index", 0, sort_index=rank))
        self._thread = threading.Thread(target=self._flush_regularly, name="commlayer-trace", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def write(self, operation: dict[str, Any]) -> None:
        """Add a finished operation, or one that failed; formatting it is left to the thread that flushes."""
        if operation["end"] is None:
            operation = operation | {"end": time.perf_counter_ns(), "error": operation["error"] or "did not finish"}
        self._waiting.append(operation)
        if len(self._waiting) >= _FLUSH_EVENTS:
            self._flush()

    def close(self) -> None:
        """Write what is left and end the file; more than once does no harm."""
        if os.getpid() != self._process:  # at the exit of a fork, which is no rank
            return
        self._closing.set()
        self._thread.join()
        self._flush()
        with self._lock:
            if not self._file.closed:
                self._put("\n]\n")
                self._file.close()
        atexit.unregister(self.close)

    def _flush_regularly(self) -> None:
        while not self._closing.wait(_FLUSH_SECONDS):
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            lines: list[str] = []
            while self._waiting:
                lines += self._events(self._waiting.popleft())
            if lines:
                self._put("".join(f",\n{line}" for line in lines))

    def _put(self, text: str) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:  # a full disk is no reason for the job to die
            self._waiting.clear()
            warnings.warn(f"tracing stops: {self._file.name}: {error}", RuntimeWarning, stacklevel=2)
            with suppress(OSError):
                self._file.close()

    def _events(self, operation: dict[str, Any]) -> Iterator[str]:
        """The event of an operation, and before it that of its lane if it is new."""
        group, start, end = operation["group"], operation["start"], operation["end"]
        # Perfetto drops an event that overlaps another one of its thread, and asynchronous operations overlap.
        lanes = self._lanes.setdefault(group, [])
        lane = next((lane for lane in lanes if lane.end <= start), None)
        if lane is None:
            lane = _Lane(1 + sum(map(len, self._lanes.values())))
            name = group if not lanes else f"{group} ({len(lanes) + 1})"
            lanes.append(lane)
            yield self._metadata("thread_name", lane.thread, name=name, group=group, ranks=operation["ranks"])
            yield self._metadata("thread_sort_index", lane.thread, sort_index=lane.thread)
        lane.end = end
        event = {
            "name": operation["op"],
            "cat": "message" if operation["seq"] is None else "collective",
            "ph": "X",
            "pid": self._rank,
            "tid": lane.thread,
            "args": {key: operation[key] for key in _ARGUMENTS if operation[key] is not None},
        }
        times = f'"ts": {_microseconds(self._epoch + start)}, "dur": {_microseconds(end - start)}'
        yield f"{json.dumps(event)[:-1]}, {times}}}"

    def _metadata(self, kind: str, thread: int, **arguments: Any) -> str:
        return json.dumps({"name": kind, "ph": "M", "pid": self._rank, "tid": thread, "args": arguments})


@dataclass
class _Lane:
    """A thread of the trace: operations of one group that do not overlap."""

    thread: int
    end: int = 0


def _file_name(rank: int) -> str:
    return f"trace-rank{rank:05d}.json"


def _microseconds(nanoseconds: int) -> str:
    """As text, since a double of today's date in microseconds moves in steps of 250 ns."""
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03d}"


@dataclass(frozen=True)
class RankFile:
    """The trace of one rank, as it lies in a directory."""

    path: Path
    rank: int
    size: int  # of the job
    host: str
    job: str
    started_ns: int

    @classmethod
    def open(cls, path: Path) -> RankFile:
        """Read the head of a file. ValueError where it is none of ours."""
        head: dict[str, Any] = next(_events(path), {"args": {}})["args"]
        types = {"rank": int, "size": int, "host": str, "job": str, "started_ns": int}
        if not all(isinstance(head.get(key), kind) for key, kind in types.items()):
            raise ValueError(f"{path}: not a rank's trace: it does not begin with the rank, the size and the job")
        if path.name != _file_name(head["rank"]):
            raise ValueError(
                f"{path}: holds the trace of rank {head['rank']}, whose name is {_file_name(head['rank'])}"
            )
        return cls(path, **{key: head[key] for key in types})

    def events(self) -> Iterator[dict[str, Any]]:
        """All that is in it: ``ts`` and ``dur`` in nanoseconds, and the ``ranks`` of an operation's group."""
        return _events(self.path)


@dataclass(frozen=True)
class Job:
    """The files of one job."""

    files: list[RankFile]  # in the order of ranks
    missing: list[int]  # ranks that left no file
    left_out: list[str]  # names of files in the same directory that an earlier job left

    @classmethod
    def open(cls, directory: str | Path) -> Job:
        """The newest job that was traced into a directory. ValueError names a file that is not a trace."""
        found = [RankFile.open(path) for path in sorted(Path(directory).glob("trace-rank*.json"))]
        if not found:
            raise ValueError(
                f"{directory}: no trace-rank*.json in it; COMMLAYER_TRACE={directory} makes a job write them"
            )
        newest = max(found, key=lambda file: file.started_ns)
        files = [file for file in found if (file.job, file.size) == (newest.job, newest.size)]
        missing = set(range(newest.size)) - {file.rank for file in files}
        return cls(files, sorted(missing), [file.path.name for file in found if file not in files])


def merge(directory: str | Path, output: str | Path | None = None) -> dict[str, Any]:
    """Write one file of all ranks, by default ``merged.json`` beside them; its time begins with the job's.

    Returns what was written: ``file``, ``operations``, ``ranks``, ``missing`` ranks and files ``left_out``. Raises
    ``ValueError`` naming the file that is not a rank's trace.
    """
    job = Job.open(directory)
    path = Path(output) if output else Path(directory) / "merged.json"
    if path.name.startswith("trace-rank"):
        raise ValueError(f"{path}: that is the name of a rank's trace; choose another one, such as merged.json")
    began = min(file.started_ns for file in job.files)
    operations = 0
    with open(path, "w", encoding="ascii") as merged:
        separator = "[\n"
        for file in job.files:
            for event in file.events():
                if event["ph"] == "X":
                    operations += 1
                    event |= {"ts": (event["ts"] - began) / 1000, "dur": event["dur"] / 1000}
                    del event["ranks"]
                merged.write(separator + json.dumps(event))
                separator = ",\n"
        merged.write("\n]\n")
    ranks = [file.rank for file in job.files]
    about = {"file": str(path), "operations": operations, "ranks": ranks}
    return about | {"missing": job.missing, "left_out": job.left_out}


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a rank's file, one by one; the last may be cut off, as a killed process leaves it."""
    ranks: dict[str, list[int]] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            text = line.strip().strip(b",")
            if text in (b"[", b"]", b""):
                continue
            try:
                event = json.loads(text, parse_float=Decimal)
                arguments = event["args"]
                if event["name"] == "thread_name":
                    ranks[arguments["group"]] = list(arguments["ranks"])
                elif event["ph"] == "X":
                    _check(event["name"], arguments)
                    event |= {key: _nanoseconds(event[key]) for key in ("ts", "dur")}
                    event["ranks"] = ranks[arguments["group"]]
            except (ValueError, TypeError, KeyError, RecursionError):
                if number > 1 and not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}, line {number}: no event of a rank's trace: {text[:80]!r}") from None
            yield event


def _check(name: Any, arguments: dict[str, Any]) -> None:
    """TypeError where an operation is none that a ``TraceFile`` wrote."""
    if not isinstance(name, str):
        raise TypeError(name)
    for key, kind in _ARGUMENTS.items():
        if not isinstance(arguments.get(key, kind()), kind):
            raise TypeError(key)


def _nanoseconds(microseconds: Any) -> int:
    if not isinstance(microseconds, Decimal) or not 0 <= microseconds < 10**17:
        raise TypeError(microseconds)
    return int(microseconds * 1000)
