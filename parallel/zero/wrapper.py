"""The wrapper: what a user sees of ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from commlayer import Group, Mesh, UnsupportedOperation
from parallel.placement import placement, recall_marks
from parallel.replicas import WRAPPERS, Replicas, check_module
from parallel.zero.divide import divide
from parallel.zero.flat import Flat, Settings
from parallel.zero.gathering import Gathering
from parallel.zero.gradients import Gradients
from parallel.zero.layout import Layout
from parallel.zero.meta import initialise, leave_meta, reset_parameters
from parallel.zero.offload import DiskState
from parallel.zero.optimizer import adopt
from parallel.zero.released import hand_out
from parallel.zero.steps import Steps
from parallel.zero.unit import Unit

OFFLOADS = ("none", "cpu", "disk")


class ZeRO(nn.Module):
    """Data parallelism without redundancy: each rank keeps a part of the optimiser state, and what the stage adds.

    ZeRO (Rajbhandari et al. 2020, SC20, arXiv:1910.02054). Per rank, for Ψ parameters, N ranks, and p, g, K bytes of
    parameter, gradient and optimiser state (master weights included) of each:

    =====  ===================  ===========================================================================
    stage  bytes                communicated in a step
    =====  ===================  ===========================================================================
    1      (p + g) Ψ + K Ψ/N    reduce_scatter of gradients, all_gather of parameters: as much as all_reduce
    2      p Ψ + (g + K) Ψ/N    the same; within accumulation in every backward, unless under ``no_sync``
    3      (p + g + K) Ψ/N      parameters are gathered twice, for forward and for backward: 1.5 times as much
    =====  ===================  ===========================================================================

    ``optimizer`` is made over the module's parameters, as always, and steps this rank's pieces of them from then on.
    Schedulers, ``GradScaler(mesh)``, ``clip_grad_norm_(model, 1.0, mesh=mesh)`` and ``zero_grad`` go on as they are.
    ``backward()`` leaves the mean gradient in the pieces (in stage 1 until the next one, which uses its memory), of the
    loss of :class:`parallel.DataParallel`, whose conditions hold here too.

    The parameters of this wrapper, and of modules around it, are the pieces: vectors, under the names that they have in
    ``module``. That is not a submodule, so look for layers in ``model.module.modules()``.

    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> model = ZeRO(model, optimizer, stage=3, mesh=mesh)

    Args:
        module: on its device or on meta; every rank passes the same architecture. Rank 0's values count.
        optimizer: any that is element-wise. State that it has is cut, too.
        stage: 1, 2 or 3.
        group: the data-parallel ranks; by default the world.
        mesh: instead of a group, for models that are also parallel along other axes; state is cut over its axis dp.
        experts: the folded mesh that the model's experts are on; their state is cut over edp.
        replicas: hybrid sharding: into so many blocks of neighbours the data ranks fall, and each has all of the state.
        units: of stage 3, the submodules whose parameters are gathered together, while they run; by default the entries
            of ModuleLists and Sequentials, and modules beside these.
        dtype: to compute in, such as ``torch.bfloat16``; the optimiser has the weights in at least float32. Inputs of
            forward are cast, except under autocast, which does so itself; buffers are not. With autocast give it, too:
            otherwise autocast keeps casts of the weights, in stage 3 of all of them.
        reduce_dtype: of gradients on their way (they are summed, then divided); by default that of the optimiser, in
            which those of several passes are added up before.
        bucket_mb: of stages 1 and 2, size in MiB of what is reduced at once.
        offload: ``"cpu"``: gradients and state of the optimiser are there, in stage 3 the parameters, too. ``"disk"``:
            and the state in files that are mapped into memory.
        folder: for these.
        init: fills the parameters of a module from meta, whole as it sees them; by default its ``reset_parameters``.
        sync_buffers: before each training forward, broadcast rank 0's buffers over the data axis.

    Raises:
        ValueError: on all ranks, where parameters or settings differ between them; for an optimiser that is not
            element-wise, for one of other parameters; for what cannot be used, by its name.
        UnsupportedOperation: for sparse gradients; in stage 3, for use of a parameter outside of forward and backward.
    """

    module: nn.Module

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        stage: int,
        group: Group | None = None,
        mesh: Mesh | None = None,
        experts: Mesh | None = None,
        replicas: int = 1,
        units: Sequence[nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        bucket_mb: float = 8.0,
        offload: str = "none",
        folder: str | Path | None = None,
        init: Callable[[nn.Module], object] | None = None,
        sync_buffers: bool = True,
    ) -> None:
        super().__init__()
        if stage not in (1, 2, 3):
            raise ValueError(f"stage: expected 1, 2 or 3, got {stage!r}")
        if offload not in OFFLOADS:
            raise ValueError(f"offload: expected one of {', '.join(OFFLOADS)}, got {offload!r}")
        if (offload == "disk") != (folder is not None):
            raise ValueError("folder: needed for offload='disk', and only there")
        if not bucket_mb > 0:
            raise ValueError(f"bucket_mb: must be positive, got {bucket_mb}")
        if units is not None and stage < 3:
            raise ValueError(f"units: of stage 3 alone, and this is stage {stage}")
        for name, given in (("dtype", dtype), ("reduce_dtype", reduce_dtype)):
            if given is not None and not given.is_floating_point:
                raise ValueError(f"{name}: expected a floating-point type, got {given}")
        for name, p in module.named_parameters():
            if (older := WRAPPERS.get(id(p))) is not None:
                raise ValueError(f"module: {name} is reduced by {type(older).__name__} already; delete that")
        check_module(module, "ZeRO")
        # Not as a submodule: whoever asks this one, or one around it, for parameters is to find the pieces alone.
        object.__setattr__(self, "module", module)
        self.optimizer, self.stage = optimizer, stage
        self.replicas = Replicas(group, mesh, experts, "ZeRO")
        self.mesh, self.group = mesh, self.replicas.group
        self.dtype, self.sync_buffers, self._bytes = dtype, sync_buffers, int(bucket_mb * 2**20)
        recall_marks(module)
        self.replicas.check_marks(module)
        self._renewed = leave_meta(module, self.group.device)
        state = [*module.named_parameters(), *module.named_buffers()]
        units_of = divide(module, units) if stage == 3 else []
        words = f"stage {stage}, replicas {replicas}, bucket_mb {bucket_mb:g}, {dtype}, {reduce_dtype}, {offload}"
        parts = [f"a unit of {', '.join(names)}" for _, names in units_of]
        self.replicas.check_alike(state, words, f"sync_buffers {sync_buffers}", *parts)
        if not self._renewed:
            self.replicas.broadcast(state, self._bytes)

        settings = Settings(stage, dtype, reduce_dtype, offload != "none", self.group.size)
        layout = Layout(self.replicas, replicas, settings)
        divided: list[tuple[nn.Module, list[Flat]]] = []
        if stage == 3:
            divided = layout.by_unit(units_of)
            self.flats = [flat for _, flats in divided for flat in flats]
        else:
            # Frozen ones stay as they are, but for their dtype.
            kept = {n: p for n, p in module.named_parameters() if p.requires_grad or (dtype and p.is_floating_point())}
            self.flats = layout.by_size(kept, self._bytes)
        self._fill(init)
        self._frozen = [p for p in module.parameters() if not p.requires_grad]
        self._members = {member.param: member for flat in self.flats for member in flat.members}
        for name, p in module.named_parameters():
            member = self._members.get(p)
            self._parameters[name] = p if member is None else member.piece
            WRAPPERS[id(p)] = self
        self._adopt()

        taught = [flat for flat in self.flats if flat.kind.trained]
        summed = [self.replicas.summed_over(flat.members[0].param) for flat in taught]
        self._gradients = Gradients(taught, summed, by_unit=stage == 3)
        self._gathering: Gathering | None = None
        if stage == 3:
            self._gathering = Gathering(module, [Unit(owner, flats) for owner, flats in divided], self._gradients)
        disk = DiskState(optimizer, taught, Path(folder)) if folder is not None else None
        whole = [flat for flat in self.flats if flat.whole]
        self._steps = Steps(optimizer, [*self.parameters()], whole, self._gradients, disk, self._stepped)

    # Construction ------------------------------------------------------------------------------------------

    def _fill(self, init: Callable[[nn.Module], object] | None) -> None:
        """Take the values of the parameters, and give them the places that they have from now on."""
        if self._renewed:
            share = partial(self.replicas.broadcast, limit=self._bytes)
            initialise(self.module, self.flats, init or reset_parameters, share)
        for flat in self.flats:
            for member in flat.members:
                member.param.grad = None
                if not self._renewed:
                    flat.store(member, member.param)
                values = torch.zeros((), dtype=flat.dtype, device=flat.device).expand(member.shape)
                hand_out(member.param, flat.view(member) if flat.whole else values)

    def _adopt(self) -> None:
        pieces = {p: member.piece for p, member in self._members.items()}
        pieces |= {p: p for p in self._frozen if p not in pieces}  # which optimisers pass over
        pieces |= {old: pieces[new] for old, new in self._renewed.items()}
        adopt(self.optimizer, pieces, self._piece_of)

    def _piece_of(self, param: nn.Parameter, values: Tensor) -> Tensor:
        """Of a tensor that is like the whole parameter."""
        piece = self._members[self._renewed.get(param, param)].piece
        cut = placement(piece).stretch
        assert cut is not None
        return values.reshape(-1)[cut.start : cut.stop].to(piece.device, piece.dtype, copy=True)

    # Use ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self._gradients.check()
            if any(p.requires_grad for p in self._frozen):
                names = [n for n, p in self.module.named_parameters() if any(p is q for q in self._frozen)]
                raise ValueError(
                    f"requires_grad of one of {', '.join(names)} was set after ZeRO was built, which would leave its "
                    "gradient unreduced; wrap the module again"
                )
        if self.sync_buffers and self._gradients.sync and self.training and torch.is_grad_enabled():
            self.replicas.broadcast(self.module.named_buffers(), self._bytes)
        if self.dtype is not None and not torch.is_autocast_enabled(self.group.device.type):
            args, kwargs = tree_map_only(Tensor, self._cast, (args, kwargs))
        return self.module(*args, **kwargs)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here add to this rank's gradients and reduce nothing.

        The next one outside reduces the sum. Needs the memory of stage 1 for gradients. Enter and leave on all ranks
        alike.
        """
        before, self._gradients.sync = self._gradients.sync, False
        try:
            yield
        finally:
            self._gradients.sync = before

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, the module's parameters are whole, and may be changed, alike on all ranks. Collective."""
        with self._gathering.gathered() if self._gathering is not None else nullcontext():
            yield
            changed = [flat.take_over(member) for flat in self.flats for member in flat.members]
        if any(changed):
            self._changed()

    def refresh(self) -> None:
        """Take over pieces that have changed; ``optimizer.step()`` does so itself. Collective."""
        self._publish(self.flats)

    def settle(self) -> None:
        """Move state that was put into the optimiser to the files of ``offload="disk"``, and give its memory back."""
        if self._steps.disk is not None:
            self._steps.disk.settle()

    def _stepped(self) -> None:
        self._publish([flat for flat in self.flats if flat.kind.trained])

    def _publish(self, flats: Sequence[Flat]) -> None:
        for i, flat in enumerate(flats if self.stage < 3 else ()):
            flat.start_publishing()
            if i:
                flats[i - 1].finish_gather()  # one after the other: each needs memory for my part
        if flats and self.stage < 3:
            flats[-1].finish_gather()
        self._changed()

    def _changed(self) -> None:
        """The parameters have other values now than a graph may have seen."""
        if self._gathering is not None:
            self._gathering.drop()
        self._steps.note()
        if self._steps.disk is not None:
            self._steps.disk.forget()

    def train(self, mode: bool = True) -> ZeRO:
        self.module.train(mode)
        return super().train(mode)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Those of the wrapped module, under its names."""
        return self.module.named_buffers(prefix, recurse, remove_duplicate)

    def requires_grad_(self, requires_grad: bool = True) -> ZeRO:
        raise UnsupportedOperation("ZeRO: what is trained is settled when it is built; call requires_grad_ before that")

    def extra_repr(self) -> str:
        return f"stage={self.stage}, {self.module!r}"

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._gradients.forget()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedOperation(
            "ZeRO.state_dict: each rank has pieces alone; use parallel.checkpoint.save, or full_state_dict on all ranks"
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedOperation(
            "ZeRO.load_state_dict: each rank has pieces alone; use parallel.checkpoint.load, or load_full_state_dict"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        raise UnsupportedOperation("ZeRO: a wrapped module cannot be moved or converted; do so before wrapping it")

    def __deepcopy__(self, memo: dict[int, Any]) -> ZeRO:
        raise TypeError("ZeRO: a copy would reduce nothing; copy the module, and wrap that")
