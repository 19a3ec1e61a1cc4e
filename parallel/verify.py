"""Are the gradients of a parallel model those of the serial one? What is off is named, with the cause if it shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import commlayer
from commlayer import Group, Mesh
from parallel.data import DataParallel
from parallel.placement import full_shape, gather_full, placement

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # relative; 2e-2 for half types


def verify_gradients(
    model: nn.Module,
    serial: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    serial_loss: Callable[[nn.Module], Tensor],
    *,
    mesh: Mesh | None = None,
    rtol: float | None = None,
) -> dict[str, float]:
    """Run one backward of both models and compare the gradient of every parameter, put together from its shards.

    ``serial`` has the same parameter names as ``model``, whole; it gets the values of ``model`` first. Call it on all
    ranks; use float64 and turn dropout off. Returns the relative error per parameter: the largest difference over the
    largest entry of the serial gradient (or, for gradients that are zero but for rounding, over 1e-6 of the largest
    entry of all).

    Args:
        model: parallel, usually in ``DataParallel``; its ``grad`` are replaced.
        loss: what this rank calls ``backward()`` on, from its share of the data, as in training.
        serial_loss: the same from all the data, on one process.
        mesh: that of the model, by default that of its DataParallel: to tell which axis was forgotten.
        rtol: the largest relative error that passes; by default 1e-10 in float64, 1e-4 in float32, else 2e-2.

    Raises:
        AssertionError: on all ranks, naming each parameter whose gradient is off on any, and why as far as can be told.
        ValueError: when the parameters of the two do not correspond.
    """
    wrapped = isinstance(model, DataParallel)
    inner: nn.Module = model.module if wrapped else model  # type: ignore[assignment]
    mesh = model.mesh if mesh is None and isinstance(model, DataParallel) else mesh
    group = commlayer.world() if mesh is None else mesh["-".join(mesh.axes)]
    params, references = dict(inner.named_parameters()), dict(serial.named_parameters())
    _copy_values(inner, serial)
    model.zero_grad()
    serial.zero_grad()
    loss(model).backward()
    serial_loss(serial).backward()

    used = set().union(*commlayer.all_gather_object({n for n, p in params.items() if p.grad is not None}, group=group))
    wholes: dict[str, Tensor | None] = {}
    for name, p in params.items():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        wholes[name] = gather_full(grad, p) if name in used else None
    largest = max((g.abs().max().item() for p in references.values() if (g := p.grad) is not None), default=0.0)
    errors = {name: _error(wholes[name], p.grad, largest) for name, p in references.items()}
    limits = {name: rtol or TOLERANCE.get(p.dtype, 2e-2) for name, p in params.items()}
    mine = {name: error for name, error in errors.items() if not error <= limits[name]}  # NaN is off too
    everyone: list[dict[str, float]] = commlayer.all_gather_object(mine, group=group)
    wrong = [name for name in errors if any(name in theirs for theirs in everyone)]
    if not wrong:
        return errors
    lines = []
    for name in wrong:
        ranks = [rank for rank, theirs in enumerate(everyone) if name in theirs]
        worst = max(theirs.get(name, 0.0) for theirs in everyone)
        cause = _cause(params[name], wholes[name], references[name].grad, mesh, largest, limits[name], group)
        lines.append(f"{name}: off by {worst:.1e} of its size on ranks {ranks}{cause}")
    raise AssertionError(f"{len(wrong)} of {len(errors)} gradients differ from the serial ones:\n" + "\n".join(lines))


@torch.no_grad()
def _copy_values(inner: nn.Module, serial: nn.Module) -> None:
    """Give ``serial`` the parameters and buffers of the parallel model."""
    params, references = dict(inner.named_parameters()), dict(serial.named_parameters())
    if odd := sorted(params.keys() ^ references.keys()):
        raise ValueError(f"serial: only one of the two models has the parameters {', '.join(odd)}")
    for name, p in params.items():
        if full_shape(p) != list(references[name].shape):
            raise ValueError(f"serial: {name} is {list(references[name].shape)}, but the model's is {full_shape(p)}")
        references[name].copy_(gather_full(p, p))
    buffers = dict(serial.named_buffers())
    for name, b in inner.named_buffers():
        if name in buffers and buffers[name].shape == b.shape:
            buffers[name].copy_(b)


def _error(grad: Tensor | None, reference: Tensor | None, largest: float) -> float:
    if grad is None or reference is None:
        return 0.0 if grad is reference else float("inf")
    if not grad.numel():
        return 0.0
    size = max(reference.abs().max().item(), 1e-6 * largest)
    return (grad.to(reference) - reference).abs().max().item() / size if size else 0.0


def _cause(
    param: nn.Parameter,
    grad: Tensor | None,
    reference: Tensor | None,
    mesh: Mesh | None,
    largest: float,
    limit: float,
    group: Group,
) -> str:
    """What would make it right; the same collectives on all ranks."""

    def fits(candidate: Tensor) -> bool:
        return all(commlayer.all_gather_object(_error(candidate, reference, largest) <= limit, group=group))

    if grad is None or reference is None:
        return ": only one of the two models has a gradient"
    cut: set[Any] = {shard.axis for shard in placement(param).shards if shard.group.size > 1}
    for axis in mesh.axes if mesh is not None else ():
        assert mesh is not None
        if axis in cut or mesh.size(axis) == 1:
            continue
        for factor, what in ((mesh.size(axis), "too small by"), (1 / mesh.size(axis), "too large by")):
            if fits(grad * factor):
                return f": {what} the size of {axis}, {mesh.size(axis)}"
        if axis != "dp" and fits(commlayer.all_reduce(grad, group=mesh[axis])):
            return f": a partial sum over {axis}; mark_replicated(…, axes=({axis!r},)) would add it up"
    return ""
