"""The command: what it finds, what it prints, how it starts ranks."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import commlayer
from commlayer.capability import OPS, shipped_profiles
from commlayer.cli import app, backends, console
from commlayer.cli import launch as cli_launch
from commlayer.launch import Launch
from commlayer.probe import find_mpiexec
from tests.unit.test_launch import (
    CRAY,
    FLUX,
    GFORKER,
    HYDRA,
    INTEL_MPI,
    JSRUN,
    OPENMPI,
    PALS,
    SBATCH,
    SRUN,
    TORCHRUN,
)

ROOT = Path(commlayer.__file__).parents[1]
OURS = re.compile(
    "(RANK|WORLD_SIZE|LOCAL_|MASTER_|GROUP_|ROLE_|TORCHELASTIC|COMMLAYER_|OMP_NUM|COLUMNS|FORCE_COLOR"
    "|PMI|MPI_|MPIR_|OMPI_|I_MPI|SLURM_|PALS_|PBS_|JSM_|LSB_|FLUX_)"
)
MPICH = ["4.1.2", "MPICH Version:      5.0.2\nMPICH Release date: today\0", "MPICH"]
OPEN_MPI = ["4.1.2", "Open MPI v5.0.8, package: x, ident: 5.0.8", "Open MPI"]
# A parameter whose id is "mpi" would be taken for the mark of pytest-mpi, hence the other ids below.
needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or find_mpiexec() is None, reason="no mpi4py or mpiexec"
)


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No launcher, no settings, no GPU."""
    for name in filter(OURS.match, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)


@pytest.fixture
def mpich(monkeypatch):
    """mpi4py on MPICH, as its child process reports it."""
    monkeypatch.setattr(backends, "_in_child", lambda code, remedy: MPICH)


def run(*arguments, env=None, status=0):
    result = CliRunner().invoke(app, arguments, env=env)
    assert result.exit_code == status, (result.output, result.exception)
    return result


def doctor(env=None, status=0):
    return json.loads(run("doctor", "--all-ranks", "--json", env=env, status=status).stdout)


def said(result):
    return " ".join(result.output.split())


# doctor ---------------------------------------------------------------------------------------------------


def test_doctor_without_a_launcher():
    report = doctor()
    assert report["launcher"]["name"] == "none"
    assert report["launcher"]["variables"] == {}
    assert report["auto"]["backend"] == report["chosen"]["backend"] == "single"
    assert report["auto_under"]["torchrun"]["backend"] == "gloo"
    assert report["versions"].keys() == {"commlayer", "python", "torch", "numpy"}
    assert report["devices"] == {"cpu_cores": len(os.sched_getaffinity(0)), "cuda": [], "xpu": []}
    health = {entry["name"]: entry for entry in report["backends"]}
    assert list(health) == ["gloo", "mpi", "nccl", "xccl", "ccl", "threads", "single"]
    assert health["gloo"]["usable"]
    assert torch.__version__ in health["gloo"]["version"]
    assert health["single"]["usable"]
    assert health["threads"]["usable"]
    for entry in health.values():
        assert entry["usable"] or (entry["reason"] and entry["remedy"]), entry


@pytest.mark.parametrize(
    ("env", "launcher", "backend", "profile"),
    [
        (TORCHRUN, "torchrun", "gloo", "gloo"),
        (HYDRA, "hydra", "mpi", "mpi"),
        (INTEL_MPI, "hydra", "mpi", "mpi"),
        (GFORKER, "pmi", "mpi", "mpi"),
        (SBATCH, "none", "single", "everything"),
        (SRUN, "slurm", "gloo", "gloo"),
        (CRAY, "cray-pmi", "mpi", "mpi"),
        (PALS, "pals", "mpi", "mpi"),
        (JSRUN, "jsrun", "mpi", "mpi"),
        (FLUX, "flux", "mpi", "mpi"),
        ({"PMIX_RANK": "3"}, "pmix", "mpi", "mpi"),
    ],
)
def test_doctor_under_each_launcher(mpich, env, launcher, backend, profile):
    report = doctor(env)
    assert report["ok"]
    assert report["launcher"]["name"] == launcher
    assert report["auto"]["backend"] == report["chosen"]["backend"] == backend
    assert report["chosen"]["profiles"][0].startswith(profile)
    for field, origin in report["launcher"]["variables"].items():
        name, _, value = origin.partition("=")
        assert env[name] == value, field


