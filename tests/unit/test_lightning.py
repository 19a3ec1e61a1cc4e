"""The Lightning integration without jobs: every launcher's environment, devices, what is cut, and clear errors."""

from __future__ import annotations

import json
import os
import re
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import commlayer.backends
from commlayer import rendezvous
from commlayer.errors import LaunchError
from commlayer.integrations import place
from commlayer.launch import Launch
from tests.unit.test_launch import CRAY, FLUX, GFORKER, HYDRA, JSRUN, OPENMPI, PALS, SRUN, TORCHRUN

pl = pytest.importorskip("lightning.pytorch", reason="pip install 'commlayer[lightning]'")
import commlayer.integrations.lightning as on_the_layer  # noqa: E402 - where Lightning is there, ours must be

# What differs from rank to rank: of four ranks on two nodes, in {} the rank, its local rank, and its node.
RANK, LOCAL, NODE = range(3)
JOBS: dict[str, tuple[dict[str, str], dict[str, object]]] = {
    "torchrun": (
        TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1"},
        {"RANK": RANK, "LOCAL_RANK": LOCAL, "GROUP_RANK": NODE},
    ),
    "hydra": (HYDRA | {"MPI_LOCALNRANKS": "2"}, {"PMI_RANK": RANK, "MPI_LOCALRANKID": LOCAL}),
    "gforker": (GFORKER | {"PMI_SIZE": "4"}, {"PMI_RANK": RANK}),
    "openmpi": (
        OPENMPI | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        {"OMPI_COMM_WORLD_RANK": RANK, "PMIX_RANK": RANK, "OMPI_COMM_WORLD_LOCAL_RANK": LOCAL},
    ),
    "slurm": (
        SRUN | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n[1-2]"},
        {"SLURM_PROCID": RANK, "SLURM_LOCALID": LOCAL, "SLURM_NODEID": NODE},
    ),
    "script under slurm": (
        SRUN | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "WORLD_SIZE": "4"}
        | {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"},
        {"SLURM_PROCID": RANK, "RANK": RANK, "SLURM_LOCALID": LOCAL, "SLURM_NODEID": NODE},
    ),
    "cray-pmi": (
        CRAY | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n[1-2]"}
        | {"PMI_SIZE": "4", "PMI_LOCAL_SIZE": "2"},
        {"PMI_RANK": RANK, "SLURM_PROCID": RANK, "PALS_RANKID": RANK, "PMI_LOCAL_RANK": LOCAL, "SLURM_LOCALID": LOCAL}
        | {"PALS_LOCAL_RANKID": LOCAL, "SLURM_NODEID": NODE, "PALS_NODEID": NODE},
    ),
    "pals": (
        PALS | {"PALS_LOCAL_SIZE": "2", "PBS_NODEFILE": "pbs"},
        {"PALS_RANKID": RANK, "PMIX_RANK": RANK, "PALS_LOCAL_RANKID": LOCAL, "PALS_NODEID": NODE},
    ),
    "jsrun": (
        JSRUN | {"JSM_NAMESPACE_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4", "JSM_NAMESPACE_LOCAL_SIZE": "2"}
        | {"LSB_DJOB_RANKFILE": "lsf"},
        {"JSM_NAMESPACE_RANK": RANK, "OMPI_COMM_WORLD_RANK": RANK, "PMIX_RANK": RANK}
        | {"JSM_NAMESPACE_LOCAL_RANK": LOCAL, "OMPI_COMM_WORLD_LOCAL_RANK": LOCAL},
    ),
    "flux": (
        FLUX | {"FLUX_JOB_SIZE": "4", "PMI_SIZE": "4"},
        {"FLUX_TASK_RANK": RANK, "PMI_RANK": RANK, "FLUX_TASK_LOCAL_ID": LOCAL},
    ),
}  # fmt: skip
BY_LIST = ("torchrun", "slurm", "script under slurm", "cray-pmi", "pals", "jsrun")  # which say that rank 0 is on n1


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Puts this process in the place of a launcher's."""
    (tmp_path / "pbs").write_text("n1\nn2\n")
    (tmp_path / "lsf").write_text("batch\nn1\nn1\nn2\nn2\n")
    monkeypatch.chdir(tmp_path)

    def launch(env):
        for name in os.environ:
            if name.partition("_")[0] not in ("PATH", "HOME", "XDG", "LD", "PYTHONPATH", "OMP", "PYTEST"):
                monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.fixture
