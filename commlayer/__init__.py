"""commlayer: one communication layer for PyTorch, on NCCL, XCCL, Gloo and MPI.

>>> import commlayer
>>> group = commlayer.init()
>>> y = commlayer.all_reduce(x)
"""

from commlayer.capability import CapabilitySet
from commlayer.errors import (
    BackendUnavailable,
    CollectiveMismatch,
    CommError,
    CommTimeout,
    LaunchError,
    PeerLost,
    UnsupportedOperation,
)
from commlayer.functional import (
    all_gather,
    all_reduce,
    all_to_all,
    balanced_sizes,
    barrier,
    broadcast,
    gather,
    reduce,
    reduce_scatter,
    scatter,
)
from commlayer.group import Explanation, Group
from commlayer.mesh import Mesh
from commlayer.objects import all_gather_object, broadcast_object, gather_object, scatter_object
from commlayer.planned import FallbackWarning
from commlayer.point_to_point import recv, send, sendrecv
from commlayer.reduce_op import AVG, BAND, BOR, BXOR, MAX, MIN, PRODUCT, SUM, ReduceOp, premul_sum
from commlayer.runtime import finalize, init, is_initialized, run_local, world
from commlayer.symmetric import empty_symmetric
from commlayer.torch_backend import register
from commlayer.torch_backend.creation import to_process_group
from commlayer.work import Work


def new_group(ranks: list[int]) -> Group:
    """The group of these world ranks, in this order; called by every rank of the world.

    On ranks outside it, the group has rank -1 and takes no operation.
    """
    return world().new_group(ranks)


register()

__version__ = "0.1.0"

__all__ = [
    "AVG",
    "BAND",
    "BOR",
    "BXOR",
    "MAX",
    "MIN",
    "PRODUCT",
    "SUM",
    "BackendUnavailable",
    "CapabilitySet",
    "CollectiveMismatch",
    "CommError",
    "CommTimeout",
    "Explanation",
    "FallbackWarning",
    "Group",
    "LaunchError",
    "Mesh",
    "PeerLost",
    "ReduceOp",
    "UnsupportedOperation",
    "Work",
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "balanced_sizes",
    "barrier",
    "broadcast",
    "broadcast_object",
    "empty_symmetric",
    "finalize",
    "gather",
    "gather_object",
    "init",
    "is_initialized",
    "new_group",
    "premul_sum",
    "recv",
    "reduce",
    "reduce_scatter",
    "run_local",
    "scatter",
    "scatter_object",
    "send",
    "sendrecv",
    "to_process_group",
    "world",
]
