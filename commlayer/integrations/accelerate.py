"""Hugging Face accelerate on the layer: ``start()`` before ``Accelerator()``, under any launcher."""

from __future__ import annotations

import os

import torch.distributed as dist

from commlayer import runtime
from commlayer.group import Group
from commlayer.integrations.place import complete_launch


def start() -> Group:
    """Start torch.distributed on the backend "commlayer" and tell accelerate of it; the group of all ranks.

    accelerate takes a process group that is there, but looks for ranks in torchrun's variables alone, which are
    therefore set. Without GPUs, pass it ``cpu=True``. Raises ``LaunchError`` as ``commlayer.init`` does.
    """
    if not dist.is_initialized():
        launch, _ = complete_launch()
        told = {
            "RANK": launch.rank,
            "WORLD_SIZE": launch.size,
            "LOCAL_RANK": launch.local_rank,
            "LOCAL_WORLD_SIZE": launch.local_size,
            "MASTER_ADDR": launch.master_addr,
            "MASTER_PORT": launch.master_port,
        }
        os.environ.update({name: str(value) for name, value in told.items() if value is not None})
        dist.init_process_group("commlayer")
    return runtime.init()
