"""The control channel: one TCP connection from every rank to a hub in rank 0, apart from every backend.

It tells at once who has died, left or failed, asks ranks where they are, and keeps the few bytes that ranks must
exchange before, or without, a backend. It binds to one interface, admits only who knows the job's secret, and reads
nothing but length-prefixed JSON: no pickles.
"""

from commlayer.control.client import Client
from commlayer.control.hub import Hub

__all__ = ["Client", "Hub"]
