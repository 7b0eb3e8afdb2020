"""MFTCoder's keys -> the sections of our config. Pure, but for looking whether the model is there."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from data_tools.mftcoder_data import Task, legal_name
from mftcoder_coba.errors import UserError

# mode: (balancer, reduction)
LOSS_MODES = {
    "coba": ("coba", "token"),
    "case1": ("proportional", "token"),
    "case2": ("proportional", "sample"),
    "case3": ("uniform", "token"),
    "case4": ("uniform", "sample"),
}
# mode: (packing, too_long)
PADDING_MODES = {"padding": ("none", "drop"), "pack": ("best_fit", "drop"), "concat": ("best_fit", "split")}
SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_restarts": "cosine",
    "linear": "linear",
    "polynomial": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
ATTENTION = {"flash_attention_2": "auto", "sdpa": "sdpa", "eager": "eager"}


def experiment(settings: dict[str, Any], tasks: list[Task], name: str, gpus: int, notes: list[str], path: Path) -> dict[str, Any]:
    """All sections but `deepspeed`.

    Args:
        settings: a value for every key that decides something.
        name: of the run, where `output_dir` is not given.
        gpus: processes of MFTCoder's launcher.
        notes: what the user should know is added here.
        path: the file of the settings, for messages.

    Raises:
        UserError: a value that has no meaning, or no counterpart with these tasks.
    """
    _check_tokenize_mode(settings["tokenize_mode"], tasks, path)
    adapter = _adapter(settings)
    return {
        "run": _run(settings, name, notes),
        "model": _model(settings, path),
        **({"adapter": adapter} if adapter else {}),
        "data": _data(settings, tasks, path),
        "balancer": _balancer(settings, tasks, notes, path),
        "training": _training(settings, gpus, notes, path),
        **_intervals(settings),
    }


def refuse_impossible(settings: dict[str, Any], path: Path) -> None:
    """Raises UserError for what has no counterpart here, whatever the data is."""
    choices = {
        "weighted_loss_mode": LOSS_MODES,
        "padding_mode": PADDING_MODES,
        "lr_scheduler_type": SCHEDULES,
        "attn_implementation": ATTENTION,
        "tokenize_mode": ("sft", "pretrain", "sst"),
    }
    for key, allowed in choices.items():
        if settings[key] not in allowed:
            raise UserError(f'{key} "{settings[key]}" has no counterpart here: {", ".join(allowed)}', str(path), "choose one of these")
    if settings["peft_type"] not in (None, "lora", "qlora"):
        raise UserError(f'peft_type "{settings["peft_type"]}" has no counterpart here: null, lora, qlora', str(path), "choose one of these")
    if not settings["load_raw_dataset"]:
        raise UserError("load_raw_dataset is false: MFTCoder's tokenised files cannot be read", str(path), "name the JSONL data and set it to true")
    if settings["resume_from_checkpoint"]:
        raise UserError(
            "resume_from_checkpoint names a checkpoint of MFTCoder, which holds no optimizer state to go on from",
            str(path),
            "set it to null. To start from these weights, give the full model, or the base with the adapter merged in, as --pretrained_model_path",
        )


def _check_tokenize_mode(mode: str, tasks: list[Task], path: Path) -> None:
    chats = [task.name for task in tasks if task.format != "text"]
    if mode != "sft" and chats:
        raise UserError(
            f'tokenize_mode "{mode}" supervises every token, which is offered for lines of text only; of another format: {", ".join(chats)}',
            str(path),
            'use "sft", or write these samples as {"text": "..."}',
        )


def _run(settings: dict[str, Any], name: str, notes: list[str]) -> dict[str, Any]:
    seed = {"seed": settings["seed"]}
    if not settings.get("output_dir"):
        name = legal_name(name) or "run"
        notes.append(f"output_dir is not given: the run folder will be runs/{name}, where the training is started")
        return {"name": name, **seed}
    folder = Path(os.path.abspath(Path(settings["output_dir"]).expanduser()))
    name = legal_name(folder.name) or "run"
    if name != folder.name:
        notes.append(f"the run folder is {folder.parent / name}, not {folder}: names are letters, digits and . _ -")
    return {"name": name, "dir": str(folder.parent), **seed}


def _model(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    name = settings["pretrained_model_path"]
    folder = Path(name).expanduser()
    if folder.exists():
        name = os.path.abspath(folder)
    elif name.startswith((".", "/", "~")):
        raise UserError(f"no such model folder: {name}", f"{path}: pretrained_model_path", "correct it, or give a hub id")
    attention = ATTENTION[settings["attn_implementation"]]
    return {"path": name, **({} if attention == "auto" else {"attention": attention}), "gradient_checkpointing": True}


def _adapter(settings: dict[str, Any]) -> dict[str, Any] | None:
    if settings["peft_type"] is None:
        return None
    return {
        "kind": settings["peft_type"],
        "rank": settings["lora_rank"],
        "alpha": settings["lora_alpha"],
        "dropout": settings["lora_dropout"],
        "target_modules": settings["target_modules"] or "all-linear",
    }


def _data(settings: dict[str, Any], tasks: list[Task], path: Path) -> dict[str, Any]:
    packing, too_long = PADDING_MODES[settings["padding_mode"]]
    template: Any = "mftcoder"
    if settings["role_markers"]:
        roles = ("system", "user", "assistant")
        missing = [role for role in roles if role not in settings["role_markers"]]
        if missing:
            raise UserError(f"role_markers has no {', '.join(missing)}", str(path), "give a marker for system, user and assistant, or null")
        template = {role: settings["role_markers"][role] for role in roles}
    return {
        "tasks": [task.entry() for task in tasks],
        "valid_fraction": _valid_fraction(settings["data_split"], path),
        "sequence_length": settings["seq_length"],
        "packing": packing,
        "too_long": too_long,
        "template": template,
    }


def _valid_fraction(split: str, path: Path) -> float:
    """MFTCoder trains on the first number, in percent; all the rest is validation data."""
    try:
        train = float(re.split("[,/]", split)[0])
    except ValueError:
        train = math.nan
    if not 0 < train <= 100:
        raise UserError(f'data_split "{split}" does not begin with a percentage above 0', str(path), 'write it as "95,5,0"')
    return round(1 - train / 100, 9)


def _balancer(settings: dict[str, Any], tasks: list[Task], notes: list[str], path: Path) -> dict[str, Any]:
    mode = settings["weighted_loss_mode"]
    weights = _task_weights(settings["task_weights"], tasks, path)
    if weights and mode not in ("case3", "case4"):
        notes.append(f"task_weights is left out: MFTCoder does not use it with {mode}")
    elif weights and len(set(weights)) > 1:
        return {"kind": "fixed", "weights": {task.name: weight for task, weight in zip(tasks, weights, strict=True)}}
    if mode != "coba":
        return {"kind": LOSS_MODES[mode][0]}
    interval = settings["coba_update_interval"]
    if interval < 1:
        raise UserError(f"coba_update_interval is {interval}", str(path), "it must be at least 1")
    return {
        "kind": "coba",
        "tau": settings["coba_tau"],
        "window": settings["coba_history_length"],
        "warmup": -(-settings["coba_warmup_steps"] // interval),
        "update_interval": interval,
    }


def _task_weights(given: str | list[Any] | None, tasks: list[Task], path: Path) -> list[float]:
    if given is None:
        return []
    parts = given if isinstance(given, list) else given.strip().removeprefix("[").removesuffix("]").split(",")
    try:
        weights = [float(part) for part in parts]
    except (TypeError, ValueError):
        weights = []
    if len(weights) != len(tasks):
        raise UserError(
            f"task_weights is {json.dumps(given)}, but there are {len(tasks)} tasks", str(path), 'write "[1.0,2.0,...]", one for each data path'
        )
    return weights


def _training(settings: dict[str, Any], gpus: int, notes: list[str], path: Path) -> dict[str, Any]:
    rows, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    most = settings["max_train_steps"]
    return {
        # With max_train_steps, MFTCoder goes through the data as often as that takes.
        **({"epochs": settings["num_train_epochs"]} if most is None else {"epochs": None, "max_steps": most}),
        "global_batch_rows": gpus * rows * accumulation,
        "micro_batch_rows": rows,
        "learning_rate": settings["learning_rate"],
        "min_learning_rate": settings["min_lr"],
        "schedule": SCHEDULES[settings["lr_scheduler_type"]],
        "warmup_steps": _warmup(settings, gpus, notes, path),
        "weight_decay": settings["weight_decay"],
        "betas": [0.9, 0.999],
        "reduction": LOSS_MODES[settings["weighted_loss_mode"]][1],
    }


def _warmup(settings: dict[str, Any], gpus: int, notes: list[str], path: Path) -> float:
    """The steps of MFTCoder's warm-up; below 1: a part of all steps.

    Its scheduler is given W x accumulation x processes, and accelerate moves it on by the number of processes once per optimizer
    step: W x accumulation optimizer steps. W is a given whole number, or the given part of `max_train_steps` over the processes.
    Without `max_train_steps` the steps that it is a part of are counted before the loader is divided among the processes, which
    cancels them.
    """
    given, accumulation, most = settings["num_warmup_steps"], settings["gradient_accumulation_steps"], settings["max_train_steps"]
    if settings["lr_scheduler_type"] == "constant":
        return 0
    part = isinstance(given, float) and given < 1
    if part and most is not None:
        steps = int(most * given) // gpus * accumulation
    else:
        steps = given * accumulation
    if part and most is None and steps >= 1:
        raise UserError(
            f"num_warmup_steps {given:g} x gradient_accumulation_steps {accumulation}: the warm-up in MFTCoder is longer than the run",
            str(path),
            "set num_warmup_steps to the number of steps that you want, divided by gradient_accumulation_steps",
        )
    if steps != given:
        notes.append(f"warmup_steps is {steps:g}: so long is the warm-up of num_warmup_steps {given:g} in MFTCoder, in optimizer steps")
    return steps


def _intervals(settings: dict[str, Any]) -> dict[str, Any]:
    """When to validate, save and log."""
    patience = settings["early_stopping_stall_num"] if settings["early_stopping"] else None
    validation: dict[str, Any] = {"every_steps": settings["evaluation_steps"]}
    if settings["weighted_loss_mode"] == "coba":
        validation["balancer_rows_per_rank"] = settings["coba_sample_valid_num"] * settings["per_device_eval_batch_size"]
    checkpoint: dict[str, Any] = {"every_steps": settings["checkpointing_steps"] or 100, "keep": settings["saving_limit"] or 2}
    if not settings["auto_resume"]:
        checkpoint["resume"] = "never"
    return {
        "validation": {**validation, "early_stopping": {"criterion": "mean_ratio", "patience": patience}},
        "checkpoint": checkpoint,
        "tracking": {"log_every_steps": settings["log_interval"]},
    }
