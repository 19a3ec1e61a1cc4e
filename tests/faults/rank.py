"""The life of one rank of a job under test: what it runs, and what it reports."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import catalogue, programs, replay

PROGRAMS = {
    "fault": catalogue.play,
    "endure": programs.endure,
    "answer": programs.answer,
    "schedule": replay.play,
}


class Report:
    """JSON lines, each with the time of the clock that all processes of a machine share."""

    def __init__(self, request: dict[str, Any]) -> None:
        env = request["env"]
        self.rank = int(env.get("RANK", env.get("PMI_RANK", -1)))
        self._path = Path(request["folder"]) / f"rank-{self.rank}.jsonl"

    def say(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, "time": time.monotonic(), **values}) + "\n"
        with self._path.open("ab", buffering=0) as file:  # at once: this rank may be killed next
            file.write(line.encode())

    def ready(self) -> None:
        """The job has started: tell what it has made outside of its processes."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        self.say("ready", shared=sorted({path for line in maps if (path := line[73:]).startswith("/dev/shm/")}))


def run(request: dict[str, Any]) -> None:
    """Run the job's program as this rank; an error leaves through the interpreter, as it would in a user's script."""
    folder = Path(request["folder"])
    job = json.loads((folder / "job.json").read_text())
    os.environ.clear()
    os.environ.update(request["env"] | job["env"] | request["pmi"])
    report = Report(request)
    errors = os.open(folder / f"rank-{report.rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    report.say("start", pid=os.getpid())
    program = PROGRAMS[job["program"]]
    if program is replay.play:
        _briefly(lambda: program(report, **job["arguments"]))
    program(report, **job["arguments"])


def _briefly(action: Callable[[], None]) -> None:
    """Do it and leave as the interpreter would, but for taking down its modules: of that, a thousand are too many."""
    status: Any = 0
    try:
        action()
    except SystemExit as left:
        status = left.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(status)
