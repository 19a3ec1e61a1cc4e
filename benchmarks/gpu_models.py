"""Training steps of whole models on made-up data that lie on the device: the ViT's ladder, and mixtures of experts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import commlayer
from benchmarks.gpu_timing import step_seconds
from commlayer import Group, Mesh
from models.devices import PEAKS
from models.flops import flops_per_token
from models.memory import high_water
from models.moe import LanguageModel, parameters
from models.moe_sizes import LanguageModelConfig
from models.vit import ViT, ViTConfig
from parallel import DataParallel, autocast, clip_grad_norm_

GIB = 2**30
Row = dict[str, Any]


class Rung(NamedTuple):
    """What the one before has not. ``published``: samples/s of NERSC's tutorial on one A100, with loading of data."""

    name: str
    published: float
    tf32: bool = True
    amp: str = "none"
    compiled: bool = False  # and fused Adam


LADDER = (
    Rung("float32", 9.2, tf32=False),
    Rung("TF32", 12.0),
    Rung("AMP bfloat16", 37.5, amp="bf16"),
    Rung("compile, fused Adam", 41.0, amp="bf16", compiled=True),
)


class Sizes(NamedTuple):
    vit: ViTConfig
    batch: int
    moe: str  # of models.moe_sizes.SIZES
    batches: tuple[tuple[int, int], ...]  # sequences a rank, and their tokens


FULL = Sizes(ViTConfig.named("era5"), 16, "deepseek-1b", ((4, 512), (16, 2048)))
QUICK = Sizes(ViTConfig.named("tiny", grid=(16, 32), in_channels=2, out_channels=2), 2, "tiny", ((2, 16),))


def vit(group: Group, sizes: Sizes, rounds: int) -> list[Row]:
    """Samples/s over all ranks on each rung, the largest batch a rank up to ``sizes.batch`` that fits. Collective."""
    rows: list[Row] = []
    before = torch.get_float32_matmul_precision()
    try:
        for rung in LADDER:
            torch.set_float32_matmul_precision("high" if rung.tf32 else "highest")
            batch = sizes.batch
            while not fits(lambda: vit_step(rung, sizes.vit, batch, group)(False), group):  # noqa: B023 (called at once)
                if batch == 1:
                    raise MemoryError(f"vit, {rung.name}: not even one sample fits on {device_name(group)}")
                batch //= 2
            reset(group)
            step = vit_step(rung, sizes.vit, batch, group)
            seconds = step_seconds(step, group, rounds)
            rate = batch * group.size / seconds
            row = {"rung": rung.name, "batch": batch, "ms": seconds * 1e3, "samples_per_second": rate}
            rows.append(row | {"published": rung.published, "GiB": high_water(group.device) / GIB})
            del step
    finally:
        torch.set_float32_matmul_precision(before)
    return rows


def vit_step(rung: Rung, config: ViTConfig, batch: int, group: Group) -> Callable[..., None]:
    """A step of training; with False, of this rank alone."""
    device = group.device
    torch.manual_seed(0)
    inner = ViT(config).to(device)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=5e-4, fused=rung.compiled)
    if rung.compiled:
        for block in inner.blocks:
            block.compile(fullgraph=True, backend="inductor" if device.type == "cuda" else "eager")
    model = DataParallel(inner, group)
    x = torch.randn(batch, config.in_channels, *config.grid, device=device)
    y = torch.randn(batch, config.out_channels, *config.grid, device=device)

    def step(together: bool = True) -> None:
        optimizer.zero_grad()
        with autocast(rung.amp, device):
            forecast = model(x)
        loss = (forecast.float() - y).square().mean()
        if together:
            loss.backward()
        else:
            with model.no_sync():
                loss.backward()
        optimizer.step()

    return step


def fits(trial: Callable[[], object], group: Group) -> bool:
    """Whether it does on every rank; a trial that runs out of memory must not leave the others waiting. Collective."""
    try:
        trial()
        mine = True
    except torch.OutOfMemoryError:
        mine = False
    reset(group)
    return all(commlayer.all_gather_object(mine, group=group))


def reset(group: Group) -> None:
    """Give back a GPU's memory that nobody uses any more, and count its peak anew."""
    if group.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def moe(group: Group, sizes: Sizes, rounds: int) -> list[Row]:
    """Tokens/s over all ranks, MFU and memory: all experts on every rank, spread over the ranks, and none. Collective.

    A model that does not fit ends the job where there are several ranks, as it would in training.
    """
    config, peak, rows = LanguageModelConfig.named(sizes.moe), bf16_peak(device_name(group)), []
    variants = {"no EP": (config, 1), "dense": (config.dense(), 1)}
    if group.size > 1:
        variants |= {f"EP {group.size}": (config, group.size)}
    for name, (made, ep) in variants.items():
        for batch, tokens in sizes.batches:
            reset(group)
            step = moe_step(made, ep, batch, tokens, group)
            seconds = step_seconds(step, group, rounds)
            rate, flops = batch * tokens * group.size / seconds, flops_per_token(made, tokens)
            mfu = None if peak is None else rate * flops / (peak * group.size)
            row = {"model": sizes.moe, "way": name, "batch": batch, "tokens": tokens, "ms": seconds * 1e3}
            row |= {"tokens_per_second": rate, "flops_per_token": flops, "mfu": mfu, "peak": peak}
            rows.append(row | {"parameters": parameters(made).total, "GiB": high_water(group.device) / GIB})
            del step
    return rows


def moe_step(config: LanguageModelConfig, ep: int, batch: int, tokens: int, group: Group) -> Callable[[], None]:
    """A step of training in bfloat16 autocast, parameters and fused AdamW in float32, gradients clipped."""
    mesh = Mesh(f"dp={group.size}", group=group)
    experts = mesh.fold(f"ep={ep}") if config.every else None
    torch.manual_seed(0)
    inner: nn.Module = LanguageModel(config, mesh, experts).to(group.device)
    model = DataParallel(inner, mesh=mesh, experts=experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    draw = torch.Generator().manual_seed(group.rank)
    ids = torch.randint(config.vocab_size, (batch, tokens + 1), generator=draw).to(group.device)

    def step() -> None:
        optimizer.zero_grad()
        with autocast("bf16", group.device):
            found = model(ids[:, :-1], ids[:, 1:])
        loss = found.loss / (batch * tokens)
        for load in found.loads:
            loss = loss + load.loss * group.size
        loss.backward()
        clip_grad_norm_(model, 1.0, mesh=mesh)
        optimizer.step()

    return step


def bf16_peak(name: str) -> float | None:
    """FLOP/s of dense bfloat16 products by NVIDIA's data sheets; None for a device that is not in the table."""
    return next((peaks["bf16"] for part, peaks in PEAKS.items() if part in name), None)


def device_name(group: Group) -> str:
    return "CPU" if group.device.type == "cpu" else torch.cuda.get_device_name(group.device)
