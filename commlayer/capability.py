"""What a backend can do, as data: a table over (op, reduce op, dtype, device, layout).

A ``Profile`` is one recorded table, a file of rules; the last rule that matches a request decides it. A
``CapabilitySet`` is what the planner asks: a request is native if every profile in the set says so and
nothing disables it, so the intersection over ranks, or of a real backend with a replayed profile, is the
union of the profiles held.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief  # a damaged file may hold anything, at any depth
from typing import Any, NamedTuple

import torch

from commlayer.reduce_op import NAMES as REDUCE_NAMES
from commlayer.reduce_op import meaningless

SCHEMA = "commlayer.capabilities/1"
REDUCING = ("all_reduce", "reduce", "reduce_scatter")
MOVING = ("broadcast", "all_gather", "all_to_all", "gather", "scatter", "send", "recv")
OPS = (*REDUCING, *MOVING, "barrier")
FEATURES = ("coalescing", "split", "non-contiguous")  # recorded for people; the planner does not ask for them
SPLITTABLE = frozenset({"all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"})
PAIRED = ("send", "recv")
LAYOUTS = ("even", "uneven")
STATUSES = ("native", "absent", "wrong-value", "mutates-input", "error", "hang", "crash")

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if hasattr(torch, name)
}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


class Request(NamedTuple):
    """One row of the table: what somebody wants done."""

    op: str
    reduce: str | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layout: str = "even"

    def to(self, op: str, reduce: str | None = None, layout: str = "even") -> Request:
        """Another operation on the same kind of tensor."""
        return Request(op, reduce, self.dtype, self.device, layout)

    def __str__(self) -> str:
        words = [self.op, self.reduce or "", NAME_OF.get(self.dtype, str(self.dtype)), self.device]
        if self.layout == "uneven":
            words.append("uneven")
        return " ".join(word for word in words if word)


def requests(device: str) -> Iterable[Request]:
    """Every request that has a meaning."""
    for op in OPS:
        for dtype in DTYPES.values() if op != "barrier" else (torch.uint8,):
            for layout in LAYOUTS if op in SPLITTABLE else ("even",):
                for reduce in REDUCE_NAMES if op in REDUCING else (None,):
                    if reduce is None or meaningless(reduce, dtype) is None:
                        yield Request(op, reduce, dtype, device, layout)


@dataclass(frozen=True)
class Rule:
    """One line of a profile: which requests it speaks of, and what it says. None matches everything."""

    status: str
    ops: frozenset[str] | None = None
    reduce: frozenset[str] | None = None
    dtypes: frozenset[str] | None = None
    devices: frozenset[str] | None = None
    layouts: frozenset[str] | None = None
    source: str = ""
    note: str = ""

    def matches(self, request: Request) -> bool:
        return (
            (self.ops is None or request.op in self.ops)
            and (self.reduce is None or request.reduce in self.reduce)
            and (self.dtypes is None or NAME_OF[request.dtype] in self.dtypes)
            and (self.devices is None or request.device in self.devices)
            and (self.layouts is None or request.layout in self.layouts)
        )


_COLUMNS = {
    "ops": frozenset({*OPS, *FEATURES}),
    "reduce": frozenset(REDUCE_NAMES),
    "dtypes": None,  # a dtype this torch does not know is no error: profiles outlive torch versions
    "devices": None,
    "layouts": frozenset(LAYOUTS),
}


@dataclass(frozen=True)
class Profile:
    """A recorded table with its sources."""

    name: str
    rules: tuple[Rule, ...]
    backend: str = ""
    summary: str = ""
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def rule(self, request: Request) -> Rule | None:
        """The rule that decides a request; None where none speaks of it, which means absent."""
        for rule in reversed(self.rules):
            if rule.matches(request):
                return rule
        return None

    @classmethod
    def from_json(cls, text: str, where: str) -> Profile:
        """Parse and check a profile; ``where`` names it in errors (ValueError)."""

        def fail(message: str) -> ValueError:
            return ValueError(f"capability profile {where}: {message}")

        try:
            data = json.loads(text, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise fail(f"not valid JSON ({error})") from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise fail(f'expected "schema": "{SCHEMA}", got {brief(found)}')
        if not isinstance(data.get("name"), str) or not isinstance(data.get("rules"), list):
            raise fail('needs a "name" and a list of "rules"')
        for key in ("versions", "sources"):
            table = data.get(key, {})
            if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
                raise fail(f'"{key}" must be an object of texts, got {brief(table)}')
        for key in ("backend", "summary"):
            if not isinstance(data.get(key, ""), str):
                raise fail(f'"{key}" must be a text, got {brief(data[key])}')
        rules = []
        for index, raw in enumerate(data["rules"]):
            if not isinstance(raw, dict) or raw.get("status") not in STATUSES:
                raise fail(f"rule {index}: status must be one of {', '.join(STATUSES)}, got {brief(raw)}")
            for key in ("source", "note"):
                if not isinstance(raw.get(key, ""), str):
                    raise fail(f"rule {index}: {key} must be a text, got {brief(raw[key])}")
            columns: dict[str, Any] = {}
            for column, allowed in _COLUMNS.items():
                values = raw.get(column)
                if values is None:
                    continue
                if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                    raise fail(f"rule {index}: {column} must be a list of names, got {brief(values)}")
                if allowed is not None and not allowed.issuperset(values):
                    raise fail(f"rule {index}: unknown {column} {sorted(set(values) - allowed)}")
                columns[column] = frozenset(values)
            unknown = set(raw) - set(_COLUMNS) - {"status", "source", "note"}
            if unknown:
                raise fail(f"rule {index}: unknown columns {sorted(unknown)}")
            rules.append(Rule(raw["status"], **columns, source=raw.get("source", ""), note=raw.get("note", "")))
        return cls(
            name=data["name"],
            rules=tuple(rules),
            backend=data.get("backend", ""),
            summary=data.get("summary", ""),
            versions=data.get("versions", {}),
            sources=data.get("sources", {}),
        )

    def to_json(self) -> str:
        """The text ``from_json`` reads."""
        rules = []
        for rule in self.rules:
            raw: dict[str, Any] = {
                column: sorted(getattr(rule, column)) for column in _COLUMNS if getattr(rule, column) is not None
            }
            raw["status"] = rule.status
            raw.update({key: getattr(rule, key) for key in ("source", "note") if getattr(rule, key)})
            rules.append(raw)
        head: dict[str, Any] = {"schema": SCHEMA, "name": self.name, "backend": self.backend}
        head |= {"versions": dict(self.versions), "summary": self.summary, "sources": dict(self.sources)}
        body = ",\n  ".join(map(json.dumps, rules))  # a rule a line, for people
        return f'{json.dumps(head, indent=1)[:-2]},\n "rules": [\n  {body}\n ]\n}}\n'


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of two equal keys, json would drop the first in silence."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"{key!r} stands twice in one object")
        made[key] = value
    return made


EVERYTHING = Profile("everything", (Rule("native"),), summary="Every request that has a meaning.")

# Of what the layer does itself between ranks of one host. premul_sum is a sum of what was scaled, by the planner.
SHARED_MEMORY = Profile(
    "shared-memory",
    (
        Rule("native", frozenset({*MOVING, "barrier"}) - {"send", "recv"}, devices=frozenset({"cpu"})),
        Rule("native", frozenset(REDUCING), frozenset(REDUCE_NAMES) - {"premul_sum"}, devices=frozenset({"cpu"})),
    ),
    summary="What commlayer does itself between ranks of one host.",
)

# The same between several hosts, where what is inside of each goes through its memory. Not the sums of halves, which
# would be rounded twice.
OVER_HOSTS = Profile(
    "over-hosts",
    (
        Rule("native", frozenset({"broadcast"}), devices=frozenset({"cpu"})),
        Rule("native", frozenset({"all_gather"}), devices=frozenset({"cpu"}), layouts=frozenset({"even"})),
        Rule(
            "native",
            frozenset({"all_reduce", "reduce_scatter"}),
            frozenset(REDUCE_NAMES) - {"premul_sum"},
            frozenset(DTYPES) - {"float16", "bfloat16", "complex32"},
            devices=frozenset({"cpu"}),
            layouts=frozenset({"even"}),
        ),
    ),
    summary="What commlayer does between hosts that each have several ranks.",
)

SHIPPED = Path(__file__).parent / "profiles"


def shipped_profiles() -> list[str]:
    """Names that ``COMMLAYER_PROFILE`` takes."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def load_profile(name_or_path: str) -> Profile:
    """A shipped profile by name, or any profile file by path. ValueError names what is wrong with it."""
    shipped = shipped_profiles()
    path = SHIPPED / f"{name_or_path}.json" if name_or_path in shipped else Path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"capability profile {name_or_path!r}: not a readable file ({error}), "
            f"nor one of the shipped ones: {', '.join(shipped)}"
        ) from None
    return Profile.from_json(text, name_or_path)


