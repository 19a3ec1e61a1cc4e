"""Launchers' environments as they really are, overlaps, contradictions, devices."""

import re
from dataclasses import replace

import pytest

from commlayer.errors import LaunchError
from commlayer.launch import LAUNCHERS, Launch, bind_device, discover

TORCHRUN = {  # torchrun --nnodes 2 --nproc-per-node 4
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "ROLE_RANK": "5", "ROLE_WORLD_SIZE": "8",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1",
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip
HYDRA = {  # MPICH mpiexec -n 4 on one node
    "PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "9", "PMI_HOSTNAME": "vm",
    "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4",
}  # fmt: skip
GFORKER = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "8", "PMI_DEBUG": "0", "MPI_APPNUM": "0"}
INTEL_MPI = HYDRA | {"PMI_RANK": "6", "PMI_SIZE": "8", "I_MPI_MPIRUN": "mpirun", "PBS_JOBID": "77.pbs"}
OPENMPI = {  # mpirun -n 8 over two nodes
    "OMPI_COMM_WORLD_RANK": "6", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_NODE_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_UNIVERSE_SIZE": "8",
    "PMIX_RANK": "6", "PMIX_NAMESPACE": "prterun-node1-4711@1", "PMIX_SERVER_URI41": "prterun;tcp4://",
}  # fmt: skip
SBATCH = {  # a batch script of sbatch -N 2 --ntasks 8
    "SLURM_JOB_ID": "4711", "SLURM_JOBID": "4711", "SLURM_JOB_NODELIST": "nid[003-004]",
    "SLURM_NODELIST": "nid[003-004]", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_GTIDS": "0", "SLURM_JOB_NAME": "train",
}  # fmt: skip
SRUN = SBATCH | {  # srun -n 7 in it
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "7",
    "SLURM_STEP_ID": "2", "SLURM_STEPID": "2", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "nid[003-004]",
    "SLURM_TASKS_PER_NODE": "4,3", "SLURM_MPI_TYPE": "none",
}  # fmt: skip
SRUN_PTY = SRUN | {  # srun -n 1 --pty bash, or salloc with an interactive step
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
}  # fmt: skip
CRAY = SRUN | {  # the same under mpi/cray_shasta
    "SLURM_MPI_TYPE": "cray_shasta", "PMI_RANK": "5", "PMI_SIZE": "7", "PMI_LOCAL_RANK": "1",
    "PMI_LOCAL_SIZE": "3", "PMI_JOBID": "4711", "PMI_UNIVERSE_SIZE": "7", "PALS_RANKID": "5",
    "PALS_LOCAL_RANKID": "1", "PALS_NODEID": "1", "PALS_APID": "4711.2", "PALS_SPOOL_DIR": "/var/spool",
}  # fmt: skip
PALS = {  # mpiexec -n 24 --ppn 12 on Aurora
    "PALS_RANKID": "13", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "12", "PALS_NODEID": "1",
    "PALS_APID": "3f2c", "PALS_DEPTH": "1", "PMIX_RANK": "13", "PMIX_NAMESPACE": "3f2c",
    "PBS_JOBID": "123.aurora-pbs", "PBS_ENVIRONMENT": "PBS_BATCH",
}  # fmt: skip
JSRUN = {  # jsrun -n 12 -r 6 on Summit
    "JSM_NAMESPACE_RANK": "7", "JSM_NAMESPACE_SIZE": "12", "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "6", "OMPI_COMM_WORLD_RANK": "7", "OMPI_COMM_WORLD_SIZE": "12",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "PMIX_RANK": "7", "PMIX_NAMESPACE": "2", "LSB_JOBID": "99",
}  # fmt: skip
FLUX = {  # flux run -N 2 -n 8
    "FLUX_TASK_RANK": "6", "FLUX_JOB_SIZE": "8", "FLUX_JOB_NNODES": "2", "FLUX_TASK_LOCAL_ID": "2",
    "FLUX_JOB_ID": "ƒiFkbMhFM", "FLUX_URI": "local:///run/flux/local", "PMI_RANK": "6", "PMI_SIZE": "8",
    "PMI_FD": "12", "PMI_SPAWNED": "0",
}  # fmt: skip


