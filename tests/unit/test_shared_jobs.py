"""Jobs through shared memory that are hurt, interrupted, forked, or end too early; and hosts that lack something."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from tests.unit.shared_ranks import Driver
from tests.unit.shared_scenarios import DIFFERENT, LIMIT

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="shared memory needs Linux")


@pytest.fixture(scope="module")
def job() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not [name for name in os.listdir("/dev/shm") if "commlayer" in name]


KILL, STOP = int(signal.SIGKILL), int(signal.SIGSTOP)


@pytest.mark.parametrize(
    ("how", "when", "async_op", "symmetric", "ranks"),
    [
        (KILL, "working", False, True, 3),
        (KILL, "working", True, False, 2),
        (KILL, "waiting", False, False, 3),
        (KILL, "away", True, True, 3),
        (STOP, "working", False, False, 3),
        (STOP, "waiting", True, True, 3),
        (STOP, "away", False, True, 2),
    ],
)
def test_a_rank_that_is_lost_is_named(
    job: Driver, how: int, when: str, async_op: bool, symmetric: bool, ranks: int
) -> None:
    said = job.play("loses", ranks, how=how, when=when, async_op=async_op, symmetric=symmetric)
    for found in said[:-1]:
        assert found["error"] == ("PeerLost" if how == KILL else "CommTimeout"), found
        assert f"rank {ranks - 1} " in found["text"], found
        assert found["seconds"] < (5 if how == KILL else 4 * LIMIT), found


@pytest.mark.parametrize("what", DIFFERENT)
def test_different_calls_are_a_mismatch_on_every_rank(job: Driver, what: str) -> None:
    for found in job.play("calls_something_else", 3, what=what):
        assert found != "no error"
        assert found["error"] == "CollectiveMismatch", found
        assert found["seconds"] < LIMIT


def test_symmetric_tensors_leave_neither_files_nor_memory(job: Driver) -> None:
    for found in job.play("makes_and_drops", 3):
        assert found["between"][0] == found["after"][0] == found["before"][0], found
        assert found["between"][1] <= found["before"][1] + 21, found
        assert found["after"][1] <= found["before"][1] + 1, found


@pytest.mark.parametrize("async_op", [False, True])
def test_an_interrupt_reaches_all(job: Driver, async_op: bool) -> None:
    first, *others = job.play("interrupted", 3, async_op=async_op)
    assert first["error"] == "KeyboardInterrupt"
    for found in others:
        assert found["error"] == "PeerLost"
        assert "rank 0 is lost: it raised KeyboardInterrupt" in found["text"]


def test_an_operation_goes_on_while_its_rank_waits_for_a_message(job: Driver) -> None:
    assert job.play("awaits_a_message") == ["right", "right"]


@pytest.mark.parametrize("groups", [1, 2])
def test_two_threads(job: Driver, groups: int) -> None:
    assert job.play("by_threads", 3, groups=groups) == ["right"] * 3


@pytest.mark.parametrize("late", [False, True])
def test_what_a_forked_child_drops_is_not_gone(job: Driver, late: bool) -> None:
    assert job.play("forks", 2, late=late) == [[3.0], [3.0]]


def test_worlds_one_after_another_and_tensors_that_outlive_them(job: Driver) -> None:
    for found in job.play("comes_again"):
        assert found["mapped"][0] >= found["mapped"][-1], found
        assert found["threads"] < 6, found


def test_a_closed_group_gives_its_memory_back(job: Driver) -> None:
    for found in job.play("closes_groups"):
        assert found["after"] <= found["before"] + 2, found


def test_a_closed_group_says_so_at_once(job: Driver) -> None:
    found, _ = job.play("uses_a_closed_group")
    assert "closed" in found["text"], found
    assert found["seconds"] < LIMIT - 0.5, found


@pytest.mark.parametrize("kept", [False, True])
def test_a_job_ends_with_operations_unfinished(job: Driver, kept: bool) -> None:
    first, second = job.play("ends_unfinished", kept=kept, limit=20)
    assert second == "ended"
    assert first == "ended" or first["error"] == "PeerLost", first


def test_what_nobody_waits_for_is_done_before_the_end(job: Driver) -> None:
    assert job.play("ends_late") == [[3.0], [3.0]]


@pytest.fixture(scope="module")
def whole(job: Driver) -> list[dict]:
    return job.play("numbers", 3)


def test_where_nothing_is_missing(whole: list[dict]) -> None:
    assert all(found["shared"] and not found["warnings"] for found in whole), whole


@pytest.mark.parametrize("lost", ["memfd", "proc", "mmap"])
def test_without_common_memory_a_warning_and_the_same_numbers(job: Driver, whole: list[dict], lost: str) -> None:
    said = job.play("numbers", 3, lost=lost)
    assert not any(found["shared"] for found in said), said
    assert "without shared memory" in " ".join(said[0]["warnings"])
    assert not said[1]["warnings"]
    same(said, whole)


@pytest.mark.parametrize("who", ["all", "one"])
def test_without_a_compiler_the_same_numbers(job: Driver, whole: list[dict], who: str, tmp_path: Path) -> None:
    env = {"CC": "/bin/false", "XDG_CACHE_HOME": str(tmp_path)}
    said = job.play("numbers", 3, envs=[env if who == "all" or rank == 1 else {} for rank in range(3)])
    assert all(found["shared"] and not found["kernel"] for found in said), said
    assert [found["numbers"] for found in said] == [found["numbers"] for found in whole]


@pytest.mark.parametrize("who", ["all", "one"])
def test_switched_off(job: Driver, whole: list[dict], who: str) -> None:
    envs = [{"COMMLAYER_SHM": "0"} if who == "all" or rank == 1 else {} for rank in range(3)]
    said = job.play("numbers", 3, envs=envs)
    assert not any(found["shared"] or found["warnings"] for found in said), said
    same(said, whole)


def same(said: list[dict], whole: list[dict]) -> None:
    """Whole numbers exactly; sums of halves in another order may be rounded otherwise."""
    for found, expected in zip(said, whole, strict=True):
        for mine, theirs in zip(found["numbers"], expected["numbers"], strict=True):
            assert mine == pytest.approx(theirs, rel=2e-2)


def test_four_ranks_on_few_cores_do_not_collapse(job: Driver) -> None:
    said = job.play("takes_turns_with_gloo", 4, limit=60)
    for name, (shared, gloo) in said[0].items():
        slow = sorted(shared)[len(shared) * 9 // 10]
        assert slow < 20 * median(gloo), f"{name}: {slow} s, gloo {median(gloo)} s"
