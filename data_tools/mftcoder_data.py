"""MFTCoder's data folders -> tasks of ours.

MFTCoder guesses the format of every line anew; here a task has one format, by name. So all lines are looked at once, by their
keys. A task whose lines are of several formats is written again as one of the format `messages`.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.common import replaced_folder, write_json
from mftcoder_coba.config import FIELD_PAIRS
from mftcoder_coba.data.files import find_files, read_lines
from mftcoder_coba.data.formats import BadSample, choose_format, parse_line
from mftcoder_coba.errors import UserError

MARK = "converted.json"
# The pairs of field names in the order in which MFTCoder tries them. It has no query with response.
PAIRS = [
    *("prompt_answer", "prompt_response", "input_output", "instruction_output", "instruction_response"),
    *("question_response", "question_answer", "query_answer"),
]
PAIR_FIELDS = [(name, tuple(FIELD_PAIRS.get(name, {"prompt": "prompt", "answer": "answer"}).values())) for name in PAIRS]


@dataclass
class Task:
    """A data path of MFTCoder.

    Attributes:
        source: files below it, as a path or glob.
        train: what the config names as its data: `source`, or the file written in its place.
        formats: lines by format, in the order in which the formats first occur.
    """

    name: str
    source: str
    train: str
    formats: Counter[str]

    @property
    def mixed(self) -> bool:
        return len(self.formats) > 1

    @property
    def format(self) -> str:
        return "messages" if self.mixed else next(iter(self.formats))

    def entry(self) -> dict[str, Any]:
        """The task in the config."""
        return {"name": self.name, "train": [self.train], **({} if self.format == "mftcoder" else {"format": self.format})}


def split_paths(given: str | list[str]) -> list[str]:
    """`data_paths`, "[a,b]" or a list, as single paths.

    Raises:
        UserError: there is none.
    """
    parts = given if isinstance(given, list) else given.strip().removeprefix("[").removesuffix("]").split(",")
    paths = [str(part).strip().strip("\"'") for part in parts]
    if not any(paths) or not all(paths):
        raise UserError(f"data_paths is {json.dumps(given)}", "data_paths", 'write "[/data/a,/data/b]", one path for each task')
    return paths


def legal_name(text: str) -> str:
    """The nearest name that the config allows; "" if nothing is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-").lstrip(".-")[:128]


def find_tasks(data_paths: str | list[str], mixed_folder: Path, notes: list[str]) -> list[Task]:
    """Looks at every line of every path.

    Args:
        mixed_folder: where tasks of several formats will be written.
        notes: what the user should know is added here.

    Raises:
        UserError: no data, a line of no format, or two tasks of one name.
    """
    tasks: list[Task] = []
    origins: dict[str, str] = {}
    for number, path in enumerate(split_paths(data_paths), start=1):
        given = os.path.basename(os.path.abspath(path)).removesuffix(".jsonl")
        name = legal_name(given) or f"task-{number}"
        if name != given:
            notes.append(f'the task of {path} is called "{name}": names are letters, digits and . _ -')
        if name in origins:
            fix = "give one of the folders another name, for example by a symbolic link"
            raise UserError(f'two data paths give the task name "{name}": {origins[name]} and {path}', "data_paths", fix)
        origins[name] = path
        source, formats = _source(path), _count_formats(path, notes)
        task = Task(name, source, source, formats)
        if task.mixed:
            task.train = str(mixed_folder / name / "train.jsonl")
            counts = ", ".join(f"{kind} {count:,}" for kind, count in formats.items())
            notes.append(f"{name} has lines of several formats ({counts}): written again as messages to {task.train}")
        tasks.append(task)
    return tasks


def _source(path: str) -> str:
    """What MFTCoder reads for a data path: the file itself, or every .jsonl file below the folder."""
    place = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(place):
        return os.path.join(glob.escape(place), "**", "*.jsonl")
    if not os.path.exists(place):
        raise UserError(f"no such file or folder: {path}", "data_paths", "correct the path; a relative one is relative to the current folder")
    if not place.endswith(".jsonl"):
        raise UserError(f"{path} is neither a folder nor a .jsonl file", "data_paths", "MFTCoder reads .jsonl files only")
    return place


def _count_formats(path: str, notes: list[str]) -> Counter[str]:
    formats: Counter[str] = Counter()
    unused_instructions = 0
    for file, number, line in _lines(_source(path)):
        record = _record(line, f"{file}:{number}")
        name = format_of(record)
        if name is None:
            keys = ", ".join(repr(key[:40]) for key in list(record)[:8]) or "none"
            raise UserError(
                f"the line is of no format that MFTCoder reads; its keys: {keys}",
                f"{file}:{number}",
                f"there is chat_rounds, text, and the pairs {', '.join(' + '.join(fields) for _, fields in PAIR_FIELDS)}",
            )
        formats[name] += 1
        unused_instructions += name == "input_output" and "instruction" in record
    if not formats:
        raise UserError(f"there is no line in the .jsonl files of {path}", "data_paths", "correct the path, or leave it out")
    if formats["text"] and len(formats) > 1:
        kinds = ", ".join(formats)
        fix = "put them into a folder of their own: a task of text"
        raise UserError(f"{path} has lines of text beside conversations ({kinds})", "data_paths", fix)
    if unused_instructions:
        notes.append(
            f"{path}: {unused_instructions:,} lines have instruction, input and output. MFTCoder learns output from input alone, and so does this "
            'config; where the instruction was meant to count, they need a task of the format "alpaca"'
        )
    return formats


def _lines(source: str) -> Iterator[tuple[Path, int, bytes]]:
    for file in find_files([source], "data_paths"):
        for number, line in read_lines(file, ()):
            yield file, number, line


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line cannot be read as JSON: {error}", place, "correct or remove it") from None
    if not isinstance(record, dict):
        raise UserError("the line is no JSON object { ... }", place, "correct or remove it")
    return record


def format_of(record: dict[str, Any]) -> str | None:
    """The format as which MFTCoder takes a line, by our name; None: it takes it as none."""
    for name, fields in PAIR_FIELDS:
        if all(field in record for field in fields):
            return name
    if isinstance(record.get("chat_rounds"), list) and record["chat_rounds"]:
        return "mftcoder"
    return "text" if "text" in record else None


def write_mixed(tasks: list[Task], folder: Path) -> None:
    """Writes the tasks of several formats to `folder`/TASK/train.jsonl, as `messages`; nothing if there are none.

    Raises:
        UserError: a line cannot be read, or something else is in `folder`.
    """
    mixed = [task for task in tasks if task.mixed]
    if not mixed:
        return
    with replaced_folder(folder, MARK) as aside:
        for task in mixed:
            (aside / task.name).mkdir()
            with open(aside / task.name / "train.jsonl", "w", encoding="utf-8") as file:
                for line in _as_messages(task.source):
                    file.write(line)
        write_json(aside / MARK, {"tasks": {task.name: {"source": task.source, "lines": dict(task.formats)} for task in mixed}})


def _as_messages(source: str) -> Iterator[str]:
    for file, number, line in _lines(source):
        name = format_of(_record(line, f"{file}:{number}"))
        try:
            messages = parse_line(line, choose_format(name or "mftcoder", {}))
        except BadSample as error:
            raise UserError(str(error), f"{file}:{number}", "correct or remove the line") from None
        turns = [{"role": message.role, "content": message.content} for message in messages]
        yield json.dumps({"messages": turns}, ensure_ascii=False) + "\n"
