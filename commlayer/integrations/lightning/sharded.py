"""Models that are spread over ranks: ZeRO by torch's FSDP2, and any other way that a model cuts itself on a mesh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

import commlayer
from commlayer.integrations.lightning.package import fabric, pytorch
from commlayer.integrations.lightning.strategies import OnTheLayer
from commlayer.mesh import Mesh

_strategies: Any = pytorch("strategies")
_overrides: Any = pytorch("overrides.distributed")
_fitting: Any = pytorch("trainer.states").TrainerFn.FITTING
_init: Any = fabric("utilities.init")
_fsdp: Any = fabric("strategies.fsdp")


class CommlayerModelParallelStrategy(OnTheLayer, _strategies.ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` on a commlayer mesh: the module cuts itself up in ``configure_model``.

    ``mesh`` and ``order``: as for ``commlayer.Mesh``; ``self.device_mesh`` of the module has its axes. Samples are
    dealt out over the axis ``dp`` (or ``data_parallel``), and ranks that differ in others only see the same ones.
    By default Lightning's own axes: ``data_parallel`` over the nodes, ``tensor_parallel`` within each.
    """

    def __init__(self, mesh: str | Mapping[str, int] | None = None, order: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._spec, self._order = mesh, order

    def setup_environment(self) -> None:
        self._setup_distributed()
        spec = self._spec or {"tensor_parallel": self.num_processes, "data_parallel": self.num_nodes}
        self.mesh = Mesh(spec, self._order, commlayer.init())
        self._device_mesh = self.mesh.to_device_mesh(self.root_device.type)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        axis = next((axis for axis in ("dp", "data_parallel") if axis in self.mesh.axes), None)
        return {
            "num_replicas": 1 if axis is None else self.mesh.size(axis),
            "rank": 0 if axis is None else self.mesh.rank(axis),
        }


class CommlayerZeroStrategy(CommlayerModelParallelStrategy):
    """Data parallelism with the model's state cut over the ranks (ZeRO), by torch's FSDP2 (``fully_shard``).

    The optimiser's state, and the parameters between two steps, are cut in every stage. What else is:

    - stage 1: nothing. Gradients of accumulated batches are summed whole, and reduced once a step.
    - stage 2: gradients. Those of every batch are reduced at once. Parameters stay whole from a step's first forward
      to its last backward.
    - stage 3: gradients, and parameters also between forward and backward: whole are only those of the unit at work.

    A unit is an element of a ``ModuleList`` or ``Sequential``, or a module of one of the classes ``auto_wrap_policy``;
    what is left is one more. ``cpu_offload``: parameters, gradients and optimiser state stay in the host's memory, and
    the optimiser runs there. Checkpoints are one file, as DDP's, unless ``save_distributed_checkpoint``.
    """

    def __init__(
        self,
        stage: int = 3,
        *,
        cpu_offload: bool = False,
        auto_wrap_policy: Collection[type[nn.Module]] | None = None,
        save_distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"stage: ZeRO has 1, 2 and 3, got {stage!r}")
        super().__init__({"dp": -1}, save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)
        self.stage, self.cpu_offload, self.auto_wrap_policy = stage, cpu_offload, auto_wrap_policy

    def setup(self, trainer: Any) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ValueError(f"precision={self.precision_plugin.precision!r} is not for ZeRO: take 'bf16-mixed'")
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        if _Root.of(self.model) is None:
            self._shard(self.model)
        self.barrier()
        if trainer.state.fn == _fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            _overrides._sync_module_states(model)  # from rank 0, as DDP does: ranks may have drawn different weights
        pin = self.root_device.type != "cpu"  # for copies from and to a GPU
        offload = CPUOffloadPolicy(pin_memory=pin) if self.cpu_offload else OffloadPolicy()
        for unit in list(_units(model, self.auto_wrap_policy)):
            fully_shard(unit, mesh=self.device_mesh, reshard_after_forward=self.stage == 3, offload_policy=offload)
        fully_shard(_Root(model), mesh=self.device_mesh, reshard_after_forward=False, offload_policy=offload)
        _init._materialize_distributed_module(model, torch.device("cpu") if self.cpu_offload else self.root_device)
        _fsdp._move_torchmetrics_to_device(model, self.root_device)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around every batch of an accumulation but the last."""
        root: Any = _Root.of(self.model)
        root.set_reshard_after_backward(self.stage == 3)
        root.set_requires_gradient_sync(self.stage > 1)
        try:
            yield
        finally:
            root.set_reshard_after_backward(True)
            root.set_requires_gradient_sync(True)


class _Root(nn.Module):
    """Calls what the LightningModule is entered by, so that FSDP's hooks enclose all of a step.

    Were the LightningModule itself the root, a ``self(x)`` within its step would set them off a second time.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._entered = False
        for name in ("training_step", "validation_step", "test_step", "predict_step", "forward"):
            setattr(module, name, self._around(getattr(module, name)))
        object.__setattr__(module, "_root", self)  # not as a submodule

    @staticmethod
    def of(module: nn.Module | None) -> _Root | None:
        """The root around the module, if it has been cut up, in this fit or an earlier one."""
        return getattr(module, "__dict__", {}).get("_root")

    def forward(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._entered = True
        try:
            return method(*args, **kwargs)
        finally:
            self._entered = False

    def _around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs) if self._entered else self(method, *args, **kwargs)

        return call


def _units(model: nn.Module, classes: Collection[type[nn.Module]] | None) -> Iterator[nn.Module]:
    """The modules to cut one by one: none inside another, and none with a parameter that another module has too."""
    everywhere = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))

    def chosen(module: nn.Module, parent: nn.Module) -> bool:
        if classes is not None:
            return isinstance(module, tuple(classes))
        lists = any(isinstance(inner, nn.ModuleList) for inner in module.modules())
        return (isinstance(parent, nn.ModuleList) and not isinstance(module, nn.ModuleList)) or (
            isinstance(parent, nn.Sequential) and not lists
        )

    def walk(parent: nn.Module) -> Iterator[nn.Module]:
        for module in parent.children():
            here = Counter(id(weight) for _, weight in module.named_parameters(remove_duplicate=False))
            if not chosen(module, parent):
                yield from walk(module)
            elif here and all(everywhere[weight] == count for weight, count in here.items()):
                yield module

    return walk(model)
