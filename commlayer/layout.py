"""Between tensors of any layout and the flat ones that backends and fallbacks work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Finish = Callable[[], object] | None


def flat(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The values of ``x`` in a row, ``dim`` slowest: a view where ``x`` lies so already, else a copy."""
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    if dim:
        x = x.movedim(dim, 0)
    return x.contiguous().view(-1)


def destination(
    shape: Sequence[int], x: torch.Tensor, out: torch.Tensor | None = None, dim: int = 0, aliases: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Finish]:
    """Where a result goes: the tensor itself, a flat buffer to fill, and what is left to do afterwards.

    The buffer is the result's own memory where that lies right and, unless the operation can work in
    place (``aliases``), is not the input's as well.
    """
    result = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    lies_right = result.is_contiguous() and all(extent == 1 for extent in result.shape[:dim])
    if out is not None and lies_right:
        shown_as_is = not (out.is_conj() or out.is_neg())
        lies_right = shown_as_is and (not _overlap(out, x) or (aliases and _same_place(out, x)))
    if lies_right:
        return result, result.view(-1), None
    moved = (*shape[dim : dim + 1], *shape[:dim], *shape[dim + 1 :])
    buffer = torch.empty(moved, dtype=x.dtype, device=x.device)
    return result, buffer.view(-1), lambda: result.copy_(buffer.movedim(0, dim) if dim else buffer)


def _same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors may share memory."""
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    (a_low, a_high), (b_low, b_high) = _span(a), _span(b)
    return a_low < b_high and b_low < a_high


def _span(x: torch.Tensor) -> tuple[int, int]:
    reach = sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()
