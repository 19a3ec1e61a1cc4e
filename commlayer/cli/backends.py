"""Whether each backend works here, found out without meeting any other rank.

MPI_Init would wait for the other ranks, and must never happen twice in a job. So libraries are loaded in a
child process, and MPI is asked for its version only, which it may tell before it is initialised (MPI 4.1,
section 11.4.1). A library that crashes on loading takes only the child along.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from commlayer import bootstrap
from commlayer.backends import torch_native
from commlayer.backends.base import Communicator
from commlayer.backends.process_groups import DEVICE_OF
from commlayer.capability import CapabilitySet
from commlayer.errors import CommError, LaunchError
from commlayer.launch import Launch, bind_device
from commlayer.settings import Settings

BACKENDS = ("gloo", "mpi", "nccl", "xccl", "ccl", "threads", "single")

_MPI = """
import json, mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
print(json.dumps([mpi4py.__version__, MPI.Get_library_version(), MPI.get_vendor()[0]]))
"""
_CCL = """
import json, oneccl_bindings_for_pytorch as binding
print(json.dumps(getattr(binding, "__version__", "")))
"""
_SECONDS = 60.0  # for a library to load


@dataclass(frozen=True)
class Health:
    """One backend on this machine, for the processes that were started as ``Launch`` says."""

    name: str
    importable: bool
    usable: bool
    version: str = ""
    reason: str = ""
    remedy: str = ""


class Unusable(Exception):
    """Reason, remedy, and what was found nevertheless."""

    def __init__(self, reason: str, remedy: str, version: str = "", importable: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.remedy, self.version, self.importable = reason, remedy, version, importable


def examine(name: str, launch: Launch | None) -> Health:
    """How a backend fares; ``launch`` is None where the launcher is unclear."""
    check = _CHECKS.get(name, _plugin)
    try:
        return Health(name, importable=True, usable=True, version=check(name, launch))
    except Unusable as no:
        return Health(name, no.importable, False, no.version, no.reason, no.remedy)


def capability_set(backend: str, settings: Settings) -> CapabilitySet:
    """The set that init would agree on, were every rank like this process. CommError, ValueError."""
    device = torch.device(DEVICE_OF.get(backend, "cpu"))
    version = {"nccl": _nccl_version, "mpi": _mpi_version}.get(backend, lambda: f"torch {torch.__version__}")
    alone = SimpleNamespace(name=backend, size=2, device=device, version=version, share=lambda text: [text])
    return bootstrap.capabilities(cast(Communicator, alone), replace(settings, probe="never"))


def _gloo(name: str, launch: Launch | None) -> str:
    if not dist.is_gloo_available():
        raise Unusable("this build of torch has no gloo", "install another build of torch, or use mpi")
    version = f"torch {torch.__version__}"
    try:
        # A group of this process alone: finds the network interface, as any group must.
        torch_native.create(name, dist.HashStore(), 0, 1, torch.device("cpu"), 10.0).close()
    except (RuntimeError, CommError) as error:
        remedy = "set GLOO_SOCKET_IFNAME to a network interface of this machine, such as lo or eth0"
        raise Unusable(_first_line(error), remedy, version, importable=True) from error
    return version


def _mpi(name: str, launch: Launch | None) -> str:
    remedy = (
        "pip install 'commlayer[mpi]' brings mpi4py and MPICH; on a cluster, load the site's MPI module and "
        "pip install --no-binary mpi4py mpi4py"
    )
    if importlib.util.find_spec("mpi4py") is None:
        raise Unusable("mpi4py is not installed", remedy)
    version, library, vendor = _in_child(_MPI, remedy)
    library = library.replace("\0", "").split("\n")[0].split(",")[0].replace("Version:", "").strip()
    version = f"mpi4py {version}, {' '.join(library.split())}"
    if launch is None or launch.launcher == "none":
        return version

    def mismatch(reason: str, remedy: str) -> Unusable:
        return Unusable(reason, remedy, version, importable=True)

    if not launch.mpi:
        remedy = "start with mpiexec (commlayer launch --backend mpi does), or choose another backend"
        raise mismatch(f"{launch.launcher} does not connect MPI processes", remedy)
    # The two families do not understand each other: every rank would be alone.
    if launch.launcher in ("hydra", "openmpi") and (launch.launcher == "openmpi") != (vendor == "Open MPI"):
        starter = "Open MPI's mpiexec" if launch.launcher == "openmpi" else "an mpiexec of the MPICH family"
        remedy = f"start with the mpiexec of {vendor}, or build mpi4py against the other MPI"
        raise mismatch(f"{starter} started us, but mpi4py loads {vendor}", remedy)
    return version


def _nccl(name: str, launch: Launch | None) -> str:
    if not dist.is_nccl_available():
        raise Unusable("this build of torch has no NCCL", "install a CUDA build of torch (pytorch.org)")
    version = f"NCCL {_nccl_version()}"
    _check_devices("cuda", "NVIDIA", "nvidia-smi, the driver and CUDA_VISIBLE_DEVICES", version, launch)
    return version


def _xccl(name: str, launch: Launch | None) -> str:
    if not dist.is_xccl_available():
        raise Unusable("this build of torch has no XCCL", "install an XPU build of torch >= 2.7 (pytorch.org)")
    version = f"torch {torch.__version__}"
    _check_devices("xpu", "Intel", "sycl-ls, the driver and ZE_AFFINITY_MASK", version, launch)
    return version


def _ccl(name: str, launch: Launch | None) -> str:
    remedy = "torch >= 2.7 for XPU has xccl built in; for older ones: pip install 'commlayer[intel]'"
    if importlib.util.find_spec("oneccl_bindings_for_pytorch") is None:
        raise Unusable("oneccl_bindings_for_pytorch is not installed", remedy)
    version = f"oneccl_bindings_for_pytorch {_in_child(_CCL, remedy)}".rstrip()
    _check_devices("xpu", "Intel", "sycl-ls, the driver and ZE_AFFINITY_MASK", version, launch)
    return version


def _threads(name: str, launch: Launch | None) -> str:
    return "built in, for commlayer.run_local"


def _single(name: str, launch: Launch | None) -> str:
    if launch is not None and launch.size not in (None, 1):
        reason = f"it is for one process, but {launch.launcher} started {launch.size}"
        raise Unusable(reason, "choose another backend", "built in", importable=True)
    return "built in"


def _plugin(name: str, launch: Launch | None) -> str:
    if not dist.is_backend_available(name):
        remedy = f"choose one of {', '.join(BACKENDS)}, or import the package that registers it"
        raise Unusable("torch.distributed knows no backend of this name", remedy)
    return f"torch {torch.__version__}"


_CHECKS: dict[str, Callable[[str, Launch | None], str]] = {
    "gloo": _gloo,
    "mpi": _mpi,
    "nccl": _nccl,
    "xccl": _xccl,
    "ccl": _ccl,
    "threads": _threads,
    "single": _single,
}


def _check_devices(kind: str, maker: str, look_at: str, version: str, launch: Launch | None) -> None:
    module = getattr(torch, kind)
    if not module.is_available():
        raise Unusable(f"no {maker} GPU is visible", f"check {look_at}", version, importable=True)
    if launch is None:
        return
    try:
        bind_device(launch, kind, module.device_count())
    except LaunchError as error:
        raise Unusable(str(error), "", version, importable=True) from error


def _nccl_version() -> str:
    if not dist.is_nccl_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))


def _mpi_version() -> str:
    """As the communicator of a job says it."""
    try:
        return " ".join(_in_child(_MPI, "")[1].split("\n")[0].strip("\0 ").split())
    except Unusable:
        return ""


def _in_child(code: str, remedy: str) -> Any:
    """What the code prints, as JSON, from a process of its own that is part of no job."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unusable(f"its library does not load within {_SECONDS:g} s", remedy) from error
    if child.returncode < 0:
        raise Unusable(f"its library dies of {signal.Signals(-child.returncode).name} on loading", remedy)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise Unusable(lines[-1], remedy)
    return json.loads(child.stdout.splitlines()[-1])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
