"""A process that has imported torch and the layer, and forks ranks: a job starts in a tenth of a second.

``python -m tests.faults.zygote FOLDER`` listens at FOLDER/HOST.socket, prints its own id and that path, and ends, with
all it started, when its standard input does. A request is a message {"folder", "env"}, with hydra's PMI socket where
there is one. The child is a rank: it gets that environment, a session of its own, and leaves through the interpreter's
normal end. How it ended goes to its report and to who asked; who asked may send numbers of signals for it, and if that
connection breaks, the child is killed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from tests.faults import rank

PR_SET_PDEATHSIG = 1  # of prctl(2)


def serve(path: str) -> dict[str, Any] | None:
    """Fork ranks until standard input ends. Returns None in the parent, in each child the request it is to run."""
    gc.freeze()  # what is there now need not be looked at, and so copied, in each child's end
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno())
    children: dict[int, tuple[socket.socket, dict[str, Any]]] = {}
    selector = selectors.DefaultSelector()
    for source in (listener, woken, sys.stdin):
        selector.register(source, selectors.EVENT_READ)
    print(os.getpid(), path, flush=True)
    while True:
        for key, _ in selector.select():
            source: Any = key.fileobj
            if source is sys.stdin:
                return None
            if source is listener:
                asked, _ = listener.accept()
                data, files, _, _ = socket.recv_fds(asked, 1 << 20, 1)
                request = json.loads(data)
                pid = os.fork()
                if pid == 0:
                    os.setsid()
                    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # however the parent ends
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    others = [other for other, _ in children.values()]
                    for inherited in (selector, listener, woken, wakes, asked, *others):
                        inherited.close()
                    return request | {"pmi": {"PMI_FD": str(files[0])} if files else {}}
                for file in files:
                    os.close(file)
                children[pid] = asked, request
                selector.register(asked, selectors.EVENT_READ, pid)
            elif source is woken:
                woken.recv(4096)
                while children:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if pid == 0:
                        break
                    asked, request = children.pop(pid)
                    if asked.fileno() >= 0:
                        selector.unregister(asked)
                    code = os.waitstatus_to_exitcode(status)
                    with suppress(OSError):  # nobody is interested any more
                        rank.Report(request).say("exit", status=code)
                        asked.send(str(code).encode())
                    asked.close()
            elif source.fileno() >= 0:  # not closed a moment ago, with its rank
                message = source.recv(64)
                with suppress(ProcessLookupError):
                    os.kill(key.data, int(message) if message else signal.SIGKILL)
                if not message:
                    selector.unregister(source)
                    source.close()


if __name__ == "__main__":
    request = serve(f"{sys.argv[1]}/{socket.gethostname()}.socket")
    if request is not None:
        rank.run(request)
