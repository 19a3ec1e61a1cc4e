"""Intel GPUs as a Lightning accelerator: ``Trainer(accelerator="xpu")``."""

from __future__ import annotations

from typing import Any

import torch

from commlayer.integrations.lightning.package import pytorch

_precision: Any = pytorch("plugins.precision")


class XPUAccelerator(pytorch("accelerators").Accelerator):  # type: ignore[misc]
    """The GPUs of ``torch.xpu``, which is first asked when a Trainer wants them."""

    @staticmethod
    def name() -> str:
        return "xpu"

    @staticmethod
    def is_available() -> bool:
        return torch.xpu.is_available()

    @staticmethod
    def auto_device_count() -> int:
        return torch.xpu.device_count()

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> list[int]:
        """Numbers of devices: of ``2`` the first two, of ``-1`` all, of ``[1, 3]`` or ``"1,3"`` these.

        Raises ``ValueError`` for anything else, and for devices that are not there.
        """
        there = torch.xpu.device_count()
        if isinstance(devices, str) and "," in devices:
            devices = [int(number) for number in devices.split(",") if number.strip()]
        if not isinstance(devices, list | tuple):
            devices = list(range(there if int(devices) == -1 else int(devices)))
        if not devices or not set(devices) <= set(range(there)):
            raise ValueError(f"devices={devices!r}: there are {there} XPUs here")
        return list(devices)

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("xpu", number) for number in devices]

    def setup_device(self, device: torch.device) -> None:
        if device.type != "xpu":
            # Lightning takes its single-device strategy to the CPU for accelerators it does not know.
            raise ValueError(f"accelerator='xpu' on device {device}: name a strategy, such as 'commlayer_ddp'")
        torch.xpu.set_device(device)

    def setup(self, trainer: Any) -> None:
        """Lightning takes autocast and the loss scaler to CUDA for accelerators it does not know."""
        plugin = trainer.strategy.precision_plugin
        if isinstance(plugin, _precision.MixedPrecision) and plugin.device != "xpu":
            trainer.strategy.precision_plugin = _precision.MixedPrecision(plugin.precision, "xpu")

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        return torch.xpu.memory_stats(device)

    def teardown(self) -> None:
        torch.xpu.empty_cache()