@pytest.fixture
def node_file(tmp_path):
    def write(text):
        (tmp_path / "nodes").write_text(text)
        return str(tmp_path / "nodes")

    return write


@pytest.mark.parametrize(
    ("env", "expected", "mpi"),
    [
        ({}, Launch("none", 0, 1, 0, 1, "127.0.0.1"), False),
        (TORCHRUN, Launch("torchrun", 5, 8, 1, 4, "node1", 29500), False),
        (HYDRA, Launch("hydra", 2, 4, 2, 4, "127.0.0.1"), True),
        (INTEL_MPI, Launch("hydra", 6, 8, 2, 4), True),
        (GFORKER, Launch("pmi", 1, 2), True),
        (OPENMPI, Launch("openmpi", 6, 8, 2, 4), True),
        (SRUN, Launch("slurm", 5, 7, 1, 3, "nid003"), False),
        (CRAY, Launch("cray-pmi", 5, 7, 1, 3, "nid003"), True),
        (PALS, Launch("pals", 13, None, 1, 12), True),
        (JSRUN, Launch("jsrun", 7, 12, 1, 6), True),
        (FLUX, Launch("flux", 6, 8, 2, 4), True),
        ({"PMIX_RANK": "3"}, Launch("pmix", 3, None), True),
    ],
)
def test_each_launcher(env, expected, mpi):
    launch = discover(env)
    assert replace(launch, master_port=expected.master_port) == expected
    assert launch.mpi is mpi


def test_forced_launcher_reads_the_same():
    for name, env in zip(LAUNCHERS, (TORCHRUN, HYDRA, FLUX, JSRUN, OPENMPI, CRAY, SRUN, PALS), strict=False):
        assert discover(env | {"COMMLAYER_LAUNCHER": name}) == discover(env)
    assert discover(SRUN | {"COMMLAYER_LAUNCHER": "none"}).size == 1


def test_variables_name_what_won():
    assert discover(SRUN | {"MASTER_PORT": "1234"}).variables == {
        "rank": "SLURM_PROCID=5",
        "size": "SLURM_STEP_NUM_TASKS=7",
        "local_rank": "SLURM_LOCALID=1",
        "local_size": "SLURM_STEP_TASKS_PER_NODE=4,3",
        "master_addr": "SLURM_STEP_NODELIST=nid[003-004]",
        "master_port": "MASTER_PORT=1234",
    }
    assert discover(HYDRA).variables.keys() == {"rank", "size", "local_rank", "local_size", "mpi"}
    assert discover({}).variables == {}


@pytest.mark.parametrize("value", ["pmi2", "pmix", "pmix_v4", "cray_shasta"])
def test_slurm_with_a_process_manager_interface_is_mpi(value):
    assert discover(SRUN | {"SLURM_MPI_TYPE": value}).mpi
    assert not discover(SRUN | {"SLURM_MPI_TYPE": "none"}).mpi
    assert discover(SRUN | {"PMIX_RANK": "5"}).mpi


