"""For autograd Functions whose gradient has none of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from commlayer import UnsupportedOperation

Result = TypeVar("Result")


def first_derivative(backward: Callable[..., Result]) -> Callable[..., Result]:
    """Of ``backward``: refuse create_graph=True, under which second derivatives would lack terms in silence.

    torch's own once_differentiable complains only if the result is itself differentiated down to where it was lost.
    """

    def checked(ctx: Any, *grads: Any) -> Result:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            name = type(ctx).__name__.removesuffix("Backward").strip("_")
            raise UnsupportedOperation(f"{name} has no second derivative, and create_graph=True asks for one")
        return backward(ctx, *grads)

    return checked
