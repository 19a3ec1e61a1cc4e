"""What the parts of a process group have in common."""

from __future__ import annotations

from typing import Any

from commlayer.group import Group
from commlayer.torch_backend.channel import Channel
from commlayer.torch_backend.works import Futures, callback_depth


class Calls:
    """A ``Group``, its channels and its futures; ``beside``: torch's backends for other devices, by their type."""

    def __init__(self, group: Group, beside: dict[str, Any]) -> None:
        assert group._comm is not None
        self.group = group
        self._beside = beside
        self._futures = Futures(group._comm)
        self._channels = {-1: Channel(group, beside, self._futures)}  # by depth of callbacks

    def _channel(self) -> Channel:
        """The program's own, or that of callbacks of futures.

        Callbacks run beside the program, and what they start must not be mixed with what it starts, which happens in
        another order on each rank. They have a communicator of their own, made at the first need.
        """
        depth = callback_depth() if self.group.size > 1 else -1
        try:
            return self._channels[depth]
        except KeyError:
            twin = self.group.twin(f"callbacks {depth}")
            return self._channels.setdefault(depth, Channel(twin, self._beside, self._futures))
