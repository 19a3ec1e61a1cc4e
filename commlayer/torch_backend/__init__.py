"""The torch.distributed backend "commlayer": unmodified torch programs run on the layer.

>>> torch.distributed.init_process_group("commlayer")

What is underneath is chosen by the layer's own variables (COMMLAYER_BACKEND and so on). The name is made known when
commlayer is imported, which torch itself does where the package is installed (entry point ``torch.backends``).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

NAME = "commlayer"
DEVICES = ["cpu", "cuda", "xpu"]


def register() -> None:
    """Make the backend known to torch.distributed, and how its ranks meet; again and again the same."""
    if not dist.is_available() or NAME in dist.Backend.backend_list:
        return
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=DEVICES)
    from commlayer.torch_backend import meeting

    meeting.register()


def _create(options: Any, _: Any) -> Any:
    from commlayer.torch_backend import creation

    return creation.create(options)
