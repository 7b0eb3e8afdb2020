"""SHA-256 of data files, each read once: it is noted beside the cache, with what the file system says of the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from mftcoder_coba.errors import UserError

# A file system's clock may stand still for so long: a file that was changed just now may change again without a new time.
CLOCK_TICK_NS = 2_000_000_000


@dataclass(frozen=True)
class FileDigest:
    """Content of a file, and its size, times and place on disk when it was read."""

    sha256: str
    signature: tuple[int, ...]

    def check_unchanged(self, file: Path) -> None:
        """Raises UserError if the file is another one by now."""
        if _signature(file) != self.signature:
            raise UserError("the file changed while it was read", str(file), "start again when it is complete")


def digest_of(file: Path, notes: Path) -> FileDigest:
    """Reads the file, or only the note about it if it is unchanged since.

    Args:
        notes: the folder of the notes.

    Raises:
        UserError: the file cannot be read.
    """
    note = notes / f"{hashlib.sha256(os.fsencode(file.absolute())).hexdigest()}.json"
    signature = _signature(file)
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if tuple(known["signature"]) == signature:
            return FileDigest(known["sha256"], signature)
    except (OSError, ValueError, KeyError, TypeError):  # no note, or not one that can be used: read the file
        pass
    try:
        with open(file, "rb") as stream:
            digest = FileDigest(hashlib.file_digest(stream, "sha256").hexdigest(), signature)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(file)) from None
    digest.check_unchanged(file)
    if time.time_ns() - max(signature[1:3]) > CLOCK_TICK_NS:
        draft = note.with_name(f"{note.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a cache that may only be read: the next start reads the file again
            draft.write_text(json.dumps({"file": str(file), "sha256": digest.sha256, "signature": signature}), encoding="utf-8")
            draft.replace(note)
    return digest


def _signature(file: Path) -> tuple[int, ...]:
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(file)) from None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev
