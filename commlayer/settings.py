"""The environment variables the layer reads, once, in ``init``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLES = {
    "COMMLAYER_BACKEND": "auto (default), gloo, mpi, nccl, xccl, ccl, single, or any torch.distributed backend",
    "COMMLAYER_PROFILE": "a capability profile to obey: a shipped name such as xccl-2.8, or a file",
    "COMMLAYER_DISABLE": "capabilities to do without, such as all_to_all,all_reduce:avg@bfloat16",
    "COMMLAYER_PROBE": "auto (default), never or always: whether init may find out what a backend can do by running it",
    "COMMLAYER_FALLBACK": "silent (default), warn or error: what happens when an operation is emulated",
    "COMMLAYER_LAUNCHER": "which launcher's variables count when several disagree",
    "COMMLAYER_SHM": "0: ranks of one host do not use the memory that they can share, but their backend alone",
    "COMMLAYER_TIMEOUT": "seconds an operation may take before CommTimeout (default 600)",
    "COMMLAYER_DEBUG": "1: before each operation ranks compare what they call, and differences are an error",
    "COMMLAYER_CHECK_NAN": "1: sending a NaN or an infinity is an error that names the rank and the call",
    "COMMLAYER_TRACE": "a folder for a trace of every operation, a file a rank (see commlayer trace)",
    "COMMLAYER_SECRET": "what the job's ranks alone know; if not set, MPI or a key in the user's files serves",
}
DEFAULT_TIMEOUT = 600.0  # seconds
POLICIES = ("silent", "warn", "error")
PROBES = ("auto", "never", "always")


@dataclass(frozen=True)
class Settings:
    backend: str = "auto"
    profile: str | None = None
    disable: str = ""
    fallback: str = "silent"
    probe: str = "auto"
    shm: bool = True
    timeout: float | None = None
    debug: bool = False
    check_nan: bool = False
    trace: str | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read and check the variables; ValueError names the one that is wrong."""
        env = os.environ if env is None else env
        raw = env.get("COMMLAYER_TIMEOUT", "")
        timeout = None
        if raw:
            try:
                timeout = float(raw)
            except ValueError:
                timeout = -1.0
            timeout = checked_timeout(timeout, f"COMMLAYER_TIMEOUT={raw!r}")
        return cls(
            backend=env.get("COMMLAYER_BACKEND", "").lower() or "auto",
            profile=env.get("COMMLAYER_PROFILE") or None,
            disable=env.get("COMMLAYER_DISABLE", ""),
            fallback=_choice("COMMLAYER_FALLBACK", POLICIES, env),
            probe=_choice("COMMLAYER_PROBE", PROBES, env),
            shm=_switch("COMMLAYER_SHM", env, default=True),
            timeout=timeout,
            debug=_switch("COMMLAYER_DEBUG", env),
            check_nan=_switch("COMMLAYER_CHECK_NAN", env),
            trace=env.get("COMMLAYER_TRACE") or None,
        )


def _choice(name: str, allowed: tuple[str, ...], env: Mapping[str, str]) -> str:
    """One of those allowed, the first where nothing is set."""
    raw = env.get(name, "")
    value = raw.lower() or allowed[0]
    if value not in allowed:
        raise ValueError(f"{name}={raw!r}: expected one of {', '.join(allowed)}")
    return value


def _switch(name: str, env: Mapping[str, str], default: bool = False) -> bool:
    raw = env.get(name, "")
    value = raw.lower()
    if value not in ("", "0", "1", "false", "true", "off", "on"):
        raise ValueError(f"{name}={raw!r}: expected 0 or 1")
    return value in ("1", "true", "on") if value else default


def checked_timeout(timeout: float, name: str = "timeout") -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < 1e9:
        raise ValueError(f"{name}: expected a positive number of seconds, got {timeout!r}")
    return float(timeout)
