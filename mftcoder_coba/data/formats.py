"""JSONL files -> lines -> messages.

A format is a function from one JSON object to a conversation, chosen by name in the config and never guessed. Whatever
is wrong with a line is raised as `BadSample` with the reason; who reads the file adds its name and the line number.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mftcoder_coba.errors import UserError, suggestion

SUFFIXES = (".jsonl", ".jsonl.gz")


class Message(NamedTuple):
    role: str  # "system", "user" or "assistant"
    content: str


class BadSample(ValueError):
    """One line cannot be used; the text says why."""


def find_files(patterns: list[str], where: str) -> list[Path]:
    """Files, folders (all JSONL files below them) and globs -> files, sorted within each pattern, each file once.

    Args:
        where: the config path that names the patterns, for messages.

    Raises:
        UserError: nothing is there, or it is not JSONL.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
            problem = "the folder holds no .jsonl or .jsonl.gz file"
        elif path.is_file():
            files, problem = [path], ""
        else:
            files = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
            problem = "no file matches" if glob.has_magic(pattern) else "no such file or folder"
        if not files:
            raise UserError(f"{problem}: {pattern}", where, "correct the path; relative paths are relative to the config file")
        for file in files:
            if not file.name.endswith(SUFFIXES):
                raise UserError(f"{file} is neither .jsonl nor .jsonl.gz", where, "convert it, or narrow the pattern")
            found[file.absolute()] = None
    return list(found)


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1, without a BOM and line ends.

    Raises:
        UserError: the file cannot be read or unpacked.
    """
    number = 0
    try:
        with gzip.open(file) if file.name.endswith(".gz") else open(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                line = line.strip(b" \t\r\n")
                if line:
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot be read after line {number}: {error}", str(file), "copy or unpack the file again") from None


def parse_line(line: bytes, format_name: str) -> list[Message]:
    """One line -> its conversation.

    Raises:
        BadSample: the line is not UTF-8, not JSON or not of this format.
    """
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadSample(f"not UTF-8 text: byte {error.object[error.start]:#04x} at position {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise BadSample(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadSample("not usable JSON: nested too deeply") from None
    except BadSample:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise BadSample(f"not usable JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadSample(f"a line must be a JSON object {{ ... }}, not {_kind(record)}")
    return FORMATS[format_name](record)


def _refuse_constant(name: str) -> NoReturn:
    raise BadSample(f"not JSON: {name} is no JSON value")


def mftcoder(record: dict[str, Any]) -> list[Message]:
    """`{"chat_rounds": [{"role": "human", "content": "..."}, {"role": "bot", "content": "..."}]}`, a system turn first or none."""
    return _conversation(record, "chat_rounds", {"system": "system", "human": "user", "user": "user", "bot": "assistant", "assistant": "assistant"})


def messages(record: dict[str, Any]) -> list[Message]:
    """`{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`, a system turn first or none."""
    return _conversation(record, "messages", {"system": "system", "user": "user", "assistant": "assistant"})


FORMATS: dict[str, Callable[[dict[str, Any]], list[Message]]] = {"mftcoder": mftcoder, "messages": messages}


def _conversation(record: dict[str, Any], key: str, roles: dict[str, str]) -> list[Message]:
    if key not in record:
        raise BadSample(f'no key "{key}"; the line has {", ".join(repr(name[:40]) for name in sorted(record)[:8]) or "no keys"}')
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise BadSample(f'"{key}" must be a list of turns, not {_kind(turns)}')
    conversation = [_turn(turn, f"{key}[{index}]", roles) for index, turn in enumerate(turns)]
    spoken = conversation[1:] if conversation[0].role == "system" else conversation
    for index, message in enumerate(spoken):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            place = index + len(conversation) - len(spoken)
            raise BadSample(f"{key}[{place}] is of role {message.role} where {expected} is due: turns alternate, only the first may be system")
    if not spoken or spoken[-1].role != "assistant":
        raise BadSample(f'"{key}" must end with an assistant turn')
    return conversation


def _turn(turn: Any, place: str, roles: dict[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise BadSample(f"{place} must be an object with role and content, not {_kind(turn)}")
    for key in ("role", "content"):
        if not isinstance(turn.get(key), str):
            raise BadSample(f"{place}.{key} must be text, not {_kind(turn[key])}" if key in turn else f'{place} has no key "{key}"')
    if turn["role"] not in roles:
        raise BadSample(f"{place}.role is {turn['role'][:40]!r}: {suggestion(turn['role'][:40], roles)}")
    content = turn["content"]
    if "\0" in content:
        raise BadSample(f"{place}.content holds a null character")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample(f"{place}.content holds half a character (lone surrogate {ascii(content[error.start])})") from None
    return Message(roles[turn["role"]], content)


def _kind(value: Any) -> str:
    if isinstance(value, list | dict | str) and not value:
        return {list: "an empty list", dict: "an empty object", str: "empty text"}[type(value)]
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)]
