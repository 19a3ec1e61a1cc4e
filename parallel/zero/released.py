"""Parameters whose values are not here: they have a shape and all that, but whoever computes with one hears of it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# What needs no values: functions, and the getters and setters of attributes.
_METHODS = """
    size dim numel nelement stride storage_offset element_size get_device is_floating_point is_complex is_contiguous
    requires_grad_ register_hook register_post_accumulate_grad_hook data_ptr untyped_storage __len__ __hash__
"""
_ATTRIBUTES = """
    shape dtype device layout ndim nbytes itemsize requires_grad grad is_leaf grad_fn _version is_meta is_cpu is_cuda
    is_xpu is_sparse is_quantized is_nested names _backward_hooks _post_accumulate_grad_hooks grad_dtype output_nr
"""
_HARMLESS: set[Any] = {torch.is_floating_point, torch.is_complex, torch.numel}
_HARMLESS |= {getattr(Tensor, name) for name in _METHODS.split()}
for _name in _ATTRIBUTES.split():
    if (_attribute := getattr(Tensor, _name, None)) is not None:
        _HARMLESS |= {_attribute.__get__, getattr(_attribute, "__set__", None)}


class Released(nn.Parameter):
    """What the class of a parameter is meanwhile. Its elements are NaN, for those that ask past ``torch``."""

    _bring: Callable[[Released, Any], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HARMLESS:
            return super().__torch_function__(func, types, args, kwargs or {})
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Released):
                leaf._bring(leaf, func)
        return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self._bring(self, deepcopy)
        return super().__deepcopy__(memo)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Released(shape={list(self.shape)}, dtype={self.dtype})"


def release(param: nn.Parameter, dtype: torch.dtype, device: torch.device, bring: Callable[..., Any]) -> None:
    """Take the values away. ``bring(param, function)`` has to hand them out, or raise, when something needs them."""
    shape = param.shape
    if not isinstance(param, Released):
        param._usual_class = type(param)  # type: ignore[attr-defined]
    _become(param, param._usual_class)  # type: ignore[attr-defined]
    nothing = float("nan") if dtype.is_floating_point else 0
    param.data = torch.full((), nothing, dtype=dtype, device=device).expand(shape)
    param._bring = bring  # type: ignore[attr-defined]
    _become(param, Released)


def hand_out(param: nn.Parameter, values: Tensor) -> None:
    """Give it values again."""
    if isinstance(param, Released):
        _become(param, param._usual_class)  # type: ignore[attr-defined]
    param.data = values


def _become(param: nn.Parameter, kind: type) -> None:
    param.__class__ = kind
