"""Whether two runs of the programs computed the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

# In units of rounding errors of the largest element. Sums in another order differ by some units; training feeds them
# through products over layers and a few steps of an optimizer.
ROUNDING = 64
SHOWN = 4  # of the results of a program that differ


def judge(got: dict[str, Any], reference: dict[str, Any], exact: Callable[[str], bool]) -> list[str]:
    """What is wrong with a rank's records, against the reference's of the same rank.

    ``exact`` says of the name of a program whether its results must agree to the bit.
    """
    wrong = []
    for name, want in reference.items():
        record = got.get(name, {"error": "did not run"})
        if want["refused"] is None:
            expected = want.get("results", {})
            if "error" in want:
                wrong.append(f"{name}: the reference failed: {want['traceback']}")
        else:
            expected = want["alone"]
            if not re.search(want["refused"], want.get("error", "")):
                wrong.append(f"{name}: the reference should refuse: {want.get('error', 'it ran')}")
        if "error" in record:
            wrong.append(f"{name}: {record.get('traceback', record['error'])}")
            continue
        to_the_bit = want["moves"] or (exact(name) and want["refused"] is None)
        wrong += [f"{name}: {line}" for line in differences(record["results"], expected, to_the_bit, want["sums_in"])]
        if want["alone"] is not None:
            lines = differences(record["results"], want["alone"], want["moves"], want["sums_in"])
            wrong += [f"{name}: against one process: {line}" for line in lines]
    return wrong


def differences(got: dict[str, Any], want: dict[str, Any], exact: bool, sums_in: torch.dtype | None) -> list[str]:
    if got.keys() != want.keys():
        return [f"results {sorted(got)}, expected {sorted(want)}"]
    found = []
    for key, expected in want.items():
        have = got[key]
        if isinstance(expected, torch.Tensor):
            if not isinstance(have, torch.Tensor):
                found.append(f"{key}: {have}, expected a tensor")
            elif not close(have, expected, exact, sums_in):
                found.append(f"{key}: {shown(have)}, expected {shown(expected)}")
        elif have != expected:
            found.append(f"{key}: {have}, expected {expected}")
    return [*found[:SHOWN], f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else found


def close(a: torch.Tensor, b: torch.Tensor, exact: bool, sums_in: torch.dtype | None) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if exact or not (b.is_floating_point() or b.is_complex()):
        return torch.equal(bits(a), bits(b))
    epsilon = max(torch.finfo(dtype).eps for dtype in (b.dtype, sums_in or b.dtype))
    wide = torch.complex128 if b.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    return torch.equal(a, b) or bool((a - b).abs().max() <= ROUNDING * epsilon * b.abs().max())


def shown(x: torch.Tensor) -> str:
    """Some of it."""
    return f"{x.dtype} {list(x.shape)} {x.flatten()[:8].tolist()} …"


def bits(x: torch.Tensor) -> torch.Tensor:
    """Its bytes: -0 is not 0, and a NaN equals itself. Plain gloo adds up bools as bytes: any but 0 is true."""
    raw = x.detach().contiguous().reshape(-1).view(torch.uint8)
    return raw != 0 if x.dtype == torch.bool else raw
