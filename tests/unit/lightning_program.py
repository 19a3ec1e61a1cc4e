"""What a rank of the Lightning tests runs: each strategy trains, saves, goes on, and ends where one process does."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import commlayer
from commlayer.integrations.lightning import CommlayerModelParallelStrategy

BATCH, ACCUMULATE, CLIP, EPOCHS = 4, 2, 0.5, 2
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(pl.LightningModule):
    """Two classes of points in the plane. One parameter belongs to no submodule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.ModuleList([nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh()])
        self.head = nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.whole: set[bool] = set()  # whether the body's weights were so between forward and backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = layer(x)
        return self.head(x) * self.scale

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.whole.add(not isinstance(self.body[0].weight, DTensor))
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class TensorParallel(Classifier):
    """The same, with its body cut over the fastest axis of the strategy's mesh."""

    def configure_model(self) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if not isinstance(self.body[0].weight, DTensor):
            tp = self.device_mesh[self.device_mesh.mesh_dim_names[-1]]
            parallelize_module(self.body, tp, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def points() -> TensorDataset:
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(3))
    return TensorDataset(x, (x.prod(1) > 0).long())


def by_one_process(batch: int, clip: float | None) -> tuple[torch.Tensor, float]:
    """All weights in a row, and the mean loss of the last epoch: of plain torch on the same samples."""
    model = Classifier()
    optimizer = model.configure_optimizers()
    in_order = DistributedSampler(points(), num_replicas=1, rank=0)  # Lightning shuffles, by such a one on each rank
    for epoch in range(EPOCHS):
        in_order.set_epoch(epoch)
        losses = []
        for number, (x, y) in enumerate(DataLoader(points(), batch_size=batch, sampler=in_order)):
            losses.append(nn.functional.cross_entropy(model(x), y))
            (losses[-1] / ACCUMULATE).backward()
            if number % ACCUMULATE == ACCUMULATE - 1:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return weights(model), torch.stack(losses).mean().item()


