"""init, finalize, world: the group of all ranks of this process, or of this thread under run_local."""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from commlayer import bootstrap
from commlayer.backends import threads, torch_native
from commlayer.backends.base import Communicator
from commlayer.errors import CommError, PeerLost, UnsupportedOperation
from commlayer.group import Group
from commlayer.launch import Launch, discover
from commlayer.settings import DEFAULT_TIMEOUT, Settings, checked_timeout

_world: Group | None = None
_launch: Launch | None = None
_generation = 0  # how often init has connected
_started_torch = False  # by us, so it ends with us
_thread = threading.local()  # .world, in a thread of run_local


def init(backend: str | None = None, *, timeout: float | None = None) -> Group:
    """Join the job and return the group of all its ranks; call it again as often as you like.

    ``backend`` is a name from COMMLAYER_BACKEND's list and beats that variable; ``auto`` takes nccl on NVIDIA GPUs,
    xccl on Intel's, else mpi where an MPI launcher started us, else gloo; without a launcher, one process alone.
    A program that has initialised torch.distributed itself has its default group wrapped. ``timeout`` is in seconds,
    for every operation.

    Raises LaunchError, BackendUnavailable, CommTimeout; ValueError for settings, or a second, different backend.
    """
    global _world, _launch, _generation
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
    limit = settings.timeout if timeout is None else timeout
    bootstrap.check(settings)
    _generation += 1
    comm: Communicator
    if dist.is_initialized() and wanted in ("auto", dist.get_backend()):
        comm = torch_native.wrap_default_group(limit, _generation)
        _launch = Launch("host program", comm.rank, comm.size, None, None, None, None, {})
    else:
        _launch = discover()
        chosen = bootstrap.choose(_launch) if wanted == "auto" else wanted
        comm = bootstrap.connect(chosen, _launch, limit or DEFAULT_TIMEOUT, _generation)
    if comm.name == "mpi" and comm.size > 1:
        _abort_when_uncaught(comm)
    _world = Group(comm, range(comm.size), bootstrap.capabilities(comm, settings), settings.fallback)
    atexit.register(_leave)
    return _world


def finalize() -> None:
    """Leave the job: release every group. Afterwards init may be called again.

    Waits for no other rank, except that rank 0 of a gloo job serves the others up to 5 seconds longer.
    """
    global _world, _launch, _started_torch
    if getattr(_thread, "world", None) is not None:
        raise CommError("finalize: the world of run_local ends with the function it runs")
    if _world is not None:
        if _world._comm is not None:
            bootstrap.leave(_world._comm)
        _world.close()
    if _started_torch and dist.is_initialized():
        dist.destroy_process_group()
    _world = _launch = None
    _started_torch = False


def _leave() -> None:
    """At exit, while there is still an interpreter to close things in."""
    if _world is not None:
        finalize()


def is_initialized() -> bool:
    return (getattr(_thread, "world", None) or _world) is not None


def world() -> Group:
    """The group of all ranks. Raises CommError before init."""
    found = getattr(_thread, "world", None) or _world
    if found is None:
        raise CommError("commlayer is not initialised: call commlayer.init() first")
    return found


def launched() -> Launch | None:
    """How this process was started, as init found it."""
    return _launch


def start_torch_distributed() -> None:
    """See to it that torch.distributed runs over the world's ranks; collective where it does not yet."""
    global _started_torch
    if dist.is_initialized():
        return
    if getattr(_thread, "world", None) is not None:
        raise UnsupportedOperation("torch.distributed knows processes only, and ranks under run_local are threads")
    group = world()
    assert group._comm is not None
    assert _launch is not None
    bootstrap.start_torch_distributed(group._comm, _launch, group.timeout, _generation)
    _started_torch = True


def resolve(group: Group | None) -> Group:
    """The group an operation runs on: the world where none is given."""
    if group is None:
        return world()
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
    results: list[Any] = [None] * ranks
    errors: list[tuple[int, BaseException]] = []

    def run(seat: threads.Threads) -> None:
        try:
            _thread.world = Group(seat, range(ranks), bootstrap.capabilities(seat, settings))
            results[seat.rank] = fn()
        except BaseException as error:
            errors.append((seat.rank, error))
            seat.abort(error)
        finally:
            _thread.world = None

    started = [threading.Thread(target=run, args=(seat,), daemon=True) for seat in seats]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        # Lost peers are a consequence; the error that started it is the news.
        raise min(errors, key=lambda item: (isinstance(item[1], PeerLost), item[0]))[1]
    return results


def _abort_when_uncaught(comm: Communicator) -> None:
    """Let an uncaught exception end the job: MPI_Finalize at exit would wait for peers that wait for us."""
    previous = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        previous(kind, error, trace)
        sys.stderr.flush()
        comm.abort(error)

    sys.excepthook = hook