def test_doctor_under_open_mpi_wants_open_mpis_library(monkeypatch):
    monkeypatch.setattr(backends, "_in_child", lambda code, remedy: OPEN_MPI)
    report = doctor(OPENMPI)
    assert report["launcher"]["name"] == "openmpi"
    assert report["backends"][1]["version"] == "mpi4py 4.1.2, Open MPI v5.0.8"
    assert "mpi4py loads Open MPI" in doctor(HYDRA, status=1)["problems"][0]
    monkeypatch.setattr(backends, "_in_child", lambda code, remedy: MPICH)
    assert "mpi4py loads MPICH" in doctor(OPENMPI, status=1)["problems"][0]


def test_doctor_shows_people_which_variable_won(mpich):
    text = said(run("doctor", env=SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}))
    assert "started by slurm" in text
    assert "rank 0 SLURM_PROCID=0" in text
    assert "size 7 SLURM_STEP_NUM_TASKS=7" in text
    assert "rank 0 is at nid003 SLURM_STEP_NODELIST=nid[003-004]" in text
    assert "install a CUDA build of torch" in text or dist.is_nccl_available()
    assert text.endswith("✓ ready")


def test_only_rank_0_prints_unless_asked(mpich):
    assert run("doctor", env=HYDRA).output == ""
    assert "rank 2 PMI_RANK=2" in said(run("doctor", "--all-ranks", env=HYDRA))
    assert "rank 0 PMI_RANK=0" in said(run("doctor", env=HYDRA | {"PMI_RANK": "0", "MPI_LOCALRANKID": "0"}))


def test_other_ranks_speak_up_about_their_own_troubles():
    result = run("doctor", "--json", env=TORCHRUN | {"COMMLAYER_BACKEND": "nccl"}, status=1)
    assert result.stdout == ""
    assert "rank 5 on" in result.stderr


def test_contradictions_are_findings_with_both_variables(mpich):
    env = HYDRA | {"PMI_RANK": "0", "MPI_LOCALRANKID": "0", "RANK": "0", "WORLD_SIZE": "8"}
    result = run("doctor", env=env, status=1)
    assert "WORLD_SIZE=8 (torchrun) and PMI_SIZE=4 (hydra) disagree on size" in said(result)
    report = doctor(env, status=1)
    assert report["launcher"] is report["chosen"]["backend"] is None
    assert doctor(env | {"COMMLAYER_LAUNCHER": "hydra"})["launcher"]["size"] == 4
    # A stale RANK, the same everywhere, makes neither every rank print nor none.
    assert run("doctor", env=env | {"PMI_RANK": "2"}, status=1).output == ""
    assert "disagree" in said(run("doctor", env=env | {"RANK": "3"}, status=1))


