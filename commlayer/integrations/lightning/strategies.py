"""What all strategies on the layer share, and data parallelism."""

from __future__ import annotations

from typing import Any

import torch

from commlayer.integrations.lightning.environment import CommlayerEnvironment
from commlayer.integrations.lightning.package import fabric, pytorch
from commlayer.launch import Launch, bind_device

_strategies: Any = pytorch("strategies")
_distributed: Any = fabric("utilities.distributed")


class OnTheLayer(_strategies.ParallelStrategy):
    """A strategy whose torch.distributed is commlayer, over the processes that the launcher started.

    ``Trainer(devices=, num_nodes=)`` may be left out: the launcher knows. Without a launcher, Lightning starts the
    processes, as it does for its own strategies.
    """

    cluster_environment: Any
    model: Any
    num_nodes: int
    parallel_devices: Any

    def __init__(self, *args: Any, process_group_backend: str = "commlayer", **kwargs: Any) -> None:
        super().__init__(*args, process_group_backend=process_group_backend, **kwargs)
        if self.cluster_environment is None and CommlayerEnvironment.detect():
            self.cluster_environment = CommlayerEnvironment()

    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        if isinstance(self.cluster_environment, CommlayerEnvironment):
            launch = self.cluster_environment.launch
            self.parallel_devices = _one_for_each_rank(self.parallel_devices, launch)
            if launch.local_size and self.world_size % launch.local_size == 0:
                if self.num_nodes == 1:
                    self.num_nodes = self.world_size // launch.local_size
                self.cluster_environment.validate_settings(len(self.parallel_devices), self.num_nodes)

    def _configure_launcher(self) -> None:
        if isinstance(self.cluster_environment, CommlayerEnvironment):
            _distributed._set_num_threads_if_needed(len(self.parallel_devices))
        else:
            super()._configure_launcher()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if isinstance(tensor, torch.Tensor) and reduce_op in ("mean", "avg") and not torch.is_floating_point(tensor):
            # Lightning divides by the mean number of samples, which need not be an integer.
            tensor = tensor.to(torch.get_default_dtype())
        return super().reduce(tensor, group, reduce_op)


class CommlayerDDPStrategy(OnTheLayer, _strategies.DDPStrategy):
    """torch's DistributedDataParallel on the layer; arguments as for Lightning's ``DDPStrategy``."""

    def determine_ddp_device_ids(self) -> list[int] | None:
        # Lightning would make a CUDA stream for any device that has a number, an XPU too.
        return super().determine_ddp_device_ids() if self.root_device.type == "cuda" else None


def _one_for_each_rank(devices: list[torch.device], launch: Launch) -> list[torch.device]:
    """The devices that the ranks of this node take, in their order. Raises ``LaunchError`` where there are too few."""
    bind_device(launch, devices[0].type, len(devices))
    if len(devices) == 1:  # a CPU, or the one device that the launcher shows to each rank
        assert launch.local_rank is not None
        return devices * (launch.local_size or launch.local_rank + 1)
    return devices if devices[0].type == "cpu" else devices[: launch.local_size]
