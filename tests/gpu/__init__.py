"""The contracts on NVIDIA GPUs, and what only a GPU has: streams. Skipped as a whole where there is none.

    python -m pytest tests/gpu                                # one process, which also starts the jobs below by itself
    torchrun --nproc-per-node N -m pytest tests/gpu           # N GPUs, a rank each, over NCCL
    COMMLAYER_BACKEND=gloo torchrun --nproc-per-node N -m pytest tests/gpu   # compute on GPUs, talk through CPU tensors

Several ranks share one GPU over NCCL 2.30 or newer where that is allowed, and the GPU is the only one that they see:

    NCCL_MULTI_RANK_GPU_ENABLE=1 CUDA_VISIBLE_DEVICES=0 torchrun --nproc-per-node 2 -m pytest tests/gpu

``make test-gpu`` is the first of these. The checks are functions of a group: what of them a CPU can do is tested there,
in tests/unit/test_gpu_checks.py.
"""
