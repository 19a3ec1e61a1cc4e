"""Some steps of torchtitan's MoE debug model on CPU ranks, on any backend of torch.distributed.

    torchrun --nproc-per-node 2 -m tests.torchtitan.train FOLDER --backend commlayer --experts 2

FOLDER has a tokenizer, text and the first weights, which ``--seed`` writes, on one process. Rank 0 writes losses, norms
and the first step's gradients to the file ``--out``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from tests.torchtitan import shim

STEPS = 3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", action="store_true", help="write the folder: tokenizer, text and the first weights")
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--experts", type=int, default=1, help="expert parallel degree")
    parser.add_argument("--sum", action="store_true", help="reduce gradients by SUM, which every backend has")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def write_tokenizer_and_text(folder: Path) -> None:
    """Bytes as tokens, and some of Python's standard library as text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "text").mkdir()
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    (folder / "text" / "text.jsonl").write_text("".join(json.dumps({"text": s.read_text()}) + "\n" for s in sources))


def configuration(options: argparse.Namespace) -> Any:
    from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel

    config = deepseek_v3_debugmodel()
    config.hf_assets_path = str(options.folder / "tokenizer")
    config.dump_folder = str(options.folder)
    config.dataloader.dataset_path = str(options.folder / "text")
    config.training.local_batch_size = 2
    config.training.seq_len = 128
    config.training.steps = STEPS
    config.training.disable_cuda_graphs = True
    config.parallelism.expert_parallel_degree = options.experts
    config.parallelism.spmd_backend = "partial_dtensor"  # its default needs a newer fully_shard than torch 2.13's
    config.checkpoint.enable = True
    config.checkpoint.create_seed_checkpoint = options.seed
    config.checkpoint.load_only = not options.seed
    if not options.seed:
        config.checkpoint.initial_load_path = str(options.folder / "checkpoint" / "step-0")
        config.checkpoint.folder = "nothing-saved"
    return config


def main() -> None:
    options = parse()
    if options.backend == "commlayer":
        import commlayer  # noqa: F401 - registers it
    shim.install(options.backend)
    if options.seed:
        write_tokenizer_and_text(options.folder)
    trainer = configuration(options).build()
    if options.seed:
        trainer.checkpointer.save(curr_step=0, last_step=True)
    else:
        train(trainer, options)
    trainer.close()
    dist.destroy_process_group()


def train(trainer: Any, options: argparse.Namespace) -> None:
    (model,) = trainer.model_parts
    if options.sum:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    steps: list[dict[str, float]] = []
    gradients: dict[str, torch.Tensor] = {}

    def keep_metrics(metrics: dict[str, Any], step: int) -> None:
        steps.append({"step": step, "loss": metrics["loss_metrics/global_avg_loss"], "norm": metrics["grad_norm"]})

    def keep_gradients(*_: Any) -> None:
        if not gradients:  # of the first step, when all runs have the same weights
            gradients.update((name, p.grad.full_tensor()) for name, p in model.named_parameters())

    trainer.metrics_processor.logger.log = keep_metrics
    trainer.optimizers.register_step_pre_hook(keep_gradients)
    trainer.train()
    if options.out and dist.get_rank() == 0:
        torch.save({"steps": steps, "gradients": gradients}, options.out)


if __name__ == "__main__":
    main()
