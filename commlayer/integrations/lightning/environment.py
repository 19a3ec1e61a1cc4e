"""Who am I, for Lightning: the place of this process in its job, as commlayer knows it."""

from __future__ import annotations

import os
from typing import Any

from commlayer.integrations.lightning.package import fabric
from commlayer.integrations.place import complete_launch
from commlayer.launch import discover

_environments: Any = fabric("plugins.environments")


class CommlayerEnvironment(_environments.ClusterEnvironment):
    """The processes that torchrun, mpiexec, srun, PALS, Cray PMI, jsrun or Flux started; to be made by all of them.

    Raises ``LaunchError`` where variables contradict each other, or neither the launcher nor MPI tells.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launch, self._node_rank = complete_launch()

    @staticmethod
    def detect() -> bool:
        """Whether a launcher started this process. WORLD_SIZE without RANK is of a process that Lightning started."""
        by_lightning = "RANK" not in os.environ
        return discover(os.environ | {"WORLD_SIZE": ""} if by_lightning else os.environ).launcher != "none"

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        assert self.launch.master_addr is not None
        return self.launch.master_addr

    @property
    def main_port(self) -> int:
        assert self.launch.master_port is not None
        return self.launch.master_port

    def world_size(self) -> int:
        assert self.launch.size is not None
        return self.launch.size

    def global_rank(self) -> int:
        return self.launch.rank

    def local_rank(self) -> int:
        assert self.launch.local_rank is not None
        return self.launch.local_rank

    def node_rank(self) -> int:
        return self._node_rank

    def set_world_size(self, size: int) -> None:
        """Nothing: this is what Lightning infers from ``devices`` and ``num_nodes``, and the launcher knows."""

    def set_global_rank(self, rank: int) -> None:
        """Nothing, for the same reason."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if num_devices * num_nodes != self.world_size():
            raise ValueError(
                f"Trainer(devices={num_devices}, num_nodes={num_nodes}) makes {num_devices * num_nodes} processes, "
                f"but {self.launch.launcher} started {self.world_size()}"
            )