@pytest.mark.parametrize(
    ("env", "finding"),
    [
        (TORCHRUN | {"COMMLAYER_BACKEND": "mpi"}, "backend mpi: torchrun does not connect MPI processes"),
        (TORCHRUN | {"COMMLAYER_BACKEND": "single"}, "torchrun started 8"),
        (TORCHRUN | {"COMMLAYER_BACKEND": "threads"}, "commlayer.run_local"),
        (TORCHRUN | {"COMMLAYER_BACKEND": "carrier-pigeon"}, "backend carrier-pigeon: torch.distributed knows"),
        (TORCHRUN | {"COMMLAYER_TIMEOUT": "soon"}, "COMMLAYER_TIMEOUT='soon'"),
        (TORCHRUN | {"COMMLAYER_PROFILE": "nix"}, "capability profile 'nix'"),
        (TORCHRUN | {"COMMLAYER_DISABLE": "flying"}, "'flying'"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "torchrun does not say where rank 0 is"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "RANK=5 is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "4"}, "RANK is not"),
        ({"COMMLAYER_LAUNCHER": "nix"}, "COMMLAYER_LAUNCHER=nix"),
    ],
)
def test_what_would_fail_is_found(mpich, env, finding):
    report = doctor(env, status=1)
    assert any(finding in problem for problem in report["problems"]), report["problems"]


def test_gloo_without_a_network_interface():
    health = doctor(TORCHRUN | {"GLOO_SOCKET_IFNAME": "nosuch0"}, status=1)["backends"][0]
    assert health["importable"]
    assert not health["usable"]
    assert "GLOO_SOCKET_IFNAME" in health["remedy"]


def test_settings_are_shown_and_misspelt_ones_noted(mpich):
    report = doctor(TORCHRUN | {"COMMLAYER_PROFILE": "xccl-2.8", "COMMLAYER_BACKND": "gloo"})
    assert report["variables"] == {"COMMLAYER_PROFILE": "xccl-2.8"}
    assert report["notes"] == ["COMMLAYER_BACKND is not read; did you mean COMMLAYER_BACKEND?"]
    assert report["chosen"]["profiles"][1] == "xccl-2.8"


@needs_mpi
def test_doctor_loads_mpi_in_a_child_and_does_not_initialise_it():
    code = (
        "import sys; from commlayer.cli.diagnosis import diagnose; r = diagnose();"
        "print(r['backends'][1]['usable'], 'mpi4py.MPI' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize(
    ("code", "reason"), [("import nosuch", "No module named"), ("import os; os.abort()", "dies of SIGABRT")]
)
def test_a_library_that_fails_to_load_is_a_finding(monkeypatch, code, reason):
    monkeypatch.setattr(backends, "_MPI", code)
    health = backends.examine("mpi", None)
    assert not health.importable
    assert reason in health.reason
    assert "commlayer[mpi]" in health.remedy


@pytest.mark.parametrize(("name", "kind"), [("nccl", "cuda"), ("xccl", "xpu")])
def test_accelerators(monkeypatch, name, kind):
    monkeypatch.setattr(dist, f"is_{name}_available", lambda: True)
    monkeypatch.setattr(backends, "_nccl_version", lambda: "2.27.3")
    blind = backends.examine(name, None)
    assert (blind.importable, blind.usable) == (True, False)
    assert "GPU is visible" in blind.reason
    monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: True)
    monkeypatch.setattr(getattr(torch, kind), "device_count", lambda: 2)
    assert backends.examine(name, Launch("torchrun", 1, 2, 1, 2)).usable
    crowded = backends.examine(name, Launch("torchrun", 1, 4, 1, 4))
    assert "4 ranks on this node but 2" in crowded.reason


# capabilities ---------------------------------------------------------------------------------------------


def matrix(*arguments):
    data = json.loads(run("capabilities", "--json", *arguments).stdout)
    return data, {(entry["op"], entry["reduce"], entry["dtype"]): entry for entry in data["requests"]}


@pytest.mark.parametrize("backend", ["gloo", pytest.param("mpi", id="of-mpi")])
def test_capabilities_of_a_backend(backend):
    data, entries = matrix("--backend", backend)
    assert data["backend"] == backend
    assert data["profiles"][0].startswith(backend)
    assert {op for op, *_ in entries} == set(OPS)
    assert entries["all_reduce", "sum", "float32"]["status"] == "native"
    assert entries["all_reduce", "sum", "float32"]["ratio"] == 1
    assert ("all_reduce", "band", "float32") not in entries
    assert entries["barrier", None, None]["status"] == "native"


def test_capabilities_of_a_profile():
    data, entries = matrix("--profile", "xccl-2.8")
    assert (data["backend"], data["device"], data["profiles"]) == ("xccl", "xpu", ["xccl-2.8"])
    assert entries["all_reduce", "avg", "float32"]["status"] == "emulated"
    assert entries["all_reduce", "avg", "float32"]["ratio"] > 1
    _, entries = matrix("--profile", "only-send-recv", "--uneven")
    assert entries["send", None, "float32"]["status"] == "native"
    assert entries["all_to_all", None, "float32"]["status"] == "emulated"


def test_a_profile_replayed_on_a_backend_is_an_intersection():
    data, _ = matrix("--backend", "gloo", "--profile", "xccl-2.8")
    assert data["device"] == "cpu"
    assert data["profiles"][1] == "xccl-2.8"


def test_disabled_capabilities():
    _, entries = matrix("--backend", "gloo", "--disable", "all_to_all")
    assert entries["all_to_all", None, "float32"]["status"] == "emulated"
    everything = ",".join(OPS)
    assert matrix("--backend", "gloo", "--disable", everything)[1]["barrier", None, None]["status"] in (
        "absent",
        "emulated",  # by the control channel
    )


