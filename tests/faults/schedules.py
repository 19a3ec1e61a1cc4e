"""Random fault schedules: none may hang, and none may give a wrong number in silence."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.faults.job import Zygote, run
from tests.faults.operations import OPERATIONS
from tests.faults.outcome import Outcome
from tests.faults.replay import DEVIATIONS, ENDS, LATE, ORDERS, RANKS, TIMEOUT

PAIRS = [[0, 1], [1, 2], [2, 0]]
DEAD = (*ENDS, "kill soon")
KNOWN = {"PeerLost", "CommTimeout", "CollectiveMismatch", "CommError"}


@st.composite
def schedules(draw: Any) -> dict[str, Any]:
    """Who fails, how, at which operation of which random sequence, on which groups."""
    groups = draw(st.lists(st.sampled_from(PAIRS), max_size=2))
    step = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, len(groups)))
    steps = draw(st.lists(step, min_size=1, max_size=6))
    at = draw(st.integers(0, len(steps) - 1))
    operation, group = steps[at]
    says = [kind for kind, (operations, _) in DEVIATIONS.items() if operation in operations]
    if group != 0 and "splits" in says:
        says.remove("splits")  # takes three ranks
    kind = draw(st.sampled_from([*DEAD, *LATE, *ORDERS, *says]))
    # A wrong argument that fits can go unnoticed without the checks; a death or a delay cannot.
    debug = kind not in (*DEAD, *LATE) or draw(st.booleans())
    return {
        "groups": groups,
        "steps": steps,
        "fault": [kind, draw(st.integers(0, RANKS - 1)), at],
        "debug": debug,
        "profile": draw(st.sampled_from([None, None, None, "only-send-recv"])),
    }


def complaints(schedule: dict[str, Any], outcome: Outcome) -> list[str]:
    """What must not have happened, did."""
    kind, victim, at = schedule["fault"]
    found = [f"left running: {what}" for what in outcome.left]
    struck = outcome.ranks[victim].when("fault") or 0.0
    for number, rank in enumerate(outcome.ranks):
        error = rank.find("error")
        if number == victim and kind in (*DEAD, "stop"):
            continue
        aborted = outcome.launched and rank.status == -signal.SIGKILL  # by mpiexec, after another's MPI_Abort
        if rank.status is None or (rank.status < 0 and not aborted):
            found.append(f"rank {number} hung" if rank.status is None else f"rank {number} died of {-rank.status}")
        elif error is None and rank.find("end") is None and not aborted:
            found.append(f"rank {number} neither ended nor failed, status {rank.status}")
        if error is not None:
            # A message of a rank that left in good order may be under way: two seconds of grace, and one.
            limit = 3.0 if kind in DEAD else TIMEOUT * (2 if kind == "sleep" else 1) + 2.0
            if error["type"] not in KNOWN:
                found.append(f"rank {number}: {error['type']}: {error['text']}")
            elif kind in DEAD and error["type"] != "PeerLost":
                found.append(f"rank {number}: {error['type']} where a rank was lost")
            elif error["time"] - struck > limit:
                found.append(f"rank {number} knew after {error['time'] - struck:.1f} s")
            elif rank.status == 0:
                found.append(f"rank {number} failed, yet its status is 0")
        elif kind in DEVIATIONS and not aborted and {number, victim} <= set(_members(schedule, at)):
            found.append(f"rank {number} saw no mismatch")
    return found


def _members(schedule: dict[str, Any], at: int) -> list[int]:
    return [list(range(RANKS)), *schedule["groups"]][schedule["steps"][at][1]]


Judge = Callable[[dict[str, Any], Outcome, list[str]], None]


def require(schedule: dict[str, Any], outcome: Outcome, wrong: list[str]) -> None:
    """As a judge: AssertionError with the first schedule that goes wrong."""
    assert not wrong, "\n".join([*wrong, str(schedule), str(outcome)])


def play_all(zygote: Zygote, backend: str, examples: int, judge: Judge = require) -> None:
    """Play ``examples`` schedules, the same ones every time; ``judge`` hears of each, and what is wrong with it."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # to shrink one that hangs would take its limit again and again
        suppress_health_check=list(HealthCheck),
    )
    @given(schedules())
    def play(schedule: dict[str, Any]) -> None:
        env = {"COMMLAYER_DEBUG": "1"} if schedule["debug"] else {}
        if schedule["profile"]:
            env["COMMLAYER_PROFILE"] = schedule["profile"]
        outcome = run([zygote] * RANKS, "schedule", backend, env=env, limit=25.0, schedule=schedule)
        judge(schedule, outcome, complaints(schedule, outcome))

    play()
