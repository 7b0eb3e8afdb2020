"""Files that grow by whole pieces, also on a disk that is full for a while."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from pathlib import Path


class AppendedFile:
    """A file that is appended to. Each piece is handed to the system at once, so that a killed process keeps what it wrote.

    A piece that cannot be written leaves no part of itself in the file: it waits in memory, and goes ahead of the next one.

    Raises:
        OSError: the file cannot be opened. Nothing is raised later: a warning on stderr tells once that pieces wait, and at the end how
            many are lost.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._whole = self._file.tell()  # bytes of whole pieces in the file
        self._torn = False  # whether there may be more behind them
        self._waiting: deque[bytes] = deque()
        self._warned = False

    def write(self, piece: bytes) -> None:
        self._waiting.append(piece)
        self._write_waiting()

    def flush(self) -> None:
        """Writes what waits, and returns when the disk has it, as far as there is room."""
        self._write_waiting()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        if self._file.closed:
            return
        self.flush()
        if self._waiting:
            warn(f"{self._path}: there was no room for the last {len(self._waiting):,} records; they are lost")
        # What is in the file was flushed: an error here tells nothing new.
        with contextlib.suppress(OSError):
            self._file.close()

    def _write_waiting(self) -> None:
        try:
            self._remove_torn()
            while self._waiting:
                self._torn = True
                piece = memoryview(self._waiting[0])
                while piece:  # a disk that is nearly full takes a part
                    piece = piece[self._file.write(piece) :]
                self._whole += len(self._waiting.popleft())
                self._torn = False
        except OSError as error:
            self._warn(error)
            with contextlib.suppress(OSError):
                self._remove_torn()

    def _remove_torn(self) -> None:
        if self._torn:
            self._file.truncate(self._whole)
            self._torn = False

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            warn(f"{self._path} cannot be written: {error.strerror}; the training goes on, records wait in memory until there is room")
        self._warned = True


def warn(message: str) -> None:
    """A line on stderr, which may lie on the same full disk."""
    with contextlib.suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)
