"""Jobs on several hosts, which are network namespaces of this machine: who talks to whom, and a link that is cut."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.faults import measure
from tests.faults.hosts import hosts, missing
from tests.faults.job import BACKENDS, ROOT, clean_environment

ON = [f"on {backend}" for backend in BACKENDS]  # pytest-mpi takes the bare id "mpi" for its marker

PROGRAM = """
    import json, sys
    import commlayer
    from tests.faults.operations import OPERATIONS
    from tests.faults.sockets import sockets

    world = commlayer.init(timeout=60)
    for seed, operation in enumerate(OPERATIONS.values()):
        operation(world, seed)                          # raises where an answer is wrong
    found = sockets()
    commlayer.barrier()                                 # nobody closes its sockets before all have looked
    sys.stdout.write("said " + json.dumps([world.rank, world.size, world.backend, found]) + chr(10))
"""


@pytest.fixture(scope="module")
def two():
    why = missing()
    if why is not None:
        pytest.skip(why)
    with hosts(2) as built:
        yield built


def check_addresses(found, own, other):
    """Another host's rank is reached at that host's address, and nobody else is let in."""
    talks = {theirs for state, _, theirs in found if state == "established"}
    listens = {mine for state, mine, _ in found if state == "listening"}
    assert other in talks
    assert talks <= {own, other, "127.0.0.1"}
    assert listens <= {own, "127.0.0.1"}, f"listens at {listens}: more than the job's interface"


@pytest.mark.parametrize("backend", BACKENDS, ids=ON)
def test_ranks_of_two_hosts_meet_at_the_other_hosts_address(two, backend):
    built, zygotes = two
    outcome = measure.on_two(built, zygotes, "answer", backend, rounds=1, size=600)
    assert [rank.status for rank in outcome.ranks] == [0] * 4, str(outcome)
    assert not outcome.left
    if backend == "mpi":
        return  # rank 0 alone has a connection of the layer to every host; the others' are MPI's affair
    for number, rank in enumerate(outcome.ranks):
        own, other = built.addresses if number < 2 else built.addresses[::-1]
        check_addresses(rank.find("sockets")["found"], own, other)


@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_torchrun_on_each_of_two_hosts(two, rendezvous, tmp_path):
    built, _ = two
    (tmp_path / "program.py").write_text(PROGRAM.replace("\n    ", "\n"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    where = {
        "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29471", "--rdzv-id", "faults"],
        "static": ["--master-addr", "host0", "--master-port", "29473"],
    }[rendezvous]
    jobs = [
        subprocess.Popen(
            [*built.prefix(host), *command, *where, "--node-rank", str(host), str(tmp_path / "program.py")],
            env=clean_environment() | {"COMMLAYER_BACKEND": "gloo"},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for host in range(2)
    ]
    for job in jobs:
        said, _ = job.communicate(timeout=120)
        assert job.returncode == 0, said
        lines = [json.loads(line.removeprefix("said ")) for line in said.splitlines() if line.startswith("said ")]
        assert len(lines) == 1, said
        for rank, size, backend, found in lines:
            assert (size, backend) == (2, "gloo")
            own, other = built.addresses if rank == 0 else built.addresses[::-1]
            check_addresses(found, own, other)


def test_a_cut_link_loses_the_other_host(two):
    built, zygotes = two
    row = measure.cut_link(built, zygotes, "gloo")
    assert not row.wrong, "\n".join([*row.wrong, str(row.outcome)])


@pytest.mark.parametrize("backend", BACKENDS, ids=ON)
def test_a_slow_link_that_loses_packets_changes_no_answer(two, backend):
    built, zygotes = two
    row = measure.slow_link(built, zygotes, backend)
    assert not row.wrong, "\n".join([*row.wrong, str(row.outcome)])
