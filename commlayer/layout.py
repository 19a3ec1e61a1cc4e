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
    return line(x.contiguous())


def side_by_side(x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor | None:
    """The quick way to a destination for values of the same shape, where ``x`` and ``out`` lie in a row.

    That is a new tensor or ``out`` itself, either the same memory as ``x`` or apart from it; else None.
    """
    if x.dim() != 1 or x.numel() < 2 or not x.is_contiguous() or x.is_neg() or x.is_conj():  # a single one: any stride
        return None
    if out is None:
        return torch.empty_like(x)
    if out is not x:
        if not out.is_contiguous() or out.is_neg() or out.is_conj():
            return None
        ours, theirs, size = x.data_ptr(), out.data_ptr(), x.nbytes
        if not (ours == theirs or ours + size <= theirs or theirs + size <= ours):
            return None
    return out


def destination(
    shape: Sequence[int], x: torch.Tensor, out: torch.Tensor | None = None, dim: int = 0, aliases: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Finish]:
    """Where a result goes: the tensor itself, a flat buffer to fill, and what is left to do afterwards.

    The buffer is the result's own memory where that lies right and, unless the operation can work in
    place (``aliases``), is not the input's as well.
    """
    if out is None:
        result = x.new_empty(shape)
        if dim == 0:
            return result, line(result), None
        lies_right = all(extent == 1 for extent in result.shape[:dim])
    else:
        result = out
        lies_right = out.is_contiguous() and (dim == 0 or all(extent == 1 for extent in out.shape[:dim]))
        shown_as_is = not (out.is_conj() or out.is_neg())
        apart = not _overlap(out, x) or (aliases and _same_place(out, x))
        lies_right = lies_right and shown_as_is and apart
    if lies_right:
        return result, line(result), None
    moved = (*shape[dim : dim + 1], *shape[:dim], *shape[dim + 1 :])
    buffer = x.new_empty(moved)

    def finish() -> None:
        if buffer.device.type not in (
            "cpu",
            "meta",
        ):  # whoever waits may be on another stream than the one it was allocated on
            buffer.record_stream(torch.accelerator.current_stream(buffer.device))
        result.copy_(buffer.movedim(0, dim) if dim else buffer)

    return result, line(buffer), finish


def is_part(x: torch.Tensor, out: torch.Tensor, rank: int) -> bool:
    """Whether ``x`` is the very memory of this rank's part, of equal ones along the slowest dim."""
    return (
        x.data_ptr() == out.data_ptr() + rank * x.nbytes
        and x.nbytes > 0
        and x.shape[1:] == out.shape[1:]
        and x.is_contiguous()
        and out.is_contiguous()
        and not (x.is_conj() or x.is_neg() or out.is_conj() or out.is_neg())
    )


def line(x: torch.Tensor) -> torch.Tensor:
    """The elements of a contiguous tensor in a row."""
    flat = x if x.dim() == 1 else x.view(-1)
    # A single element counts as contiguous whatever its stride, which reading it as another dtype would not.
    return flat if flat.stride(0) == 1 else flat.as_strided((flat.numel(),), (1,))


def _same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors may share memory: whether the stretches of it that they span meet."""
    a_low, b_low = a.data_ptr(), b.data_ptr()
    return bool(a_low and b_low) and a_low < b_low + _reach(b) and b_low < a_low + _reach(a)


def _reach(x: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if x.is_contiguous():
        return x.nbytes
    reach = sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride(), strict=True))
    return (reach + 1) * x.element_size() if x.numel() else 0
