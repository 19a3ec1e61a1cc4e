"""Memory that several processes map, without a name in the file system.

It is a file of the kernel's (memfd_create): other processes open it through /proc, and it goes with the last that
has it mapped. So nothing is left behind, however a job ends, and the size of /dev/shm does not matter.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import weakref
from typing import Any

from commlayer.backends.shared.ranks import Ranks
from commlayer.errors import CollectiveMismatch

PAGE = 4096
_NONCE = 16  # bytes at the beginning, which tell it from another process' file of the same number
_PROT_READ_WRITE, _MAP_SHARED = 3, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Memory:
    """``size`` bytes after the first page, from ``address`` on. Unmapped when ``buffer`` is dropped."""

    def __init__(self, descriptor: int, size: int) -> None:
        # Not by Python's mmap, which would keep a file descriptor for as long.
        whole = PAGE + size
        start = _libc.mmap(None, whole, _PROT_READ_WRITE, _MAP_SHARED, descriptor, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            number = ctypes.get_errno()
            raise OSError(number, f"mapping {whole} bytes of shared memory: {os.strerror(number)}")
        self.size = size
        self.address = start + PAGE
        self.buffer: Any = (ctypes.c_char * whole).from_address(start)
        end = weakref.finalize(self.buffer, _libc.munmap, start, whole)
        end.atexit = False  # the kernel does it then, and tensors may be in use until the very end


def create(size: int) -> tuple[Memory, int, bytes]:
    """New memory, its open file and what to tell other processes. Raises OSError."""
    descriptor = os.memfd_create("commlayer", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, PAGE + size)
        made = Memory(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    nonce = secrets.token_bytes(_NONCE)
    made.buffer[:_NONCE] = nonce
    return made, descriptor, f"{os.getpid()} {descriptor} {size} {nonce.hex()}".encode()


def attach(told: bytes) -> Memory:
    """The memory that another process has created. Raises OSError."""
    process, number, size, nonce = told.decode().split()
    descriptor = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size != PAGE + int(size):
            raise OSError(f"/proc/{process}/fd/{number} is another file by now")
        found = Memory(descriptor, int(size))
    finally:
        os.close(descriptor)
    if found.buffer[:_NONCE] != bytes.fromhex(nonce):
        raise OSError(f"/proc/{process}/fd/{number} is another process' file")
    return found


def common(comm: Ranks, size: int) -> Memory | str:
    """Memory of all ranks, which rank 0 creates; on every rank why not, if one of them cannot. Called by all.

    Raises CollectiveMismatch, on all ranks, where they ask for different sizes.
    """
    made: Memory | None = None
    descriptor, told, trouble = -1, b"", ""
    try:
        try:
            if comm.rank == 0:
                made, descriptor, told = create(size)
        except (OSError, OverflowError) as error:
            trouble = str(error)
        sizes, places = zip(*(answer.split(b" ", 1) for answer in comm.share(b"%d %b" % (size, told))), strict=True)
        if len({*sizes}) > 1:
            raise CollectiveMismatch(f"shared memory: the ranks ask for {', '.join(map(bytes.decode, sizes))} bytes")
        try:
            if comm.rank and places[0]:
                made = attach(places[0])
        except OSError as error:
            trouble = str(error)
        troubles = [answer.decode() for answer in comm.share(trouble.encode())]
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    for rank, text in enumerate(troubles):
        if text:
            return f"rank {rank}: {text}"
    assert made is not None
    return made
