"""What the small commands share: exit codes, the cache folder, folders that appear whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from mftcoder_coba.errors import RunFailure, UserError


def run(main: Callable[[], None]) -> None:
    """Runs a command and exits: 0 on success; with a message, but no traceback, 2 on a user's mistake and 1 on a failure."""
    try:
        main()
    except (UserError, RunFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def cache_dir() -> Path:
    """Where artefacts that are made once live: `$MFTCODER_COBA_CACHE`, or ~/.cache/mftcoder_coba."""
    return Path(os.environ.get("MFTCODER_COBA_CACHE") or "~/.cache/mftcoder_coba").expanduser().absolute()


def experiment_parser(tool: str, description: str) -> argparse.ArgumentParser:
    """Of a command about an experiment, with `--config` and `--set` (`overrides`)."""
    parser = argparse.ArgumentParser(prog=f"python -m data_tools.{tool}", description=description)
    parser.add_argument("--config", type=Path, required=True, help="the experiment's JSON file")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="override a key of it; may be repeated")
    return parser


def whole_number(least: int) -> Callable[[str], int]:
    """A type of argparse: a whole number, at least so big."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} on")
        return int(text)

    return read


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`: two processes never make the same one. The lock file stays beside it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        yield


@contextmanager
def replaced_folder(folder: Path, mark: str) -> Iterator[Path]:
    """Gives an empty folder to write to, which takes the place of `folder` when the block ends without an error.

    Args:
        folder: the folder to make. It is replaced only if it is empty or holds the file `mark`, which the tool itself wrote.
        mark: name of a file that every folder made by the tool has.

    Raises:
        UserError: something else is in `folder`.
    """
    if folder.exists() and not (folder / mark).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"there is something else here (no {mark} in it); it is not overwritten", str(folder), "name a new or empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    aside.chmod(0o755)
    try:
        yield aside
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            folder.rename(old / "folder")
            aside.rename(folder)
            shutil.rmtree(old)
        else:
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_mark(folder: Path, mark: str) -> dict[str, Any] | None:
    """The JSON object in `folder`/`mark`, or None if it is missing or unreadable."""
    try:
        value = json.loads((folder / mark).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
