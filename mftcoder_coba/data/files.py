"""Paths of the config -> files -> samples as lines of JSON, from .jsonl, .jsonl.gz and Parquet."""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from mftcoder_coba.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
BOM = b"\xef\xbb\xbf"
PARQUET_BATCH_ROWS = 256
PARQUET_BUFFER_BYTES = 1 << 20


def find_files(patterns: list[str], where: str) -> list[Path]:
    """Files, folders (all data files below them) and globs -> files, sorted within each pattern, each file once.

    In folders, files without a suffix of `SUFFIXES` are no data, nor is anything whose name or whose folder's name begins with a
    dot. A folder that a glob matches counts as a folder.

    Args:
        where: the config path that names the patterns, for messages.

    Raises:
        UserError: nothing is there, or a file that was named is of another kind.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        try:
            files = _matches(pattern)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}: {pattern}", where) from None
        except ValueError as error:  # a null character
            raise UserError(f"is no path: {error}: {pattern!r}", where) from None
        if isinstance(files, str):
            raise UserError(f"{files}: {pattern}", where, "correct the path; relative paths are relative to the config file")
        for file in files:
            if not file.name.endswith(SUFFIXES):
                raise UserError(f"{file} is none of {', '.join(SUFFIXES)}", where, "convert it, or narrow the pattern")
            found[Path(os.path.abspath(file))] = None
    return list(found)


def _matches(pattern: str) -> list[Path] | str:
    """The files of one pattern, or what is wrong with it."""
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        return _files_below(path) or f"the folder holds no {', '.join(SUFFIXES)} file"
    if path.is_file():
        return [path]
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
    files = [file for match in matches for file in (_files_below(match) if match.is_dir() else [match] if match.is_file() else [])]
    return files or ("no file matches" if glob.has_magic(pattern) else "no such file or folder")


def _files_below(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def read_lines(file: Path, columns: Iterable[str]) -> Iterator[tuple[int, bytes]]:
    """The samples of a file with their numbers from 1: each the bytes of a JSON object, if the file is right.

    A text file gives its lines that are not blank, without line ends and without a BOM at the file's start; only a line feed
    ends a line. A Parquet file gives its rows; what JSON has no kind for (bytes, dates, decimals) is the object
    `{"parquet": type}` there, and text that is not UTF-8 comes as its bytes in place of the row. Memory does not grow with
    the file (for Parquet: with the number of its row groups).

    Args:
        columns: what to read of a Parquet file, where it has them.

    Raises:
        UserError: the file cannot be read or unpacked, or a Parquet file has none of `columns`.
    """
    return _read_parquet(file, list(columns)) if file.name.endswith(".parquet") else _read_text(file)


def _read_text(file: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(file) if file.name.endswith(".gz") else open(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(BOM)
                line = line.strip(b" \t\r\n")
                if line:
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot be read after line {number}: {error}", str(file), "copy or unpack the file again") from None


def _read_parquet(file: Path, columns: list[str]) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        # Not the whole row group at once but page by page, with the checksums of pages where the file has them.
        options = {"pre_buffer": False, "buffer_size": PARQUET_BUFFER_BYTES, "page_checksum_verification": True}
        with pyarrow.parquet.ParquetFile(file, **options) as table:
            present = _present_columns(table.schema_arrow.names, columns, file)
            for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=present, use_threads=False):
                # A nested column `a` and a column of the name `a.b` are asked for alike.
                for row in _rows(batch.select(present)):
                    number += 1
                    yield number, row
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: a column name that is not UTF-8
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot be read as Parquet after row {number}: {reason}", str(file), "copy or write the file again") from None


def _present_columns(names: list[str], columns: list[str], file: Path) -> list[str]:
    present = [name for name in columns if name in names]
    if not present:
        found, needed = (", ".join(map(repr, some)) or "none" for some in (names, columns))
        fix = "choose the task's `format`, or name its fields as the file does in the task's `fields`"
        raise UserError(f"the file has none of the columns {needed}; it has {found}", str(file), fix)
    twice = [name for name in present if names.count(name) > 1]
    if twice:
        raise UserError(f"the file has two columns of the name {twice[0]!r}", str(file), "write the file again with one of them")
    return present


def _rows(batch: pa.RecordBatch) -> Iterator[bytes]:
    try:
        records: Iterable[dict[str, Any] | bytes] = batch.to_pylist()
    except (ValueError, OverflowError):  # a value that Python has no equal for: find it row by row
        records = (_row(batch, index) for index in range(batch.num_rows))
    for record in records:
        yield record if isinstance(record, bytes) else json.dumps(record, ensure_ascii=False, default=_foreign).encode()


def _row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | bytes:
    row: dict[str, Any] = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            row[field.name] = column[index].as_py()
        except UnicodeDecodeError as error:
            return bytes(error.object)
        except (ValueError, OverflowError):  # a time beyond Python's years, or finer than microseconds
            row[field.name] = {"parquet": str(field.type)}
    return row


def _foreign(value: Any) -> dict[str, str]:
    return {"parquet": type(value).__name__}