# Overlaps: several launchers' variables at once -----------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "launcher", "rank", "size"),
    [
        (SBATCH, "none", 0, 1),  # no srun: one process, whatever was allocated
        ({k: v for k, v in SBATCH.items() if k != "SLURM_PROCID"}, "none", 0, 1),  # salloc
        (SRUN_PTY, "slurm", 0, 1),
        (SBATCH | HYDRA, "hydra", 2, 4),
        (SRUN_PTY | HYDRA, "hydra", 2, 4),
        (SRUN | HYDRA, "hydra", 2, 4),  # mpiexec starts its proxies with srun: theirs is SLURM_PROCID
        (SBATCH | OPENMPI, "openmpi", 6, 8),
        (SRUN_PTY | {"PMIX_RANK": "0"} | OPENMPI, "openmpi", 6, 8),
        (CRAY | HYDRA, "hydra", 2, 4),  # mpiexec in a shell under srun
        (CRAY | OPENMPI, "openmpi", 6, 8),
        (SRUN | TORCHRUN, "torchrun", 5, 8),  # one srun task per node, torchrun in each
        (HYDRA | TORCHRUN, "torchrun", 5, 8),
        (PALS | TORCHRUN, "torchrun", 5, 8),
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "7"}, "slurm", 5, 7),  # srun --mpi=pmi2
        (SRUN | {"PMIX_RANK": "5"}, "slurm", 5, 7),
        (SRUN | FLUX, "flux", 6, 8),  # flux start under srun
        (FLUX | HYDRA, "hydra", 2, 4),
        (PALS | {"PMI_RANK": "13", "PMI_SIZE": "24"}, "pals", 13, 24),
        (PALS | {"PMI_RANK": "13", "PMI_LOCAL_RANK": "1", "PMI_SIZE": ""}, "cray-pmi", 13, None),
        (HYDRA | {"RANK": "2", "WORLD_SIZE": "4"}, "torchrun", 2, 4),  # exported by a script
        (SBATCH | HYDRA | {"RANK": "2", "WORLD_SIZE": "4"}, "torchrun", 2, 4),
        (HYDRA | {"RANK": "2"}, "torchrun", 2, 4),
        (HYDRA | {"WORLD_SIZE": "1"}, "hydra", 2, 4),
    ],
)
def test_the_launcher_of_these_very_processes_counts(env, launcher, rank, size):
    launch = discover(env)
    assert (launch.launcher, launch.rank, launch.size) == (launcher, rank, size)


def test_gaps_are_filled_by_what_agrees():
    by_script = {"RANK": "5", "WORLD_SIZE": "7"}
    assert discover(SRUN | by_script) == replace(discover(SRUN), launcher="torchrun")
    assert not discover(SRUN | by_script).mpi
    assert discover(CRAY | by_script).mpi
    assert not discover(CRAY | by_script | {"TORCHELASTIC_RUN_ID": "7"}).mpi  # a child is not MPI's process


