"""Data parallelism: every rank holds the whole model, sees its own samples, and ends with the mean gradient.

The algorithm is that of Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel
Training" (PVLDB 13(12)), built on commlayer's public functions alone:

1. At construction rank 0's parameters and buffers are broadcast, so that all ranks start alike.
2. Gradients live in a few flat *buckets*, one dtype and device each, filled in reverse order of registration,
   which is roughly the order in which backward produces them. ``p.grad`` is a view into its bucket.
3. A hook on each parameter marks its gradient as ready. A bucket whose gradients are all ready is averaged
   over the ranks, asynchronously and in place, while backward goes on with earlier layers.
4. At the end of backward the rest is started, and everything is waited for.

What keeps the ranks in step, whatever their data did: buckets are the same on all ranks (checked), they start
in one fixed order (one that is ready early waits for its turn), and all of them start in every synchronised
backward. A parameter without a gradient on this rank brings zeros. Each bucket ends with a flag per
parameter, 1 where this rank has a gradient, so the same all-reduce tells whether any rank has one: a
parameter that **no** rank used since ``zero_grad()`` ends with ``grad`` None, as in torch's
DistributedDataParallel with ``find_unused_parameters=True``, but without a second collective.

On a mesh, a parameter that :func:`parallel.mark_replicated` marked as replicated over further axes (a norm under
context parallelism) has its gradients added up over those in the very same all-reduce, over the group of the data
axis and these axes together: so exactly once, and also where the data axis has one rank.

Experts live on a folded mesh. Each has seen the tokens of all ranks that share it, so their gradients are added up over
``edp``, the ranks that hold the same, and then divided by the size of dp, as all others are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import commlayer
from commlayer import CommError, Group, Mesh
from parallel.buckets import Bucket, Slot, make_buckets
from parallel.placement import recall_marks
from parallel.replicas import WRAPPERS, Replicas, check_module


class DataParallel(nn.Module):
    """Wrap a module so that ``backward()`` leaves the mean of all ranks' gradients in ``p.grad``.

    On a ``mesh`` the mean is over its axis ``dp``, and the gradients of parameters marked by ``mark_replicated`` are
    added up over the axes they are marked for. The loss of a rank then is that of its own tokens and samples: a part
    of the sum over ``cp``, a term of the mean over ``dp``.

    Where ranks have different numbers of samples, sum the losses and multiply by ``size / global count``: the
    mean over ranks then is the mean over samples. A rank without samples runs an empty batch. (A rank whose
    backward reaches no parameter at all would take no part; the others would wait for it until the timeout.)

    Gradient accumulation: run all but the last backward under :meth:`no_sync`. Frozen parameters
    (``requires_grad=False`` at construction) are left alone, tied ones are reduced once. The state dict is
    that of the wrapped module, without a prefix.
    Wrapping a module again retires the wrapper before.

    Args:
        module: on the device it will train on; every rank passes the same architecture.
        group: the data-parallel ranks; by default the world.
        mesh: instead of a group, for models that are also parallel along other axes.
        experts: the folded mesh that the model's experts are on, ``mesh.fold("ep=4")``.
        bucket_mb: size of a bucket in MiB; the result does not depend on it, the overlap does.
        sync_buffers: before each training forward, broadcast rank 0's buffers (statistics of batch norm), over the data
            axis alone.

    Raises:
        ValueError: on all ranks, when parameters or ``bucket_mb`` differ between ranks; when a parameter is marked for
            an axis that the mesh lacks, or marked at all without a mesh.
        UnsupportedOperation: for sparse gradients, and for a second derivative through ``p.grad``.
    """

    def __init__(
        self,
        module: nn.Module,
        group: Group | None = None,
        *,
        mesh: Mesh | None = None,
        experts: Mesh | None = None,
        bucket_mb: float = 25.0,
        sync_buffers: bool = True,
    ) -> None:
        super().__init__()
        if not bucket_mb > 0:
            raise ValueError(f"bucket_mb: must be positive, got {bucket_mb}")
        _check_module(module)
        self.module = module
        self.replicas = Replicas(group, mesh, experts, "DataParallel")
        self.mesh, self.group = mesh, self.replicas.group
        self.sync_buffers = sync_buffers
        self._bytes = int(bucket_mb * 2**20)
        recall_marks(module)
        self.replicas.check_marks(module)
        state = [*module.named_parameters(), *module.named_buffers()]
        self.replicas.check_alike(state, f"bucket_mb {bucket_mb:g}")
        self.replicas.broadcast(state, self._bytes)

        self._frozen = [p for p in module.parameters() if not p.requires_grad]
        # named_parameters yields tied parameters once.
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        reductions = {name: found for name, p in trained.items() if (found := self.replicas.reduction(p)) is not None}
        reduced = {name: trained[name] for name in reductions}
        self._replace_older(reduced)
        self._buckets = make_buckets([*reduced.items()], self._bytes, reductions)
        self._sync = True
        self._open = False  # between the first gradient of a synchronised backward and its end
        self._task: int | None = None  # the engine's id of the backward that will call _finish
        self._launched = 0  # buckets started in this backward: always the first ones
        self._arrived = 0  # and of these, the first ones that are known to be done
        # Parameters outlive this wrapper, so their hooks must neither keep it alive nor stay behind.
        handles: list[Any] = []
        self._accumulators: list[Any] = []  # which live only as long as somebody holds them
        self._retire = weakref.finalize(self, lambda: [handle.remove() for handle in handles])
        for bucket in self._buckets:
            for slot in bucket.slots:
                WRAPPERS[id(slot.param)] = self
                hook = _hook(weakref.ref(self), bucket, slot)
                handles.append(slot.param.register_post_accumulate_grad_hook(hook))
                if slot.gain != 1:
                    # On the node that accumulates: a hook on the parameter would see torch.autograd.grad, too.
                    node: Any = slot.param.view_as(slot.param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
                    self._accumulators.append(node)
                    handles.append(node.register_prehook(_before(slot)))
        self.register_load_state_dict_pre_hook(_insert_prefix)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self._check_state()
        if self.sync_buffers and self._sync and self.training and torch.is_grad_enabled():
            self.replicas.broadcast(self.module.named_buffers(), self._bytes)
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here add to this rank's gradients and communicate nothing.

        The next one outside averages the sum. Enter and leave on all ranks alike.
        """
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> DataParallel:
        raise TypeError("DataParallel: a copy would reduce nothing; copy the wrapped module, and wrap that anew")

    # What happens in backward ------------------------------------------------------------------------------

    def _ready(self, bucket: Bucket, slot: Slot) -> None:
        if slot.param.grad is not None:  # backward can come to a parameter with nothing
            slot.attach()
        if not self._sync:
            return
        self._open = True
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        bucket.mark_ready(slot)
        while self._launched < len(self._buckets) and not self._buckets[self._launched].missing:
            self._launch_next()
        # Ask, although nobody needs the answer yet: some backends (MPI) move data only inside their calls.
        while self._arrived < self._launched and self._buckets[self._arrived].work.done():
            self._arrived += 1

    def _launch_next(self) -> None:
        bucket = self._buckets[self._launched]
        bucket.collect()
        flat, (group, op) = bucket.flat, bucket.reduction
        bucket.work = commlayer.all_reduce(flat, op, group=group, out=flat, async_op=True)
        self._launched += 1

    def _finish(self) -> None:
        """End of backward. Where they nest (re-entrant checkpoints), called once more than there is to do."""
        if not self._open:
            return
        while self._launched < len(self._buckets):
            self._launch_next()
        for bucket in self._buckets:
            bucket.work.wait()
        for bucket in self._buckets:
            bucket.deliver()
        self._open, self._task, self._launched, self._arrived = False, None, 0, 0

    # Agreement ---------------------------------------------------------------------------------------------

    def _replace_older(self, reduced: dict[str, nn.Parameter]) -> None:
        """Retire a wrapper of the same parameters, since two that reduce would add up twice."""
        mine = {id(p) for p in reduced.values()}
        for name, p in reduced.items():
            older = WRAPPERS.get(id(p))
            if older is not None and not isinstance(older, DataParallel):
                raise ValueError(f"module: {name} is reduced by {type(older).__name__} already; delete that")
            if older is None or not older._retire.alive:
                continue
            if not {id(slot.param) for bucket in older._buckets for slot in bucket.slots} <= mine:
                raise ValueError(f"module: {name} is reduced by another DataParallel, of a larger module; delete that")
            older._retire()

    def _check_state(self) -> None:
        if self._buckets and not self._retire.alive:
            raise CommError("DataParallel: this wrapper was replaced by a newer one of the same parameters")
        if self._open and torch._C._current_graph_task_id() == -1:
            raise CommError(
                "DataParallel: the last backward broke off halfway, so this rank and the others may have "
                "started different reductions; restart from a checkpoint"
            )
        if any(p.requires_grad for p in self._frozen):
            names = [n for n, p in self.module.named_parameters() if any(p is q for q in self._frozen)]
            raise ValueError(
                f"requires_grad of one of {', '.join(names)} was set after DataParallel was built, which "
                "would leave its gradient unreduced; wrap the module again"
            )


def _hook(parallel: weakref.ref[DataParallel], bucket: Bucket, slot: Slot) -> Callable[[Tensor], None]:
    def ready(_: Tensor) -> None:
        if (alive := parallel()) is not None:
            alive._ready(bucket, slot)

    return ready


def _before(slot: Slot) -> Callable[..., None]:
    return lambda *_: slot.divide_reduced()


def _check_module(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, DataParallel):
            raise ValueError(f"{name or 'module'}: already wrapped in DataParallel")
    check_module(module, "DataParallel")


def _insert_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}module.{key[len(prefix) :]}"] = state_dict.pop(key)
