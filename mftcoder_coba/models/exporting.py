"""The command `export`: an adapter in the forms that servers load.

An adapter with experts becomes, for each task, a plain PEFT LoRA adapter; that, or any plain LoRA adapter, is merged into its base
model where a full model is asked for.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from mftcoder_coba.config import ModelConfig
from mftcoder_coba.data.templates import load_tokenizer
from mftcoder_coba.errors import UserError
from mftcoder_coba.models.cgc_lora import read_adapter
from mftcoder_coba.models.cgc_lora.model import CONFIG_FILE, PEFT_TYPE, TASKS_FOLDER, TENSORS_FILE
from mftcoder_coba.models.export import whole_folder
from mftcoder_coba.models.exported import adapter_config, check_plain_adapter, exported_folder, load_plain_adapter
from mftcoder_coba.models.loading import load_model

TRUST_KEY, TRUST_OPTION = "set model.trust_remote_code = true", "add --trust-remote-code"


def export(
    source: Path,
    out: Path,
    task: str | None = None,
    merged: bool = False,
    base_model: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """Writes a task's adapter or full model to `out`, or those of all tasks to `out`/TASK.

    Args:
        source: a run folder, or a folder with an adapter.
        task: None: all tasks; or for an adapter without tasks.
        merged: full models instead of plain LoRA adapters.
        base_model: merged into this one; None: the one that the adapter names.
        dtype: of full models, bfloat16 or float32; None: the base model's own.
        trust_remote_code: run Python code that comes with the base model.

    Returns:
        What was written, for people: a line for each folder.

    Raises:
        UserError: the source holds nothing that can be exported so; or `out` is not empty or cannot be written; then nothing is left there.
    """
    adapter = exported_folder(source)
    if not (adapter / CONFIG_FILE).is_file():
        raise UserError("is a full model already, without an adapter", str(adapter), "load it as it is")
    if not merged and (base_model or dtype):
        raise UserError("without --merged, no model is written", "--base-model" if base_model else "--dtype", "leave it out, or add --merged")
    plain = _plain_adapters(adapter, task, merged)
    lines = [] if not (merged and _trained_in_4_bits(adapter)) else ["the adapter was trained on the base model in 4 bits; merged into the full one"]
    try:
        with whole_folder(out) as new:
            for name, folder in plain.items():
                if merged:
                    what = _write_merged(new / name, folder, adapter, base_model, dtype, trust_remote_code)
                else:
                    what = _write_adapter(new / name, folder, adapter, trust_remote_code)
                of_task = f" of the task {name or task}" if name or task else ""
                lines.append(f"wrote {out / name}: {what}{of_task}, {_size(new / name)}")
    except UserError as error:
        raise _in_words_of_the_command(error) from None
    except OSError as error:
        raise UserError(f"the export cannot be written: {error}", str(out), "make room, or name another folder; nothing is left there") from error
    return lines


def _in_words_of_the_command(error: UserError) -> UserError:
    """What loading a model or a tokenizer says of a config's keys, said of this command's options."""
    key, _, path = error.where.partition(" = ")
    if key != "model.path":
        return error
    return UserError(error.what, path, "; ".join(filter(None, [error.fix.replace(TRUST_KEY, TRUST_OPTION), "--base-model names another base model"])))


def _plain_adapters(adapter: Path, task: str | None, merged: bool) -> dict[str, Path]:
    """Place below the output folder -> the plain LoRA adapter that is meant. Raises UserError where it cannot be had."""
    kind = adapter_config(adapter).get("peft_type")
    if kind == PEFT_TYPE:
        structure = read_adapter(adapter)[0]
        if task is not None:
            structure.cluster_of(task)
        plain = {"" if task else name: adapter / TASKS_FOLDER / name for name in ([task] if task else structure.tasks)}
    elif kind != "LORA":
        raise UserError(f"holds an adapter of the type {kind}; exported are {PEFT_TYPE} and LORA", str(adapter))
    elif task is not None:
        raise UserError("is one LoRA adapter for all tasks, without parts of their own", str(adapter), "leave out --task")
    elif not merged:
        raise UserError("is a plain LoRA adapter already", str(adapter), "load it as it is, or add --merged")
    else:
        plain = {"": adapter}
    for folder in plain.values():
        check_plain_adapter(folder)
    return plain


def _trained_in_4_bits(adapter: Path) -> bool:
    """Told by the config of the run that the adapter is in; an adapter elsewhere does not say."""
    try:
        section = json.loads((adapter.parent / "config.json").read_text(encoding="utf-8"))["adapter"]
        return section["kind"] == "qlora" or bool(section.get("quantised"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write_adapter(new: Path, folder: Path, adapter: Path, trust: bool) -> str:
    """A task's plain adapter, and the tokenizer of the adapter with experts. Returns what it is."""
    new.mkdir(exist_ok=True)
    for name in (CONFIG_FILE, TENSORS_FILE):
        shutil.copyfile(folder / name, new / name)
    load_tokenizer(str(adapter), trust).save_pretrained(new)
    return f"LoRA adapter of rank {adapter_config(folder)['r']}"


def _write_merged(new: Path, folder: Path, adapter: Path, base_model: str | None, dtype: str | None, trust: bool) -> str:
    """The base model with a plain adapter merged in, and a tokenizer: the adapter's, else the base model's. Returns what it is."""
    base = base_model or adapter_config(folder).get("base_model_name_or_path")
    if not base:
        raise UserError("the adapter does not name its base model", str(folder / CONFIG_FILE), "name it with --base-model")
    model = _merged(_load_base(base, dtype, trust), folder)
    own = (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter) if own else base, trust)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    return f"full model in {_name(model.dtype)}"


def _load_base(base: str, dtype: str | None, trust: bool) -> nn.Module:
    """The base model in `dtype`, else in its own. Raises UserError where it cannot be loaded."""
    stored = None
    with contextlib.suppress(OSError, ValueError, KeyError):  # `load_model` meets it again, and explains it
        stored = AutoConfig.from_pretrained(base, trust_remote_code=trust)
    if stored is not None and stored.dtype is None and dtype is None:
        raise UserError("the base model's config.json does not say its dtype", base, "name it with --dtype")
    wanted = dtype or _name(stored.dtype if stored else torch.float32)
    loaded = wanted if wanted in ("bfloat16", "float32") else "float32"  # float16 is rounded from it
    model = load_model(ModelConfig(path=base, dtype=loaded, trust_remote_code=trust), "eager")
    return model.to(getattr(torch, wanted))


def _merged(model: nn.Module, folder: Path) -> nn.Module:
    """The model, changed in place, with a plain LoRA adapter added to its weights.

    Raises:
        UserError: the adapter is not one of this model, changes weights that it shares with its embedding, or makes numbers that are not finite.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    adapted = load_plain_adapter(model, folder, "name the base model that it was trained on with --base-model")
    if tied and ends != (model.get_input_embeddings(), model.get_output_embeddings()):
        what = (
            "the adapter changes the embedding or the output layer, which share their weight in this model: they cannot both be right after merging"
        )
        raise UserError(what, str(folder), "serve it as an adapter, without --merged")
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"merging makes numbers that are not finite: {error}", str(folder), "take an adapter of an earlier step") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(folder: Path) -> str:
    size = float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
