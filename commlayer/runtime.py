"""init, finalize, world: the group of all ranks of this process, or of this thread under run_local."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch.distributed as dist

from commlayer import bootstrap, rendezvous
from commlayer.backends import threads, torch_native
from commlayer.backends.base import Communicator
from commlayer.control import Client
from commlayer.control.local import Board, Local
from commlayer.control.seat import Seat
from commlayer.errors import BackendUnavailable, CommError, PeerLost
from commlayer.group import Group
from commlayer.launch import Launch, discover
from commlayer.recorder import Recorder
from commlayer.settings import DEFAULT_TIMEOUT, Settings, checked_timeout
from commlayer.signals import dump_on_signal
from commlayer.trace import TraceFile
from commlayer.watchdog import Watchdog, said

LINGER = 5.0  # seconds that the end of a rank waits for the others

_world: Group | None = None
_launch: Launch | None = None
_control: Client | None = None
_dog: Watchdog | None = None  # of the last world
_generation = 0  # how often init has connected
_timeout = DEFAULT_TIMEOUT  # of the last world, in seconds
_with_the_world: list[Callable[[], None]] = []  # what ends first: torch.distributed, where it runs on the layer
_thread = threading.local()  # .world, in a thread of run_local
_runs = 0  # of run_local, under way: looking into _thread takes time


def init(backend: str | None = None, *, timeout: float | None = None) -> Group:
    """Join the job and return the group of all its ranks; call it again as often as you like.

    ``backend`` is a name from COMMLAYER_BACKEND's list and beats that variable; ``auto`` takes nccl on NVIDIA GPUs,
    xccl on Intel's, else mpi where an MPI launcher started us, else gloo; without a launcher, one process alone.
    A program that has initialised torch.distributed itself has its default group wrapped. ``timeout`` is in seconds,
    for every operation.

    Raises LaunchError, BackendUnavailable, CommTimeout; ValueError for settings, or a second, different backend.
    """
    return start(backend, timeout)


def start(backend: str | None, timeout: float | None, place: tuple[Any, Launch] | None = None) -> Group:
    """``init``; ``place`` is the store of a program that starts torch.distributed on the layer, and who it says it is.

    Its timeout counts where COMMLAYER_TIMEOUT is not set: torch always gives one.
    """
    global _world, _launch, _generation, _control, _dog, _timeout
    if timeout is not None:
        timeout = checked_timeout(timeout)
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected a name, got {backend!r}")
    current = getattr(_thread, "world", None) or _world
    if current is not None:
        if backend not in (None, "auto", current.backend):
            raise ValueError(f"backend: already running on {current.backend}, asked for {backend}; finalize() first")
        if timeout not in (None, current.timeout):
            raise ValueError(f"timeout: already running with {current.timeout:g} s, asked for {timeout:g}")
        return current
    settings = Settings.from_env()
    wanted = backend or settings.backend
    limit = settings.timeout if timeout is None or (place and settings.timeout) else timeout
    bootstrap.check(settings)
    _at_the_end()
    _dog = None
    comm: Communicator
    try:
        if place is not None:
            store, _launch = place
            chosen = bootstrap.choose(_launch) if wanted == "auto" else wanted
            comm, _control = bootstrap.connect(chosen, _launch, limit or DEFAULT_TIMEOUT, _generation + 1, store)
        elif dist.is_initialized() and wanted in ("auto", dist.get_backend()):
            comm, _control, _launch = bootstrap.wrap(limit, _generation + 1)
        else:
            _launch = discover()
            chosen = bootstrap.choose(_launch) if wanted == "auto" else wanted
            comm, _control = bootstrap.connect(chosen, _launch, limit or DEFAULT_TIMEOUT, _generation + 1)
        _generation += 1  # on every rank alike, as it would not be if failures counted
        _world = _make_world(comm, _control, settings)
    except (BackendUnavailable, ValueError):  # alike on every rank: they may try another backend
        raise
    except BaseException as error:
        rendezvous.fail(said(error))
        raise
    _dog, _timeout = _world.watch.dog, comm.timeout
    return _world


def _make_world(comm: Communicator, control: Client | Local | None, settings: Settings, generation: int = 0) -> Group:
    """The group of all ranks, watched over by the control channel."""
    generation = generation or _generation
    recorder = Recorder(comm.rank, comm.size, comm.name, settings.trace)
    trace = None
    if settings.trace is not None:
        offset = control.clock_offset() if control is not None else 0
        trace = TraceFile(
            settings.trace,
            comm.rank,
            comm.size,
            host=os.uname().nodename,
            backend=comm.name,
            clock_offset_ns=offset,
            job=f"{control.job if control is not None else os.getpid()}.{generation}",
        )
    dog = Watchdog(
        recorder,
        control,
        generation,
        rank=comm.rank,
        debug=settings.debug,
        check_nan=settings.check_nan,
        trace=trace,
    )
    if control is not None:
        ranks = range(comm.size)
        comm.seat = Seat(control, generation, dog.label(ranks), ranks, comm.progress)
        control.listen(dog.on_event)
    capabilities = bootstrap.capabilities(comm, settings)
    hosts = bootstrap.hosts(comm, settings)
    return Group(comm, range(comm.size), capabilities, settings.fallback, dog=dog, hosts=hosts)


def finalize() -> None:
    """Leave the job: release every group. Afterwards init may be called again.

    Waits for no other rank, but up to 5 seconds for this one's operations that nobody has waited for.
    """
    global _world, _launch
    if getattr(_thread, "world", None) is not None:
        raise CommError("finalize: the world of run_local ends with the function it runs")
    while _with_the_world:
        _with_the_world.pop()()
    if _world is not None:
        _world.watch.dog.bye()
        _world.close()
    _world = _launch = None


def with_the_world(end: Callable[[], None], owned: bool) -> Callable[[], None]:
    """See to it that ``finalize`` calls ``end`` first. What is returned is for an end that comes from elsewhere.

    It finalizes, if the world is ``owned`` by what has ended.
    """
    _with_the_world.append(end)

    def ended() -> None:
        if end in _with_the_world:
            _with_the_world.remove(end)
            if owned:
                finalize()

    return ended


def is_initialized() -> bool:
    return (getattr(_thread, "world", None) or _world) is not None


def world() -> Group:
    """The group of all ranks. Raises CommError before init."""
    found = getattr(_thread, "world", None) or _world
    if found is None:
        raise CommError("commlayer is not initialised: call commlayer.init() first")
    return found


def store_for_torch() -> Any:
    """A store through which torch.distributed can be started over the world's ranks."""
    group = world()
    assert _launch is not None
    if _control is None:
        return dist.HashStore()
    return rendezvous.native_store(_control, _launch, group.size, group.timeout)


