"""Lightning 2.x on the layer: ``import commlayer.integrations.lightning``, then ``Trainer(strategy="commlayer_ddp")``.

The import registers the strategies of ``STRATEGIES`` and, where Lightning has none, the accelerator ``xpu``; Lightning
looks for strategies nowhere else (its one entry point, for callbacks, is read when the strategy has been chosen).
With the package ``pytorch_lightning``, import that first.
"""

from __future__ import annotations

from typing import Any

from commlayer.integrations.lightning.environment import CommlayerEnvironment
from commlayer.integrations.lightning.package import pytorch
from commlayer.integrations.lightning.sharded import CommlayerModelParallelStrategy, CommlayerZeroStrategy
from commlayer.integrations.lightning.strategies import CommlayerDDPStrategy
from commlayer.integrations.lightning.xpu import XPUAccelerator

STRATEGIES: dict[str, tuple[type, dict[str, Any]]] = {
    "commlayer_ddp": (CommlayerDDPStrategy, {}),
    "commlayer_zero1": (CommlayerZeroStrategy, {"stage": 1}),
    "commlayer_zero2": (CommlayerZeroStrategy, {"stage": 2}),
    "commlayer_zero3": (CommlayerZeroStrategy, {"stage": 3}),
    "commlayer_zero3_offload": (CommlayerZeroStrategy, {"stage": 3, "cpu_offload": True}),
    "commlayer_model_parallel": (CommlayerModelParallelStrategy, {}),
}
"""The names for ``Trainer(strategy=)``: the class and its arguments. A class with other arguments can be passed too."""

_registry: Any = pytorch("strategies").StrategyRegistry
for _name, (_class, _arguments) in STRATEGIES.items():
    _registry.register(_name, _class, description=_class.__doc__, override=True, **_arguments)

_accelerators: Any = pytorch("accelerators").AcceleratorRegistry
if XPUAccelerator.name() not in _accelerators:
    _accelerators.register(XPUAccelerator.name(), XPUAccelerator, description=XPUAccelerator.__doc__)

__all__ = [
    "STRATEGIES",
    "CommlayerDDPStrategy",
    "CommlayerEnvironment",
    "CommlayerModelParallelStrategy",
    "CommlayerZeroStrategy",
    "XPUAccelerator",
]
