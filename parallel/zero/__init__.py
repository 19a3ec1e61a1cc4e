"""ZeRO: the optimiser's state, the gradients and the parameters, each cut over the data-parallel ranks."""

from parallel.zero.wrapper import ZeRO

__all__ = ["ZeRO"]
