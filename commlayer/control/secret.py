"""The job's secret, where nothing but this user's files can carry it from rank to rank.

As with Erlang's cookie or X's authority file: a key in the user's configuration folder, readable by the user alone,
made by the first rank that needs it, and on clusters seen by all hosts. The secret of a job is derived from it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from commlayer.errors import LaunchError


def fresh() -> bytes:
    """A secret that nobody knows yet, for ranks that can be told otherwise."""
    return secrets.token_bytes(32)


def of_job(job: str, env: Mapping[str, str] = os.environ) -> bytes:
    """COMMLAYER_SECRET where it is set, else derived from the user's key. Raises LaunchError."""
    given = env.get("COMMLAYER_SECRET")
    key = given.encode() if given else _key(env)
    return hmac.new(key, job.encode(), hashlib.sha256).digest()


def key_file(env: Mapping[str, str] = os.environ) -> Path:
    folder = env.get("XDG_CONFIG_HOME") or Path(env.get("HOME") or Path.home()) / ".config"
    return Path(folder) / "commlayer" / "key"


def _key(env: Mapping[str, str]) -> bytes:
    remedy = "set COMMLAYER_SECRET to the same random text on every rank"
    try:
        path = key_file(env)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            aside = path.with_name(f"key.{os.getpid()}.{secrets.token_hex(4)}")
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_hex(32).encode())
            try:
                os.link(aside, path)  # the first wins, and nobody sees half a key
            except FileExistsError:
                pass
            finally:
                aside.unlink()
        info = path.stat()
        if info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise LaunchError(f"{path}: others can read or own the job's key; chmod 600 it, or {remedy}")
        for _ in range(20):  # a network file system may show it late
            key = path.read_bytes()
            if len(key) >= 32:
                return key
            time.sleep(0.1)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise LaunchError(f"no secret for the control channel: {error}; {remedy}") from error
    raise LaunchError(f"{path}: is damaged ({len(key)} bytes); delete it, or {remedy}")
