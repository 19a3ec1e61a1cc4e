"""What ``commlayer doctor`` finds, as data."""

from __future__ import annotations

import difflib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy
import torch

import commlayer
from commlayer import bootstrap
from commlayer.backends import shared
from commlayer.backends.torch_native import DEVICE_OF
from commlayer.capability import parse_disabled
from commlayer.cli.backends import BACKENDS, Health, capability_set, examine
from commlayer.errors import CommError, LaunchError
from commlayer.launch import LAUNCHERS, Launch, discover, mpi_importable
from commlayer.settings import VARIABLES, Settings

_FIELDS = ("rank", "size", "local_rank", "local_size", "master_addr", "master_port", "mpi")


def diagnose(env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Everything doctor shows; ``problems`` are what keeps a program from starting, ``notes`` are not."""
    problems: list[str] = []
    launch: Launch | None = None
    settings = Settings(backend=(env.get("COMMLAYER_BACKEND") or "auto").lower())
    try:
        launch = discover(env)
    except LaunchError as error:
        problems.append(str(error))
    try:
        settings = Settings.from_env(env)
        parse_disabled(settings.disable)
    except ValueError as error:
        problems.append(str(error))

    auto, why = _automatic(launch)
    wanted = settings.backend
    chosen = auto if wanted == "auto" else wanted
    names = [*BACKENDS, *([chosen] if chosen and chosen not in BACKENDS else [])]
    backends = {name: examine(name, launch) for name in names}
    profiles: list[str] = []
    if chosen:
        problems += _unusable(backends[chosen])
        try:
            profiles = [p.name for p in capability_set(chosen, settings).profiles]
        except (CommError, ValueError) as error:
            problems.append(str(error))
    if chosen and launch:
        problems += _unconnected(chosen, launch)
    return {
        "ok": not problems,
        "problems": problems,
        "notes": _misspelt(env),
        "versions": {
            "commlayer": commlayer.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "host": platform.node(),
        "launcher": _launcher(launch),
        "devices": devices(),
        "shared_memory": shared.able(),
        "backends": [asdict(health) for health in backends.values()],
        "variables": {name: env[name] for name in VARIABLES if env.get(name)},
        "auto": {"backend": auto, "why": why},
        "auto_under": _elsewhere(launch),
        "chosen": {
            "backend": chosen,
            "why": why if wanted == "auto" else f"COMMLAYER_BACKEND={env['COMMLAYER_BACKEND']}",
            "profiles": profiles,
        },
    }


def devices() -> dict[str, Any]:
    """Cores this process may run on, and the names of the GPUs it sees."""
    found: dict[str, Any] = {"cpu_cores": len(os.sched_getaffinity(0))}
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        count = module.device_count() if module.is_available() else 0
        found[kind] = [module.get_device_name(index) for index in range(count)]
    return found


def possible_ranks(env: Mapping[str, str]) -> set[int]:
    """What launchers' variables say of the rank, each launcher by itself, where together they make no sense."""
    ranks = {}
    for name in LAUNCHERS[:-1]:
        try:
            ranks[name] = discover({**env, "COMMLAYER_LAUNCHER": name}).rank
        except LaunchError:
            continue
    if len(ranks) > 1:
        ranks.pop("torchrun", None)  # RANK is what a script may have exported, the same for all
    return set(ranks.values()) or {0}


def _launcher(launch: Launch | None) -> dict[str, Any] | None:
    if launch is None:
        return None
    return {
        "name": launch.launcher,
        **{field: getattr(launch, field) for field in _FIELDS},
        "variables": launch.variables,
    }


def _automatic(launch: Launch | None) -> tuple[str | None, str]:
    """What ``auto`` means here, and why. The order is bootstrap's; these are its reasons in words."""
    if launch is None:
        return None, "the launcher is unclear"
    backend = bootstrap.choose(launch)
    if backend == "single":
        return backend, "no launcher started this process: it is alone"
    if backend in ("nccl", "xccl"):
        kind = DEVICE_OF[backend]
        return backend, f"visible {kind} devices: {getattr(torch, kind).device_count()}"
    no_gpu = "no GPU that torch can use"
    if backend == "mpi":
        return backend, f"{no_gpu}, an MPI launcher, and mpi4py is installed"
    if launch.mpi:
        return backend, f"{no_gpu}; an MPI launcher, but mpi4py is not installed"
    return backend, f"{no_gpu}, and {launch.launcher} does not connect MPI processes"


def _elsewhere(launch: Launch | None) -> dict[str, Any]:
    """For a process on its own: what ``auto`` would mean for ranks on this machine."""
    if launch is None or launch.launcher != "none":
        return {}
    starts = (Launch("torchrun", 0, 2), Launch("hydra", 0, 2, variables={"mpi": "PMI_RANK=0"}))
    answers = zip(("torchrun", "mpiexec"), map(_automatic, starts), strict=True)
    return {starter: {"backend": backend, "why": why} for starter, (backend, why) in answers}


def _unusable(health: Health) -> list[str]:
    if health.name == "threads":
        return ["backend threads: its ranks are threads, so start them with commlayer.run_local(fn)"]
    if health.usable:
        return []
    return [f"backend {health.name}: {health.reason}" + (f" → {health.remedy}" if health.remedy else "")]


def _unconnected(backend: str, launch: Launch) -> list[str]:
    """Whether ranks can find each other, by the ways that bootstrap knows."""
    if backend in ("mpi", "single", "threads") or launch.size == 1:
        return []
    by_mpi = launch.mpi and mpi_importable()
    if launch.launcher == "torchrun":
        known = {"master_addr", "master_port"} <= launch.variables.keys()
    else:
        known = by_mpi or (launch.master_addr is not None and launch.master_port is not None)
    or_mpi = ", or pip install 'commlayer[mpi]', whose MPI knows" if launch.mpi and not by_mpi else ""
    if launch.size is None and not by_mpi:
        return [f"{launch.launcher} does not say how many ranks there are → set RANK and WORLD_SIZE{or_mpi}"]
    if not known:
        return [f"{launch.launcher} does not say where rank 0 is → set MASTER_ADDR and MASTER_PORT{or_mpi}"]
    return []


def _misspelt(env: Mapping[str, str]) -> list[str]:
    notes = []
    for name in sorted(env):
        if name.startswith("COMMLAYER_") and name not in VARIABLES:
            close = difflib.get_close_matches(name, VARIABLES, 1)
            notes.append(f"{name} is not read" + (f"; did you mean {close[0]}?" if close else ""))
    return notes
