"""Checks of arguments, before anything is communicated: ValueError and TypeError that name the argument."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from commlayer.backends.base import INTERNAL_TAG
from commlayer.capability import NAME_OF
from commlayer.group import Group
from commlayer.reduce_op import ReduceOp, meaningless

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def check_tensor(x: torch.Tensor, group: Group, name: str = "x") -> None:
    """A dense tensor of a dtype the layer knows, on the group's device."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if group.rank < 0:
        raise ValueError(f"group: this process is not a member of the group of ranks {list(group.ranks)}")
    if type(x) not in PLAIN and (is_traceable_wrapper_subclass(x) or isinstance(x, FakeTensor)):
        raise TypeError(f"{name}: a {type(x).__name__} has no memory of its own; give its local part, x.to_local()")
    if x.is_nested:
        raise TypeError(f"{name}: a nested tensor has no one shape; give its parts, x.unbind()")
    if x.dtype not in NAME_OF:
        raise TypeError(f"{name}: dtype {x.dtype} cannot be communicated; convert it to a plain dtype first")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {x.layout}; use x.to_dense()")
    if x.device != group.device and group.backend != "single":  # one rank alone only copies
        raise ValueError(f"{name}: is on {x.device}, but backend {group.backend} works on {group.device}")


def check_timeout(timeout: float | None) -> float | None:
    """Seconds, or None for the group's."""
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0):
        raise ValueError(f"timeout: expected a positive number of seconds, got {timeout!r}")
    return timeout


def budget(timeout: float | None) -> Callable[[], float | None]:
    """What is left of a timeout, for the parts of a call that has several."""
    end = None if check_timeout(timeout) is None else time.monotonic() + (timeout or 0.0)
    return lambda: None if end is None else max(end - time.monotonic(), 1e-3)


def check_reduce(op: ReduceOp, dtype: torch.dtype) -> None:
    why = meaningless(op.name, dtype)
    if why is not None:
        raise TypeError(f"op: {op} of {dtype} has no meaning: {why}")


def as_int(value: int, name: str, what: str = "an int") -> int:
    """An int, or what counts as one (NumPy's); bool does not."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected {what}, got {value!r}")
    return operator.index(value)


def check_rank(rank: int, group: Group, name: str) -> int:
    rank = as_int(rank, name, "a rank (int)")
    if not 0 <= rank < group.size:
        raise ValueError(f"{name}: expected a rank from 0 to {group.size - 1} of the group, got {rank}")
    return rank


def check_tag(tag: int) -> int:
    tag = as_int(tag, "tag")
    if not 0 <= tag < INTERNAL_TAG:
        raise ValueError(f"tag: expected 0 to {INTERNAL_TAG - 1} (what MPI guarantees), got {tag}")
    return tag


def check_dim(dim: int, x: torch.Tensor) -> int:
    """A non-negative dim; a 0-dim tensor counts as one of one element."""
    dim = as_int(dim, "dim")
    ndim = max(x.dim(), 1)
    if not -ndim <= dim < ndim:
        raise ValueError(f"dim: expected {-ndim} to {ndim - 1} for shape {tuple(x.shape)}, got {dim}")
    return dim % ndim


def check_sizes(sizes: Sequence[int] | None, group: Group, name: str = "sizes") -> list[int] | None:
    """One extent per rank, or None for equal ones."""
    if sizes is None:
        return None
    if isinstance(sizes, (torch.Tensor, np.ndarray)):
        sizes = sizes.tolist()
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence):
        raise TypeError(f"{name}: expected a sequence of {group.size} ints, got {sizes!r}")
    if not all(hasattr(size, "__index__") and not isinstance(size, bool) for size in sizes):
        raise TypeError(f"{name}: expected ints, got {list(sizes)}")
    sizes = [operator.index(size) for size in sizes]
    if len(sizes) != group.size:
        raise ValueError(f"{name}: expected one per rank, {group.size}, got {len(sizes)}: {list(sizes)}")
    if min(sizes) < 0:
        raise ValueError(f"{name}: must not be negative, got {list(sizes)}")
    return sizes


def check_divides(x: torch.Tensor, dim: int, group: Group, remedy: str) -> int:
    """Each rank's extent where all are equal."""
    if x.shape[dim] % group.size:
        raise ValueError(
            f"x: dim {dim} of shape {tuple(x.shape)} does not divide into {group.size} equal parts; {remedy}"
        )
    return x.shape[dim] // group.size


def check_extent(name: str, sizes: Sequence[int], got: int, dim: int, x: torch.Tensor) -> None:
    """The sizes add up to, or name, the extent that is there."""
    if sum(sizes) != got:
        raise ValueError(
            f"{name}: {list(sizes)} add up to {sum(sizes)}, but dim {dim} of x has {got} (shape {tuple(x.shape)})"
        )


def check_splittable(x: torch.Tensor) -> None:
    if x.dim() == 0:
        raise ValueError("x: a 0-dim tensor cannot be split over ranks; give it a dim, x.reshape(1)")


def check_out(out: torch.Tensor, shape: Sequence[int], like: torch.Tensor, group: Group, name: str = "out") -> None:
    """A destination that fits: right shape and dtype, no two elements in one place, outside autograd."""
    if out is like and not out.requires_grad and out.is_contiguous() and out.shape == shape:
        return  # it was checked
    check_tensor(out, group, name)
    if out.shape != shape and tuple(out.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(out.shape)}")
    if out.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype}, got {out.dtype}")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad, but what is written into it has no gradient; detach it")
    if out.is_contiguous() or not out.numel():
        return
    reach = 1  # elements that the dims so far, from the closest, can touch
    for stride, extent in sorted(zip(out.stride(), out.shape, strict=True)):
        if extent > 1 and stride < reach:
            raise ValueError(
                f"{name}: elements share memory (shape {tuple(out.shape)}, strides {out.stride()}), as in an expanded "
                "tensor; give a destination of its own"
            )
        reach += (extent - 1) * stride