def mpi(monkeypatch):
    """MPI as four ranks on two nodes see it, one after the other, rank 0 first."""

    class Told(ModuleType):
        rank, size, meeting = 0, 4, b""

        def place(self):
            return self.rank, self.size

        def exchange(self, value, timeout):
            if value == json.dumps(host(self.rank)).encode():
                return [json.dumps(host(rank)).encode() for rank in range(4)]
            self.meeting = value if self.rank == 0 else self.meeting
            return [self.meeting, b"[]", b"[]", b"[]"]

    def host(rank):
        return [f"n{1 + rank // 2}", f"10.0.0.{1 + rank // 2}"]

    told = Told("mpi_job")
    monkeypatch.setattr(commlayer.backends, "mpi_job", told, raising=False)
    monkeypatch.setitem(sys.modules, "commlayer.backends.mpi_job", told)
    monkeypatch.setattr(place, "mpi_importable", lambda: True)
    monkeypatch.setattr(rendezvous, "whereabouts", lambda: host(told.rank))
    monkeypatch.setattr(rendezvous, "_route_to", lambda address: "10.0.0.1")
    return told


@pytest.mark.parametrize("job", JOBS)
def test_each_launcher_on_every_rank(job, launched, mpi):
    common, differing = JOBS[job]
    meetings = set()
    for rank in range(4):
        mpi.rank = rank
        places = (rank, rank % 2, rank // 2)
        launched(common | {name: str(places[which]) for name, which in differing.items()})
        assert on_the_layer.CommlayerEnvironment.detect()
        environment = on_the_layer.CommlayerEnvironment()
        assert (environment.global_rank(), environment.local_rank(), environment.node_rank()) == places
        assert environment.world_size() == 4
        assert environment.creates_processes_externally
        meetings.add((environment.main_address, environment.main_port))
    assert len(meetings) == 1
    address, port = meetings.pop()
    assert address == ("n1" if job in BY_LIST else "10.0.0.1")
    assert 1024 < port < 65536


def test_mpi_of_another_launcher_is_an_error(launched, mpi):
    launched(HYDRA)
    mpi.rank, mpi.size = 0, 1
    with pytest.raises(LaunchError, match="MPI says rank 0 of 1, but hydra says 2 of 4"):
        on_the_layer.CommlayerEnvironment()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (PALS | {"PBS_NODEFILE": "pbs"}, "pals does not tell WORLD_SIZE: set it on every rank, or install mpi4py"),
        (HYDRA, "hydra does not tell MASTER_PORT"),
        (OPENMPI, "openmpi does not tell MASTER_ADDR"),
        (GFORKER | {"MASTER_ADDR": "n1", "MASTER_PORT": "1"}, "pmi does not tell LOCAL_RANK"),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}, "set NODE_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "4", "PMI_RANK": "0", "PMI_SIZE": "2"}, "disagree on size"),
    ],
)
def test_what_nobody_tells_is_named(env, message, launched, monkeypatch):
    monkeypatch.setattr(place, "mpi_importable", lambda: False)
    launched(env)
    with pytest.raises(LaunchError, match=message):
        on_the_layer.CommlayerEnvironment()


def test_without_mpi_the_user_can_tell(launched, monkeypatch):
    monkeypatch.setattr(place, "mpi_importable", lambda: False)
    script = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    launched(script | {"NODE_RANK": "1"})
    environment = on_the_layer.CommlayerEnvironment()
    assert (environment.node_rank(), environment.main_address, environment.main_port) == (1, "n1", 29500)


def test_one_process_needs_nobody(launched):
    launched({"PMI_RANK": "0", "PMI_SIZE": "1"})
    environment = on_the_layer.CommlayerEnvironment()
    assert (environment.world_size(), environment.local_rank(), environment.node_rank()) == (1, 0, 0)
    assert environment.main_address == "127.0.0.1"
    assert environment.main_port > 0