@pytest.mark.parametrize("profile", shipped_profiles())
@pytest.mark.parametrize("layout", [(), ("--uneven",)])
def test_the_matrix_fits_a_terminal(profile, layout):
    output = run("capabilities", "--profile", profile, *layout).output
    assert max(map(len, output.splitlines())) <= 100
    for op in OPS:
        assert re.search(f"^{op}", output, re.MULTILINE)
    for word in ("native", "emulated", "absent"):
        assert word in output


def test_one_dtype_and_one_reduce_op():
    _, entries = matrix("--backend", "gloo", "--dtype", "torch.bfloat16", "--reduce", "avg")
    assert {dtype for *_, dtype in entries} == {"bfloat16", None}
    assert {reduce for _, reduce, _ in entries} == {"avg", None}


def test_explain_shows_the_tree_the_cost_and_why():
    only_messages = ("capabilities", "--profile", "only-send-recv", "--explain", "all_to_all", "--dtype", "bfloat16")
    text = run(*only_messages).output
    assert "all_to_all bfloat16 cpu ⇐ " in text
    assert re.search(r"^ +send .*: native$", text, re.MULTILINE)
    assert re.search(r"cost: about [\d.]+x a native one", text)
    assert "why: " in text
    data = json.loads(run(*only_messages, "--json").stdout)
    assert data["fallback"]
    assert data["parts"]
    avg = run("capabilities", "--profile", "xccl-2.8", "--explain", "all_reduce", "--reduce", "avg").output
    assert "avg float32 xpu is wrong-value" in avg


def test_profiles_are_listed():
    listed = json.loads(run("capabilities", "--list", "--json").stdout)
    assert [entry["name"] for entry in listed] == shipped_profiles()
    assert all(entry["summary"] for entry in listed)
    assert "only-all-reduce" in run("capabilities", "--list").output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--profile", "nix"), 2, "nor one of the shipped ones"),
        (("--disable", "flying"), 2, "'flying'"),
        (("--explain", "allreduce"), 2, "--explain allreduce: expected one of all_reduce"),
        (("--dtype", "float31"), 2, "--dtype float31"),
        (("--reduce", "mean"), 2, "--reduce mean: expected one of sum, avg"),
        (("--device", "tpu"), 2, "--device tpu"),
        (("--explain", "broadcast", "--reduce", "sum"), 2, "broadcast does not reduce"),
        (("--explain", "broadcast", "--uneven"), 2, "--uneven"),
        (("--explain", "reduce", "--dtype", "int8", "--reduce", "avg"), 2, "mean of integers"),
        (("--backend", "carrier-pigeon"), 1, "backend carrier-pigeon"),
    ],
)
def test_wrong_names_are_one_clear_line(arguments, status, message):
    result = run("capabilities", *arguments, status=status)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


# launch ---------------------------------------------------------------------------------------------------


def dry(*arguments, env=None, status=0):
    return run("launch", "--dry-run", *arguments, env=env, status=status)


def test_torchrun_is_the_default():
    line = dry("-n", "2", "--", "train.py", "--lr", "1").stdout
    assert f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 --no-python" in line
    assert line.endswith(f"{sys.executable} -u train.py --lr 1\n")
    assert "COMMLAYER_BACKEND" not in line
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert line.startswith(f"OMP_NUM_THREADS={threads} ")
    assert "OMP" not in dry("-n", "2", "train.py", env={"OMP_NUM_THREADS": "5"}).stdout


@needs_mpi
def test_mpiexec_for_mpi():
    line = dry("-n", "3", "--backend", "mpi", "--with", "-ppn 3", "x.py").stdout
    assert line.startswith("COMMLAYER_BACKEND=mpi ")
    assert f" {find_mpiexec()} -n 3 -ppn 3 {sys.executable} -u x.py\n" in line
    assert line == dry("-n", "3", "--with", "-ppn 3", "x.py", env={"COMMLAYER_BACKEND": "MPI"}).stdout


def test_srun_inside_an_allocation(tmp_path):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "PATH": str(tmp_path)}
    line = dry("-n", "8", "--backend", "gloo", "x.py", env=slurm).stdout
    assert f" srun -n 8 {sys.executable} -u x.py\n" in line
    assert line.startswith("COMMLAYER_BACKEND=gloo ")
    assert "torch.distributed.run" in dry("-n", "8", "x.py", env=slurm | {"SLURM_JOB_ID": ""}).stdout


