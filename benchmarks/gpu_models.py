"""Training steps of whole models on made-up data that lie on the device: the ViT's ladder, and mixtures of experts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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
Step = Callable[..., None]  # of training; with False, of this rank alone


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
            make = partial(vit_step, rung, sizes.vit, group)
            batch = largest_batch(make, sizes.batch, group)
            step = make(batch)
            seconds = step_seconds(step, group, rounds)
            rate = batch * group.size / seconds
            row = {"rung": rung.name, "batch": batch, "ms": seconds * 1e3, "samples_per_second": rate}
            rows.append(row | {"published": rung.published, "GiB": high_water(group.device) / GIB})
            del step
    finally:
        torch.set_float32_matmul_precision(before)
    return rows


def vit_step(rung: Rung, config: ViTConfig, group: Group, batch: int) -> Step:
    """A step of training on ``batch`` samples a rank."""
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
        with nullcontext() if together else model.no_sync():
            loss.backward()
        optimizer.step()

    return step


def largest_batch(make: Callable[[int], Step], batch: int, group: Group) -> int:
    """This one, or the largest half of a half … of it with which a step fits on every rank. Collective.

    Steps without communication try it: a rank that runs out of memory must not leave the others waiting.
    """
    while True:
        reset(group)
        try:
            make(batch)(False)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        reset(group)
        if all(commlayer.all_gather_object(fits, group=group)):
            return batch
        if batch == 1:
            raise MemoryError(f"not even a batch of 1 fits on {device_name(group)}")
        batch //= 2


def reset(group: Group) -> None:
    """Give back a GPU's memory that nobody uses any more, and count its peak anew."""
    if group.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def moe(group: Group, sizes: Sizes, rounds: int) -> list[Row]:
    """Tokens/s over all ranks, MFU and memory: all experts on every rank, spread over the ranks, and none. Collective.

    All with the largest batches up to ``sizes.batches`` that fit where every rank has all experts.
    """
    config, peak, rows = LanguageModelConfig.named(sizes.moe), bf16_peak(device_name(group)), []
    variants = {"no EP": (config, 1), "dense": (config.dense(), 1)}
    if group.size > 1:
        variants |= {f"EP {group.size}": (config, group.size)}
    batches = [(largest_batch(partial(moe_step, config, 1, t, group), b, group), t) for b, t in sizes.batches]
    for name, (made, ep) in variants.items():
        for batch, tokens in batches:
            reset(group)
            step = moe_step(made, ep, tokens, group, batch)
            seconds = step_seconds(step, group, rounds)
            rate, flops = batch * tokens * group.size / seconds, flops_per_token(made, tokens)
            mfu = None if peak is None else rate * flops / (peak * group.size)
            row = {"model": sizes.moe, "way": name, "batch": batch, "tokens": tokens, "ms": seconds * 1e3}
            row |= {"tokens_per_second": rate, "flops_per_token": flops, "mfu": mfu, "peak": peak}
            rows.append(row | {"parameters": parameters(made).total, "GiB": high_water(group.device) / GIB})
            del step
    return rows


def moe_step(config: LanguageModelConfig, ep: int, tokens: int, group: Group, batch: int) -> Step:
    """A step of training on ``batch`` sequences a rank: bfloat16 by autocast, clipped, fused AdamW in float32."""
    mesh = Mesh(f"dp={group.size}", group=group)
    experts = mesh.fold(f"ep={ep}") if config.every else None
    torch.manual_seed(0)
    inner: nn.Module = LanguageModel(config, mesh, experts).to(group.device)
    model = DataParallel(inner, mesh=mesh, experts=experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    draw = torch.Generator().manual_seed(group.rank)
    ids = torch.randint(config.vocab_size, (batch, tokens + 1), generator=draw).to(group.device)

    def step(together: bool = True) -> None:
        optimizer.zero_grad()
        with autocast("bf16", group.device):
            found = model(ids[:, :-1], ids[:, 1:])
        loss = found.loss / (batch * tokens)
        for load in found.loads:
            loss = loss + load.loss * group.size
        with nullcontext() if together else model.no_sync():
            loss.backward()
        if together:
            clip_grad_norm_(model, 1.0, mesh=mesh)
        optimizer.step()

    return step


def bf16_peak(name: str) -> float | None:
    """FLOP/s of dense bfloat16 products by NVIDIA's data sheets; None for a device that is not in the table."""
    return next((peaks["bf16"] for part, peaks in PEAKS.items() if part in name), None)


def device_name(group: Group) -> str:
    return "CPU" if group.device.type == "cpu" else torch.cuda.get_device_name(group.device)
