"""A whole experiment in small: three tasks that a tiny random Llama learns in seconds, without any download."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TASKS = {"count": 160, "reverse": 96, "upper": 24}


def sample(task: str, rng: random.Random) -> tuple[str, str]:
    word = "".join(rng.choice("abcde") for _ in range(rng.randint(3, 9)))
    answer = {"count": " ".join(str(position) for position in range(len(word))), "reverse": word[::-1], "upper": word.upper()}[task]
    return f"{task} {word}", answer


def write_samples(path: Path, samples: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"chat_rounds": [{"role": "human", "content": prompt}, {"role": "bot", "content": answer}]}) for prompt, answer in samples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_model(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=264, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["human bot system"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_toy(folder: Path) -> None:
    """`folder`/model, `folder`/data/TASK/{train,valid}.jsonl and `folder`/toy.json."""
    write_model(folder / "model")
    rng = random.Random(0)
    for task, size in TASKS.items():
        write_samples(folder / "data" / task / "train.jsonl", [sample(task, rng) for _ in range(size)])
        write_samples(folder / "data" / task / "valid.jsonl", [sample(task, rng) for _ in range(16)])
    (folder / "toy.json").write_text(json.dumps(tree(), indent=2), encoding="utf-8")


def tree() -> dict[str, Any]:
    """The experiment; paths are relative to its folder."""
    return {
        "run": {"name": "toy", "dir": "runs"},
        "model": {"path": "./model", "dtype": "float32"},
        "data": {
            "tasks": [{"name": task, "train": [f"data/{task}/train.jsonl"], "valid": [f"data/{task}/valid.jsonl"]} for task in TASKS],
            "sequence_length": 96,
            "cache_dir": "cache",
        },
        "balancer": {"kind": "coba", "warmup": 3, "window": 6},
        "training": {"epochs": None, "max_steps": 12, "global_batch_rows": 8, "micro_batch_rows": 2, "learning_rate": 5e-3, "warmup_steps": 2},
        "validation": {"every_steps": 4},
        "checkpoint": {"every_steps": 6},
        "tracking": {"tensorboard": False},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
