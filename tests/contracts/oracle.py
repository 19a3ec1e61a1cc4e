"""What every operation must give, computed with NumPy alone.

A tensor is an array of bytes here: its shape, and one more dim of ``itemsize`` bytes per element. So movement
is exact for every dtype, NumPy's or not. Reductions decode to float64, complex128 or wrapping integers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch

with warnings.catch_warnings():  # torch says once per process that complex32 is experimental
    warnings.simplefilter("ignore")
    torch.empty(1, dtype=torch.complex32)

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
}
FLOATS = ("float16", "bfloat16", "float32", "float64")
COMPLEX = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}
FP8 = tuple(name for name in DTYPES if name.startswith("float8"))
INTEGERS = tuple(name for name in DTYPES if name.startswith(("int", "uint")))
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}
LARGEST = {
    "float16": 65504.0,
    "bfloat16": 3.3895313892515355e38,
    "float32": float(np.finfo("f4").max),
    "float64": float(np.finfo("f8").max),
}
CANONICAL_NAN = {"float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000, "float64": 0x7FF8 << 48}


def itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize


def reductions(dtype: str) -> list[str]:
    """The reduce ops with a meaning on a dtype."""
    if dtype in FP8:
        return []
    names = ["sum", "product"]
    if dtype not in COMPLEX:
        names += ["min", "max"]
    if dtype in FLOATS or dtype in COMPLEX:
        names += ["avg", "premul_sum"]
    else:
        names += ["band", "bor", "bxor"]
    return names


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, near_one: bool) -> np.ndarray:
    """Bytes of moderate floats of a dtype."""
    values = rng.uniform(0.5, 1.5, shape) if near_one else rng.normal(size=shape)
    values = values * rng.choice([-1.0, 1.0], shape)
    return encode(values, dtype)


def make(seed: tuple[int, ...], shape: tuple[int, ...], dtype: str, kind: str) -> np.ndarray:
    """Bytes of an array. ``kind``: bits (anything, many NaN payloads), values, near_one, or special (values with
    NaN, infinities, signed zeros and subnormals among them)."""
    rng = np.random.default_rng(seed)
    size = itemsize(dtype)
    if dtype == "bool":
        return rng.integers(0, 2, (*shape, 1), dtype=np.uint8)
    if kind == "bits" or dtype in INTEGERS or dtype in FP8:
        data = rng.integers(0, 256, (*shape, size), dtype=np.uint8)
        if dtype in FLOATS or dtype in COMPLEX:  # all-ones exponents are rare among random bits
            data[..., -2:] |= rng.choice(np.array([0, 0x7F], np.uint8), (*shape, 1))
        return data
    if dtype in COMPLEX:
        part = COMPLEX[dtype]
        return np.concatenate([make((*seed, k), shape, part, kind) for k in (1, 2)], axis=-1)
    data = _values(rng, shape, dtype, kind == "near_one")
    if kind == "special":
        specials = encode(np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, TINY[dtype], -TINY[dtype]]), dtype)
        payload = specials[:1].copy()
        payload[0, 0] ^= 0x2D  # another NaN, and a negative one
        payload[0, -1] ^= 0x80
        specials = np.concatenate([specials, payload])
        chosen = rng.random(shape) < 0.4
        data[chosen] = specials[rng.integers(0, len(specials), int(chosen.sum()))]
    return data


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of float64 values, rounded once."""
    values = np.asarray(values, np.float64)
    if dtype == "bfloat16":
        bits = np.asarray(values, np.float32, order="C").view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits16 = np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
        return bits16[..., None].view(np.uint8)
    plain = values.astype(np.dtype(dtype))
    return plain[..., None].view(np.uint8)


