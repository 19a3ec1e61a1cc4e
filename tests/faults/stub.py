"""What mpiexec starts in place of a rank: has the rank forked by the zygote, and shares its fate.

Runs without site-packages, so it takes no time. Hydra's end of PMI goes to the real rank, signals are passed on, and
the stub ends when the rank ends, with the status that a shell would give.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress

# Not imported from the zygote: that would import torch, which is what the stub spares.
zygote = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
zygote.connect(f"{sys.argv[1]}/{socket.gethostname()}.socket")


def pass_on(number, _):
    with suppress(OSError):  # the rank has ended
        zygote.send(str(number).encode())


for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, pass_on)
message = json.dumps({"folder": sys.argv[2], "env": dict(os.environ)}).encode()
pmi = int(os.environ["PMI_FD"])
socket.send_fds(zygote, [message], [pmi])
os.close(pmi)
status = -signal.SIGKILL
with suppress(ConnectionResetError):
    status = int(zygote.recv(64) or status)
# Never by a signal: hydra's proxy then kills every rank, whatever -disable-auto-cleanup says (MPICH 5, pmip.c).
os._exit(status if status >= 0 else 128 - status)
