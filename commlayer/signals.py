"""SIGUSR1, also while the main thread is inside a library that does not return."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable


def dump_on_signal(dump: Callable[[], None]) -> None:
    """Call ``dump`` in a thread of its own at every SIGUSR1, unless the program has other plans with that signal.

    Python runs handlers in the main thread, and not before it comes back from C; but it writes the signal's number
    to a wake-up descriptor at once.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL:
        return
    ours, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    previous = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    if previous != -1:  # an event loop has it already
        signal.set_wakeup_fd(previous)

    def serve() -> None:
        while data := ours.recv(64):
            if signal.SIGUSR1 in data:
                dump()

    def handle(number: int, frame: object) -> None:
        """In the main thread; for nothing where the descriptor is still ours."""
        holder = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(holder)
        if holder != wakeup.fileno():
            dump()

    def forked() -> None:
        """The parent's descriptor is not the child's to ring."""
        if signal.getsignal(signal.SIGUSR1) is handle:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    os.register_at_fork(after_in_child=forked)
    signal.signal(signal.SIGUSR1, handle)
    threading.Thread(target=serve, name="commlayer-signals", daemon=True).start()
