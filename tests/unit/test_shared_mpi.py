"""Shared memory beside MPI: messages that move only when asked, while ranks wait in memory; and a rank that dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.unit.test_jobs import BIN, job, lines, needs_mpiexec

PROGRAM = """
    import gc, sys
    import torch, commlayer
    world = commlayer.init(timeout=30)
    rank, other = world.rank, 1 - world.rank
    x = torch.full((500_000,), rank + 1.0)
    done = []

    def right(y, expected=3.0):
        assert y.unique().tolist() == [expected], (done, y)

    # A message that needs the progress of a rank that waits in shared memory, long enough for a rendezvous.
    for count in (10, 100_000, 4_000_000):
        message = torch.arange(float(count)) if rank == 0 else torch.zeros(count)
        if rank == 0:
            sent = commlayer.send(message, 1, async_op=True)
            right(commlayer.all_reduce(x))
            sent.wait()
        else:
            assert torch.equal(commlayer.recv(message, 0), torch.arange(float(count)))
            right(commlayer.all_reduce(x))
    done.append("send")

    # A message that is sent after an operation that its receiver has only started.
    for _ in range(10):
        if rank == 0:
            work = commlayer.all_reduce(x, async_op=True)
            commlayer.recv(torch.empty(3), 1)
            right(work.wait())
        else:
            right(commlayer.all_reduce(x))
            commlayer.send(torch.ones(3), 0)
    done.append("recv")

    # By MPI where they are small, and through memory where they are large; waited for in another order on each rank.
    works = []
    for step in range(40):
        count = (1, 10, 3000, 100_000)[step % 4]
        y = torch.full((count,), rank + 1.0 + step)
        works.append((commlayer.all_reduce(y, async_op=True), 3.0 + 2 * step))
    for place in sorted(range(40), key=lambda place: (place * 7 + rank * 13) % 40):
        right(works[place][0].wait(), works[place][1])
    done.append("sizes")

    # Symmetric tensors outlive what they were made for; and the interpreter.
    s = commlayer.empty_symmetric(500_000).copy_(x)
    commlayer.all_reduce(s, out=s)
    part = s[10:]
    commlayer.all_reduce(x, async_op=True)     # nobody waits for it
    commlayer.finalize()
    del s, world
    gc.collect()
    right(part.add_(1), 4.0)
    sys.kept = part
    sys.stdout.write(f"said {done}\\n")
"""


@needs_mpiexec
def test_messages_and_operations_side_by_side(tmp_path: Path) -> None:
    assert lines(job("mpiexec", 2, PROGRAM, tmp_path)) == ["said ['send', 'recv', 'sizes']"] * 2


DYING = """
import os, signal, sys, threading, time
import torch, commlayer
world = commlayer.init(timeout=5)
x = commlayer.empty_symmetric(1 << 23).fill_(1)
commlayer.all_reduce(x, "max", out=x)
start = time.monotonic()
if world.rank == 1:
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
try:
    while True:
        commlayer.all_reduce(x, "max", out=x)
except commlayer.PeerLost as error:
    print("said", "rank 1 is lost" in str(error), time.monotonic() - start < 10, flush=True)
os._exit(0)
"""


@needs_mpiexec
def test_a_rank_killed_in_shared_memory_is_named(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("COMMLAYER_", "PMI", "OMPI_"))}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "COMMLAYER_BACKEND": "mpi"}
    # By way of a shell, or hydra would see how the rank died, and now and then kill the others before they can speak.
    rank = ["sh", "-c", 'trap "" USR1; "$0" "$1"; true', sys.executable, str(tmp_path / "dying.py")]
    command = [str(BIN / "mpiexec"), "-disable-auto-cleanup", "-n", "3", *rank]
    result = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=90, check=False)
    said = [line for line in result.stdout.splitlines() if line.startswith("said")]
    assert said == ["said True True"] * 2, result.stdout + result.stderr
