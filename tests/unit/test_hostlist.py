"""Slurm's compressed notations, as scontrol show hostnames expands them."""

import re

import pytest

from commlayer.errors import LaunchError
from commlayer.hostlist import expand, tasks_per_node


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("nid[001-003,7]", ["nid001", "nid002", "nid003", "nid7"]),
        ("login1", ["login1"]),
        ("a,b[9-11],c-d.e", ["a", "b9", "b10", "b11", "c-d.e"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("r[1,3]-ib", ["r1-ib", "r3-ib"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_expand(text, hosts):
    assert expand(text) == hosts


@pytest.mark.parametrize(
    "text", ["", "a,,b", "a,", "n[1-2", "n1-2]", "n[]", "n[2-1]", "n[1-]", "n[a]", "n[1,]", "n[[1]]", "a b"]
)
def test_malformed_host_list_is_quoted(text):
    with pytest.raises(LaunchError, match=re.escape(repr(text))):
        expand(text)


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("16") == [16]
    for text in ("", "2(3)", "2(x3", "2(x3),", "two"):
        with pytest.raises(LaunchError, match=re.escape(repr(text))):
            tasks_per_node(text)
