"""Finds out what a backend can do, by running it and looking at the values.

A clean subprocess (``keeper``) starts ranks that may hang or die (``crew``); each runs the raw backend and compares
(``checks``). What they found becomes a profile (``table``), which ``cache`` keeps and ``policy`` asks for in ``init``.
"""

from commlayer.probe.cache import Identity, cached, keep, save
from commlayer.probe.policy import agree, obtain
from commlayer.probe.processes import find_mpiexec
from commlayer.probe.start import RANKS, SECONDS, probe
from commlayer.probe.table import incomplete

__all__ = [
    "RANKS",
    "SECONDS",
    "Identity",
    "agree",
    "cached",
    "find_mpiexec",
    "incomplete",
    "keep",
    "obtain",
    "probe",
    "save",
]
