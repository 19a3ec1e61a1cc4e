"""Several hosts, played by ranks of one that say they are on others."""

from __future__ import annotations

from pathlib import Path

import pytest

from commlayer.backends.shared import host
from commlayer.backends.shared.hierarchy import grid
from tests.unit.test_jobs import job, lines

# ``place`` says which host a rank is on.
HOSTS = """
    import os, sys
    import torch, commlayer
    from commlayer import AVG, MAX, SUM
    from commlayer.backends.shared import host
    me = int(os.environ["RANK"])
    host.identity = lambda: f"host {{{place}}}"
    world = commlayer.init(timeout=30)
    mine = lambda n, r=me: torch.arange(n, dtype=torch.float32) % 7 - 3 + r  # integers: exact in any order
    n = world.size
"""
PROGRAM = (
    HOSTS
    + """
    said = [str(world.explain("all_reduce")).split(": ")[1], world.shared is not None]
    for size in (0, 1, 3, 1000, 300_001):
        rows = [mine(size, r) for r in range(n)]
        x = mine(size)
        for op, want in ((SUM, sum(rows)), (MAX, rows[-1]), (AVG, sum(rows) / n)):
            assert torch.equal(commlayer.all_reduce(x, op), want), (size, op)
            work = commlayer.all_reduce(x, op, async_op=True)
            again = commlayer.all_reduce(x, op)
            assert torch.equal(work.wait(), want)
            assert torch.equal(again, want)
        for src in range(n):
            assert torch.equal(commlayer.broadcast(x, src=src), rows[src])
        assert torch.equal(commlayer.all_gather(x), torch.cat(rows))
        whole = [torch.cat([mine(size, r + 10 * k) for k in range(n)]) for r in range(n)]
        part = sum(whole)[me * size : (me + 1) * size]
        assert torch.equal(commlayer.reduce_scatter(whole[me]), part)
        assert torch.equal(commlayer.all_to_all(whole[me]), torch.cat([w[me * size : (me + 1) * size] for w in whole]))
        half = mine(size).bfloat16()
        assert torch.equal(commlayer.all_reduce(half), sum(rows).bfloat16())
        commlayer.barrier()
    pairs = world.split(me // 2)
    first = me // 2 * 2
    assert torch.equal(commlayer.all_reduce(mine(5000), group=pairs), mine(5000, first) + mine(5000, first + 1))
    sys.stdout.write(f"said {said}\\n")
"""
)


@pytest.mark.parametrize(
    ("place", "backend", "said"),
    [
        ("me // 2", "gloo", ["shared memory", False]),  # two hosts of two, one after the other
        ("me % 2", "gloo", ["shared memory", False]),  # in turn
        ("me // 2", "mpi", None),  # from some size on
        ("me", "gloo", ["native", False]),  # one each
        ("me // 3", "gloo", ["native", False]),  # three and one: no rails
    ],
)
def test_hosts(place: str, backend: str, said: list[object] | None, tmp_path: Path) -> None:
    program = PROGRAM.replace("{place}", place).replace("{{", "{").replace("}}", "}")
    if backend == "mpi":
        program = program.replace('os.environ["RANK"]', 'os.environ["PMI_RANK"]')
    found = lines(job("mpiexec" if backend == "mpi" else "torchrun", 4, program, tmp_path, COMMLAYER_BACKEND=backend))
    assert len(found) == 4
    if said is not None:
        assert set(found) == {f"said {said}"}


def test_a_rank_that_is_lost_between_hosts(tmp_path: Path) -> None:
    """Its neighbour waits in shared memory, the others for their rails."""
    program = (
        HOSTS
        + """
    commlayer.all_reduce(mine(100_000))
    if me == 3:
        os._exit(0)  # which is nothing to torchrun, so that the others can say it
    try:
        for _ in range(1000):
            commlayer.all_reduce(mine(100_000))
    except commlayer.PeerLost as error:
        assert "rank 3" in str(error), error
        sys.stdout.write(f"said {me}\\n")
"""
    )
    program = program.replace("{place}", "me // 2").replace("{{", "{").replace("}}", "}")
    assert lines(job("torchrun", 4, program, tmp_path)) == ["said 0", "said 1", "said 2"]


def test_rails_need_equal_hosts() -> None:
    assert grid([0, 0, 1, 1]) == [[0, 1], [2, 3]]
    assert grid([0, 1, 0, 1]) == [[0, 2], [1, 3]]
    assert grid([0, 0, 0]) is None
    assert grid([0, 1, 2]) is None
    assert grid([0, 0, 1]) is None


def test_ranks_without_an_identity_are_alone() -> None:
    assert host.places(["a", "", "a", "", "b"]) == (0, 1, 0, 2, 3)