def profile_for(backend: str, version: str) -> Profile | None:
    """The shipped profile of a backend: the newest not newer than ``version``, else the oldest."""
    found = []
    for name in shipped_profiles():
        match = re.fullmatch(rf"{re.escape(backend)}-(\d+(?:\.\d+)*)", name)
        if match:
            found.append((_numbers(match[1]), name))
    if not found:
        return None
    fitting = [entry for entry in found if entry[0] <= _numbers(version)]
    return load_profile(max(fitting)[1] if fitting else min(found)[1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:2])


def parse_disabled(text: str) -> tuple[Rule, ...]:
    """Rules from ``op[:reduce][:uneven][@dtype]``, comma separated: ``all_to_all,all_reduce:avg@bfloat16``."""
    rules = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        head, at, dtype = item.partition("@")
        op, *words = head.split(":")
        layouts = frozenset(word for word in words if word in LAYOUTS)
        reduce = frozenset(words) - layouts
        dtypes = frozenset({dtype}) if at else None
        rule = Rule("absent", frozenset({op}), reduce or None, dtypes, None, layouts or None, "disabled")
        known = op in OPS and reduce <= set(REDUCE_NAMES) and (not at or dtype in DTYPES)
        if not known or not any(map(rule.matches, requests("cpu"))):
            raise ValueError(
                f"disabled capabilities: {item!r} matches nothing; expected op[:reduce][:even|uneven][@dtype] "
                f"with op in {', '.join(OPS)} and reduce in {', '.join(REDUCE_NAMES)}, as far as they go together"
            )
        rules.append(rule)
    return tuple(rules)