def test_processes_that_lightning_starts_are_its_own(launched):
    launched({})
    assert not on_the_layer.CommlayerEnvironment.detect()
    launched({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    assert not on_the_layer.CommlayerEnvironment.detect()
    assert on_the_layer.CommlayerDDPStrategy().cluster_environment is None


def trainer(**options):
    return pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, **options)


@pytest.fixture
def restored(monkeypatch):
    """Undoes what a Trainer leaves behind."""
    monkeypatch.setattr(pl.utilities.rank_zero_only, "rank", 0)


@pytest.mark.parametrize("name", on_the_layer.STRATEGIES)
def test_devices_and_nodes_are_the_launchers(name, launched, restored):
    launched(TORCHRUN)  # rank 5 of 8 on 2 nodes
    made = trainer(strategy=name, accelerator="cpu")
    assert (made.global_rank, made.world_size, made.node_rank, made.local_rank) == (5, 8, 1, 1)
    assert (made.num_devices, made.num_nodes) == (4, 2)
    assert made.strategy.process_group_backend == "commlayer"
    assert made.strategy.launcher is None
    if name == "commlayer_ddp":  # the others ask their mesh, once there is one
        assert made.strategy.distributed_sampler_kwargs == {"num_replicas": 8, "rank": 5}


@pytest.mark.parametrize("said", [{}, {"devices": 4, "num_nodes": 2}])
def test_a_script_may_leave_out_how_many_ranks_a_node_has(said, launched, restored, monkeypatch):
    monkeypatch.setattr(place, "mpi_importable", lambda: False)
    launched({name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")})
    for name, value in (("MASTER_ADDR", "n1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    made = trainer(strategy=on_the_layer.CommlayerDDPStrategy(), accelerator="cpu", **said)
    assert (made.world_size, made.node_rank, made.strategy.root_device) == (8, 1, torch.device("cpu"))
    assert made.strategy.distributed_sampler_kwargs == {"num_replicas": 8, "rank": 5}


@pytest.mark.parametrize(("devices", "nodes"), [(3, 1), (4, 3), (8, 1)])
def test_other_devices_and_nodes_than_the_launchers_are_an_error(devices, nodes, launched, restored):
    launched(TORCHRUN)
    message = re.escape(f"makes {devices * (nodes if nodes > 1 else 2)} processes, but torchrun started 8")
    with pytest.raises(ValueError, match=message):
        trainer(strategy="commlayer_ddp", accelerator="cpu", devices=devices, num_nodes=nodes)


def test_lightnings_own_strategy_with_our_environment_needs_the_right_numbers(launched):
    launched(TORCHRUN)
    environment = on_the_layer.CommlayerEnvironment()
    environment.validate_settings(num_devices=4, num_nodes=2)
    with pytest.raises(ValueError, match=r"devices=1, num_nodes=1\) makes 1 processes, but torchrun started 8"):
        environment.validate_settings(num_devices=1, num_nodes=1)


CPU, GPUS = [torch.device("cpu")], [torch.device("cuda", number) for number in range(4)]


@pytest.mark.parametrize(
    ("devices", "ranks", "mask", "expected"),
    [(CPU, 3, "", CPU * 3), (GPUS, 4, "", GPUS), (GPUS, 2, "", GPUS[:2]), (GPUS[:1], 4, "2", GPUS[:1] * 4)],
)
def test_a_device_for_each_rank(devices, ranks, mask, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    launch = Launch("pals", 0, 8, 0, ranks)
    assert on_the_layer.strategies._one_for_each_rank(devices, launch) == expected
    assert on_the_layer.strategies._one_for_each_rank(expected, launch) == expected


def test_more_ranks_than_devices_is_an_error():
    with pytest.raises(LaunchError, match="8 ranks on this node but 4 cuda devices"):
        on_the_layer.strategies._one_for_each_rank(GPUS, Launch("pals", 0, 8, 0, 8))


# What ZeRO cuts --------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(3))
        self.head = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 4))
        self.stages = nn.Sequential(nn.ModuleDict({"inner": nn.ModuleList([nn.Linear(2, 2)])}), nn.Linear(2, 2))
        self.head[1].weight = self.embedding.weight


def test_units_are_elements_of_lists():
    model = Blocks()
    names = {module: name for name, module in model.named_modules()}
    assert [names[unit] for unit in on_the_layer.sharded._units(model, None)] == [
        *["blocks.0", "blocks.1", "blocks.2", "head.0"],  # and not head.1, which shares its weight
        *["stages.0.inner.0", "stages.1"],
    ]
    by_class = on_the_layer.sharded._units(model, {nn.Linear})
    assert [names[unit] for unit in by_class] == [f"blocks.{n}.0" for n in range(3)] + ["stages.0.inner.0", "stages.1"]
    assert not list(on_the_layer.sharded._units(model, ()))


def test_zero_refuses_what_it_cannot():
    with pytest.raises(ValueError, match="ZeRO has 1, 2 and 3, got 4"):
        on_the_layer.CommlayerZeroStrategy(stage=4)
    strategy = on_the_layer.CommlayerZeroStrategy()
    strategy.accelerator = pl.accelerators.CPUAccelerator()
    strategy.precision_plugin = pl.plugins.MixedPrecision("16-mixed", "cpu")
    strategy.connect(pl.LightningModule())
    with pytest.raises(ValueError, match="precision='16-mixed' is not for ZeRO: take 'bf16-mixed'"):
        strategy.setup(None)


# Intel GPUs, of which there are two, in name only ----------------------------------------------------------------


@pytest.fixture
def two_xpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "set_device", chosen.append)
    return chosen


def test_xpu_devices_by_local_rank(two_xpus, launched, mpi, restored):
    common, differing = JOBS["pals"]
    mpi.rank = 0
    launched(common | dict.fromkeys(differing, "0"))
    on_the_layer.CommlayerEnvironment()  # rank 0 tells where to meet
    mpi.rank = 3
    launched(common | {name: str((3, 1, 1)[which]) for name, which in differing.items()})
    made = trainer(accelerator="xpu", strategy=on_the_layer.CommlayerDDPStrategy(), precision="bf16-mixed")
    assert made.strategy.root_device == torch.device("xpu", 1)
    assert (made.world_size, made.num_devices, made.num_nodes) == (4, 2, 2)
    assert made.strategy.determine_ddp_device_ids() is None
    made.accelerator.setup_device(made.strategy.root_device)
    assert two_xpus == [torch.device("xpu", 1)]
    assert made.precision_plugin.device == "cuda"  # of Lightning's making
    made.accelerator.setup(made)
    assert made.precision_plugin.device == "xpu"


@pytest.mark.parametrize(
    ("devices", "expected"), [(1, [0]), (-1, [0, 1]), ("2", [0, 1]), ("1,", [1]), ([1, 0], [1, 0])]
)
def test_xpu_devices_by_the_user(devices, expected, two_xpus):
    accelerator = on_the_layer.XPUAccelerator
    assert accelerator.parse_devices(devices) == expected
    assert accelerator.get_parallel_devices(expected) == [torch.device("xpu", number) for number in expected]


@pytest.mark.parametrize("devices", [3, [2], [], 0, "1,5", -2])
def test_xpu_devices_that_are_not_there(devices, two_xpus):
    with pytest.raises(ValueError, match="there are 2 XPUs here"):
        on_the_layer.XPUAccelerator.parse_devices(devices)


def test_one_xpu_without_a_strategy_would_be_the_cpu(two_xpus, launched):
    launched({})
    made = trainer(accelerator="xpu", devices=1)
    with pytest.raises(ValueError, match="name a strategy, such as 'commlayer_ddp'"):
        made.strategy.setup_environment()


# Lightning under either name, or not at all ----------------------------------------------------------------------


def test_the_package_that_the_program_has_imported(monkeypatch):
    name = on_the_layer.package._name
    assert name() == "lightning"
    monkeypatch.delitem(sys.modules, "lightning")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
    assert name() == "pytorch_lightning"
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    monkeypatch.setattr(on_the_layer.package, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs Lightning 2.x: pip install 'commlayer\[lightning\]'"):
        name()
