"""What must be refused: the exact error, before anything is communicated, and no rank left hanging."""

import threading
import time

import pytest
import torch

import commlayer as c
from tests.contracts.bad_input import CASES, still_works


def test_there_are_many():
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("profile", [None, "only-send-recv"])
def test_on_every_rank(name, profile):
    call, error, message = CASES[name]

    def program():
        with pytest.raises(error, match=message) as caught:
            call(c.world())
        assert caught.type is error
        still_works(c.world())

    c.run_local(program, 3, profile=profile, timeout=10)


COLLECTIVE = [
    name for name, case in CASES.items() if "group" not in name and "factor" not in name and "init" not in name
]


@pytest.mark.parametrize("name", COLLECTIVE)
def test_on_one_rank_alone(name):
    """The others wait in the next operation, and hear of it at once."""
    call, error, message = CASES[name]
    others = []

    def program():
        if c.world().rank == 1:
            call(c.world())
            raise AssertionError("was accepted")
        try:
            c.all_reduce(torch.ones(2))
        except c.PeerLost as lost:
            others.append(str(lost))
            raise

    begin = time.monotonic()
    with pytest.raises(error, match=message):
        c.run_local(program, 3, timeout=30)
    assert time.monotonic() - begin < 10
    assert len(others) == 2
    assert all(f"rank 1 is lost: it raised {error.__name__}" in text for text in others)


@pytest.mark.parametrize("call", ["all_reduce", "all_gather", "broadcast", "barrier", "all_gather_object"])
def test_outside_the_group(call):
    def program():
        group = c.new_group([0, 2])
        if c.world().rank == 1:
            arguments = () if call == "barrier" else (torch.ones(2),)
            with pytest.raises(ValueError, match=r"group: this process is not a member of .*\[0, 2\]"):
                getattr(c, call)(*arguments, group=group)
            with pytest.raises(ValueError, match="not a member"):
                group.new_group([0])
            with pytest.raises(ValueError, match="not a member"):
                group.split(0)
            with pytest.raises(ValueError, match="not a member"):
                group.explain("all_reduce")
        still_works(c.world())

    c.run_local(program, 3, timeout=10)


def test_without_a_world():
    with pytest.raises(c.CommError, match="init"):
        c.all_reduce(torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 0}, "ranks: expected a positive int, got 0"),
        ({"ranks": True}, "ranks: .*True"),
        ({"timeout": -1}, "timeout: .*-1"),
        ({"profile": "no-such"}, "no-such.*only-all-reduce"),
        ({"disable": "all_redcue"}, "all_redcue"),
    ],
)
def test_run_local_itself(arguments, message):
    before = threading.active_count()
    with pytest.raises(ValueError, match=message):
        c.run_local(lambda: None, **arguments)
    assert threading.active_count() == before


def test_a_rank_that_never_comes_times_out():
    def program():
        if c.world().rank:
            c.barrier()
        time.sleep(1)

    with pytest.raises(c.CommTimeout, match=r"barrier #1 .* not finished after 0\.3 s; rank 0 never arrived"):
        c.run_local(program, 3, timeout=0.3)


def test_a_rank_that_leaves_early_is_lost():
    def program():
        if c.world().rank:
            c.barrier()

    with pytest.raises(c.PeerLost, match="rank 0 is lost: it has left the job after 0 collectives"):
        c.run_local(program, 3, timeout=30)
