"""Profile files: damaged ones are named, and the right one is found for a version."""

import json

import pytest

from commlayer import run_local
from commlayer.capability import Request, load_profile, profile_for, shipped_profiles

GOOD = {"schema": "commlayer.capabilities/1", "name": "mine", "rules": [{"status": "native", "ops": ["all_reduce"]}]}


def rule(**columns):
    return {**GOOD, "rules": [{"status": "native"}, {"status": "native", **columns}]}


DAMAGED = {
    "no JSON": ("{", "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "a list": ("[]", "schema.*list"),
    "another schema": ({**GOOD, "schema": "commlayer.capabilities/2"}, "schema.*capabilities/2"),
    "no schema": ({"name": "mine", "rules": []}, "schema.*None"),
    "no name": ({"schema": GOOD["schema"], "rules": []}, "name"),
    "name a number": ({**GOOD, "name": 3}, "name"),
    "no rules": ({"schema": GOOD["schema"], "name": "mine"}, "rules"),
    "rules an object": ({**GOOD, "rules": {}}, "rules"),
    "a rule no object": ({**GOOD, "rules": ["native"]}, "rule 0"),
    "no status": ({**GOOD, "rules": [{}]}, "rule 0: status"),
    "unknown status": (rule(status="perhaps"), "rule 1: status must be one of native.*perhaps"),
    "status a list": (rule(status=["native"]), "rule 1: status"),
    "unknown op": (rule(ops=["allreduce"]), "rule 1: unknown ops.*allreduce"),
    "ops a string": (rule(ops="all_reduce"), "rule 1: ops must be a list"),
    "ops of numbers": (rule(ops=[1]), "rule 1: ops must be a list"),
    "unknown reduce": (rule(reduce=["mean"]), "rule 1: unknown reduce.*mean"),
    "unknown layout": (rule(layouts=["ragged"]), "rule 1: unknown layouts.*ragged"),
    "unknown column": (rule(dtype=["float32"]), "rule 1: unknown columns.*dtype"),
    "sources a list": ({**GOOD, "sources": []}, "sources"),
    "sources null": ({**GOOD, "sources": None}, "sources"),
    "source of a rule a list": (rule(source=["S1"]), "rule 1: source"),
    "note a number": (rule(note=3), "rule 1: note"),
    "versions a string": ({**GOOD, "versions": "2.8"}, "versions"),
    "summary a list": ({**GOOD, "summary": []}, "summary"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_profile_is_named(name, tmp_path):
    content, message = DAMAGED[name]
    path = tmp_path / "damaged.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_profile(str(path))
    assert "damaged.json" in str(caught.value)
    with pytest.raises(ValueError, match=r"damaged\.json"):
        run_local(lambda: None, 2, profile=str(path))


def test_an_unreadable_profile_is_named(tmp_path):
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "latin.json", tmp_path, tmp_path / "missing.json"):
        with pytest.raises(ValueError, match="only-all-reduce") as caught:
            load_profile(str(path))
        assert str(path) in str(caught.value)


def test_a_profile_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rule(dtypes=["float128"])))  # a dtype of another torch is no error
    assert load_profile(str(path)).rule(Request("send")).status == "native"


@pytest.mark.parametrize(
    ("backend", "version", "found"),
    [
        ("xccl", "2.7.1", "xccl-2.7"),
        ("xccl", "2.8.0+xpu", "xccl-2.8"),
        ("xccl", "2.10.0", "xccl-2.8"),
        ("xccl", "2.11", "xccl-2.11"),
        ("xccl", "2.12.0a0+git1", "xccl-2.11"),
        ("xccl", "2.13.1", "xccl-2.13"),
        ("xccl", "3.0", "xccl-2.13"),
        ("xccl", "2.6", "xccl-2.7"),
        ("nccl", "2.30.4", "nccl-2.27"),
        ("mpi", "4", "mpi-4"),
    ],
)
def test_the_newest_profile_not_newer_is_taken(backend, version, found):
    assert profile_for(backend, version).name == found


def test_no_profile_for_an_unknown_backend():
    assert profile_for("smoke", "1.0") is None
    assert profile_for("only", "1.0") is None
    assert "xccl-2.8" in shipped_profiles()
