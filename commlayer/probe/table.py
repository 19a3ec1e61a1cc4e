"""What was found about each request, as the few rules of a profile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from commlayer.capability import NAME_OF, STATUSES, Profile, Request, Rule
from commlayer.probe.checks import Verdict

NATIVE = Verdict("native", "")
NOT_PROBED = "not probed"  # how the note of what the time did not suffice for begins


def profile_of(verdicts: Mapping[Request, Verdict], backend: str, versions: Mapping[str, str], how: str) -> Profile:
    """The profile that says so; ``how`` it was measured becomes its source."""
    strided = {request: verdict for request, verdict in verdicts.items() if request.layout == "strided"}
    plain = {request: verdict for request, verdict in verdicts.items() if request.layout != "strided"}
    return Profile(
        name=f"{backend} as probed",
        rules=(*_feature(strided), *_rules(plain)),
        backend=backend,
        summary="Probed: every entry was run, and its values compared on every rank.",
        versions=versions,
        sources={"probe": how},
    )


def merge(profile: Profile, others: Iterable[Profile]) -> Profile:
    """What a node found, less what others of the same kind found wrong; nodes may share a cache folder."""
    alike = (other for other in others if other.versions == profile.versions)
    wrong = (rule for other in alike for rule in other.rules if rule.status != "native")
    return replace(profile, rules=tuple(dict.fromkeys((*profile.rules, *wrong))))


def incomplete(profile: Profile) -> bool:
    """Whether the time did not suffice for all of it."""
    return any(rule.note.startswith(NOT_PROBED) for rule in profile.rules)


def _feature(strided: Mapping[Request, Verdict]) -> tuple[Rule, ...]:
    """How the backend treats strided tensors, for people: the layer never hands out any."""
    if not strided:
        return ()
    seen: dict[Verdict, list[str]] = defaultdict(list)
    for request, verdict in strided.items():
        seen[verdict._replace(example="")].append(request.op)
    worst = max(strided.values(), key=lambda verdict: STATUSES.index(verdict.status)).status
    bad = [f"{', '.join(ops)}: {verdict.status}, {verdict.what}" for verdict, ops in seen.items() if verdict.what]
    return (Rule(worst, frozenset({"non-contiguous"}), source="probe", note="; ".join(bad)),)


def _rules(verdicts: Mapping[Request, Verdict]) -> list[Rule]:
    """What says the same of other dtypes, layouts, reduce ops and ops is joined."""
    rows: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for request, (status, what, _) in verdicts.items():
        rows[(status, what), request.op, request.reduce, request.layout].add(NAME_OF[request.dtype])
    # Each step joins the rows that agree in everything but one column.
    table = {(key[0], *map(_one, key[1:]), frozenset(dtypes)) for key, dtypes in rows.items()}
    for column in (3, 2, 1):
        joined: dict[tuple[Any, ...], set[str]] = defaultdict(set)
        for row in table:
            joined[row[:column] + row[column + 1 :]] |= row[column]
        table = {(*rest[:column], frozenset(names), *rest[column:]) for rest, names in joined.items()}
    rules = []
    for (status, what), *sets in table:
        ops, reduce, layouts, dtypes = (names or None for names in sets)
        rule = Rule(status, ops, reduce, dtypes, None, layouts, "probe")
        examples = (
            f"; e.g. {request}: {verdict.example}"
            for request, verdict in verdicts.items()
            if verdict.example and rule.matches(request)
        )
        rules.append(replace(rule, note=what + next(examples, "")))
    return sorted(
        rules, key=lambda rule: (STATUSES.index(rule.status), rule.note, *map(_names, (rule.ops, rule.reduce)))
    )


def _one(value: str | None) -> frozenset[str]:
    return frozenset() if value is None else frozenset({value})


def _names(values: frozenset[str] | None) -> list[str]:
    return sorted(values or ())
