"""The user's DeepSpeed keys, completed by what our config decides, which they may not contradict."""

from __future__ import annotations

import copy
from typing import Any

from mftcoder_coba.config import Config
from mftcoder_coba.errors import UserError
from mftcoder_coba.planning import accumulation_steps


def build_deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Raises:
        UserError: the user's keys contradict the config, or ask for what this program does itself.
    """
    result = copy.deepcopy(config.deepspeed)
    training = config.training
    decided: dict[str, tuple[Any, str]] = {
        "train_batch_size": (training.global_batch_rows, "training.global_batch_rows"),
        "train_micro_batch_size_per_gpu": (training.micro_batch_rows, "training.micro_batch_rows"),
        "gradient_accumulation_steps": (accumulation_steps(config, world_size), "training.global_batch_rows / (micro_batch_rows x ranks)"),
        "gradient_clipping": (training.gradient_clipping, "training.gradient_clipping"),
        "bf16.enabled": (config.model.dtype == "bfloat16", "model.dtype"),
        "fp16.enabled": (False, "model.dtype (float16 is not offered)"),
    }
    for path, (value, source) in decided.items():
        _decide(result, path, value, source)
    for key, instead in {"optimizer": "training.learning_rate, betas and weight_decay", "scheduler": "training.schedule and warmup_steps"}.items():
        if key in result:
            raise UserError(f'has the key "{key}", which this program decides', f"deepspeed.{key}", f"remove it; use {instead}")
    if config.model.dtype == "bfloat16":
        # Stages 1 and 2 look for non-finite bfloat16 gradients only when told to. One must never reach the optimizer.
        _decide(result, "bf16.check_grad_overflow", True, "the rule that non-finite gradients never reach the optimizer")
    zero = result.setdefault("zero_optimization", {"stage": 0})
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device") == "nvme":
            raise UserError(
                'is "nvme", where a checkpoint cannot save what is swapped out', f"deepspeed.zero_optimization.{key}.device", 'use "cpu" or "none"'
            )
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        # torch's AdamW steps offloaded states as well; DeepSpeed's own CPU Adam must be compiled on the machine.
        result.setdefault("zero_force_ds_cpu_optimizer", False)
    result.setdefault("steps_per_print", 2**31 - 1)
    return result


def _decide(tree: dict[str, Any], path: str, value: Any, source: str) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"must be an object, found {tree!r}", f"deepspeed.{parent}")
    given = tree.get(last, "auto")
    if given != "auto" and given != value:
        raise UserError(
            f"is {given!r}, but {source} makes it {value!r}",
            f"deepspeed.{path}",
            "remove it from the DeepSpeed file; it is filled in from the config",
        )
    tree[last] = value
