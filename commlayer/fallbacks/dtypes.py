"""Dtypes a backend does not take, as others that it does: the same bits read differently, or converted."""

from __future__ import annotations

from typing import Any

import torch

from commlayer.arithmetic import HALF, SIGNED_OF_WIDTH, UNSIGNED
from commlayer.backends.base import Collectives
from commlayer.capability import MOVING, REDUCING, Request
from commlayer.fallbacks.registry import Needs, Use, fallback
from commlayer.reduce_op import BITWISE, BXOR, MAX, MIN, ORDERED, SUM
from commlayer.work import Work

REAL_OF = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}

# bool as 0 and 1 in uint8: OR is the larger, AND the smaller.
BOOL_AS = {
    **dict.fromkeys(("sum", "max", "bor"), MAX),
    **dict.fromkeys(("product", "min", "band"), MIN),
    "bxor": BXOR,
}


def _reread(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The same arguments with every tensor read as ``dtype``, and element counts to fit."""
    factor = 1.0
    for arg in args:
        if isinstance(arg, torch.Tensor):
            factor = arg.element_size() / dtype.itemsize
            break

    def reread(arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            return arg.view(dtype)
        return [int(count * factor) for count in arg] if isinstance(arg, (list, tuple)) else arg

    return tuple(map(reread, args))


def _carrier(dtype: torch.dtype) -> torch.dtype:
    """The integer that carries another dtype's bits: of its width, or of 8 bytes where it is wider."""
    if dtype.itemsize == 1:
        return torch.uint8  # the one byte type that every library has
    return SIGNED_OF_WIDTH.get(dtype.itemsize, torch.int64)


def _as_integers(request: Request, size: int) -> list[Use] | None:
    carrier = _carrier(request.dtype)
    return None if carrier == request.dtype else [Use(request._replace(dtype=carrier))]


# The little cost breaks ties: wide integers are moved, and summed, faster than as many bytes.
@fallback(*MOVING, needs=_as_integers, passes=0.001, reinterprets=True)
def same_bits_as_integers(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
    """The same bits, moved as integers of the same width."""
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    return getattr(g, op)(*_reread(args, _carrier(tensor.dtype)))


def _as_bytes(request: Request, size: int) -> list[Use] | None:
    return None if request.dtype.itemsize == 1 else [Use(request._replace(dtype=torch.uint8))]


@fallback(*MOVING, needs=_as_bytes, passes=0.01, reinterprets=True)
def same_bits_as_bytes(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
    """The same bits, moved as bytes."""
    return getattr(g, op)(*_reread(args, torch.uint8))


def _bool(request: Request, size: int) -> list[Use] | None:
    if request.dtype != torch.bool or request.reduce not in BOOL_AS:
        return None
    return [Use(request._replace(dtype=torch.uint8, reduce=BOOL_AS[request.reduce].name))]


@fallback(*REDUCING, needs=_bool, reinterprets=True)
def bool_as_uint8(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
    """bool read as 0 and 1: OR is MAX, AND is MIN."""
    out, x, reduce_op, *rest = _reread(args, torch.uint8)
    return getattr(g, op)(out, x, BOOL_AS[reduce_op.name], *rest)


def _real(request: Request, size: int) -> list[Use] | None:
    if request.dtype not in REAL_OF or request.reduce not in ("sum", "avg", "premul_sum"):
        return None
    return [Use(request._replace(dtype=REAL_OF[request.dtype]))]


@fallback(*REDUCING, needs=_real, reinterprets=True)
def complex_as_real_pairs(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
    """Real and imaginary parts side by side: what is linear acts on each alone."""
    return getattr(g, op)(*_reread(args, REAL_OF[args[1].dtype]))


def _two_complement(request: Request, size: int) -> list[Use] | None:
    if request.dtype not in UNSIGNED or request.reduce in ORDERED:
        return None
    return [Use(request._replace(dtype=UNSIGNED[request.dtype]))]


@fallback(*REDUCING, needs=_two_complement, reinterprets=True)
def unsigned_as_signed(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
    """Two's complement: sums, products and bits of unsigned integers are those of signed ones."""
    return getattr(g, op)(*_reread(args, UNSIGNED[args[1].dtype]))


def _biased(request: Request, size: int) -> list[Use] | None:
    if request.dtype not in UNSIGNED or request.reduce not in ORDERED:
        return None
    return [Use(request._replace(dtype=UNSIGNED[request.dtype]))]


@fallback(*REDUCING, needs=_biased, passes=2)
def unsigned_with_sign_flipped(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
    """MIN and MAX of unsigned integers as signed ones, the top bit flipped."""
    out, x, *rest = args
    signed = UNSIGNED[x.dtype]
    flip = torch.iinfo(signed).min
    result = None if out is None else out.view(signed)
    work = getattr(g, op)(result, x.view(signed) ^ flip, *rest)
    return work if result is None else work.then(lambda: result.bitwise_xor_(flip))


def _wider(wide_of: dict[torch.dtype, torch.dtype], excluded: frozenset[str] = frozenset()) -> Needs:
    def needs(request: Request, size: int) -> list[Use] | None:
        if request.dtype not in wide_of or request.reduce in excluded:
            return None
        wide = wide_of[request.dtype]
        return [Use(request._replace(dtype=wide), 1, wide.itemsize / request.dtype.itemsize)]

    return needs


FLOAT_OF_HALF = dict.fromkeys(HALF, torch.float32)
# Not MIN and MAX: those round nothing, and go through integers of the same width.
WIDER_INTEGER = {
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.uint8: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
}


@fallback(*REDUCING, needs=_wider(FLOAT_OF_HALF, ORDERED | BITWISE | {"avg"}), passes=3)
def half_accumulated_in_float32(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
    """Halves reduced in float32 and rounded once, so that nothing overflows on the way."""
    return _widened(g, op, args, torch.float32)


def _half_mean(request: Request, size: int) -> list[Use] | None:
    if request.dtype not in HALF or request.reduce != "avg":
        return None
    wide = torch.float32
    return [Use(request._replace(dtype=wide, reduce="sum"), 1, wide.itemsize / request.dtype.itemsize)]


@fallback(*REDUCING, needs=_half_mean, passes=4)
def mean_of_halves_in_float32(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
    """Halves divided in float32, summed there, and rounded once: nothing overflows and nothing vanishes."""
    out, x, _, *rest = args
    return _widened(g, op, (out, x.to(torch.float32).div_(g.size), SUM, *rest), torch.float32)


@fallback(*REDUCING, needs=_wider(WIDER_INTEGER), passes=3)
def small_integers_widened(g: Collectives, op: str, args: tuple[Any, ...]) -> Work:
    """Small integers in wider ones, then cut off: the low bits of sums and products are the same."""
    return _widened(g, op, args, WIDER_INTEGER[args[1].dtype])


def _widened(g: Collectives, op: str, args: tuple[Any, ...], wide: torch.dtype) -> Work:
    out, x, *rest = args
    result = None if out is None else out.new_empty(out.numel(), dtype=wide)
    work = getattr(g, op)(result, x.to(wide), *rest)
    return work if out is None or result is None else work.then(lambda: out.copy_(result))
