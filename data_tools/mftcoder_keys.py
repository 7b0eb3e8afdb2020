"""MFTCoder's training arguments: what they are when not given, and what becomes of each of them here.

Every argument is in exactly one of `CONVERTED`, `DIFFERENT` and `HARMLESS`. A sentence may depend on the value: it is then a
dict of value -> sentence, with "*" for every other value and None where there is nothing to say.
"""

from __future__ import annotations

import json
from typing import Any

Sentence = str | dict[str, str | None]

# Keys that decide something here, and their values where a config is silent.
DEFAULTS: dict[str, Any] = {
    "load_raw_dataset": True,
    "task_weights": None,
    "data_split": "98,2,0",
    "padding_mode": "padding",
    "tokenize_mode": "sft",
    "weighted_loss_mode": "case3",
    "peft_type": "qlora",
    "lora_rank": 96,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": None,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 5e-5,
    "min_lr": 5e-6,
    "weight_decay": 0.01,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "num_warmup_steps": 0.05,
    "num_train_epochs": 4,
    "seed": 1234,
    "seq_length": 4096,
    "resume_from_checkpoint": None,
    "auto_resume": True,
    "log_interval": 10,
    "checkpointing_steps": 100,
    "evaluation_steps": 100,
    "max_train_steps": None,
    "early_stopping": True,
    "early_stopping_stall_num": 5,
    "saving_limit": None,
    "coba_warmup_steps": 100,
    "coba_history_length": 200,
    "coba_tau": 5,
    "coba_update_interval": 1,
    "coba_sample_valid_num": 1,
    "attn_implementation": "flash_attention_2",
    "role_markers": None,
    "trust_remote_code": True,
}
# Types that a value may have beside that of its default (text, for a path). An int always stands for a float.
OTHER_TYPES: dict[str, tuple[type, ...]] = {
    "data_paths": (list,),
    "task_weights": (str, list),
    "peft_type": (type(None),),
    "lora_alpha": (float,),
    "target_modules": (str, list),
    "resume_from_checkpoint": (str,),
    "checkpointing_steps": (type(None),),
    "max_train_steps": (int,),
    "saving_limit": (int,),
    "coba_tau": (float,),
    "role_markers": (dict,),
}

CONVERTED = {
    "data_paths",
    "output_dir",
    "pretrained_model_path",
    "task_weights",
    "tokenize_mode",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "per_device_train_batch_size",
    "learning_rate",
    "num_warmup_steps",
    "num_train_epochs",
    "resume_from_checkpoint",
    "log_interval",
    "evaluation_steps",
    "early_stopping_stall_num",
    "coba_warmup_steps",
    "coba_history_length",
    "coba_tau",
}

_OWN_MODEL_CODE = "MFTCoder brings code of its own for this architecture; here transformers' is used, or the model's with model.trust_remote_code"
_PER_TASK = "tasks are weighed over the global batch; MFTCoder weighs within each micro-batch, where one that holds a single task cancels its weight"
_SAMPLES = "a sample is a document; with pack or concat, MFTCoder's is a row"
_KEEP = "the two newest checkpoints and the best are kept (checkpoint.keep); MFTCoder keeps every adapter, or two full models"
_NO_LORA_BIAS = "biases of the adapted layers stay as they are; MFTCoder trains them with the adapter, in models that have any"

