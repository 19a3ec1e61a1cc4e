"""What a job has not cleaned up: processes of its ranks' sessions or bearing its mark, and shared memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tests.faults.outcome import RankOutcome

MARK = "FAULTS_JOB"  # a variable in the environment of all that a job starts


def find(mark: str, ranks: Sequence[RankOutcome]) -> list[str]:
    """What is still there after two seconds: mpiexec and its proxies leave a moment after the last rank."""
    sessions = {start["pid"] for rank in ranks if (start := rank.find("start"))}
    end = time.monotonic() + 2
    while True:
        left = sorted({*_processes(mark, sessions), *_segments(ranks)})
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.02)


def remove(ranks: Sequence[RankOutcome]) -> None:
    for path in _segments(ranks):
        with suppress(FileNotFoundError):
            os.unlink(path)


def _processes(mark: str, sessions: set[int]) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name, _, fields = (path / "stat").read_text().rpartition(") ")
            state, session = fields.split()[0], int(fields.split()[3])
            ours = session in sessions or f"{MARK}={mark}".encode() in (path / "environ").read_bytes()
            if ours and state != "Z":
                yield f"process {name.replace(' (', ' ')}"
        except (OSError, ProcessLookupError):
            continue


def _segments(ranks: Sequence[RankOutcome]) -> set[str]:
    """Of the shared memory that ranks had mapped once they had met, what still has a name."""
    named = {path for rank in ranks if (ready := rank.find("ready")) for path in ready["shared"]}
    return {path for path in named if os.path.exists(path)}
