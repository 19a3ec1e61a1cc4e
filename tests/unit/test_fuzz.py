"""Damaged profiles, hostile variables, absurd notations: a right answer or one clear error, soon and cheaply."""

import json
import os
import resource
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commlayer.capability import (
    DTYPES,
    EVERYTHING,
    OPS,
    SHIPPED,
    STATUSES,
    CapabilitySet,
    Profile,
    Request,
    Rule,
    load_profile,
    parse_disabled,
    shipped_profiles,
)
from commlayer.errors import LaunchError
from commlayer.hostlist import expand, tasks_per_node
from commlayer.launch import _ROWS, LAUNCHERS, Launch, discover
from commlayer.mesh import Mesh
from commlayer.reduce_op import NAMES as REDUCE_NAMES
from commlayer.settings import POLICIES, VARIABLES, Settings

EXAMPLES = int(os.environ.get("COMMLAYER_TEST_EXAMPLES", "800"))
SECONDS = 2.0  # for one call, on a busy machine
MEBIBYTES = 512  # of memory beyond the largest the process had before


def fuzz(share=1.0):
    return settings(
        max_examples=max(50, int(EXAMPLES * share)),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def attempt(error, function, *arguments, **options):
    """What a function returns, and None; or None, and the error of exactly this kind that it refuses with.

    It neither takes long nor much memory.
    """
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = refusal = None
    try:
        result = function(*arguments, **options)
    except error as caught:
        refusal = caught
    took = time.process_time() - began
    grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert took < SECONDS, f"took {took:.1f} s"
    assert grew < MEBIBYTES, f"took {grew:.0f} MiB"
    assert type(refusal) in (error, type(None))
    return result, refusal


# Profiles -------------------------------------------------------------------------------------------------

TEXTS = [(SHIPPED / f"{name}.json").read_bytes() for name in shipped_profiles()]
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.just(10**400),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from([*OPS, *REDUCE_NAMES, *STATUSES, "\x00", "\ud800", "x" * 10_000]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def places(data, path=()):
    """Every place in a JSON document."""
    yield path
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def damaged_bytes(draw):
    """A shipped profile with some bytes flipped, cut, put in or doubled."""
    text = bytearray(draw(st.sampled_from(TEXTS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "double", "remove"]))
        if kind == "flip" and at < len(text):
            text[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del text[at:]
        elif kind == "insert":
            text[at:at] = draw(st.binary(max_size=8) | st.sampled_from([b'"', b"[", b"{", b",", b"NaN", b"-1e999"]))
        elif kind == "double":
            text[at:at] = text[at : at + draw(st.integers(1, 200))]
        else:
            del text[at : at + draw(st.integers(1, 200))]
    return bytes(text)


@st.composite
def damaged_values(draw):
    """A shipped profile with a value replaced by any other, or a key renamed or added."""
    data = json.loads(draw(st.sampled_from(TEXTS)))
    path = draw(st.sampled_from(list(places(data))))
    value = draw(VALUES)
    if not path:
        return json.dumps(value).encode()
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    if isinstance(parent, dict) and draw(st.booleans()):
        parent[draw(st.text(max_size=6))] = parent.pop(path[-1])
    else:
        parent[path[-1]] = value
    return json.dumps(data).encode()


def deep(inner, depth):
    return "[" * depth + inner + "]" * depth


HEAD = '{"schema": "commlayer.capabilities/1", "name": "x", "rules": '
BOMBS = {
    "nested lists": deep("", 100_000),
    "nested objects": '{"a":' * 100_000,
    "nested rule": HEAD + deep("", 900) + "}",
    "nested status": HEAD + '[{"status": ' + deep("", 950) + "}]}",
    "nested ops": HEAD + '[{"status": "native", "ops": ' + deep("1", 950) + "}]}",
    "nested summary": HEAD + '[], "summary": ' + deep("", 970) + "}",
    "nested name": HEAD.replace('"x"', deep("", 980)) + "[]}",
    "a huge integer": HEAD + "9" * 100_000 + "}",
    "a huge integer as status": HEAD + '[{"status": ' + "9" * 4000 + "}]}",
    "a huge exponent": HEAD + "1e999999999}",
    "NaN": HEAD + '[{"status": NaN}]}',
    "infinity": HEAD + "-Infinity}",
    "rules twice": HEAD + '[{"status": "native"}], "rules": []}',
    "status twice": HEAD + '[{"status": "native", "status": "absent"}]}',
    "many keys": HEAD + "[{" + ",".join(f'"{n}": 1' for n in range(50_000)) + "}]}",
    "the same key often": "{" + '"a": 1,' * 50_000 + '"a": 1}',
    "a byte order mark": "\ufeff" + HEAD + "[]}",
    "two documents": HEAD + "[]}" + HEAD + "[]}",
    "nothing but blanks": " " * 1_000_000,
}


def read(content, path):
    """The profile in a file, or None where it is refused by name."""
    path.write_bytes(content)
    profile, refusal = attempt(ValueError, load_profile, str(path))
    assert refusal is None or str(path) in str(refusal)
    return profile


@fuzz()
@given(content=st.one_of(damaged_bytes(), damaged_values(), st.binary(max_size=64)))
def test_a_damaged_profile_is_refused_by_name_or_is_a_profile(content, tmp_path_factory):
    profile = read(content, tmp_path_factory.getbasetemp() / "damaged.json")
    if profile is not None:
        assert Profile.from_json(profile.to_json(), "again") == profile
        CapabilitySet((profile,)).status(Request("all_reduce", "sum"))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_name(name, tmp_path):
    assert read(BOMBS[name].encode(), tmp_path / "bomb.json") is None


def test_invalid_utf8_is_refused_by_name(tmp_path):
    for content in (b"\xff\xfe{}", HEAD.encode()[:-9] + b'"\xc3"}', "{}".encode("utf-16")):
        assert read(content, tmp_path / "latin.json") is None


@pytest.mark.parametrize(
    "name", ["", " ", "\x00", "a\x00b", "x" * 5000, "/" * 5000, "..", "/", "\ud800", "*", "xccl-2.8/", "XCCL-2.8"]
)
def test_a_name_that_is_no_profile(name):
    with pytest.raises(ValueError, match="only-all-reduce") as caught:
        load_profile(name)
    assert repr(name) in str(caught.value)


def names(known):
    return st.none() | st.frozensets(st.sampled_from(sorted(known)), max_size=4)


TEXT = st.text(max_size=20)
PROFILES = st.builds(
    Profile,
    name=TEXT,
    rules=st.lists(
        st.builds(
            Rule,
            status=st.sampled_from(STATUSES),
            ops=names(OPS),
            reduce=names(REDUCE_NAMES),
            dtypes=names(DTYPES) | st.frozensets(TEXT, max_size=3),
            devices=st.none() | st.frozensets(TEXT, max_size=2),
            layouts=names({"even", "uneven"}),
            source=TEXT,
            note=TEXT,
        ),
        max_size=6,
    ).map(tuple),
    backend=TEXT,
    summary=TEXT,
    versions=st.dictionaries(TEXT, TEXT, max_size=3),
    sources=st.dictionaries(TEXT, TEXT, max_size=3),
)


@fuzz(0.3)
@given(PROFILES)
def test_a_profile_survives_its_file(profile):
    assert Profile.from_json(profile.to_json(), "a test") == profile


@fuzz(0.1)
@given(st.lists(PROFILES, min_size=1, max_size=3), st.sampled_from(["", "all_to_all,all_reduce:avg@bfloat16"]))
def test_ranks_agree_on_what_all_can_do(profiles, disable):
    sets = [CapabilitySet((profile,), parse_disabled(disable)) for profile in profiles]
    agreed = sets[0].agreed([one.to_bytes() for one in sets])
    assert agreed.digest() == sets[-1].agreed([one.to_bytes() for one in sets]).digest()
    for request in (Request("all_reduce", "sum"), Request("all_to_all"), Request("recv"), Request("barrier")):
        assert agreed.native(request) == all(one.native(request) for one in sets)


@fuzz(0.3)
@given(
    st.one_of(
        st.binary(max_size=64),
        damaged_bytes(),
        st.builds(lambda data: json.dumps(data).encode(), VALUES),
        st.builds(
            lambda profiles, disabled: json.dumps({"profiles": profiles, "disabled": disabled}).encode(), VALUES, VALUES
        ),
        st.just(b"[" * 100_000),
        st.just(b'{"profiles": [], "disabled": ' + b"[" * 990 + b"]" * 990 + b"}"),
    )
)
def test_what_another_rank_sends_is_refused_or_agreed_with(text):
    mine = CapabilitySet((EVERYTHING,))
    agreed, refusal = attempt(ValueError, mine.agreed, [mine.to_bytes(), text])
    assert isinstance(agreed, CapabilitySet) if refusal is None else "another rank" in str(refusal)


# Launchers ------------------------------------------------------------------------------------------------

_USED = {
    name for row in _ROWS.values() for field, value in vars(row).items() if field != "same" for name in value.split()
}
LAUNCH_VARIABLES = sorted(_USED | {"MASTER_ADDR", "MASTER_PORT", "COMMLAYER_LAUNCHER"})
NUMBERS = st.integers(0, 9).map(str)
HOSTILE = st.sampled_from(
    [
        *("", " ", "0", "-1", "1.5", "1e9", "+1", "٣", "²", "0x10", " 3 ", "none", "nan", "9" * 30, "9" * 10_000),
        *("2(x3),1", "1(x999999999999)", "9(x", "n[0-999999999999]", "n[" + "0" * 9999 + "1-2]", "nid[001-002]"),
        *("r[0-99999]n[0-99999]", "n[1-3", "a,b", ",", "/dev/null", "/dev/zero", "/", "/nonexistent", "x" * 10_000),
        *("$(reboot)", "'; drop table ranks", "\udcff\udc80", "host name", "65536", "\n"),
    ]
)
ANY_VALUE = st.one_of(
    NUMBERS,
    NUMBERS,
    HOSTILE,
    st.sampled_from(LAUNCHERS),
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20),
)
HOST_CHARACTERS = st.text("nid019-[],. (x)٣", max_size=30)
HOST_BOMBS = [
    "n[0-999999999999]",
    "n[0-99999999999999999999]",
    "n[0-999999][0-999999]",
    "n" + "[0-9]" * 12,
    "n[" + ",".join(["0-1000000"] * 50) + "]",
    ",".join(f"n{i}[0-999999]" for i in range(50)),
    "n[" + "0" * 100_000 + "1-2]",
    "n[" + "9" * 5000 + "]",
    "n[0-9" * 20_000,
    "n" * 100_000 + "[",
    "," * 100_000,
    "[" * 100_000,
    "n[1]" * 1000 + " ",
]


@fuzz()
@given(
    st.dictionaries(st.sampled_from(LAUNCH_VARIABLES), ANY_VALUE, max_size=8)
    | st.sampled_from(sorted(_ROWS)).flatmap(  # all variables of one launcher, so that more is read than the first
        lambda name: st.fixed_dictionaries(
            {
                variable: ANY_VALUE
                for field, value in vars(_ROWS[name]).items()
                if field != "same"
                for variable in value.split()
            }
        )
    )
)
def test_any_environment_gives_a_launch_or_a_launch_error(env):
    launch, refusal = attempt(LaunchError, discover, env)
    if refusal is not None:
        assert any(variable in str(refusal) for variable in env)
        return
    assert isinstance(launch, Launch)
    assert launch.launcher in LAUNCHERS
    assert launch.rank >= 0
    assert launch.size is None or launch.rank < launch.size
    assert launch.local_rank is None or launch.local_rank >= 0
    assert None in (launch.local_rank, launch.local_size) or launch.local_rank < launch.local_size
    assert launch.master_port is None or 0 <= launch.master_port < 65536
    for shown in launch.variables.values():
        variable, value = shown.split("=", 1)
        assert env[variable] == value


@fuzz(0.5)
@given(st.one_of(HOST_CHARACTERS, HOSTILE, st.text(max_size=20), st.sampled_from(HOST_BOMBS)))
def test_any_host_list(text):
    for function in (expand, tasks_per_node):
        found, refusal = attempt(LaunchError, function, text)
        assert found if refusal is None else repr(text) in str(refusal)


@pytest.mark.parametrize("text", ["1(x999999999999)", "1(x" + "9" * 5000 + ")", ",".join(["1(x1000000)"] * 100)])
def test_tasks_of_too_many_nodes(text):
    assert attempt(LaunchError, tasks_per_node, text)[1] is not None


def test_as_many_hosts_as_the_largest_machines_have():
    assert len(expand("c[000000-199999]")) == 200_000
    assert len(expand("r[0-99]c[0-99]n[0-9]")) == 100_000
    assert sum(tasks_per_node("4(x200000)")) == 800_000


# Settings and meshes --------------------------------------------------------------------------------------


@fuzz()
@given(
    st.dictionaries(
        st.sampled_from(sorted(VARIABLES)),
        HOSTILE
        | st.text(max_size=12)
        | st.sampled_from([*POLICIES, "1", "0.5", "inf", "1e400", "1_0", "auto", "GLOO"]),
    )
)
def test_any_settings(env):
    found, refusal = attempt(ValueError, Settings.from_env, env)
    if refusal is not None:
        assert any(f"{name}={value!r}" in str(refusal) for name, value in env.items())
        return
    assert found.fallback in POLICIES
    assert found.timeout is None or 0 < found.timeout < 1e9
    assert found.backend == found.backend.lower() != ""


ITEMS = st.builds(
    lambda op, words, dtype: ":".join([op, *words]) + dtype,
    st.sampled_from([*OPS, "allreduce", ""]),
    st.lists(st.sampled_from([*REDUCE_NAMES, "even", "uneven", "mean", ""]), max_size=3),
    st.sampled_from(["", "@", "@float32", "@float33", "@@", "@bfloat16@bfloat16"]),
)


@fuzz(0.3)
@given(st.lists(ITEMS | st.text(max_size=10), max_size=4).map(",".join))
def test_any_disabled_capabilities(text):
    rules, refusal = attempt(ValueError, parse_disabled, text)
    if refusal is not None:
        assert "matches nothing" in str(refusal)
        return
    sent = CapabilitySet((), rules)
    assert sent.agreed([sent.to_bytes()]).disabled == rules


MESH_NAMES = st.sampled_from(["dp", "tp", "pp", "cp", "ep", "x", "_", "9", "", "dp-tp", "é"])
MESH_SIZES = st.sampled_from(
    ["1", "2", "3", "-1", "0", "-2", "", "1.5", "٣", "1000000000", "9" * 30, "9" * 10_000, "1e3", " 2", "=2"]
)
MESH_SPECS = st.lists(st.builds(lambda name, size: f"{name}={size}", MESH_NAMES, MESH_SIZES), max_size=4).map(" ".join)


@fuzz()
@given(
    MESH_SPECS | st.text("dpt=12- ", max_size=12) | st.just(" ".join(f"a{n}=1" for n in range(100))),
    st.none() | st.sampled_from(["dp-tp", "tp-dp", "", "-", "dp--tp", "dp"]),
    st.none() | st.sampled_from([1, 2, 6, 64, 0, -4, 10**12]),
)
def test_any_mesh(spec, order, world_size):
    mesh, refusal = attempt(ValueError, Mesh, spec, order, world_size=world_size)
    if refusal is not None:
        assert str(refusal).startswith(("mesh ", "order "))
        return
    assert mesh.world_size == world_size or world_size is None
    last = mesh.world_size - 1
    assert mesh.rank_of(**mesh.coords(last)) == last
    for axis in mesh.axes:
        assert sorted(rank for ranks in mesh.groups(axis) for rank in ranks) == list(range(mesh.world_size))


@fuzz(0.3)
@given(MESH_SPECS.map(lambda spec: spec.replace("dp", "ep").replace("tp", "etp").replace("cp", "edp")))
def test_any_fold(spec):
    mesh, refusal = attempt(ValueError, Mesh("dp=4 tp=2 pp=3").fold, spec)
    assert mesh.world_size == 24 if refusal is None else str(refusal).startswith(("mesh ", "fold "))