@dataclass(frozen=True)
class CapabilitySet:
    """The profiles that must all agree, and what is taken away by hand."""

    profiles: tuple[Profile, ...]
    disabled: tuple[Rule, ...] = ()

    def native(self, request: Request) -> bool:
        """Whether the backend does it itself. Both ends of a message must, or neither."""
        both = PAIRED if request.op in PAIRED else (request.op,)
        return all(self.status(request._replace(op=op))[0] == "native" for op in both)

    def status(self, request: Request) -> tuple[str, str]:
        """One of ``STATUSES``, and who says so: profile, source and note."""
        for taken in self.disabled:
            if taken.matches(request):
                return "absent", "disabled by hand"
        verdict = ("native", "")
        for profile in self.profiles:
            rule = profile.rule(request)
            status = rule.status if rule else "absent"
            source = rule.source if rule else "no rule speaks of it"
            words = [profile.name, profile.sources.get(source, source), rule.note if rule else ""]
            verdict = (status, ": ".join(word for word in words if word))
            if status != "native":
                break
        return verdict

    def __and__(self, other: CapabilitySet) -> CapabilitySet:
        profiles = tuple(dict.fromkeys((*self.profiles, *other.profiles)))
        return CapabilitySet(profiles, tuple(dict.fromkeys((*self.disabled, *other.disabled))))

    def agreed(self, texts: Iterable[bytes]) -> CapabilitySet:
        """The intersection with every rank's ``to_bytes``, the same on each of them."""
        result = None
        for text in texts:
            try:
                data = json.loads(text)
                profiles = tuple(Profile.from_json(profile, "of another rank") for profile in data["profiles"])
                other = CapabilitySet(profiles, parse_disabled(data["disabled"]))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"capabilities of another rank: {type(error).__name__}: {error}") from None
            result = other if result is None else result & other
        return result or self

    def to_bytes(self) -> bytes:
        disabled = ",".join(map(_unparse, self.disabled))
        profiles = [profile.to_json() for profile in self.profiles]
        return json.dumps({"profiles": profiles, "disabled": disabled}).encode()

    def digest(self) -> str:
        """A short name for exactly this set."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:12]


def _unparse(rule: Rule) -> str:
    words = [*(rule.ops or ()), *(rule.reduce or ()), *(rule.layouts or ())]
    return ":".join(words) + "".join(f"@{dtype}" for dtype in rule.dtypes or ())
