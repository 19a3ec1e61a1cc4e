"""The norm of all gradients of a model whose parameters are spread over a mesh, and clipping by it.

Every element of every parameter counts once, wherever its shards are: each rank weighs what it holds by one over the
number of ranks that hold the same, and one all_reduce of one number adds it all up. So every rank has the total, and
the coefficient, in the same bits, also where rounding made replicated gradients differ.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import commlayer
from commlayer import MAX, SUM, Group, Mesh
from parallel.buckets import packs_of
from parallel.placement import placement


@torch.no_grad()
def clip_grad_norm_(
    module_or_params: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    mesh: Mesh | None = None,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients in place so that their norm is at most ``max_norm``; returns the norm that they had.

    As ``torch.nn.utils.clip_grad_norm_``, for parameters marked by ``mark_sharded``; after data parallelism has reduced
    the gradients. Collective: see :func:`grad_norm`, also for the errors.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm: expected at least 0, got {max_norm}")
    params = _parameters(module_or_params)
    total = grad_norm(params, norm_type, mesh=mesh, error_if_nonfinite=error_if_nonfinite)
    coefficient = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for pack in packs_of([p.grad for p in params if p.grad is not None], sys.maxsize):
        # In the gradients' own dtype, which torch multiplies all at once; but in half precision it would lose digits.
        dtype = torch.promote_types(pack[0].dtype, torch.float32)
        torch._foreach_mul_(pack, coefficient.to(pack[0].device, dtype))
    return total


@torch.no_grad()
def grad_norm(
    module_or_params: nn.Module | Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    *,
    mesh: Mesh | None = None,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """The norm of all gradients as one vector: a 0-dim tensor (float64, where the device has it), alike on all ranks.

    Args:
        module_or_params: every rank passes the same parameters; tied ones count once, those without gradient as zeros.
        norm_type: p of the p-norm, 1 to infinity.
        mesh: all its ranks take part. Without one, each sharded parameter is summed over the groups it is cut over, and
            if nothing is sharded, nothing is communicated.
        error_if_nonfinite: raise RuntimeError, on all ranks, where the norm is infinite or NaN.

    Raises ValueError for another ``norm_type``, and for a parameter cut into more parts than the mesh has ranks for.
    """
    p = float(norm_type)
    if not p >= 1:
        raise ValueError(f"norm_type: expected a number from 1 to infinity, got {norm_type!r}")
    # Parameters that are spread alike, in the order of the model, which is the same on all ranks.
    alike: dict[tuple[Group, ...], list[Tensor]] = {}
    for param in _parameters(module_or_params):
        alike.setdefault(placement(param).groups, []).append(param)

    if mesh is None:
        total = _sum([_over(_powers(params, p), cut, p) for cut, params in alike.items()], p)
    else:
        parts = [_powers(params, p) / (1 if p == math.inf else _copies(cut, mesh)) for cut, params in alike.items()]
        total = _over(_sum(parts, p), (mesh["-".join(mesh.axes)],), p)
    total = total if p == math.inf else total ** (1 / p)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the norm of the gradients is {total.item()}, so they cannot be clipped; to scale them by it anyway, set "
            "error_if_nonfinite=False"
        )
    return total


def _parameters(given: nn.Module | Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Each of them once."""
    if isinstance(given, nn.Module):
        return list(given.parameters())
    return [given] if isinstance(given, Tensor) else list(dict.fromkeys(given))


def _copies(cut: tuple[Group, ...], mesh: Mesh) -> int:
    """How many ranks hold the same part. The stages of a pipeline have parameters of their own."""
    stage, parts = mesh.world_size // mesh.sizes.get("pp", 1), math.prod(group.size for group in cut)
    if stage % parts:
        raise ValueError(f"mesh: a parameter is cut into {parts} parts, which do not fit the {stage} ranks of {mesh}")
    return stage // parts


def _powers(params: list[Tensor], p: float) -> Tensor:
    """The sum of |g|^p over all their gradients on this rank; for p = inf the largest |g|."""
    grads = [param.grad for param in params if param.grad is not None and param.grad.numel()]
    parts = [torch.zeros(())]
    for pack in packs_of(grads, sys.maxsize):
        half = pack[0].dtype in (torch.float16, torch.bfloat16)
        norms = torch.stack(torch._foreach_norm(pack, p, dtype=torch.float32 if half else None))
        norms = norms.to(_widest(norms.device))
        parts.append(norms.amax() if p == math.inf else norms.pow(p).sum())
    return _sum(parts, p)


def _sum(parts: list[Tensor], p: float) -> Tensor:
    """The sum of some powers; for p = inf the largest. On the device of the last."""
    if not parts:
        return torch.zeros(())
    device = parts[-1].device
    together = torch.stack([part.to(device, _widest(device)) for part in parts])  # also zeros of what has no gradient
    return together.amax() if p == math.inf else together.sum()


def _over(part: Tensor, groups: tuple[Group, ...], p: float) -> Tensor:
    """The same of all ranks of the groups."""
    for group in groups:
        part = part.to(group.device, _widest(group.device))
        part = commlayer.all_reduce(part, MAX if p == math.inf else SUM, group=group)
    return part


def _widest(device: torch.device) -> torch.dtype:
    """float64, so that shards add up to what a serial run has; some GPUs have none."""
    if device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64):
        return torch.float32
    return torch.float64