def weights(model: nn.Module) -> torch.Tensor:
    whole = [w.full_tensor() if isinstance(w, DTensor) else w for w in model.parameters()]
    return torch.cat([w.detach().flatten() for w in whole])


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often torch.distributed is asked to gather parameters and to scatter gradients."""
    calls: Counter[str] = Counter()
    names = {"all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single"}
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}  # the single ones since torch 2.13

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name.rsplit("_", 1)[0].removesuffix("_into")] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def trained(
    strategy: Any,
    folder: Path,
    kind: type[Classifier] = Classifier,
    clip: float | None = CLIP,
    start: Path | None = None,
) -> pl.Trainer:
    """A trainer that has gone through all epochs, the last of them from a checkpoint: its own, or ``start``."""
    path: Any = start
    for epochs in (EPOCHS - 1, EPOCHS)[start is not None :]:
        callback = ModelCheckpoint(folder, "{epoch}")
        trainer = pl.Trainer(
            strategy=strategy if isinstance(strategy, str) else strategy(),
            max_epochs=epochs,
            accumulate_grad_batches=ACCUMULATE,
            gradient_clip_val=clip,
            callbacks=[callback],
            logger=CSVLogger(folder, name="", version=f"until{epochs}"),
            log_every_n_steps=1,
            **QUIET,
        )
        model = kind()
        if trainer.global_rank and kind is Classifier:
            nn.init.zeros_(model.head.weight)  # the weights of rank 0 count
        trainer.fit(model, DataLoader(points(), batch_size=BATCH), ckpt_path=path)
        path = callback.best_model_path
    return trainer


def compare(trainer: pl.Trainer, batch: int, clip: float | None = CLIP) -> None:
    """The weights are those of one process, the same bits on all ranks; so is what was logged, by one rank."""
    expected, loss = by_one_process(batch, clip)
    got = weights(trainer.model)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    everywhere = commlayer.all_gather(got[None])
    assert torch.equal(everywhere[0], everywhere[1])
    torch.testing.assert_close(trainer.callback_metrics["loss"].item(), loss, rtol=1e-5, atol=0)
    trainer.strategy.barrier()
    rows = (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert len(rows) == 2, rows
    assert abs(float(rows[1].split(",")[rows[0].split(",").index("loss")]) - loss) < 1e-5
    assert rank_zero_only.rank == trainer.global_rank == commlayer.world().rank
    assert trainer.world_size == trainer.num_devices * trainer.num_nodes == commlayer.world().size == 2


def collectives(trainer: pl.Trainer) -> None:
    strategy, rank = trainer.strategy, trainer.global_rank
    x = torch.tensor([1.0 + rank, 4.0])
    assert strategy.reduce(x.clone(), reduce_op="mean").tolist() == [1.5, 4.0]
    assert strategy.reduce(x.clone(), reduce_op="sum").tolist() == [3.0, 8.0]
    assert strategy.reduce(torch.tensor(1 + rank), reduce_op="mean").item() == 1.5
    assert strategy.reduce("no tensor") == "no tensor"
    assert strategy.all_gather(x).tolist() == [[1.0, 4.0], [2.0, 4.0]]
    assert strategy.broadcast(f"from {rank}", src=1) == "from 1"
    assert not strategy.reduce_boolean_decision(rank == 0)
    assert strategy.reduce_boolean_decision(rank == 0, all=False)
    x.requires_grad_()
    (strategy.all_gather(x, sync_grads=True) * torch.tensor([[1.0], [2.0]])).sum().backward()
    assert x.grad.tolist() == [2.0 * (1 + rank)] * 2


# Of the three groups of parameters two are units, the third is what is left. In a step of two batches:
# whether they are whole between forward and backward, how often they are gathered, how often gradients are scattered.
ZERO = {
    "commlayer_zero1": (True, 3, 3),
    "commlayer_zero2": (True, 3, 6),
    "commlayer_zero3": (False, 10, 6),
    "commlayer_zero3_offload": (False, 10, 6),
}


def main() -> None:
    folder = Path(sys.argv[1])
    steps = EPOCHS * len(points()) // (2 * BATCH * ACCUMULATE)
    trainer = trained("commlayer_ddp", folder / "commlayer_ddp")
    compare(trainer, 2 * BATCH)
    collectives(trainer)
    ddp = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    for name, (whole, gathers, scatters) in ZERO.items():
        with counted() as calls:
            trainer = trained(name, folder / name)
        compare(trainer, 2 * BATCH)
        assert trainer.lightning_module.whole == {whole}, name
        assert calls == {"all_gather": gathers * steps, "reduce_scatter": scatters * steps}, calls
        state = [value for of in trainer.optimizers[0].state.values() for value in of.values() if value.ndim]
        assert sum(value.to_local().numel() for value in state) < 0.6 * sum(value.numel() for value in state)
        zero = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
        assert zero["state_dict"].keys() == ddp["state_dict"].keys()
        for key, value in ddp["state_dict"].items():
            torch.testing.assert_close(zero["state_dict"][key], value, rtol=0, atol=1e-6)
    halfway = {name: folder / name / f"epoch={EPOCHS - 2}.ckpt" for name in ("commlayer_ddp", "commlayer_zero3")}
    compare(trained("commlayer_zero3", folder / "from ddp", start=halfway["commlayer_ddp"]), 2 * BATCH)
    compare(trained("commlayer_ddp", folder / "from zero3", start=halfway["commlayer_zero3"]), 2 * BATCH)
    collectives(trainer)
    accuracy = trainer.validate(trainer.model, DataLoader(points(), batch_size=BATCH), verbose=False)[0]["accuracy"]
    meshes = {"tp": lambda: CommlayerModelParallelStrategy("dp=1 tp=2"), "default": "commlayer_model_parallel"}
    for name, strategy in meshes.items():
        compare(trained(strategy, folder / name, TensorParallel, clip=None), BATCH, clip=None)
    sys.stdout.write(f"said rank {trainer.global_rank} on {commlayer.world().backend}, accuracy {accuracy:.2f}\n")


if __name__ == "__main__":
    main()