@pytest.mark.parametrize(
    ("env", "one", "other"),
    [
        (HYDRA | {"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 (torchrun)", "PMI_RANK=2 (hydra)"),
        (
            HYDRA | {"PMI_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"},
            "WORLD_SIZE=1 (torchrun)",
            "PMI_SIZE=4 (hydra)",
        ),
        (SRUN | {"RANK": "2", "WORLD_SIZE": "7"}, "RANK=2 (torchrun)", "SLURM_PROCID=5 (slurm)"),
        (PALS | {"RANK": "1", "WORLD_SIZE": "24"}, "RANK=1 (torchrun)", "PALS_RANKID=13 (pals)"),
        (HYDRA | OPENMPI, "PMI_RANK=2 (hydra)", "OMPI_COMM_WORLD_RANK=6 (openmpi)"),
        (CRAY | {"SLURM_PROCID": "4", "PALS_RANKID": "4"}, "PMI_RANK=5 (cray-pmi)", "SLURM_PROCID=4 (slurm)"),
        (CRAY | {"PALS_RANKID": "4"}, "SLURM_PROCID=5 (slurm)", "PALS_RANKID=4 (pals)"),
        (CRAY | {"PMI_SIZE": "9"}, "PMI_SIZE=9 (cray-pmi)", "SLURM_STEP_NUM_TASKS=7 (slurm)"),
        (SRUN | GFORKER, "SLURM_PROCID=5 (slurm)", "PMI_RANK=1 (pmi)"),
        (SRUN | {"PMIX_RANK": "4"}, "SLURM_PROCID=5 (slurm)", "PMIX_RANK=4 (pmix)"),
        (PALS | {"PMIX_RANK": "4"}, "PALS_RANKID=13 (pals)", "PMIX_RANK=4 (pmix)"),
        (OPENMPI | {"PMIX_RANK": "0"}, "OMPI_COMM_WORLD_RANK=6 (openmpi)", "PMIX_RANK=0 (pmix)"),
        (
            JSRUN | {"OMPI_COMM_WORLD_SIZE": "24"},
            "JSM_NAMESPACE_SIZE=12",
            "OMPI_COMM_WORLD_SIZE=24 (openmpi)",
        ),
        (FLUX | {"PMI_RANK": "0"}, "FLUX_TASK_RANK=6 (flux)", "PMI_RANK=0 (pmi)"),
    ],
)
def test_contradictions_name_both_and_the_way_out(env, one, other):
    with pytest.raises(LaunchError) as error:
        discover(env)
    assert one in str(error.value)
    assert other in str(error.value)
    for name in re.findall(r"COMMLAYER_LAUNCHER=([\w-]+)", str(error.value)):
        assert discover(env | {"COMMLAYER_LAUNCHER": name}).launcher == name


# Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "RANK=0 is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set but RANK is not"),
        ({"PMI_RANK": "0", "PMI_LOCAL_RANK": "0"}, "PMI_RANK=0 is set but PMI_SIZE is not"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK='one' is not a number"),
        ({"RANK": "1", "WORLD_SIZE": "4.0"}, "WORLD_SIZE='4.0' is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK='-1' is not a number from 0 up"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 is out of range: it must be below 4"),
        (HYDRA | {"PMI_RANK": "4"}, "PMI_RANK=4 is out of range"),
        (HYDRA | {"MPI_LOCALRANKID": "4"}, "MPI_LOCALRANKID=4 is out of range: it must be below 4"),
        (SRUN | {"SLURM_LOCALID": "3"}, "SLURM_LOCALID=3 is out of range: it must be below 3"),
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_NODEID=2 is out of range: it must be below 2"),
        (SRUN | {"SLURM_STEP_NODELIST": "nid[4-3]"}, "'nid[4-3]'"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4x2"}, "'4x2'"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is out of range"),
        (HYDRA | {"COMMLAYER_LAUNCHER": "mpich"}, ", ".join(LAUNCHERS)),
        (HYDRA | {"COMMLAYER_LAUNCHER": "openmpi"}, "OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE are not"),
        (TORCHRUN | {"COMMLAYER_LAUNCHER": "pals"}, "launcher's PALS_RANKID are not set"),
    ],
)
def test_errors_name_the_variable(env, message):
    with pytest.raises(LaunchError, match=re.escape(message)):
        discover(env)


# Master address and port ----------------------------------------------------------------------------------


def test_first_host_of_a_node_file(node_file):
    pbs = node_file("x4204c0.hsn\nx4204c1.hsn\n")
    assert discover(PALS | {"PBS_NODEFILE": pbs}).master_addr == "x4204c0.hsn"
    lsf = node_file("batch5\n" + "h36n01\n" * 42 + "h36n02\n" * 42)
    assert discover(JSRUN | {"LSB_DJOB_RANKFILE": lsf}).master_addr == "h36n01"


@pytest.mark.parametrize(
    ("env", "variable", "text"),
    [(PALS, "PBS_NODEFILE", None), (PALS, "PBS_NODEFILE", "\n"), (JSRUN, "LSB_DJOB_RANKFILE", "batch5\n")],
)
def test_node_file_without_a_host(env, variable, text, node_file):
    env = env | {variable: "/does/not/exist" if text is None else node_file(text)}
    with pytest.raises(LaunchError, match=f"{variable}={env[variable]}.*set MASTER_ADDR"):
        discover(env)
    assert discover(env | {"MASTER_ADDR": "node7"}).master_addr == "node7"


def test_the_user_decides_under_any_launcher():
    for env in (HYDRA, OPENMPI, SRUN, CRAY, PALS, JSRUN, FLUX, GFORKER):
        launch = discover(env | {"MASTER_ADDR": "node7", "MASTER_PORT": "4000"})
        assert (launch.master_addr, launch.master_port) == ("node7", 4000)


def test_one_node_needs_neither_name_nor_file():
    one_node = {"PALS_RANKID": "1", "PMI_RANK": "1", "PMI_SIZE": "2", "PALS_LOCAL_SIZE": "2"}
    launch = discover(one_node | {"PBS_NODEFILE": "/does/not/exist"})
    assert launch.master_addr == "127.0.0.1"
    assert "master_addr" not in launch.variables


def test_mpiexec_in_an_allocation_leaves_the_address_to_mpi():
    """Open MPI's daemons are a Slurm step of their own, without the first node: ranks see different lists."""
    assert discover(SRUN | OPENMPI).master_addr is None
    assert discover(SRUN | INTEL_MPI).master_addr is None


@pytest.mark.parametrize(
    ("env", "own", "job"),
    [
        (OPENMPI, {"OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}, "PMIX_NAMESPACE"),
        (SRUN, {"SLURM_PROCID": "6", "SLURM_LOCALID": "2"}, "SLURM_JOB_ID"),
        (SRUN, {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}, "SLURM_STEP_ID"),
        (CRAY, {"PMI_RANK": "0", "SLURM_PROCID": "0", "PALS_RANKID": "0"}, "PALS_APID"),
        (PALS, {"PALS_RANKID": "0", "PMIX_RANK": "0"}, "PALS_APID"),
        (JSRUN, {"JSM_NAMESPACE_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}, "LSB_JOBID"),
        (FLUX, {"FLUX_TASK_RANK": "0", "PMI_RANK": "0"}, "FLUX_JOB_ID"),
    ],
)
def test_port_is_one_for_all_ranks_and_another_in_the_next_job(env, own, job):
    port = discover(env).master_port
    assert port == discover(env | own).master_port
    assert port != discover(env | {job: "4712"}).master_port


def test_ports_are_in_range_and_spread():
    ports = {discover(FLUX | {"FLUX_JOB_ID": f"ƒ{job}"}).master_port for job in range(500)}
    assert 20000 <= min(ports) < max(ports) < 60000
    assert len(ports) > 450


def test_two_mpiexec_in_one_allocation_do_not_share_a_port():
    assert discover(SBATCH | HYDRA).master_port is None


@pytest.mark.parametrize(
    ("size", "nodes", "local_rank", "local_size"),
    [(8, 2, 3, 4), (7, 2, 1, None), (4, 2, 2, None), (4, 0, 0, 4)],  # 4 on 2 nodes may be 3 + 1
)
def test_flux_local_size(size, nodes, local_rank, local_size):
    numbers = {"FLUX_JOB_SIZE": size, "FLUX_JOB_NNODES": nodes, "FLUX_TASK_LOCAL_ID": local_rank}
    launch = discover({"FLUX_TASK_RANK": "3"} | {name: str(number) for name, number in numbers.items()})
    assert (launch.local_rank, launch.local_size) == (local_rank, local_size)


# Devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_local_rank_is_the_device(device):
    for local_rank in range(4):
        assert bind_device(Launch("slurm", 9, 16, local_rank, 4), device, 4, env={}) == local_rank
    assert bind_device(Launch("pmi", 1, 2, 1), device, 2, env={}) == 1


def test_cpu_needs_no_device():
    assert bind_device(Launch("pmix", 3, None), "cpu", 1) is None


@pytest.mark.parametrize(("device", "mask"), [("cuda", "CUDA_VISIBLE_DEVICES"), ("xpu", "ZE_AFFINITY_MASK")])
def test_device_chosen_by_the_launcher(device, mask):
    for launch in (Launch("pals", 3, None, 3, 12), Launch("pmix", 3, None)):
        assert bind_device(launch, device, 1, env={mask: "3"}) == 0
        with pytest.raises(LaunchError):
            bind_device(launch, device, 1, env={})


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (Launch("hydra", 0, 16, 0, 8), "8 ranks on this node but 4 cuda devices .*CUDA_VISIBLE_DEVICES"),
        (Launch("pmi", 5, 8, 4), "5 ranks on this node but 4 cuda devices"),
        (Launch("pmi", 5, 8), "'pmi' gives no local rank .*set LOCAL_RANK"),
    ],
)
def test_no_device_for_every_rank(launch, message):
    with pytest.raises(LaunchError, match=message):
        bind_device(launch, "cuda", 4, env={})


def test_unknown_device_type():
    with pytest.raises(ValueError, match="device_type='tpu': it may be cpu, cuda, xpu"):
        bind_device(Launch("none", 0, 1, 0, 1), "tpu", 1)


def test_local_rank_given_by_the_user_where_the_launcher_has_none():
    launch = discover(GFORKER | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert (launch.launcher, bind_device(launch, "cuda", 2, env={})) == ("pmi", 1)
