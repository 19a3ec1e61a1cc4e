"""Which profile counts at init: the cache, the shipped one or a probe, and who on a node finds out."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch

from commlayer import BackendUnavailable
from commlayer.capability import CapabilitySet, Profile, Request, Rule
from commlayer.probe import Identity, cached, keep, policy
from commlayer.settings import Settings

CPU = torch.device("cpu")
SUM, BROADCAST = Request("all_reduce", "sum"), Request("broadcast")


def profile(*ops: str, note: str = "") -> Profile:
    """What a prober could have found about the backend smoke on the machine of the tests."""
    rules = [Rule("native", frozenset({op}), source="probe") for op in ops]
    if note:
        rules.append(Rule("absent", frozenset({"barrier"}), source="probe", note=note))
    identity = Identity.named("smoke", "1.0", CPU)
    return Profile("smoke as probed", tuple(rules), "smoke", "", identity.versions(), {"probe": "made up"})


SHIPPED = profile("send")


class Seat:
    """As much of a communicator as the policy sees; ``table`` and ``turn`` are common to the ranks."""

    name, device = "smoke", CPU

    def __init__(self, rank: int, table: list[bytes], turn: threading.Barrier, timeout: float) -> None:
        self.rank, self.table, self.turn, self.timeout = rank, table, turn, timeout

    def version(self) -> str:
        return "1.0"

    def share(self, value: bytes) -> list[bytes]:
        self.table[self.rank] = value
        self.turn.wait(30)
        values = list(self.table)
        self.turn.wait(30)
        return values


def none_is_shipped():
    raise BackendUnavailable("backend smoke: no capability profile is shipped for it")


def start(monkeypatch, hosts, answers, setting="auto", trusted=False, timeout=600.0, shipped=lambda: SHIPPED):
    """Each rank's profile or error, and on which hosts it was probed. ``answers`` are by host."""
    probed: Counter[str] = Counter()
    here = threading.local()

    def probe(name, seconds):
        assert name == "smoke"
        together.wait(30)  # else the first to end would have filled the cache for the others
        probed[here.host] += 1
        limits.append(seconds)
        answer = answers[here.host]
        if isinstance(answer, Exception):
            raise answer
        return answer

    limits: list[float] = []
    together = threading.Barrier(max(len(answers), 1))
    monkeypatch.setattr(policy, "probe", probe)
    monkeypatch.setattr(policy.socket, "gethostname", lambda: here.host)
    results = [None] * len(hosts)

    def run(seat, host):
        here.host = host
        try:
            results[seat.rank] = policy.obtain(seat, setting, trusted, shipped)
        except (BackendUnavailable, ValueError) as error:
            results[seat.rank] = error

    table, turn = [b""] * len(hosts), threading.Barrier(len(hosts))
    seats = [Seat(rank, table, turn, timeout) for rank in range(len(hosts))]
    running = [threading.Thread(target=run, args=pair) for pair in zip(seats, hosts, strict=True)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(30)
    assert not any(thread.is_alive() for thread in running)
    return results, probed, limits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "commlayer" / "profiles"


def test_one_rank_of_each_node_probes_and_the_nodes_are_intersected(monkeypatch, cache):
    lame = profile("all_reduce")
    lame = replace(lame, rules=(*lame.rules, Rule("hang", frozenset({"broadcast"}), source="probe")))
    answers = {"a": profile("all_reduce", "broadcast"), "b": lame}
    results, probed, limits = start(monkeypatch, "aabab", answers)
    assert results == [answers[host] for host in "aabab"]
    assert probed == {"a": 1, "b": 1}
    assert limits == [policy.SECONDS] * 2
    sets = [CapabilitySet((result,)) for result in results]
    agreed = sets[0].agreed(each.to_bytes() for each in sets)
    assert agreed.native(SUM)
    assert not agreed.native(BROADCAST)
    # It is kept, in one folder of both nodes: the next start asks nobody, and knows what either found wrong.
    assert len(list(cache.iterdir())) == 1
    results, probed, _ = start(monkeypatch, "aab", {})
    assert not probed
    for result in results:
        assert CapabilitySet((result,)).native(SUM)
        assert CapabilitySet((result,)).status(BROADCAST)[0] == "hang"


def test_where_a_probe_cannot_be_run_the_shipped_profile_counts(monkeypatch, cache, capsys):
    """As with one device for each process, of which two ranks cannot be made."""
    answers = {"a": profile("all_reduce"), "b": BackendUnavailable("backend smoke cannot be probed: no fire")}
    results, _, _ = start(monkeypatch, "abab", answers)
    assert results[1] == results[3] == SHIPPED
    assert "no fire; so its shipped profile" in capsys.readouterr().err


def test_a_probe_that_cannot_be_run_is_the_same_error_on_all_ranks(monkeypatch, cache):
    answers = {"a": profile("all_reduce"), "b": BackendUnavailable("backend smoke cannot be probed: no fire")}
    results, probed, _ = start(monkeypatch, "abab", answers, shipped=none_is_shipped)
    assert [str(result) for result in results] == ["backend smoke cannot be probed: no fire"] * 4
    assert {type(result) for result in results} == {BackendUnavailable}
    assert probed == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("setting", "trusted", "in_cache", "expected", "probes"),
    [
        ("auto", True, False, "shipped", 0),
        ("auto", True, True, "cached", 0),
        ("auto", False, False, "probed", 1),
        ("auto", False, True, "cached", 0),
        ("never", False, False, "shipped", 0),
        ("never", True, True, "cached", 0),
        ("always", True, False, "probed", 1),
        ("always", True, True, "probed", 1),
        ("always", False, True, "probed", 1),
    ],
)
def test_the_order_of_precedence(monkeypatch, setting, trusted, in_cache, expected, probes):
    kinds = {"shipped": SHIPPED, "cached": profile("broadcast"), "probed": profile("all_reduce")}
    if in_cache:
        keep(kinds["cached"])
    results, probed, _ = start(monkeypatch, "aa", {"a": kinds["probed"]}, setting, trusted)
    assert results == [kinds[expected]] * 2
    assert probed.total() == probes