def inside_run_local() -> bool:
    return getattr(_thread, "world", None) is not None


def resolve(group: Group | None) -> Group:
    """The group an operation runs on: the world where none is given."""
    if group is None:
        return _world if _world is not None and not _runs else world()
    if not isinstance(group, Group):
        raise TypeError(f"group: expected a commlayer Group, got {type(group).__name__}")
    return group


def run_local(
    fn: Callable[[], Any],
    ranks: int = 4,
    *,
    profile: str | None = None,
    disable: str = "",
    timeout: float = 60.0,
) -> list[Any]:
    """Run ``fn()`` on thread ranks of this process, each with a world of its own; their results in rank order.

    For notebooks and tests: the same functions, contracts and plans as on any backend. ``profile`` and ``disable``
    are as COMMLAYER_PROFILE and COMMLAYER_DISABLE. If a rank raises, the others get PeerLost and the first rank's
    error is raised here.

    >>> run_local(lambda: int(commlayer.all_reduce(torch.tensor(commlayer.world().rank))), ranks=3)
    [3, 3, 3]
    """
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks: expected a positive int, got {ranks!r}")
    settings = Settings(profile=profile, disable=disable)
    seats = threads.new_world(ranks, checked_timeout(timeout))
    board = Board(ranks)
    results: list[Any] = [None] * ranks
    errors: list[tuple[int, BaseException]] = []

    global _runs

    def run(seat: threads.Threads) -> None:
        control = board.seats[seat.rank]
        try:
            _thread.world = _make_world(seat, control if ranks > 1 else None, settings, generation=1)
            results[seat.rank] = fn()
            _thread.world.watch.dog.bye()
        except BaseException as error:
            errors.append((seat.rank, error))
            control.tell({"event": "failed", "why": said(error)})
        finally:
            _thread.world = None

    started = [threading.Thread(target=run, args=(seat,), daemon=True) for seat in seats]
    _runs += 1
    try:
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    finally:
        _runs -= 1
    if errors:
        # Lost peers are a consequence; the error that started it is the news.
        raise min(errors, key=lambda item: (isinstance(item[1], PeerLost), item[0]))[1]
    return results


# The end of the process. A rank that ends with an error tells the others why; one whose groups are broken must not
# end in MPI_Finalize, which would wait for ranks that wait for it.


@cache
def _at_the_end() -> None:
    """Once in a process: what its end must not leave out."""
    previous = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        previous(kind, error, trace)
        sys.stderr.flush()
        if _dog is not None:
            _dog.failed(error)

    sys.excepthook = hook
    atexit.register(_leave)
    dump_on_signal(lambda: None if _world is None else _world.watch.dog.report("SIGUSR1"))


def _leave() -> None:
    """At exit, while there is still an interpreter to close things in."""
    try:
        finalize()
    finally:
        if "commlayer.backends.mpi_job" in sys.modules:
            from commlayer.backends import mpi_job

            mpi_job.end(_is_broken, lambda: _dog is not None and _dog.everybody_gone(), LINGER)
        # The hub serves the others as long as they are there, but not those that cannot be helped.
        rendezvous.leave(LINGER if _is_broken() else _timeout)
        if signal.getsignal(signal.SIGUSR1) not in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # hydra sends it as ranks leave; Python would reset a handler
        if torch_native.stuck:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # the end of the interpreter would wait for them, or abort


def _is_broken() -> bool:
    """Whether this process cannot end as if nothing had happened: init failed, or a group, or another rank."""
    return _dog is None or _dog.broken or bool(_dog.lost)


_of_the_parent: list[Any] = []


def _forget() -> None:
    """In a forked child, which is no rank: the groups are its parent's, and must not be closed here."""
    global _world, _dog, _control
    _of_the_parent.append((_world, _dog, _control))
    _world = _dog = _control = None
    _at_the_end.cache_clear()
    atexit.unregister(_leave)
    rendezvous.forget()


os.register_at_fork(after_in_child=_forget)
