"""The user's optimiser on pieces of parameters, in place of the parameters themselves."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SHAPE = (6, 5)  # of the parameter that an optimiser is tried with,
CUT = 11  # and where that is cut
STEPS = 3


def adopt(optimizer: Optimizer, pieces: Mapping[Any, nn.Parameter], cut: Callable[..., Tensor]) -> None:
    """Put pieces in the place of parameters, in the groups and in the state that is there already.

    Args:
        pieces: by the parameters that they are of.
        cut: ``cut(parameter, tensor of its shape)`` is the piece of that.

    Raises:
        ValueError: for a parameter that is not in ``pieces``, and for an optimiser that is not element-wise.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in pieces:
                what = "frozen" if not p.requires_grad else "not of this module"
                raise ValueError(f"optimizer: a parameter of shape {list(p.shape)} is {what}")
    check_elementwise(optimizer)
    for group in optimizer.param_groups:
        group["params"] = [pieces[p] for p in group["params"]]
    old, new = dict(optimizer.state), {}
    for key, state in old.items():
        if key not in pieces:
            new[key] = state
            continue
        new[pieces[key]] = {
            # Of a parameter without dims the shape does not tell what is kept of its element from a count of steps.
            name: cut(key, value)
            if isinstance(value, Tensor) and value.shape == key.shape and (value.ndim or name != "step")
            else value
            for name, value in state.items()
        }
    optimizer.state.clear()
    optimizer.state.update(new)


def check_elementwise(optimizer: Optimizer) -> None:
    """Try it: does a parameter in pieces, as vectors, go the same way as in one?

    Raises ValueError where it does not: for those that look at rows and columns (Adafactor, Muon, Shampoo), at norms
    (LARS, LAMB), or at the loss (L-BFGS).
    """
    name = type(optimizer).__name__
    problem = None
    for i, group in enumerate(optimizer.param_groups):
        like = next((p for p in group["params"] if p.ndim and p.numel()), None)
        if like is None:
            continue
        draw = torch.Generator().manual_seed(0)
        start, *gradients = (torch.randn(SHAPE, generator=draw, dtype=torch.float64) for _ in range(STEPS + 1))
        dtype = torch.promote_types(like.dtype, torch.float32)
        device = torch.device("cpu") if like.is_meta else like.device
        whole = [nn.Parameter(start.to(device, dtype))]
        flat = start.flatten().to(device, dtype)
        parts = [nn.Parameter(flat[:CUT].clone()), nn.Parameter(flat[CUT:].clone())]
        try:
            # Each piece by an optimiser of its own, as on ranks, so that what it sums over all is seen, too.
            for p, elements in zip((*whole, *parts), (slice(None), slice(None, CUT), slice(CUT, None)), strict=True):
                trial = _alike(optimizer, i, like, [p])
                for gradient in gradients:
                    p.grad = gradient.flatten()[elements].to(device, dtype).view(p.shape)
                    trial.step()
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            problem = str(error).splitlines()[0]
            break
        if not torch.allclose(
            torch.cat([p.detach() for p in parts]), whole[0].detach().flatten(), rtol=1e-4, atol=1e-6
        ):
            problem = "a parameter in pieces goes another way than in one"
            break
    if problem is not None:
        raise ValueError(f"optimizer: {name} is not element-wise, so it cannot step pieces of parameters ({problem})")


def limited(optimizer: Optimizer, params: Sequence[Any]) -> Optimizer:
    """The same optimiser for these of its parameters alone: same options, same state, without its hooks."""
    mine = {id(p) for p in params}
    groups = [{**group, "params": [p for p in group["params"] if id(p) in mine]} for group in optimizer.param_groups]
    return _with(optimizer, groups, optimizer.state)


def _alike(optimizer: Optimizer, group: int, like: nn.Parameter, params: Sequence[nn.Parameter]) -> Optimizer:
    """An optimiser with the options of a group, for other parameters than ``like``, which is of that."""
    options = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in optimizer.param_groups[group].items()
        if key != "params"
    }
    state: dict[Any, Any] = defaultdict(dict)
    for p in params:  # some, as Adagrad, begin with a state
        for name, value in optimizer.state.get(like, {}).items():
            if isinstance(value, Tensor) and value.shape == like.shape:
                state[p][name] = torch.full_like(p, value.flatten()[0].item())
            else:
                state[p][name] = value.clone() if isinstance(value, Tensor) else value
    return _with(optimizer, [{**options, "params": list(params)}], state)


def _with(optimizer: Optimizer, groups: list[dict[str, Any]], state: Any) -> Optimizer:
    made: Optimizer = object.__new__(type(optimizer))
    made.__dict__.update(optimizer.__dict__)
    made.__dict__.pop("step", None)  # a scheduler counts them by a method of the instance
    made._optimizer_step_pre_hooks, made._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    made.param_groups, made.state = groups, state
    return made
