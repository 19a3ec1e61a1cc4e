"""Lightning and accelerate in whole jobs: under mpiexec, torchrun, a PALS that is made up, and on two hosts."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.faults.hosts import Hosts, missing
from tests.faults.job import ROOT, clean_environment
from tests.unit.test_jobs import BIN, job, lines, needs_mpiexec

pytest.importorskip("lightning.pytorch", reason="pip install 'commlayer[lightning]'")

EVERY_STRATEGY = """
    import runpy, sys
    sys.argv = ["lightning_program", {folder!r}]
    runpy.run_module("tests.unit.lightning_program", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("launcher", "backend"),
    [pytest.param("mpiexec", "mpi", id="by mpiexec", marks=needs_mpiexec), ("torchrun", "gloo")],
)
def test_every_strategy_ends_where_one_process_does(launcher, backend, tmp_path):
    result = job(launcher, 2, EVERY_STRATEGY.format(folder=str(tmp_path)), tmp_path, COMMLAYER_BACKEND=backend)
    said = lines(result)
    assert len(said) == 2, result.stdout
    assert all(f"on {backend}" in line for line in said)


# The published example: a classifier in bf16 under an MPI launcher, here by the variables of PALS, which does not say
# how many ranks there are. Lightning goes by its other name.
PUBLISHED = """
    import os, sys
    rank, size = os.environ["PMI_RANK"], os.environ["PMI_SIZE"]
    for name in ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"):
        del os.environ[name]                            # mpiexec's own, which MPI itself does not need
    os.environ |= {"PALS_RANKID": rank, "PALS_LOCAL_RANKID": rank, "PALS_LOCAL_SIZE": size, "PALS_APID": "3f2c"}
    os.environ |= {"PBS_JOBID": "123.aurora-pbs", "COMMLAYER_LAUNCHER": "pals"}

    import pytorch_lightning as pl
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    import commlayer.integrations.lightning

    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

        def training_step(self, batch, _):
            logits = self.net(batch[0])
            assert logits.dtype == torch.bfloat16
            return nn.functional.cross_entropy(logits, batch[1])

        def validation_step(self, batch, _):
            self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.02)

    torch.manual_seed(1)
    x = torch.rand(512, 2) * 2 - 1
    data = TensorDataset(x, (x.prod(1) > 0).long())
    trainer = pl.Trainer(
        strategy="commlayer_ddp", precision="bf16-mixed", max_epochs=8, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=16), DataLoader(data, batch_size=128))
    good = trainer.callback_metrics["accuracy"].item() > 0.93
    launcher = trainer.strategy.cluster_environment.launch.launcher
    sys.stdout.write(f"said {launcher} {trainer.global_rank}/{trainer.world_size} {trainer.num_devices} {good}\\n")
"""


@needs_mpiexec
def test_the_published_example_under_pals(tmp_path):
    pytest.importorskip("pytorch_lightning")
    assert lines(job("mpiexec", 2, PUBLISHED, tmp_path)) == ["said pals 0/2 2 True", "said pals 1/2 2 True"]


ON_TWO_HOSTS = """
    import os, sys
    from pathlib import Path
    from tests.unit.lightning_program import BATCH, compare, trained

    trainer = trained("commlayer_zero2", Path({folder!r}))
    compare(trainer, 2 * BATCH)
    env = trainer.strategy.cluster_environment
    where = f"{{env.main_address}} {{os.environ['MASTER_ADDR']}}"
    sys.stdout.write(f"said node {{env.node_rank()}} of {{trainer.num_nodes}}, rank {{env.local_rank()}}, {{where}}\\n")
"""


@needs_mpiexec
def test_two_hosts_meet_at_the_first_ones_address(tmp_path):
    why = missing()
    if why is not None:
        pytest.skip(why)
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(ON_TWO_HOSTS.format(folder=str(tmp_path))))
    hosts = Hosts(2, tmp_path)
    try:
        hosts.build()
        mpiexec = [str(BIN / "mpiexec"), "-launcher", "ssh", "-launcher-exec", hosts.ssh(), "-hosts", "host0:1,host1:1"]
        result = subprocess.run(
            [*hosts.prefix(0), *mpiexec, "-iface", "eth0", "-n", "2", sys.executable, str(program)],
            env=clean_environment() | {"UCX_TLS": "tcp,self", "COMMLAYER_BACKEND": "gloo"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        hosts.close()
    assert lines(result) == [f"said node {node} of 2, rank 0, 10.77.0.1 10.77.0.1" for node in range(2)]


ACCELERATE = """
    import sys
    import commlayer.integrations.accelerate
    world = commlayer.integrations.accelerate.start()

    import torch
    from accelerate import Accelerator
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x.sum(1, keepdim=True))

    def trained(batch, prepare, backward, clip):
        torch.manual_seed(2)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, batches = prepare(model, optimizer, DataLoader(data, batch_size=batch))
        for x, y in batches:
            backward((model(x) - y).square().mean())
            clip(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([w.detach().flatten() for w in model.parameters()])

    ours = Accelerator(cpu=True)
    weights = trained(8, ours.prepare, ours.backward, ours.clip_grad_norm_)
    alone = trained(16, lambda *args: args, torch.Tensor.backward, nn.utils.clip_grad_norm_)
    torch.testing.assert_close(weights, alone, rtol=0, atol=1e-6)
    everywhere = ours.gather(weights[None])
    assert torch.equal(everywhere[0], everywhere[1])
    assert ours.reduce(torch.tensor(1.0 + world.rank), "mean").item() == 1.5
    ours.wait_for_everyone()
    sys.stdout.write(f"said {world.backend} {ours.process_index}/{ours.num_processes}\\n")
"""


@needs_mpiexec
def test_accelerate_trains_as_one_process_does(tmp_path):
    pytest.importorskip("accelerate")
    assert lines(job("mpiexec", 2, ACCELERATE, tmp_path)) == ["said mpi 0/2", "said mpi 1/2"]