def decode(data: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes as float64, complex128, bool, or integers."""
    data = np.ascontiguousarray(data)
    if dtype in COMPLEX:
        half = data.shape[-1] // 2
        real, imag = (decode(part, COMPLEX[dtype]) for part in (data[..., :half], data[..., half:]))
        return _pair(real, imag)  # real + 1j * imag makes NaN of infinities
    if dtype == "bfloat16":
        bits = data.view(np.uint16)[..., 0].astype(np.uint32) << 16
        with np.errstate(invalid="ignore"):
            return bits.view(np.float32).astype(np.float64)
    plain = data.view(np.bool_ if dtype == "bool" else np.dtype(dtype))[..., 0]
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return plain.astype(np.float64) if dtype in FLOATS else plain


@dataclass
class Exact:
    """These bytes."""

    data: np.ndarray

    def check(self, got: np.ndarray, what: str) -> None:
        assert got.shape == self.data.shape, f"{what}: shape {got.shape}, expected {self.data.shape}"
        if not np.array_equal(got, self.data):
            place = tuple(int(i) for i in np.argwhere(got != self.data)[0][:-1])
            raise AssertionError(
                f"{what}: differs first at {place}: bytes {got[place].tolist()}, expected {self.data[place].tolist()}"
            )


@dataclass
class Near:
    """These values, parts of a complex number apart, within a tolerance; NaN and infinities in the same places."""

    values: np.ndarray
    tolerance: np.ndarray
    dtype: str

    def check(self, got: np.ndarray, what: str) -> None:
        pairs = [(decode(got, self.dtype), self.values, self.tolerance)]
        if self.dtype in COMPLEX:
            real = [np.real(part) for part in pairs[0]]
            imag = [np.imag(part) for part in pairs[0][:2]] + [np.imag(self.tolerance)]
            pairs = [tuple(real), tuple(imag)]
        for value, expected, tolerance in pairs:
            assert value.shape == expected.shape, f"{what}: shape {value.shape}, expected {expected.shape}"
            with np.errstate(all="ignore"):
                good = (
                    (value == expected) | (np.isnan(value) & np.isnan(expected)) | (abs(value - expected) <= tolerance)
                )
            if not good.all():
                place = tuple(int(i) for i in np.argwhere(~good)[0])
                raise AssertionError(
                    f"{what}: {self.dtype} differs first at {place}: {value[place]!r}, expected {expected[place]!r} "
                    f"within {tolerance[place]!r}"
                )


def reduced(rows: list[np.ndarray], op: str, dtype: str, factors: list[float] | None = None) -> Exact | Near:
    """The reduction of the rows' bytes."""
    if dtype == "bool":
        table = np.stack(rows).astype(bool)
        result = {
            **dict.fromkeys(("sum", "max", "bor"), table.any(0)),
            **dict.fromkeys(("product", "min", "band"), table.all(0)),
            "bxor": table.sum(0) % 2 == 1,
        }[op]
        return Exact(result.astype(np.uint8))
    if dtype in INTEGERS:
        table = np.stack([decode(row, dtype) for row in rows])
        function = {
            "sum": np.add, "product": np.multiply, "min": np.minimum, "max": np.maximum,
            "band": np.bitwise_and, "bor": np.bitwise_or, "bxor": np.bitwise_xor,
        }[op]  # fmt: skip
        result = function.reduce(table, axis=0, dtype=table.dtype)
        return Exact(np.asarray(result, order="C")[..., None].view(np.uint8))
    if op in ("min", "max"):
        return Exact(_extreme(np.stack(rows), op, dtype))
    if dtype in COMPLEX and op != "product":
        half = itemsize(dtype) // 2
        parts = [reduced([row[..., at : at + half] for row in rows], op, COMPLEX[dtype], factors) for at in (0, half)]
        real, imag = (part for part in parts if isinstance(part, Near))
        return Near(_pair(real.values, imag.values), _pair(real.tolerance, imag.tolerance), dtype)
    return _near([decode(row, dtype) for row in rows], op, dtype, factors)


def _pair(real: np.ndarray, imag: np.ndarray) -> np.ndarray:
    result = np.empty(real.shape, np.complex128)
    result.real, result.imag = real, imag
    return result


def _near(rows: list[np.ndarray], op: str, dtype: str, factors: list[float] | None) -> Near:
    size, part = len(rows), COMPLEX.get(dtype, dtype)
    if factors is not None:
        rows = [factor * row for factor, row in zip(factors, rows, strict=True)]
    table = np.stack(rows)
    with np.errstate(all="ignore"):
        if op == "product":
            values = np.multiply.reduce(table, axis=0)
            magnitude = np.multiply.reduce(abs(table), axis=0)
            tolerance = 4 * size * EPS[part] * magnitude
        else:
            values = table.sum(0)
            magnitude = abs(table).sum(0)
            tolerance = (size + 2) * EPS[part] * magnitude + (size + 1) * TINY[part]
            if op == "avg":
                values = values / size
                # Halves are rounded once; a wider type is summed in itself.
                tolerance = EPS[part] * magnitude / size + TINY[part] if itemsize(part) == 2 else tolerance / size
                tolerance = tolerance + TINY[part]
    tolerance = np.where(np.isfinite(tolerance), tolerance, 0.0)
    if np.iscomplexobj(values):
        tolerance = _pair(tolerance, tolerance)
    return Near(values, tolerance, dtype)


def _extreme(table: np.ndarray, op: str, dtype: str) -> np.ndarray:
    """IEEE 754-2019 minimum and maximum: a canonical quiet NaN if there is any NaN; -0 is less than +0."""
    values = decode(table, dtype)
    negative = np.signbit(values)
    best = np.where(
        np.isnan(values).any(0), np.nan, np.minimum.reduce(values) if op == "min" else np.maximum.reduce(values)
    )
    candidates = values == best
    preferred = candidates & (negative if op == "min" else ~negative)
    chosen = np.where(preferred.any(0), preferred.argmax(0), candidates.argmax(0))
    result = np.take_along_axis(table, chosen[None, ..., None], axis=0)[0].copy()
    size = itemsize(dtype)
    result[np.isnan(best)] = np.frombuffer(CANONICAL_NAN[dtype].to_bytes(size, "little"), np.uint8)
    return result


def part(data: np.ndarray, dim: int, sizes: list[int], index: int) -> np.ndarray:
    """The ``index``-th of the parts along ``dim``."""
    begin = sum(sizes[:index])
    return np.take(data, np.arange(begin, begin + sizes[index]), axis=dim)
