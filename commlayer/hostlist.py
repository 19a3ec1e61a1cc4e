"""The two compressed notations of Slurm: host lists and tasks per node.

Source: Slurm, ``scontrol show hostnames`` and ``SLURM_TASKS_PER_NODE`` in sbatch(1).
"""

from __future__ import annotations

import math
import re
from itertools import product

from commlayer.errors import LaunchError

_HOST = r"(?:[^\[\],\s]|\[[^\[\]\s]+\])+"  # literal text and [bracketed] ranges, in any mixture
_NUMBERS = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?")  # 7 or 001-003
_TASKS = re.compile(r"(\d{1,18})(?:\(x(\d{1,18})\))?")  # 2 or 2(x3)
_MOST = 1 << 20  # nodes: some times what the largest machines have


def expand(text: str) -> list[str]:
    """Host names of a host list, in its order: ``nid[001-003,7]`` is nid001 nid002 nid003 nid7.

    Raises ``LaunchError`` quoting a list that is malformed.
    """
    if not re.fullmatch(f"{_HOST}(?:,{_HOST})*", text):
        raise LaunchError(f"malformed host list {text!r}: expected names like 'nid[001-003,7],login1'")
    names: list[str] = []
    for host in re.findall(_HOST, text):
        names += _expand_host(host, text)
        _check_number(len(names), text)
    return names


def _expand_host(host: str, text: str) -> list[str]:
    parts = re.split(r"\[(.+?)\]", host)  # literal, ranges, literal, …, literal
    choices = [_numbers(part, text) if i % 2 else [part] for i, part in enumerate(parts)]
    _check_number(math.prod(map(len, choices)), text)
    return ["".join(choice) for choice in product(*choices)]


def _numbers(ranges: str, text: str) -> list[str]:
    """The members of ``001-003,7``; leading zeros of the lower bound are kept."""
    numbers: list[str] = []
    for item in ranges.split(","):
        match = _NUMBERS.fullmatch(item)
        low, high = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(low) > int(high):
            raise LaunchError(f"malformed host list {text!r}: {item!r} is no ascending range of numbers")
        _check_number(len(numbers) + int(high) - int(low), text)
        numbers += [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return numbers


def tasks_per_node(text: str) -> list[int]:
    """Tasks on each node: ``2(x3),1`` is 2 2 2 1.

    Raises ``LaunchError`` quoting a list that is malformed.
    """
    matches = [_TASKS.fullmatch(item) for item in text.split(",")]
    if None in matches:
        raise LaunchError(f"malformed tasks per node {text!r}: expected counts like '2(x3),1'")
    _check_number(sum(int(m[2] or 1) for m in matches if m), text)
    return [int(m[1]) for m in matches if m for _ in range(int(m[2] or 1))]


def _check_number(nodes: int, text: str) -> None:
    """Before a wrong digit takes all memory."""
    if nodes > _MOST:
        raise LaunchError(f"{text!r} would be {nodes} nodes or more; at most {_MOST} are believed")
