"""The compiled loops of kernel.c, where there is a C compiler; else None, and torch's operations do it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("kernel.c")
# Bit for bit what combine() of commlayer.arithmetic computes: so nothing that reorders or fuses floating point.
FLAGS = ("-std=c11", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
COMPILING = 60.0  # seconds

# (reduce op, dtype) -> the place in add_up's table. Signed or not, wrapping sums are the same bits.
KINDS = {
    ("sum", torch.float32): 0,
    ("avg", torch.float32): 1,
    ("sum", torch.float64): 2,
    ("avg", torch.float64): 3,
    ("sum", torch.bfloat16): 4,
    ("avg", torch.bfloat16): 5,
    ("sum", torch.float16): 6,
    ("avg", torch.float16): 7,
    ("sum", torch.int8): 8,
    ("sum", torch.uint8): 8,
    ("sum", torch.int16): 9,
    ("sum", torch.uint16): 9,
    ("sum", torch.int32): 10,
    ("sum", torch.uint32): 10,
    ("sum", torch.int64): 11,
    ("sum", torch.uint64): 11,
}


@cache
def load() -> Any | None:
    """The library, built if it was not yet for this processor; None where that is not possible."""
    try:
        library = ctypes.CDLL(str(_built(shlex.split(os.environ.get("CC") or "cc"))))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    library.meet.argtypes = (ctypes.c_void_p, *(ctypes.c_int,) * 2, ctypes.c_uint32, *(ctypes.c_int64,) * 2)
    library.add_up.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int) * 2,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_double,
    )
    library.add_up.restype = None
    library.copy_past.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    library.copy_past.restype = None
    return library


def kind(library: Any | None, op: str, dtype: torch.dtype) -> int | None:
    """How ``add_up`` calls this reduction; None where it has none."""
    if library is None:
        return None
    if dtype == torch.float16 and not ctypes.c_int.in_dll(library, "has_float16").value:
        return None
    return KINDS.get((op, dtype))


def _built(compiler: list[str]) -> Path:
    """The library, under a name of all that it depends on: beside this package's bytecode, else in the user's cache."""
    source = SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join([source, repr((compiler, FLAGS)).encode(), _processor()])).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "commlayer"
    folders = SOURCE.parent / "__pycache__", cache
    for folder in folders:
        path = folder / f"kernel-{key}.so"
        if path.exists() and _is_own(path):
            return path
    folder = folders[0] if os.access(folders[0], os.W_OK) else cache
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernel-{key}.so"
    handle, draft = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        subprocess.run(
            [*compiler, *FLAGS, str(SOURCE), "-o", draft, "-lm"],
            check=True,
            capture_output=True,
            timeout=COMPILING,
            stdin=subprocess.DEVNULL,
        )
        ctypes.CDLL(draft)  # what cannot be loaded is not kept
        os.chmod(draft, 0o755)  # for all who use this installation
        os.replace(draft, path)  # at once: other ranks may be looking
    finally:
        with suppress(FileNotFoundError):
            os.unlink(draft)
    return path


def _is_own(path: Path) -> bool:
    """A library that somebody else may write is not run."""
    info = path.stat()
    return info.st_uid in (os.getuid(), 0) and not info.st_mode & 0o022


def _processor() -> bytes:
    """What -march=native depends on: home folders are shared between machines."""
    with suppress(OSError), open("/proc/cpuinfo", "rb") as info:
        for line in info:
            if line.startswith((b"flags", b"Features")):
                return line
    return platform.machine().encode()
