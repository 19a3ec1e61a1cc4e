"""Parallel modules on commlayer's public functions, for use in your own models."""

from parallel.data import DataParallel

__all__ = ["DataParallel"]
