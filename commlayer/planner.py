"""Finds the cheapest way to do what a backend cannot.

Every request is a node; a native one costs what its transport needs, any other what its cheapest fallback
needs for everything that one uses in turn. Costs are linear in the bytes of the request, so a plan has
three numbers: messages, bytes sent per byte asked for, and local passes over the bytes. They are compared
at one nominal size, because a plan may depend only on what every rank knows, which for uneven operations
excludes the size. All costs are found at once by relaxation, as in Bellman and Ford's shortest paths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from commlayer.capability import CapabilitySet, Request
from commlayer.fallbacks import FALLBACKS, Fallback, Use

# A message's latency, and seconds per byte sent or touched: those of ranks on one host, where the layer was
# measured. They only weigh plans against each other.
LATENCY = 20e-6
PER_BYTE_SENT = 1 / 4e9
PER_BYTE_TOUCHED = 1 / 8e9
NOMINAL_BYTES = 1 << 20
CHANNELS = Path(__file__).with_name("channels.json")
OVERHEAD = 0.25  # of an emulation, in messages: so that what only reads the bits otherwise comes first


@dataclass(frozen=True)
class Line:
    """Seconds as a line over bytes, of one operation on one channel, as measured."""

    latency: float
    per_byte: float

    def cheaper_from(self, other: Line) -> float:
        """Bytes from which on this is the cheaper; infinite where it never is."""
        if self.latency <= other.latency:
            return 0
        if self.per_byte >= other.per_byte:
            return math.inf
        return (self.latency - other.latency) / (other.per_byte - self.per_byte)


@cache
def channel_cost(channel: str, op: str, crowded: bool) -> Line:
    """From the table of channels.json, measured between ranks of one host; ``crowded``: they share cores."""
    table = json.loads(CHANNELS.read_text())["crowded" if crowded else "free"][channel]
    microseconds, gigabytes = table.get(op, table["all_reduce"])
    return Line(microseconds * 1e-6, 1e-9 / gigabytes)


@dataclass(frozen=True)
class Cost:
    """What a request costs: ``messages`` one after the other, and factors of its own size in bytes."""

    messages: float = 0.0
    sent: float = 0.0
    touched: float = 0.0

    def seconds(self, size: float = NOMINAL_BYTES) -> float:
        per_byte = self.sent * PER_BYTE_SENT + self.touched * PER_BYTE_TOUCHED
        return self.messages * LATENCY + per_byte * size

    def plus(self, other: Cost, times: float, scale: float) -> Cost:
        share = times * scale
        return Cost(
            self.messages + times * other.messages,
            self.sent + share * other.sent,
            self.touched + share * other.touched,
        )


def native_cost(op: str, size: int) -> Cost:
    """What good implementations need (Thakur, Rabenseifner and Gropp 2005), relative to the whole vector."""
    depth, share = math.log2(size), (size - 1) / size
    return {
        "all_reduce": Cost(2 * depth, 2 * share),
        "reduce": Cost(depth, 1),
        "broadcast": Cost(depth, 1),
        "all_gather": Cost(depth, share),
        "reduce_scatter": Cost(depth, share),
        "all_to_all": Cost(size - 1, share),
        "gather": Cost(depth, share),
        "scatter": Cost(depth, share),
        "send": Cost(1, 1),
        "recv": Cost(),  # counted with its send
        "barrier": Cost(depth),
        # The control channel is there for a last resort, and costs like one.
        "control": Cost(50, 20),
    }[op]


def _kib(size: float) -> str:
    return f"{size / 1024:.3g} KiB"


@dataclass(frozen=True)
class Plan:
    """How one request is done: natively, or by a fallback whose parts are plans in turn."""

    request: Request
    cost: Cost
    fallback: Fallback | None = None
    parts: tuple[Plan, ...] = ()
    why: str = ""
    shared_from: float = math.inf  # bytes from which on ranks of one host do it through memory that they share

    @property
    def emulated(self) -> bool:
        """Whether it does more than the backend's own operation, perhaps on the same bits read otherwise."""
        if self.fallback is None:
            return False
        return not self.fallback.reinterprets or any(part.emulated for part in self.parts)

    def lines(self, depth: int = 0) -> Iterator[str]:
        head = "  " * depth + str(self.request)
        if self.shared_from == 0:
            yield f"{head}: shared memory"
            return
        if self.shared_from < math.inf:
            yield f"{head}: shared memory from {_kib(self.shared_from)} on, below that"
            head = "  " * (depth + 1) + str(self.request)
        if self.fallback is None:
            yield f"{head}: native"
            return
        yield f"{head} ⇐ {self.fallback.name}: {self.fallback.summary[:1].lower()}{self.fallback.summary[1:]}"
        for part in self.parts:
            yield from part.lines(depth + 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "request": str(self.request),
            "fallback": self.fallback.name if self.fallback else None,
            "why": self.why,
            "shared_from": self.shared_from if self.shared_from < math.inf else None,
            "seconds_at_1MiB": self.cost.seconds(),
            "parts": [part.to_dict() for part in self.parts],
        }


