"""Hugging Face folders with safetensors weights, read one tensor at a time, and written so.

Names, shapes and dtypes come from the files' headers. Reading copies one tensor out of a file instead of mapping the file, and writing
puts the header down first, so that the memory is that of the tensors in hand, however large the files are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mftcoder_coba.errors import UserError
from mftcoder_coba.models.loading import check_weights_files

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# What a model folder on the hub may hold beside weights in other formats.
NEEDED_FILES = ["model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
TORCH_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}
SAFETENSORS_DTYPES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
DAMAGED = "fetch or write the model again"


@dataclass(frozen=True)
class Stored:
    """A tensor as a file's header describes it."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ModelFolder:
    """A full model on the disk.

    Attributes:
        path: the folder.
        config: config.json.
        tensors: name -> what is stored under it.

    Raises:
        UserError: it is no such folder, or one of its files is missing or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_dir():
            raise UserError("no such folder", str(path))
        check_weights_files(path, str(path))
        self.config = read_json(path / "config.json")
        self.tensors = _headers(path)
        self._open: tuple[str, safe_open] | None = None

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own. Raises UserError where it cannot be read."""
        return self._from_file(name, lambda file: file.get_tensor(name))

    def beginning(self, name: str) -> bytes:
        """The bytes of the first row of the tensor `name`, or of all of it where it has no rows. Raises UserError where it cannot be read."""
        shape = self.tensors[name].shape
        rows = len(shape) > 1 and shape[0] > 0
        part = self._from_file(name, lambda file: file.get_slice(name)[:1] if rows else file.get_tensor(name))
        return part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    def _from_file(self, name: str, get: Callable[[safe_open], Tensor]) -> Tensor:
        file = self.tensors[name].file
        try:
            if self._open is None or self._open[0] != file:  # one header in memory, and one open file
                self._open = file, safe_open(self.path / file, "pt", backend="pread")
            return get(self._open[1])
        except (OSError, SafetensorError) as error:
            raise UserError(f"{name} cannot be read: {error}", str(self.path / file), DAMAGED) from None


class ShardedWriter:
    """Writes tensors one after the other into safetensors files of `folder`, with an index where these are several.

    A context manager; the files are whole after a block without errors.

    Args:
        tensors: name -> shape and dtype of all that will be written. The files depend on these alone, not on the order of the mapping.
        max_shard_bytes: of the tensors in a file; a larger tensor has a file of its own.

    Attributes:
        order: the names in the order in which `write` wants them: wide dtypes first, so that each lies at a multiple of its size, then by name.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_shard_bytes: int):
        self.order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
        self._folder, self._tensors = folder, tensors
        self._shards = _shards([(name, self._bytes(name)) for name in self.order], max_shard_bytes)
        count = len(self._shards)
        self._names = [SINGLE_FILE] if count == 1 else [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        self._starts = {shard[0]: number for number, shard in enumerate(self._shards) if shard}
        self._written = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardedWriter:
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a tensor that is not the next of `order`, as it was announced; OSError where it cannot be written."""
        expected = self.order[self._written]
        if (name, tuple(tensor.shape), tensor.dtype) != (expected, *self._tensors[expected]):
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} where {expected} {self._tensors[expected]} is next")
        if name in self._starts:
            self._begin(self._starts[name])
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._written += 1

    def __exit__(self, kind, error, traceback) -> None:
        if self._file:
            self._file.close()
        if kind is None:
            if self._written != len(self.order):
                raise ValueError(f"{len(self.order) - self._written} tensors were not written")
            self._write_index()

    def _begin(self, number: int) -> None:
        """Begins a file: the header's length, the header in JSON, padded to 8 bytes, as the format safetensors wants it; then the data."""
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name in self._shards[number]:
            shape, dtype = self._tensors[name]
            end = offset + self._bytes(name)
            header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if self._file:
            self._file.close()
        self._file = open(self._folder / self._names[number], "wb")  # noqa: SIM115 it lives until the next file, or the block's end
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        where = {name: file for file, shard in zip(self._names, self._shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(map(self._bytes, self.order))}, "weight_map": dict(sorted(where.items()))}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _bytes(self, name: str) -> int:
        shape, dtype = self._tensors[name]
        return math.prod(shape) * dtype.itemsize


def local_folder(name: str) -> Path:
    """The folder that `name` is, or the copy of that hub id in Hugging Face's cache, fetched where it is not there yet.

    Raises:
        UserError: it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=NEEDED_FILES))
    except HFValidationError:
        raise UserError("no such folder", name, "give a Hugging Face folder, or a hub id") from None
    except (OSError, ValueError) as error:
        text = str(error).strip().splitlines()
        raise UserError(f"no such folder, and no model that can be had from the hub: {text[0] if text else error}", name) from error


def dtype_name(dtype: torch.dtype) -> str:
    """As in config.json."""
    return str(dtype).removeprefix("torch.")


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError where there is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"is not a Hugging Face model folder: it has no {path.name}", str(path.parent), DAMAGED) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {getattr(error, 'strerror', None) or error}", str(path), DAMAGED) from None
    if not isinstance(tree, dict):
        raise UserError("is no JSON object", str(path), DAMAGED)
    return tree


def _headers(path: Path) -> dict[str, Stored]:
    """All tensors of a folder by name. Raises UserError for files that are missing, damaged, or differ from the index."""
    indexed = None
    if (path / INDEX_FILE).is_file():
        indexed = read_json(path / INDEX_FILE)["weight_map"]
    elif not (path / SINGLE_FILE).is_file():
        raise UserError(f"holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}", str(path), "give a Hugging Face folder with safetensors weights")
    tensors = {}
    for file in sorted(set(indexed.values())) if indexed is not None else [SINGLE_FILE]:
        tensors |= _header(path / file)
    if indexed is not None:
        odd = sorted(name for name in tensors.keys() | indexed.keys() if indexed.get(name) != (tensors[name].file if name in tensors else None))
        if odd:
            raise UserError(f"the index and the files differ: {odd[0]}", str(path / INDEX_FILE), DAMAGED)
    return tensors


def _header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, "pt", backend="pread") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except FileNotFoundError:
        raise UserError("a weights file is missing", str(path), DAMAGED) from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"a weights file is damaged, or no safetensors file: {error}", str(path), DAMAGED) from None
    other = next((name for name, (_, code) in found.items() if code not in TORCH_DTYPES), None)
    if other:
        raise UserError(f"{other} is stored as {found[other][1]}, which is not merged", str(path), "give the model in bfloat16, float16 or float32")
    return {name: Stored(path.name, shape, TORCH_DTYPES[code]) for name, (shape, code) in found.items()}


def _shards(sizes: Iterable[tuple[str, int]], most: int) -> list[list[str]]:
    """Names in files, in order, each filled until the next would not fit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
