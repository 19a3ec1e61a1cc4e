"""Several ranks on one GPU, or on some, over Gloo: COMMLAYER_BACKEND=gloo torchrun --nproc-per-node 2 -m pytest …"""

import pytest
import torch

from commlayer.launch import discover
from tests.gpu import staged


@pytest.mark.parametrize("check", staged.CHECKS)
def test_compute_on_the_gpu_and_talk_on_the_cpu(several, agreed, check):
    device = torch.device("cuda", (discover().local_rank or 0) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    agreed(lambda: check(several, device))
