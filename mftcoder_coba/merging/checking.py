"""Whether several models can be merged: everything that does not fit is told before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from mftcoder_coba.errors import UserError
from mftcoder_coba.merging.folders import ModelFolder, dtype_name

TOLD = 3  # names of one kind of mismatch
# Keys of config.json that say nothing of what the weights mean, or that training may change.
FREE_KEYS = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "_attn_implementation", "attn_implementation", "pretraining_tp", "output_router_logits"),
}
FREE_ENDINGS = ("dropout", "_pdrop", "_drop")
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_inputs(base: ModelFolder, models: Sequence[ModelFolder]) -> None:
    """All have the same architecture, tensors, shapes and tokens, and the models the same dtypes. The base may have others: what is
    trained in another dtype starts from the base rounded to it.

    Raises:
        UserError: with all that differs, for the first folder for which anything does; or a folder holds a quantised model.
    """
    for folder in (base, *models):
        method = (folder.config.get("quantization_config") or {}).get("quant_method")
        if method:
            what = f"the weights of this model are quantised ({method}), and cannot be merged"
            raise UserError(what, str(folder.path), "give the model as it was before")
    first = models[0]
    for folder in (*models[1:], base):
        lines = [*_configs(first, folder), *_tensors(first, folder, dtypes=folder is not base), *_tokenizers(first.path, folder.path)]
        if lines:
            role = "the base" if folder is base else "a model"
            what = f"{role} does not fit the model {first.path}:\n" + "\n".join(f"  {line}" for line in lines)
            raise UserError(what, str(folder.path), _fix(lines, folder is base))


def check_tokenizers(folders: Sequence[Path]) -> None:
    """Those of `folders` that have a tokenizer's vocabulary have the same one. Raises UserError with what differs."""
    for folder in folders[1:]:
        lines = _tokenizers(folders[0], folder)
        if lines:
            raise UserError(f"{lines[0]} as in {folders[0]}", str(folder), "merge adapters of one base model, trained with one tokenizer")


def check_fixed(models: Sequence[ModelFolder]) -> None:
    """Tensors of whole numbers or truth values (buffers) cannot be averaged, and have to be the same in all models.

    Raises:
        UserError: they are not, or cannot be read.
    """
    for name, stored in models[0].tensors.items():
        if not stored.dtype.is_floating_point:
            expected = models[0].read(name)
            for other in models[1:]:
                if not torch.equal(other.read(name), expected):
                    what = f"{name} ({dtype_name(stored.dtype)}) differs from that of {models[0].path}; only floating-point tensors are merged"
                    raise UserError(what, str(other.path))


def shared_tensors(folders: Sequence[ModelFolder]) -> dict[str, str]:
    """Tensors that are stored more than once: name -> the first name (in the order of the alphabet) with the same bytes in every folder.

    A weight that layers share (tied embeddings) is mostly stored under one name; some files repeat it. What is equal in all inputs has to
    be equal in the result, too, although random rules draw by name.
    """
    alike: dict[tuple, list[str]] = {}
    for name, stored in sorted(folders[0].tensors.items()):
        alike.setdefault((stored.shape, stored.dtype), []).append(name)
    return {name: leader for names in alike.values() if len(names) > 1 for name, leader in _copies(names, folders)}


def _copies(names: list[str], folders: Sequence[ModelFolder]) -> Iterator[tuple[str, str]]:
    """Of tensors of one shape: pairs (copy, first). Those that begin differently are not read further."""
    beginnings: dict[tuple[bytes, ...], list[str]] = {}
    for name in names:
        beginnings.setdefault(tuple(folder.beginning(name) for folder in folders), []).append(name)
    for group in beginnings.values():
        leaders: list[str] = []
        for name in group:
            same = next((leader for leader in leaders if all(_same_bytes(folder, name, leader) for folder in folders)), None)
            if same:
                yield name, same
            else:
                leaders.append(name)


def _same_bytes(folder: ModelFolder, one: str, other: str) -> bool:
    return torch.equal(*(folder.read(name).reshape(-1).view(torch.uint8) for name in (one, other)))


def _configs(first: ModelFolder, other: ModelFolder) -> list[str]:
    """Keys that both have with other values. One that is null or absent has a default that differs between versions of transformers."""
    keys = sorted(key for key in first.config.keys() & other.config.keys() if key not in FREE_KEYS and not key.endswith(FREE_ENDINGS))
    pairs = [(key, other.config[key], first.config[key]) for key in keys]
    odd = [(key, found, expected) for key, found, expected in pairs if None not in (found, expected) and found != expected]
    differing = [f"{key} is {_json(found)}, not {_json(expected)}" for key, found, expected in odd]
    return [f"config.json: {_told(differing, '; ')}"] if differing else []


def _tensors(first: ModelFolder, other: ModelFolder, dtypes: bool) -> list[str]:
    lines = []
    missing, extra = sorted(first.tensors.keys() - other.tensors.keys()), sorted(other.tensors.keys() - first.tensors.keys())
    if missing:
        lines.append(f"tensors that are missing here: {_told(missing)}")
    if extra:
        lines.append(f"tensors that are here only: {_told(extra)}")
    both = [(name, other.tensors[name], first.tensors[name]) for name in sorted(first.tensors.keys() & other.tensors.keys())]
    shapes = [f"{name} {list(found.shape)}, not {list(expected.shape)}" for name, found, expected in both if found.shape != expected.shape]
    if shapes:
        lines.append(f"shapes: {_told(shapes, '; ')}")
    kinds = [
        f"{name} {dtype_name(found.dtype)}, not {dtype_name(expected.dtype)}"
        for name, found, expected in both
        if found.dtype != expected.dtype and (dtypes or found.dtype.is_floating_point != expected.dtype.is_floating_point)
    ]
    return [*lines, f"dtypes: {_told(kinds, '; ')}"] if kinds else lines


def _tokenizers(first: Path, other: Path) -> list[str]:
    """Tokens have to have the same ids. Files that one of them lacks are not compared: either may have another kind."""
    for file in VOCABULARY_FILES:
        if (first / file).is_file() and (other / file).is_file():
            expected, found = _vocabulary(first / file), _vocabulary(other / file)
            if isinstance(found, bytes):
                return [f"the tokenizer: {file} differs"] if found != expected else []
            odd = sorted(token for token in found.keys() | expected.keys() if found.get(token) != expected.get(token))
            told = [f"{_json(token)} is {found.get(token, 'absent')}, not {expected.get(token, 'absent')}" for token in odd]
            return [f"the tokenizer's ids: {_told(told, '; ')}"] if told else []
    return []


def _vocabulary(path: Path) -> dict[str, int] | bytes:
    """Token -> id; or the bytes of a sentencepiece model. Raises UserError for a damaged file."""
    if path.suffix == ".model":
        return path.read_bytes()
    try:
        if path.name == "vocab.json":
            return dict(json.loads(path.read_text(encoding="utf-8")))
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"the tokenizer cannot be read: {error}", str(path), "copy it again") from None


def _fix(lines: list[str], base: bool) -> str:
    if base and all(line.startswith("tensors") for line in lines):
        return (
            "name the model that they were trained from; where it is that, written by another program or long ago, "
            "load it with transformers and save it anew, and name the new folder"
        )
    return "name the base model that all were trained from" if base else "models that are merged are of one base model, trained with one dtype"


def _told(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - TOLD} more" if len(items) > TOLD else ""
    return separator.join(items[:TOLD]) + more


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
