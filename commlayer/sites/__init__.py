"""Sites: what a job script must know of a machine, as data. README.md beside this file explains the keys."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from commlayer.sites.schedulers import SCHEDULERS, Value

SCHEMA = "commlayer.site/1"
SHIPPED = Path(__file__).parent


@dataclass(frozen=True)
class Site:
    """One machine, for jobs that take whole nodes with at most one rank per GPU. See README.md for the fields."""

    name: str
    scheduler: str
    summary: str = ""
    gpus: int = 0
    cores: tuple[tuple[int, ...], ...] = ()
    threads_per_core: int = 1
    needs_account: bool = False
    queues: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    directives: Mapping[str, Value] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, name: str, text: str, where: str) -> Site:
        """Raises ``ValueError`` naming the file, the key and what it got."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"site file {where}: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"site file {where}: expected an object, got {text.strip()[:40]!r}")
        for key, value in data.items():
            if key not in _KEYS:
                raise ValueError(f"site file {where}: unknown key {key!r}; the keys are {', '.join(_KEYS)}")
            fits, expected = _KEYS[key]
            if not fits(value):
                raise ValueError(f"site file {where}: {key} is {json.dumps(value)}; expected {expected}")
        for key in ("schema", "scheduler"):
            if key not in data:
                raise ValueError(f"site file {where}: {key} is missing; expected {_KEYS[key][1]}")
        data["cores"] = tuple(map(_numbers, data.get("cores", ())))
        data["setup"] = tuple(data.get("setup", ()))
        return cls(name, **{f.name: data[f.name] for f in fields(cls) if f.name in data})

    def cores_of(self, ranks: int) -> list[list[int]]:
        """Cores of each of a node's ranks: as many for each, next to the GPU of the same number. [] if not known.

        Ranks whose GPUs are next to the same domain (an entry of ``cores``) share it out. Where there are fewer
        GPUs than domains, a rank gets several. Without GPUs the ranks spread over all domains.
        """
        places, domains = self.gpus or ranks, len(self.cores)
        if not domains:
            return []
        first = [rank * domains // places for rank in range(ranks)]
        last = [max(start, (rank + 1) * domains // places - 1) for rank, start in enumerate(first)]
        near = [[core for part in self.cores[a : b + 1] for core in part] for a, b in zip(first, last, strict=True)]
        each = min(len(cores) // first.count(start) for cores, start in zip(near, first, strict=True))
        turn = [first[:rank].count(start) * each for rank, start in enumerate(first)]
        return [cores[at : at + each] for cores, at in zip(near, turn, strict=True)]

    def queue_for(self, nodes: int, hours: float) -> str:
        """The first queue that takes such a job, "" where the site leaves the choice to the scheduler."""
        for name, limits in self.queues.items():
            least, most = limits.get("nodes", (1, nodes))
            if least <= nodes <= most and hours <= limits.get("hours", hours):
                return name
        if not self.queues:
            return ""
        offered = "; ".join(f"{name}: {_limits(limits)}" for name, limits in self.queues.items())
        raise ValueError(f"no queue of {self.name} takes {nodes} nodes for {hours:g} h ({offered}); --queue names one")


def user_folder() -> Path:
    """Where users keep their own site files."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "commlayer" / "sites"


def known() -> dict[str, Path]:
    """Files of all sites by name; a user's own stands before a shipped one of the same name."""
    return {path.stem: path for folder in (SHIPPED, user_folder()) for path in sorted(folder.glob("*.json"))}


def load(name_or_path: str) -> Site:
    """A known site by name, or any site file by path. ValueError names what is wrong with it."""
    files = known()
    path = files.get(name_or_path, Path(name_or_path).expanduser())
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"site {name_or_path!r}: not a readable file ({error}), nor one of the known sites: "
            f"{', '.join(files)}; your own go into {user_folder()}"
        ) from None
    return Site.from_json(path.stem, text, str(path))


def _numbers(text: str) -> tuple[int, ...]:
    """``4-6,9`` is 4 5 6 9."""
    ranges = [part.partition("-")[::2] for part in text.split(",")]
    return tuple(number for a, b in ranges for number in range(int(a), int(b or a) + 1))


def _limits(limits: Mapping[str, Any]) -> str:
    nodes = [f"{limits['nodes'][0]} to {limits['nodes'][1]} nodes"] if "nodes" in limits else []
    return ", ".join([*nodes, *([f"{limits['hours']:g} h"] if "hours" in limits else [])]) or "any job"


def _count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _named(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _is_cores(value: Any) -> bool:
    if not _texts(value) or not all(re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", part) for part in value):
        return False
    every = [core for part in value for core in _numbers(part)]
    return len(set(every)) == len(every) and all(map(_numbers, value))


def _is_queue(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"nodes", "hours"}:
        return False
    nodes, hours = value.get("nodes", [1, 1]), value.get("hours", 1)
    right = isinstance(nodes, list) and len(nodes) == 2 and all(_count(n, 1) for n in nodes)
    return right and isinstance(hours, (int, float)) and not isinstance(hours, bool)


_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "schema": (lambda value: value == SCHEMA, f'"{SCHEMA}"'),
    "scheduler": (lambda value: value in list(SCHEDULERS), " or ".join(SCHEDULERS)),
    "summary": (_text, "text"),
    "sources": (_named(_text), "an object of texts"),
    "gpus": (_count, "a number from 0 up"),
    "cores": (_is_cores, 'a list of distinct core numbers per domain, as ["0-31", "32-63"]'),
    "threads_per_core": (lambda value: _count(value, 1), "a number from 1 up"),
    "needs_account": (lambda value: isinstance(value, bool), "true or false"),
    "queues": (_named(_is_queue), 'an object as {"debug": {"nodes": [1, 2], "hours": 1}}'),
    "directives": (_named(lambda v: _text(v) or v is None or v is True), "an object of texts, true or null"),
    "setup": (_texts, "a list of lines"),
    "env": (_named(_text), "an object of texts"),
}
