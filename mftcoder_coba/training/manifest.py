"""What a checkpoint folder consists of, to the byte.

`manifest.json` holds size and SHA-256 of every other file, and the SHA-256 of all that. There is one way to write a manifest down, so that
a changed byte in it shows even where it would not change its meaning.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mftcoder_coba.engine.tensor_files import FileDigest

MANIFEST_FILE = "manifest.json"
FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Manifest(NamedTuple):
    """Attributes:
    step: of the checkpoint.
    files: by path relative to the checkpoint folder, with "/" between its parts.
    """

    step: int
    files: dict[str, FileDigest]

    def to_bytes(self) -> bytes:
        files = {name: {"size": digest.size, "sha256": digest.sha256} for name, digest in self.files.items()}
        return _proven({"format": FORMAT, "step": self.step, "files": files})


def read_manifest(folder: Path) -> Manifest:
    """Of a checkpoint folder.

    Raises:
        ValueError: it is not there, or is not what was written; the message names it.
    """
    try:
        raw = (folder / MANIFEST_FILE).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST_FILE} is missing") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST_FILE} cannot be read ({error.strerror})") from error
    try:
        tree = json.loads(raw)
        claim = {key: tree[key] for key in tree if key != "sha256"}
        proven = _proven(claim) == raw
    except (ValueError, TypeError, RecursionError):
        proven = False
    if not proven:
        raise ValueError(f"{MANIFEST_FILE} is not what was written: it does not match its own checksum")
    if claim.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST_FILE} has format {claim.get('format')}; this version reads {FORMAT}")
    return _checked(claim)


def digest_of(content: bytes) -> FileDigest:
    return FileDigest(len(content), hashlib.sha256(content).hexdigest())


def size_problem(folder: Path, name: str, digest: FileDigest) -> str | None:
    """What is wrong with a file at a glance: None, or a line that names it."""
    path = folder / name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if not path.is_file():  # opening a pipe would wait for ever
        return f"{name} is not a file"
    if size != digest.size:
        return f"{name} is {'shorter' if size < digest.size else 'longer'} than it was written ({size} of {digest.size} bytes)"
    return None


def problem(folder: Path, name: str, digest: FileDigest) -> str | None:
    """As `size_problem`; also reads the file and compares its checksum."""
    found = size_problem(folder, name, digest)
    if found:
        return found
    try:
        with open(folder / name, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if sha256 == digest.sha256 else f"{name} is not what was written: its checksum differs"


def strangers(folder: Path, files: Iterable[str]) -> list[str]:
    """Files in the checkpoint folder that are none of `files`, a line each: a copy over another checkpoint leaves such. Hidden ones are nobody's."""
    there = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    visible = (path.as_posix() for path in there if not any(part.startswith(".") for part in path.parts))
    return [f"{name} is none of its files" for name in sorted({*visible} - {*files, MANIFEST_FILE})]


def folders_of(names: Iterable[str]) -> list[PurePosixPath]:
    """The folders in which files of these names are, relative to the checkpoint folder, the deepest first; the last one is "."."""
    found = {parent for name in names for parent in PurePosixPath(name).parents}
    return sorted(found, key=lambda folder: (-len(folder.parts), folder))


def _proven(claim: dict[str, Any]) -> bytes:
    """`claim` as it is written down: with its own checksum, in the one form that is accepted."""
    proof = hashlib.sha256(json.dumps(claim, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**claim, "sha256": proof}, indent=1, sort_keys=True) + "\n").encode()


def _checked(claim: dict[str, Any]) -> Manifest:
    """A manifest can come from elsewhere and prove itself all the same: types are checked, and paths that leave the folder are refused."""
    files, step = claim.get("files"), claim.get("step")
    if not isinstance(files, dict) or type(step) is not int:
        raise ValueError(f"{MANIFEST_FILE} is not one of this program")
    digests = {}
    for name, entry in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.as_posix() != name or name in (".", MANIFEST_FILE) or "\0" in name:
            raise ValueError(f"{MANIFEST_FILE} names {name!r}, which is no file inside the checkpoint")
        size, sha256 = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ValueError(f"{MANIFEST_FILE} has no size and checksum of {name!r}")
        digests[name] = FileDigest(size, sha256)
    return Manifest(step, digests)
