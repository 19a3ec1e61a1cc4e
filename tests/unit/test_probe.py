"""The prober finds each defect of the broken backends, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from commlayer import BackendUnavailable
from commlayer.capability import CapabilitySet, Profile, Request
from commlayer.probe import incomplete, keep, probe
from commlayer.probe.processes import scrubbed
from tests import broken_backends
from tests.unit.test_jobs import job, lines, needs_mpiexec

F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
STRIDED = Request("all_reduce", "sum", layout="strided")
# What each is asked, what must be found, and words of the evidence.
DEFECTS = {
    "hang": ([Request("all_to_all"), Request("all_to_all", None, U8)], "hang", "at 1 element.*not done after 5 s"),
    "twice": (
        [Request("all_reduce", "avg")],
        "wrong-value",
        r"at 5 elements: wrong values.*[-\d.]+ for [-\d.]+ on rank",
    ),
    "neighbours": ([STRIDED], "wrong-value", "all_reduce: wrong-value, at 2 elements: neighbouring memory"),
    "mutating": (
        [Request("reduce_scatter", "premul_sum", F32, "cpu", layout) for layout in ("even", "uneven")],
        "mutates-input",
        "at 1 element: the input has changed",
    ),
    "crash": ([Request("reduce_scatter", "sum", BF16)], "crash", "at 1 element: killed by SIGABRT"),
}
# What a wrapper inherits from gloo; and what the layer's emulations of the above end in.
HEALTHY = [
    *(Request(op, "sum") for op in ("all_reduce", "reduce", "reduce_scatter")),
    *(Request(op) for op in ("broadcast", "all_gather", "send", "recv")),
    *(Request(op, None, U8) for op in ("send", "recv")),
]


def test_each_defect_is_found_with_its_evidence_and_the_layer_is_right_on_top_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, (wanted, status, evidence) in DEFECTS.items():
        profile = probe(f"broken_{name}", wanted=[*wanted, *HEALTHY])
        rules = [rule for rule in profile.rules if rule.status != "native"]
        assert [rule.status for rule in rules] == [status], name
        assert re.search(evidence, rules[0].note), rules[0].note
        natives = CapabilitySet((profile,))
        assert all(map(natives.native, HEALTHY)), name
        assert not any(map(natives.native, wanted)), name
        keep(profile)
    program = """
        import sys
        import torch, commlayer, tests.broken_backends
        from commlayer import AVG, premul_sum

        def hang(n):
            return commlayer.all_to_all(torch.arange(n) + 10 * me), torch.arange(n) * 10 + me

        def twice(n):
            return commlayer.all_reduce(torch.full((7,), float(me)), AVG), torch.full((7,), (n - 1) / 2)

        def neighbours(n):
            x = torch.zeros(10)
            x[::2] = me
            commlayer.all_reduce(x[::2], out=x[::2])
            return x, torch.tensor([n * (n - 1) / 2, 0.0]).repeat(5)

        def mutating(n):
            x = torch.ones(n)
            share = commlayer.reduce_scatter(x, premul_sum(0.5))
            return torch.cat([share, x]), torch.cat([torch.tensor([n / 2]), torch.ones(n)])

        def crash(n):
            x = torch.arange(n, dtype=torch.bfloat16)
            return commlayer.reduce_scatter(x), torch.tensor([me * n], dtype=torch.bfloat16)

        for check in (hang, twice, neighbours, mutating, crash):
            world = commlayer.init(f"broken_{check.__name__}", timeout=20)
            me = world.rank
            got, expected = check(world.size)
            sys.stdout.write(f"said {check.__name__} {torch.equal(got, expected)}\\n")
            commlayer.finalize()
    """
    result = job("torchrun", 2, program, tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert lines(result) == sorted(f"said {name} True" for name in DEFECTS for _ in range(2))
    assert "probing" not in result.stderr


def test_a_job_probes_what_it_does_not_know(tmp_path):
    # Registered by the program itself, which the prober's children import under another name.
    program = """
        import sys
        import torch, commlayer, torch.distributed as dist
        from tests.broken_backends import Twice

        class Mine(Twice):
            pass

        dist.Backend.register_backend("mine", Mine, devices=["cpu"])
        if __name__ == "__main__":
            world = commlayer.init("mine")
            mean = commlayer.all_reduce(torch.full((7,), float(world.rank)), commlayer.AVG)
            status, why = world.capabilities().status(commlayer.capability.Request("all_reduce", "avg"))
            sys.stdout.write(f"said {mean.tolist() == [0.5] * 7} {status} {'at 5 elements' in why}\\n")
    """
    result = job("torchrun", 2, program, tmp_path, XDG_CACHE_HOME=str(tmp_path), COMMLAYER_TIMEOUT="30")
    assert lines(result) == ["said True wrong-value True"] * 2
    assert result.stderr.count("probing backend mine") == 1  # the other rank waits
    assert "15 s at most" in result.stderr  # half the job's timeout
    assert "so not kept" in result.stderr or list(tmp_path.glob("commlayer/profiles/mine_*.json"))


def test_a_program_that_inits_when_imported_is_told_so_on_all_ranks(tmp_path):
    program = """
        import sys
        import commlayer, torch.distributed as dist
        from tests.broken_backends import Sound

        def creator(*arguments):
            return Sound(*arguments)

        dist.Backend.register_backend("mine", creator, devices=["cpu"])
        try:
            commlayer.init("mine", timeout=60)
        except commlayer.BackendUnavailable as error:
            if __name__ != "__main__":
                raise
            sys.stdout.write(f"said {'if __name__ ==' in str(error)}\\n")
    """
    assert lines(job("torchrun", 2, program, tmp_path, XDG_CACHE_HOME=str(tmp_path))) == ["said True"] * 2


def test_time_is_bounded_and_the_rest_is_absent():
    begun = time.monotonic()
    seen = []
    profile = probe("gloo", seconds=7, progress=lambda *state: seen.append(state))
    assert time.monotonic() - begun < 7 + 5
    assert incomplete(profile)
    rest = CapabilitySet((profile,)).status(Request("scatter", None, torch.complex64))
    assert rest[0] == "absent"
    assert "not probed: the time of 7 s was over" in rest[1]
    done = [state[0] for state in seen]
    assert done == sorted(done)
    assert seen[0][1] > 600


def test_a_backend_that_cannot_be_run_is_an_error():
    with pytest.raises(BackendUnavailable, match=r"'smoke'.*knows none of that name"):
        probe("smoke", seconds=30)
    with pytest.raises(BackendUnavailable, match="cannot import no_such_module"):
        probe("smoke", seconds=30, modules=["no_such_module"])
    with pytest.raises(BackendUnavailable, match=r"not connect in the time|did not end in time"):
        probe("gloo", seconds=0.5)


@needs_mpiexec
def test_mpi_is_probed_through_mpiexec():
    wanted = [Request("all_reduce", "sum"), Request("all_reduce", "max"), Request("broadcast", None, BF16), STRIDED]
    found = CapabilitySet((probe("mpi", wanted=wanted),))
    assert [found.status(request)[0] for request in wanted[:3]] == ["native", "wrong-value", "absent"]
    assert "for nan" in found.status(wanted[1])[1]
    feature = found.profiles[0].rules[0]
    assert (feature.ops, feature.status) == ({"non-contiguous"}, "wrong-value")


def test_no_variable_of_a_launcher_reaches_the_prober():
    of_launchers = (
        "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID PMI_RANK PMI_FD "
        "PMIX_RANK MPI_LOCALRANKID OMPI_COMM_WORLD_RANK SLURM_PROCID PALS_RANKID PBS_NODEFILE FLUX_TASK_RANK "
        "JSM_NAMESPACE_RANK COMMLAYER_BACKEND COMMLAYER_SECRET"
    )
    kept = {"PATH": "/bin", "GLOO_SOCKET_IFNAME": "lo", "MPICH_OFI_NIC_POLICY": "x", "CUDA_VISIBLE_DEVICES": "0"}
    assert scrubbed(dict.fromkeys(of_launchers.split(), "1") | kept) == {**kept, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("backend", "sign"),
    [
        ("gloo", signal.SIGINT),
        ("gloo", signal.SIGKILL),
        pytest.param("mpi", signal.SIGTERM, marks=needs_mpiexec, id="mpiexec-SIGTERM"),
        pytest.param("mpi", signal.SIGKILL, marks=needs_mpiexec, id="mpiexec-SIGKILL"),
    ],
)
def test_nothing_is_left_when_the_command_is_interrupted(backend, sign, tmp_path):
    mark = f"MARK_OF_{os.getpid()}_{time.monotonic_ns()}"
    env = {**os.environ, mark: "1", "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    # Under a shell's "&" or nohup SIGINT is ignored, and stays so in what is started there.
    default = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program = f"{default}sys.argv[0] = 'commlayer'; from commlayer.cli import app; app()"
    command = [sys.executable, "-c", program, "probe", "--backend", backend]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("commlayer-probe-*"))) < 1 or len(_marked(mark)) < 5:
            assert time.monotonic() < until, _marked(mark)
            time.sleep(0.1)
        process.send_signal(sign)
        process.wait(60)  # the end of an interpreter takes its time on a busy machine; a probe takes longer
    assert process.returncode != 0
    until = time.monotonic() + 30
    while _marked(mark) or list(tmp_path.iterdir()):
        assert time.monotonic() < until, (_marked(mark), list(tmp_path.iterdir()))
        time.sleep(0.1)


def _marked(mark: str) -> list[str]:
    """Command lines of the processes that have the variable in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " ")[:80])
        except (OSError, UnicodeDecodeError):
            continue
    return found


def test_the_command_probes_saves_and_keeps(tmp_path):
    # A backend with little time: the prober's bound is a constant, so the child gets a smaller one.
    code = "import commlayer.cli.probe as p; import commlayer.probe.start as s; from commlayer.cli import app; "
    code += "f = s.probe; p.probe = lambda *a, **k: f(*a, **k, seconds=8); app()"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(temporary)}
    words = ["--backend", "broken_twice", "--import", "tests.broken_backends", "-n", "2", "--json"]
    command = [sys.executable, "-c", code, "probe", *words, "--save", str(tmp_path / "mine.json")]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    saved = (tmp_path / "mine.json").read_text()
    assert Profile.from_json(saved, "saved").rules
    assert Path(answer["kept"]).read_text() == saved
    assert answer["profile"] == json.loads(saved)
    assert answer["complete"] is False
    assert "2 ranks of one host" in saved
    assert "240 s at most" in result.stderr
    assert not list(temporary.iterdir())


def test_the_broken_backends_are_what_they_say():
    assert set(DEFECTS) == {kind.__name__.lower() for kind in broken_backends.Sound.__subclasses__()}