DIFFERENT: dict[str, Sentence] = {
    "model_type": {
        **dict.fromkeys(("aquila2", "baichuan", "chatglm2", "chatglm3", "qwen", "deepseek_v2"), _OWN_MODEL_CODE),
        "*": "not needed: the model's config.json names its architecture",
    },
    "data_split": "a sample's hash decides whether it is validation data, not a shuffle; all that is not the first number is, as in MFTCoder",
    "padding_mode": {
        "padding": None,
        "pack": "documents of a row do not see each other, and tasks share rows; MFTCoder's do see each other, and a folder's last go to the next",
        "concat": "only samples longer than seq_length are cut, and documents of a row do not see each other; MFTCoder cuts at every row's end",
    },
    "weighted_loss_mode": {
        "case1": "the mean is over all tokens of the global batch; MFTCoder's is over each micro-batch, then over these",
        "case2": _SAMPLES,
        "case3": _PER_TASK,
        "case4": f"{_PER_TASK}. {_SAMPLES}",
        "coba": "weights by the paper's formulas; MFTCoder adds a second softmax and a least weight of 1/(10 K): balancer.variant "
        f'"mftcoder" has them. Also, {_PER_TASK}',
    },
    "peft_type": {"lora": _NO_LORA_BIAS, "qlora": _NO_LORA_BIAS, "null": None},
    "per_device_eval_batch_size": "sizes the balancer's mini-batch only; full validations take micro_batch_rows at once",
    "min_lr": "the schedule ends there; MFTCoder's goes down to 0 and is cut off at this value",
    "weight_decay": "norms and biases are not decayed; in MFTCoder they are",
    "gradient_accumulation_steps": {
        "1": None,
        "*": "taken as written. If your launcher passed another --gradient_accumulation_steps (MFTCoder's own pass 1), that one was in force: change "
        "training.global_batch_rows. The learning rate falls over all steps; MFTCoder covers only 1 / this number of its schedule",
    },
    "lr_scheduler_type": {
        "cosine_with_restarts": "cosine: with transformers' default of one cycle both are the same",
        "polynomial": "linear: with transformers' default power of 1 both are the same",
        "constant": "without warm-up: transformers' constant schedule takes no account of num_warmup_steps",
        "*": None,
    },
    "seed": "the order of the data is another one",
    "seq_length": "tokens of a sample at most; MFTCoder also takes samples of one token more",
    "auto_resume": {
        "true": "goes on from checkpoints of this program; those of MFTCoder hold no optimizer state and are not continued",
        "*": None,
    },
    "checkpointing_steps": {"null": "MFTCoder makes none; here every 100 steps", "0": "MFTCoder makes none; here every 100 steps", "*": None},
    "max_train_steps": {
        "null": None,
        "*": "the schedule covers the run once; MFTCoder's is over after max_train_steps x accumulation / GPUs steps, and a cosine then rises again",
    },
    "early_stopping": {
        "true": "looks at mean_ratio: each task's validation loss over that before training, their mean; MFTCoder looks at the mean loss",
        "*": None,
    },
    "saving_limit": {
        "null": _KEEP,
        "0": _KEEP,
        "*": "counts the newest checkpoints; the best is kept beside them",
    },
    "coba_update_interval": {
        "1": None,
        "*": "warmup and window count observations: the warm-up's steps are divided by this number; MFTCoder's window mixes steps and observations",
    },
    "coba_sample_valid_num": "one mini-batch of as many rows, which holds every task; MFTCoder averages over this many random ones",
    "attn_implementation": {"flash_attention_2": "auto: flash-attention where it is installed, else PyTorch's own", "*": None},
    "role_markers": "an answer is followed by its end token; MFTCoder learns a line end between the two, and makes no-break spaces plain",
    "trust_remote_code": {
        "true": "left off for safety: set model.trust_remote_code if the model or its tokenizer comes with code of its own",
        "*": None,
    },
}

_NO_EFFECT = "has no effect in MFTCoder either"
HARMLESS: dict[str, Sentence] = {
    "tb_dir": "TensorBoard files are in the run folder, tensorboard/",
    "load_raw_dataset": "JSONL files are what is read",
    "data_weights": "MFTCoder overwrites it: both sample each task in proportion to its size",
    "low_cpu_mem_usage": "how the model is loaded, not what is trained",
    "quantization": "peft_type decides, as in MFTCoder",
    "tokenizer_type": "the model folder's tokenizer, always",
    "epoch_checkpointing": "checkpoints come every checkpoint.every_steps; the best and the newest are kept",
    "shuffle_before_split": _NO_EFFECT,
    "use_random_sampler": _NO_EFFECT,
    "use_dynamic_padding": "padding is never learned from and takes no share of the loss",
    "distributed_type": "the engine is DeepSpeed; what FSDP shards, ZeRO stage 3 shards (--zero-stage 3)",
    "init_timeout_seconds": "data is prepared before the ranks meet",
    "use_xformers": _NO_EFFECT,
    "weight_by_num_documents": _NO_EFFECT,
    "make_vocab_size_divisible_by": _NO_EFFECT,
    "model_parallel_size": _NO_EFFECT,
    "use_slow_tokenizer": _NO_EFFECT,
    "world_size": "the launcher decides; --gpus tells it to this converter",
}
LAUNCHER = (
    "From MFTCoder's launchers, not from its JSON: {gpus} GPUs, ZeRO stage {stage}, clipping at 1.0, bfloat16. "
    "They also keep the optimizer's state on the CPU; configs/deepspeed/ shows how to ask for that here."
)


def known_keys() -> set[str]:
    return CONVERTED | DIFFERENT.keys() | HARMLESS.keys()


def sentence(table: dict[str, Sentence], key: str, value: Any) -> str | None:
    """What `table` says about a key with this value; None: nothing."""
    text = table[key]
    if isinstance(text, str):
        return text
    return text.get(value if isinstance(value, str) else json.dumps(value), text.get("*"))