def through_shared_memory(request: Request, found: Plan | None, backend: str, size: int, crowded: bool) -> Plan:
    """The plan where the ranks of a group can also share memory; ``found`` is what the backend would do.

    What a backend can only emulate goes through shared memory at any size.
    """
    near, far = (channel_cost(name, request.op, crowded) for name in ("shared memory", backend))
    if found is None or found.fallback is not None:
        return Plan(request, native_cost(request.op, size), shared_from=0)
    return replace(found, shared_from=near.cheaper_from(far))


@lru_cache(maxsize=4096)
def plan(capabilities: CapabilitySet, size: int, request: Request) -> Plan | None:
    """The cheapest plan, or None where no chain of fallbacks ends in native operations."""
    nodes = _reachable(capabilities, size, request)
    costs: dict[Request, Cost] = {
        node: native_cost(node.op, size) for node, choices in nodes.items() if choices is None
    }
    chosen: dict[Request, tuple[Fallback, list[Use]]] = {}
    changed = True
    while changed:
        changed = False
        for node, choices in nodes.items():
            for candidate, uses in choices or ():
                if not all(use.request in costs for use in uses):
                    continue
                cost = Cost(0 if candidate.reinterprets else OVERHEAD, touched=candidate.passes)
                for use in uses:
                    cost = cost.plus(costs[use.request], use.times, use.scale)
                # Strictly cheaper: at equal cost the first declared stays, on every rank alike.
                if node not in costs or cost.seconds() < costs[node].seconds() * (1 - 1e-9):
                    costs[node], chosen[node], changed = cost, (candidate, uses), True
    return _build(capabilities, request, costs, chosen) if request in costs else None


def _reachable(
    capabilities: CapabilitySet, size: int, request: Request
) -> dict[Request, list[tuple[Fallback, list[Use]]] | None]:
    """Every request that could take part, with its fallbacks; None marks a native one."""
    nodes: dict[Request, list[tuple[Fallback, list[Use]]] | None] = {}
    todo = [request]
    while todo:
        node = todo.pop()
        if node in nodes:
            continue
        if node.op == "control" or capabilities.native(node):
            nodes[node] = None
            continue
        choices = []
        for candidate in FALLBACKS:
            uses = candidate.needs(node, size) if node.op in candidate.ops else None
            if uses is not None:
                choices.append((candidate, list(uses)))
                todo.extend(use.request for use in uses)
        nodes[node] = choices
    return nodes


def _build(
    capabilities: CapabilitySet,
    request: Request,
    costs: dict[Request, Cost],
    chosen: dict[Request, tuple[Fallback, list[Use]]],
) -> Plan:
    if request not in chosen:
        return Plan(request, costs[request])
    candidate, uses = chosen[request]
    parts = tuple(_build(capabilities, use.request, costs, chosen) for use in uses)
    status, source = capabilities.status(request)
    return Plan(request, costs[request], candidate, parts, f"{status} ({source})")
