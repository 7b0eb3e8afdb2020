"""Files of tensors in the safetensors format, written without a second copy of the data in memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# https://github.com/huggingface/safetensors, "Format": the header's length as 8 bytes, the header as JSON, then the tensors' bytes.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
_BLOCK_BYTES = 64 << 20


class FileDigest(NamedTuple):
    """size: in bytes. sha256: of the whole content, as hexadecimal digits."""

    size: int
    sha256: str


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> FileDigest:
    """Writes a safetensors file and returns when it is on the disk.

    The data go out tensor by tensor, block by block; a thread hashes them meanwhile. Beside the tensors given, memory holds
    copies of two blocks at most (a block ends with a whole tensor), and none of contiguous tensors on the CPU.

    Raises:
        OSError: the file could not be written whole; a part of it may be there.
    """
    # Wide elements first, so that every tensor is aligned to its element size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    digest, size, block = hashlib.sha256(), 0, 0
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hashing:
        hashed = last_block = hashing.submit(digest.update, b"")
        for data in itertools.chain([_header(ordered, metadata)], map(_bytes_of, ordered.values())):
            hashed = hashing.submit(digest.update, data)
            file.write(data)
            size, block = size + len(data), block + len(data)
            if block >= _BLOCK_BYTES:
                file.flush()
                os.fsync(file.fileno())
                last_block.result()
                last_block, block = hashed, 0
        file.flush()
        os.fsync(file.fileno())
        hashed.result()
    return FileDigest(size, digest.hexdigest())


def _header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """The elements row by row. The format is little-endian, as every machine that PyTorch has builds for GPUs on."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