def test_a_damaged_file_in_the_cache_is_named_on_all_ranks(monkeypatch, cache):
    path = keep(profile("all_reduce"))
    for damaged in ("{", path.read_text()[:-20], "\xff", path.read_text().replace('"smoke": "1.0"', '"smoke": "0.9"')):
        path.write_text(damaged, encoding="latin-1")
        results, probed, _ = start(monkeypatch, "aab", {})
        for result in results:
            assert isinstance(result, ValueError)
            assert str(path) in str(result)
            assert "commlayer probe --backend smoke" in str(result)
        assert not probed
    # Asking for a probe makes it anew.
    fresh = profile("broadcast")
    assert start(monkeypatch, "a", {"a": fresh}, "always")[0] == [fresh]
    assert start(monkeypatch, "a", {})[0] == [fresh]


def test_a_probe_stays_within_the_jobs_timeout_and_is_not_kept_if_that_cut_it_short(monkeypatch, cache, capfd):
    short = profile("all_reduce", note="not probed: the time of 10 s was over")
    results, _, limits = start(monkeypatch, "aa", {"a": short}, timeout=20.0)
    assert results == [short] * 2
    assert limits == [10.0]
    assert not cache.exists()
    said = capfd.readouterr().err
    assert "10 s at most" in said
    assert "so not kept" in said
    start(monkeypatch, "aa", {"a": profile("all_reduce")}, timeout=20.0)  # in time, though
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_no_obstacle(monkeypatch, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(policy, "cached", lambda identity: None)
    made = profile("all_reduce")
    assert start(monkeypatch, "aa", {"a": made})[0] == [made] * 2
    assert "cannot be kept" in capfd.readouterr().err


def test_versions_and_devices_have_files_of_their_own(monkeypatch, tmp_path):
    one, other = (Identity.named("smoke", version, CPU) for version in ("1.0", "1,0"))
    assert one.path != other.path
    keep(profile("all_reduce"))
    assert cached(one).rules == profile("all_reduce").rules
    assert cached(other) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the XDG specification
    monkeypatch.setenv("HOME", str(tmp_path))
    assert one.path.is_relative_to(tmp_path / ".cache")


def test_the_setting_is_checked():
    assert Settings.from_env({}).probe == "auto"
    assert Settings.from_env({"COMMLAYER_PROBE": "Never"}).probe == "never"
    with pytest.raises(ValueError, match=r"COMMLAYER_PROBE='perhaps'.*never"):
        Settings.from_env({"COMMLAYER_PROBE": "perhaps"})
