"""kernel.c against commlayer.arithmetic and plain Python, and how it is built; one process."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from commlayer.arithmetic import combine
from commlayer.backends.shared import kernel
from commlayer.backends.shared.meeting import LINE, Meeting
from commlayer.backends.shared.sums import reducer
from commlayer.errors import CommError, CommTimeout, PeerLost

LIBRARY = kernel.load()
needs_compiler = pytest.mark.skipif(LIBRARY is None, reason="no C compiler here")
COUNTS = [0, 1, 2, 7, 8, 9, 15, 31, 33, 511, 512, 513, 1025, 5000]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all: of floats many are NaN, infinite, denormal, or too large to be added up."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=random).view(dtype)


def hard(dtype: torch.dtype) -> torch.Tensor:
    """Values at the edges of a float type, and next to ties of its rounding."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -1.0, info.max, -info.max, info.tiny, -info.tiny, info.smallest_normal / 2, info.eps]
    values += [
        1 + info.eps,
        1 + 2 * info.eps,
        1 + 3 * info.eps,
        info.eps / 2,
        -info.eps / 2,
        info.eps * 1.5,
        info.max / 2,
    ]
    values += [float("inf"), float("-inf"), float("nan"), info.max * info.eps / 4, 2.0**-24, 3 * 2.0**-25]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def unlike(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two tensors have other bits; any NaN is as good as another."""
    width = SIGNED[a.dtype.itemsize]
    different = a.view(width) != b.view(width)
    return different & ~(a.isnan() & b.isnan()) if a.dtype.is_floating_point else different


def run(op: str, rows: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    add = reducer(LIBRARY, op, rows[0].dtype)
    add([x.data_ptr() for x in targets], [x.data_ptr() for x in rows], rows[0].nbytes)


@needs_compiler
@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize(
    ("op", "dtype"), [*itertools.product(["sum", "avg"], FLOATS), *(("sum", dtype) for dtype in INTEGERS)], ids=str
)
def test_every_bit_is_as_from_torch(op: str, dtype: torch.dtype, ranks: int) -> None:
    for count in COUNTS:
        rows = [bits(count, dtype, 100 * count + rank) for rank in range(ranks)]
        out, second = torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
        run(op, rows, [out, second])
        expected = combine(rows, op)
        assert not unlike(out, expected).any(), (count, out[unlike(out, expected)], expected[unlike(out, expected)])
        assert torch.equal(out.view(torch.uint8), second.view(torch.uint8))


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", ["sum", "avg"])
def test_edges_ties_and_overflow(op: str, dtype: torch.dtype) -> None:
    edges = hard(dtype)
    rows = [part.reshape(-1).clone() for part in torch.meshgrid(edges, edges, edges, indexing="ij")]
    out = torch.empty_like(rows[0])
    run(op, rows, [out])
    wrong = unlike(out, combine(rows, op))
    assert not wrong.any(), [(*(row[wrong][0].item() for row in rows), out[wrong][0].item())]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_half_type_comes_back(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    nothing = torch.full_like(every, -0.0)
    out = torch.empty_like(every)
    run("sum", [every, nothing], [out])
    assert not unlike(out, every).any()


@needs_compiler
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64], ids=str)
def test_in_place_and_nothing_beside_it(dtype: torch.dtype, place: int) -> None:
    for count in COUNTS:
        for shift in (0, 1, 3):  # elements: so that vectors begin anywhere
            rows = [torch.zeros(count + 20, dtype=dtype) + 5 for _ in range(3)]
            for rank, row in enumerate(rows):
                row[shift : shift + count] = (torch.arange(count) % 7 + rank).to(dtype)
            before = [row.clone() for row in rows]
            inner = [row[shift : shift + count] for row in rows]
            expected = combine([part.clone() for part in inner], "sum")
            run("sum", inner, [inner[place]])
            assert torch.equal(inner[place], expected)
            before[place][shift : shift + count] = expected
            assert all(torch.equal(row, old) for row, old in zip(rows, before, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32], ids=str)
def test_memory_at_odd_addresses(dtype: torch.dtype) -> None:
    raw = [torch.zeros(4000, dtype=torch.uint8) for _ in range(3)]
    rows = [(torch.arange(333) % 5 + rank).to(dtype) for rank in range(2)]
    for memory, row in zip(raw, rows, strict=False):
        memory[1 : 1 + row.nbytes] = row.view(torch.uint8)
    add = reducer(LIBRARY, "sum", dtype)
    add([raw[2].data_ptr() + 1], [raw[0].data_ptr() + 1, raw[1].data_ptr() + 1], rows[0].nbytes)
    assert torch.equal(raw[2][1 : 1 + rows[0].nbytes].clone().view(dtype), rows[0] + rows[1])
    assert raw[2][0] == 0
    assert not raw[2][1 + rows[0].nbytes :].any()


def test_what_the_kernel_has_not_is_left_to_torch() -> None:
    for op, dtype in [("max", torch.float32), ("product", torch.bfloat16), ("sum", torch.bool), ("avg", torch.int32)]:
        assert kernel.kind(LIBRARY, op, dtype) is None
    rows = [bits(100_000, torch.float32, seed) for seed in range(3)]
    for op in ("min", "max"):
        out = torch.empty(100_000)
        run(op, rows, [out])
        assert not unlike(out, combine(rows, op)).any()
    pairs = [bits(1001, torch.complex64, seed) for seed in range(2)]
    out = torch.empty(1001, dtype=torch.complex64)
    run("sum", pairs, [out])
    assert not unlike(torch.view_as_real(out).reshape(-1), torch.view_as_real(combine(pairs, "sum")).reshape(-1)).any()


@needs_compiler
def test_copies_past_the_caches_copy_everything_and_nothing_else() -> None:
    source = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    for size in [0, 1, 31, 32, 33, 127, 128, 129, 160, 257, 1000, 4096]:
        for to in (0, 1, 17, 31, 32, 63):
            for start in (0, 1, 30):
                target = torch.zeros(5000, dtype=torch.uint8)
                LIBRARY.copy_past(target.data_ptr() + to, source.data_ptr() + start, size)
                assert torch.equal(target[to : to + size], source[start : start + size])
                assert not target[:to].any()
                assert not target[to + size :].any()


# Meetings


class Alone:
    """What a Meeting asks of its communicator."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.failure: CommError | None = None
        self.asked = 0

    def progress(self) -> None:
        self.asked += 1


@pytest.fixture(params=["kernel", "python"])
def library(request: pytest.FixtureRequest) -> object:
    if request.param == "kernel" and LIBRARY is None:
        pytest.skip("no C compiler here")
    return LIBRARY if request.param == "kernel" else None


def meetings(library: object, size: int, memory: object, crowded: bool, step: int = 0) -> list[Meeting]:
    found = [Meeting(library, ctypes.addressof(memory), Alone(rank, size), crowded) for rank in range(size)]  # type: ignore[arg-type]
    for rank, meeting in enumerate(found):
        meeting._step = step
        ctypes.c_uint32.from_address(ctypes.addressof(memory) + LINE * rank).value = step  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("crowded", [True, False])
@pytest.mark.parametrize("step", [0, (1 << 31) - 40, (1 << 32) - 40], ids=["from 0", "past the sign", "past the end"])
def test_nobody_leaves_a_meeting_before_all_have_come(library: object, crowded: bool, step: int) -> None:
    size, rounds = 4, 150
    memory = (ctypes.c_char * (LINE * size + LINE))()
    arrived, early = [0] * size, []

    def rank(meeting: Meeting) -> None:
        for number in range(1, rounds + 1):
            arrived[meeting.rank] = number
            if number % 50 == meeting.rank:
                time.sleep(0.002)  # so that the others fall asleep
            meeting.meet(time.perf_counter() + 20, True)
            if min(arrived) < number:
                early.append((meeting.rank, number, list(arrived)))

    threads = [threading.Thread(target=rank, args=(one,)) for one in meetings(library, size, memory, crowded, step)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert arrived == [rounds] * size
    assert not early


def test_sleepers_are_woken_by_the_one_they_wait_for(library: object) -> None:
    size = 4
    memory = (ctypes.c_char * (LINE * size))()
    ranks = meetings(library, size, memory, True)
    late: list[float] = []

    def sleep(meeting: Meeting) -> None:
        missing = meeting._once(1, 0, 900_000_000)  # nanoseconds: so long if nobody wakes them
        late.append(time.perf_counter() - come if not missing else 1.0)

    threads = [threading.Thread(target=sleep, args=(meeting,)) for meeting in ranks[:-1]]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    come = time.perf_counter()
    assert ranks[-1]._once(1, 0, 900_000_000) == 0
    for thread in threads:
        thread.join()
    assert max(late) < 0.4


def test_who_waits_alone_hears_of_failures_and_deadlines(library: object) -> None:
    memory = (ctypes.c_char * (LINE * 3))()
    meeting = meetings(library, 2, memory, True)[0]
    comm = meeting._comm
    start = time.perf_counter()
    with pytest.raises(CommTimeout):
        meeting.meet(start + 0.1, True)
    assert 0.1 <= time.perf_counter() - start < 2
    assert comm.asked > 3  # type: ignore[attr-defined]
    comm.asked = 0  # type: ignore[attr-defined]
    threading.Timer(0.05, lambda: setattr(comm, "failure", PeerLost("gone"))).start()
    with pytest.raises(PeerLost, match="gone"):
        meeting.meet(time.perf_counter() + 20, False)
    assert comm.asked == 0  # type: ignore[attr-defined]


# Building


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder of its own, no bytecode beside the source, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel, "SOURCE", Path(shutil.copy(kernel.SOURCE, tmp_path)))
    kernel.load.cache_clear()
    yield tmp_path / "commlayer"
    kernel.load.cache_clear()


@pytest.mark.parametrize("compiler", ["/bin/false", "no-such-compiler -x", "/bin/true", "unclosed '"])
def test_without_a_compiler_there_is_no_kernel_and_nothing_is_left(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert kernel.load() is None
    assert not [path for path in fresh.glob("*") if path.stat().st_size]


@needs_compiler
def test_it_is_built_once_whatever_the_users_mask(fresh: Path) -> None:
    before = os.umask(0o002)
    try:
        assert kernel.load() is not None
        (built,) = fresh.iterdir()
        first = built.stat().st_mtime_ns
        kernel.load.cache_clear()
        assert kernel.load() is not None
    finally:
        os.umask(before)
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [first]


def found_in(folder: Path, data: bytes, mode: int) -> None:
    """Put a file where the kernel would be."""
    assert LIBRARY is not None
    folder.mkdir()
    place = folder / Path(LIBRARY._name).name
    place.write_bytes(data)
    place.chmod(mode)


@needs_compiler
def test_a_kernel_that_others_may_write_is_not_run(fresh: Path) -> None:
    assert LIBRARY is not None
    found_in(fresh, b"somebody else's", 0o777)
    assert kernel.load() is not None, "a new one, in its place"
    (built,) = fresh.iterdir()
    assert built.stat().st_mode & 0o022 == 0


@needs_compiler
def test_rubbish_in_the_cache_costs_the_kernel_alone(fresh: Path) -> None:
    found_in(fresh, b"\x7fELF rubbish", 0o700)
    assert kernel.load() is None


def test_a_cache_that_cannot_be_written_costs_the_kernel_alone(fresh: Path) -> None:
    fresh.parent.mkdir(exist_ok=True)
    fresh.write_text("a file where the folder should be")
    assert kernel.load() is None
