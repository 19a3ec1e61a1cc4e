"""Profiles that were probed on this machine, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from commlayer.backends.base import Communicator
from commlayer.capability import Profile
from commlayer.probe.origin import source_version


@dataclass(frozen=True)
class Identity:
    """What a probe is valid for: another version or device is another file."""

    backend: str
    version: str
    torch_version: str
    device: str

    @classmethod
    def of(cls, comm: Communicator) -> Identity:
        return cls.named(comm.name, comm.version(), comm.device)

    @classmethod
    def named(cls, backend: str, version: str, device: torch.device) -> Identity:
        if device.type == "cpu":
            where = f"cpu {platform.machine()}"
        else:
            module = getattr(torch, device.type)
            where = module.get_device_name(device) if module.is_available() else "no device"
        return cls(backend, source_version(backend) or version, torch.__version__, where)

    def versions(self) -> dict[str, str]:
        """As a profile has them."""
        return {"torch": self.torch_version, self.backend: self.version, "device": self.device}

    @property
    def path(self) -> Path:
        parts = (self.backend, self.version, f"torch {self.torch_version}", self.device)
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
        words = dict.fromkeys(re.sub(r"[^A-Za-z0-9.+]+", "-", part).strip("-") for part in parts)
        return folder() / f"{'_'.join(words)[:150]}_{digest}.json"


def folder(env: Mapping[str, str] = os.environ) -> Path:
    base = env.get("XDG_CACHE_HOME") or ""
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "commlayer" / "profiles"


def cached(identity: Identity) -> Profile | None:
    """The profile probed earlier, None where there is none; ValueError where its file is damaged."""
    path = identity.path
    remedy = f"delete the file, or make it anew with: commlayer probe --backend {identity.backend}"
    try:
        profile = Profile.from_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"capability profile {path}: not readable ({error}); {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    if profile.backend != identity.backend or dict(profile.versions) != identity.versions():
        raise ValueError(
            f"capability profile {path}: is of {profile.backend} {dict(profile.versions)}, expected "
            f"{identity.backend} {identity.versions()}; {remedy}"
        )
    return profile


def keep(profile: Profile) -> Path:
    """Write a probed profile where ``cached`` finds it; readers see the old file or the new one, whole. OSError."""
    versions = profile.versions
    identity = Identity(profile.backend, versions[profile.backend], versions["torch"], versions["device"])
    save(identity.path, profile)
    return identity.path


def save(path: Path, profile: Profile) -> None:
    """Write a profile's file aside, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as aside:
        try:
            aside.write(profile.to_json())
            aside.close()
            os.chmod(aside.name, 0o644)
            os.replace(aside.name, path)
        except BaseException:
            os.unlink(aside.name)
            raise
