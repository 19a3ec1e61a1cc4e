"""Ranks on gloo, forked from a process that has imported torch and the layer: a job starts in a tenth of a second.

``python -m tests.unit.shared_ranks`` reads requests, a line of JSON each, plays a scenario of shared_scenarios.py on so
many ranks, and answers with what each of them returned or raised, and how its process ended.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from tests.faults.job import clean_environment, free_port

ROOT = Path(__file__).parents[2]


class Driver:
    """That process, as a test sees it."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.unit.shared_ranks"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(), stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def play(self, scenario: str, ranks: int = 2, *, envs: Any = (), limit: float = 40, **arguments: Any) -> list[Any]:
        """What each rank returned, or its error as a dict; ``envs`` are added to the environment, one dict a rank."""
        request = {"scenario": scenario, "ranks": ranks, "envs": envs, "limit": limit, "arguments": arguments}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


def main() -> None:
    import commlayer  # noqa: F401  before anything is forked
    from tests.unit import shared_scenarios

    for line in sys.stdin:
        request = json.loads(line)
        action = getattr(shared_scenarios, request["scenario"])
        ports = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        size, started = request["ranks"], []
        for rank in range(size):
            place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            env = {key: str(value) for key, value in place.items()} | ports | {"COMMLAYER_BACKEND": "gloo"}
            env |= request["envs"][rank] if request["envs"] else {}
            started.append(_fork(action, rank, size, env, request["arguments"]))
        print(json.dumps(_collect(started, time.monotonic() + request["limit"])), flush=True)


def _fork(action: Any, rank: int, size: int, env: dict[str, str], arguments: Any) -> tuple[int, int]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    os.close(reading)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    os.environ.update(env)
    _be_a_rank(action, rank, size, arguments, writing)


def _be_a_rank(action: Any, rank: int, size: int, arguments: Any, writing: int) -> NoReturn:
    try:
        said = action(rank, size, **arguments)
    except BaseException as error:
        said = {"error": type(error).__name__, "text": str(error)}
    os.write(writing, json.dumps(said).encode())
    os.close(writing)
    if isinstance(said, dict) and "error" in said:
        time.sleep(0.5)  # the others may be about to hear of it
    else:
        atexit._run_exitfuncs()
    os._exit(0)


def _collect(started: list[tuple[int, int]], end: float) -> list[Any]:
    """Wait for all, but kill what is stopped once the others have ended, and everything at ``end``."""
    said: list[Any] = [None] * len(started)
    left = dict(enumerate(started))
    while left:
        time.sleep(0.01)
        for rank, (pid, reading) in list(left.items()):
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done and not os.WIFSTOPPED(status):
                del left[rank]
                data = os.read(reading, 1 << 20)
                os.close(reading)
                ended = "ended by signal" if os.WIFSIGNALED(status) else ""
                said[rank] = json.loads(data) if data and not ended else {"error": ended or "nothing said"}
            elif done:
                said[rank] = "stopped"
        late = time.monotonic() > end
        if late or all(said[rank] == "stopped" for rank in left):
            for rank, (pid, _) in left.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                said[rank] = {"error": "never ended" if late else "stopped"}
            left.clear()
    return said


if __name__ == "__main__":
    main()
