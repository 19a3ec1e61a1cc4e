"""How many floating-point operations a second the ranks' devices could do at best: what utilisation is a share of."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

import commlayer
from commlayer import Group

# FLOP/s of dense matrix products, of what torch counts as one device; the first whose name is part of the device's.
# From the vendors' data sheets, where NVIDIA's count twice as many, with sparsity: nvidia.com/en-us/data-center/a100,
# …/h100, …/h200.
PEAKS: dict[str, dict[str, float]] = {
    "A100": {"fp32": 19.5e12, "tf32": 156e12, "fp16": 312e12, "bf16": 312e12},
    "H100 PCIe": {"fp32": 51e12, "tf32": 378e12, "fp16": 756e12, "bf16": 756e12},
    "H100 NVL": {"fp32": 60e12, "tf32": 417.5e12, "fp16": 835.5e12, "bf16": 835.5e12},
    "H100": {"fp32": 66.9e12, "tf32": 494.7e12, "fp16": 989.4e12, "bf16": 989.4e12},
    "H200 NVL": {"fp32": 60e12, "tf32": 417.5e12, "fp16": 835.5e12, "bf16": 835.5e12},
    "H200": {"fp32": 66.9e12, "tf32": 494.7e12, "fp16": 989.4e12, "bf16": 989.4e12},
    # One of the two dies: amd.com/en/products/accelerators/instinct/mi200/mi250x.html
    "MI250X": {"fp32": 47.9e12, "fp16": 191.5e12, "bf16": 191.5e12},
    # amd.com/en/products/accelerators/instinct/mi300/mi300x.html
    "MI300X": {"fp32": 163.4e12, "fp16": 1307.4e12, "bf16": 1307.4e12},
    # One tile as on Aurora, of 448 vector engines: 512 operations a clock at 1.3 GHz in half precision, as torchtitan
    # counts them, 32 at 1.6 GHz in single (Intel's oneAPI GPU Optimization Guide, Xe architecture).
    "Max 1550": {"fp32": 22.9e12, "fp16": 298.2e12, "bf16": 298.2e12},
}
AURORA_ENGINES = 448

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ENOUGH = 0.02  # seconds


class Peak(NamedTuple):
    """``flops`` per second of all ranks together, and where the figure is from."""

    flops: float
    source: str


def peak(precision: str, group: Group) -> Peak:
    """Of the ranks of ``group`` in ``fp32``, ``tf32``, ``fp16`` or ``bf16``. Collective.

    Where a device is not in the table, as CPUs are not, the best rate of large matrix products, which all ranks
    do at the same time, since they may share cores.
    """
    name, known = _listed(group.device, precision)
    if all(commlayer.all_gather_object(known > 0, group=group)):
        rate, source = known, f"data sheet of {name}, {precision}"
    else:
        commlayer.barrier(group=group)
        rate, source = _measured(DTYPES[precision], group.device), f"measured: matrix products in {precision}"
    return Peak(sum(commlayer.all_gather_object(rate, group=group)), source)


def _listed(device: torch.device, precision: str) -> tuple[str, float]:
    """The name of a device, and its peak by the table; 0 where it is not there."""
    if device.type not in ("cuda", "xpu"):
        return device.type, 0.0
    name = torch.get_device_module(device).get_device_name(device)
    for part, peaks in PEAKS.items():
        if part in name:
            rate = peaks.get(precision, peaks["fp32"])
            if device.type == "xpu":  # which may be a tile of more engines, or the whole card
                rate *= torch.xpu.get_device_properties(device).max_compute_units / AURORA_ENGINES
            return name, rate
    return name, 0.0


def _measured(dtype: torch.dtype, device: torch.device) -> float:
    """The best rate of products of ever larger matrices, until one takes long enough."""
    side, best = 128, 0.0
    while True:
        side *= 2
        matrix = torch.ones(side, side, dtype=dtype, device=device)
        seconds = min(_timed(matrix) for _ in range(3))
        best = max(best, 2 * side**3 / seconds)
        if seconds > ENOUGH:
            return best


def _timed(matrix: Tensor) -> float:
    start = time.perf_counter()
    (matrix @ matrix)[0, 0].item()  # waits for a GPU
    return time.perf_counter() - start
