# mypy: disable-error-code="override, assignment, misc"
# One signature takes what torch spells out as several overloads.

"""torch.distributed's process group, on a ``Group``.

torch's C++ calls some methods by their names (``getGroupName``, ``allreduce``), torch's Python all of them; what the
names mean is in torch/csrc/distributed/c10d/ProcessGroup.hpp. Newer names (torch 2.13) stand beside the older.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from commlayer.errors import CommError
from commlayer.group import Group
from commlayer.torch_backend import kernels
from commlayer.torch_backend.arguments import options_of
from commlayer.torch_backend.messages import Messages
from commlayer.torch_backend.movement import Movement
from commlayer.torch_backend.reductions import Reductions
from commlayer.torch_backend.untraced import untraced


@untraced
class ProcessGroup(Reductions, Movement, Messages, dist.ProcessGroup):
    """A ``Group`` as torch.distributed knows it.

    What torch's own backend under the group does natively, on contiguous tensors, is that backend's call and costs
    nothing more; everything else is the group's, native or by a plan. Under COMMLAYER_DEBUG, COMMLAYER_CHECK_NAN and
    COMMLAYER_TRACE all calls are the group's. ``beside``: torch's backends for tensors on other devices, by their type.
    """

    def __init__(self, group: Group, beside: dict[str, Any]) -> None:
        dist.ProcessGroup.__init__(self, group.rank, group.size)  # type: ignore[call-arg]
        Reductions.__init__(self, group, beside)
        kernels.install()
        self._name = self._desc = ""
        self._then: Callable[[], None] | None = None
        self._token = torch.empty(0, dtype=torch.uint8, device=group.device)  # what a barrier is asked about with

    def barrier(self, opts: Any = None, timeout: Any = None) -> dist.Work:
        opts = options_of(c10d.BarrierOptions, opts, timeout)
        channel = self._channel()
        direct = channel.direct("barrier", self._token)
        if direct is not None:
            return channel.started("barrier", direct.barrier(opts), [], opts)
        return channel.run("barrier", None, lambda: (None, channel.flat.barrier()), [], opts)

    # What torch asks of a group

    supports_splitting = supports_coalescing = False

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(kind) for kind in dict.fromkeys([self.group.device.type, *self._beside])]

    def _get_backend(self, device: torch.device) -> Any:
        return self._beside.get(torch.device(device).type, self)

    def getBackendName(self) -> str:
        return "commlayer"

    name = _get_backend_name = getBackendName

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupDesc(self) -> str:
        return self._desc

    def setGroupDesc(self, desc: str) -> None:
        self._desc = desc

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc
    group_name, group_desc = property(getGroupName), property(getGroupDesc)

    def abort(self) -> None:
        """Wake whoever waits here, with an error."""
        for channel in self._channels.values():
            channel.watch.fail(CommError, "the process group was aborted")

    def shutdown(self) -> None:
        self._futures.close()
        self._beside = {}
        for channel in self._channels.values():
            channel.close()
        if self._then is not None:
            self._then()

    def at_shutdown(self, then: Callable[[], None]) -> None:
        self._then = then
