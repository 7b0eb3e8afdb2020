"""What lies beside the weights of a merged model: config and tokenizer, and merge.json, which says how it was made of what."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mftcoder_coba import __version__
from mftcoder_coba.merging.folders import dtype_name, read_json
from mftcoder_coba.merging.writing import Begin

PROVENANCE_FILE = "merge.json"
CONFIG_FILES = ("config.json", "generation_config.json", "*.py")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*")
PACKAGES = ("torch", "numpy", "safetensors", "transformers", "peft", "mergekit")
READ_BYTES = 1 << 24


def copy_files(new: Path, sources: Sequence[Path], patterns: Sequence[str]) -> None:
    """Copies what matches into `new`, each file from the first of `sources` that has it."""
    for source in reversed(sources):  # the first comes last, and its files stay
        for path in (path for pattern in patterns for path in sorted(source.glob(pattern)) if path.is_file()):
            shutil.copyfile(path, new / path.name)


def copy_tokenizer(new: Path, sources: Sequence[Path]) -> None:
    """Copies the tokenizer's files, which belong together, from the first of `sources` that has one."""
    owner = next((source for source in sources if any(source.glob("tokenizer*"))), None)
    copy_files(new, [owner] if owner else [], TOKENIZER_FILES)


def set_dtype(path: Path, dtype: torch.dtype) -> None:
    """In a config.json."""
    config = read_json(path)
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = dtype_name(dtype)
    write_json(path, config)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_provenance(
    new: Path,
    method: str,
    options: dict[str, Any],
    base: Path,
    models: Sequence[Path],
    begin: Begin,
    **more: Any,
) -> None:
    """Writes merge.json: the method and its options, the versions, and for each input its path and the SHA-256 of each weights file.

    Args:
        options: complete, with the defaults.
        base: its folder.
        models: the folders of the merged models or adapters, in the order of the options' values.
        more: further entries, plain values.
    """
    advance = begin("checksums", sum(file.stat().st_size for folder in (base, *models) for file in _weights_files(folder)))
    tree = {
        "method": method,
        "options": options,
        **more,
        "base": _input(base, advance),
        "models": [_input(model, advance) for model in models],
        "versions": {"mftcoder_coba": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_json(new / PROVENANCE_FILE, tree)


def _weights_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _input(folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    return {"path": str(folder.absolute()), "sha256": {path.name: _sha256(path, advance) for path in _weights_files(folder)}}


def _sha256(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()