def test_settings_and_modules_are_passed_on():
    line = dry("-n", "2", "--profile", "xccl-2.8", "--disable", "all_reduce:avg", "-m", "my.module", "-x").stdout
    assert "COMMLAYER_PROFILE=xccl-2.8" in line
    assert "COMMLAYER_DISABLE=all_reduce:avg" in line
    assert line.endswith("-u -m my.module -x\n")
    assert dry("-n", "2", "--", "-m", "my.module").stdout.endswith("-u -m my.module\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-n", "2", "--backend", "threads", "x.py"), "commlayer.run_local"),
        (("-n", "2", "--backend", "single", "x.py"), "it has one rank"),
        (("-n", "2", "--backend", "carrier-pigeon", "x.py"), "--backend carrier-pigeon"),
        (("-n", "2", "--profile", "nix", "x.py"), "'nix'"),
        (("-n", "2", "--disable", "flying", "x.py"), "'flying'"),
        (("-n", "0", "x.py"), "-n"),
        (("-n", "2"), "Missing argument"),
        (("x.py",), "Missing option"),
    ],
)
def test_what_cannot_be_launched(arguments, message):
    assert message in said(dry(*arguments, status=2))


def test_a_missing_script_is_no_job():
    assert "nosuch.py: no such file" in run("launch", "-n", "2", "nosuch.py", status=2).stderr


def test_a_missing_mpiexec_has_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    error = dry("-n", "2", "--backend", "mpi", "x.py", status=1).stderr
    assert error.startswith("error: backend mpi: ")
    assert "pip install 'commlayer[mpi]'" in error


SCRIPT = """
import sys, torch, commlayer
group = commlayer.init()
total = commlayer.all_reduce(torch.tensor(group.rank + 1))
print(f"rank {group.rank} of {group.size} on {group.backend}: {int(total)}\\n", end="", flush=True)
commlayer.finalize()
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", ["gloo", pytest.param("mpi", marks=needs_mpi, id="over-mpi")])
def test_two_ranks_really_start(tmp_path, backend):
    (tmp_path / "script.py").write_text(SCRIPT)
    status = 3 if backend == "mpi" else 0  # torchrun answers 1 to every failure
    done = subprocess.run(
        [sys.executable, "-m", "commlayer", "launch", "-n", "2", "--backend", backend, "script.py", str(status)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == status, done.stderr
    for rank in range(2):
        assert f"rank {rank} of 2 on {backend}: 3\n" in done.stdout


# demo, and the command itself -----------------------------------------------------------------------------


def test_demo_is_a_launch_of_the_training(monkeypatch):
    monkeypatch.setattr("commlayer.cli.demo.PACKAGES", ())
    line = run("demo", "--dry-run", "epochs=1").stdout
    assert line.startswith("COMMLAYER_BACKEND=gloo ")
    assert "--nproc-per-node 2" in line
    assert line.endswith("-m models.train --config demo epochs=1\n")


def test_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr("commlayer.cli.demo.PACKAGES", ("nosuchpackage",))
    error = run("demo", "--dry-run", status=1).stderr
    assert error == "error: demo: missing nosuchpackage; pip install 'commlayer[train]'\n"


def test_version_and_help():
    assert run("--version").stdout == f"commlayer {commlayer.__version__}\n"
    for command in ((), ("doctor",), ("capabilities",), ("launch",), ("demo",)):
        assert "Usage" in run(*command, "--help").output


def test_a_program_becomes_the_launcher(monkeypatch):
    became = []
    monkeypatch.setattr(cli_launch.os, "execvpe", lambda *call: became.append(call))
    run("launch", "-n", "2", "--backend", "gloo", "-m", "my.module")
    [(file, command, environment)] = became
    assert file == command[0] == sys.executable
    assert environment["COMMLAYER_BACKEND"] == "gloo"
    assert environment["PATH"] == os.environ["PATH"]


def test_text_is_as_wide_as_its_reader(monkeypatch):
    assert console.console().width == console.WIDTH
    monkeypatch.setenv("COLUMNS", "70")
    assert console.console().width == 70


def test_a_terminal_without_the_symbols_is_no_error():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "commlayer", "capabilities", "--profile", "only-send-recv"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"\\u25cf native" in done.stdout
