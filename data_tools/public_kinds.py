"""Records of public releases, in the fields of their owners -> samples. `KINDS` names them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.mftcoder_data import format_of, legal_name
from mftcoder_coba.data.formats import PARSERS, BadSample, Message, choose_format

Record = dict[str, Any]  # a JSON object
# Folders of a release that name the split of the files in them.
SPLIT_FOLDERS = {"train": "train", "validation": "valid", "valid": "valid", "dev": "valid", "test": "test"}


class Sample(NamedTuple):
    """A conversation and where it belongs.

    task: the folder for it; None: the release is one task.
    split: as the owner has it; None: a function of `key`.
    key: samples of one key are in one split, so that no prompt is both learned and tested.
    """

    messages: list[Message]
    task: str | None
    split: str | None
    key: str


@dataclass(frozen=True)
class Kind:
    """A form of release.

    Attributes:
        what: for the command's help.
        columns: what is read of a Parquet file.
        read: (record, its file) -> its sample; raises BadSample.
    """

    what: str
    columns: tuple[str, ...]
    read: Callable[[Record, Path], Sample]


def _messages(format: str, record: Record, **fields: str) -> list[Message]:
    """The record as the named format of `mftcoder_coba.data.formats` has it; `fields` as in a task's config."""
    chosen = choose_format(format, fields)
    return PARSERS[chosen.name](record, chosen.names)


def _texts(record: Record, first: str, second: str) -> tuple[str, str]:
    """Two fields that must be text."""
    *_, one, other = _messages("prompt_answer", record, prompt=first, answer=second)
    return one.content, other.content


def _by_prompt(messages: list[Message], task: str | None = None) -> Sample:
    """A sample of a release that has one file for all splits: what the user says first decides on the split."""
    prompt = next(message.content for message in messages if message.role != "system")
    return Sample(messages, task, None, " ".join(prompt.split()))


def orca_math(record: Record, file: Path) -> Sample:
    """`question` and `answer`."""
    return _by_prompt(_messages("question_answer", record))


def alpaca(record: Record, file: Path) -> Sample:
    """`instruction`, `input`, which may be empty, and `output`."""
    return _by_prompt(_messages("alpaca", record))


def codefuse(record: Record, file: Path) -> Sample:
    """`chat_rounds`, or one of the pairs of fields that MFTCoder reads, such as `instruction` and `output`."""
    name = format_of(record)
    if name in (None, "text"):
        raise BadSample(f"of no format that MFTCoder takes as a conversation; keys: {', '.join(map(repr, list(record)[:8])) or 'none'}")
    return _by_prompt(_messages(name, record))


def xtreme_up(record: Record, file: Path) -> Sample:
    """In-language QA, SPLIT/LANGUAGE.jsonl: `question`, `title`, `context` and `target`; a task for each language, the owner's splits.

    The prompt has the form of the benchmark's own baselines.
    """
    split = SPLIT_FOLDERS.get(file.parent.name)
    if split is None:
        raise BadSample(f"its file lies in the folder {file.parent.name!r}, which names no split: {', '.join(SPLIT_FOLDERS)}")
    question, target = _texts(record, "question", "target")
    title, context = _texts(record, "title", "context")
    turns = [Message("user", f"question: {question} title: {title} context: {context}"), Message("assistant", target)]
    return Sample(turns, file.name.partition(".")[0], split, "")


def code_completion(record: Record, file: Path) -> Sample:
    """HumanEval-X's fields: `task_id` as LANGUAGE/NUMBER, `prompt`, `canonical_solution`; a task for each language.

    A problem has the same number in all languages, and is in the same split in all of them.
    """
    task_id = record.get("task_id")
    language, slash, number = task_id.rpartition("/") if isinstance(task_id, str) else ("", "", "")
    if not (slash and legal_name(language) and number):
        raise BadSample(f'"task_id" is {str(task_id)[:40]!r}, not LANGUAGE/NUMBER')
    prompt, solution = _texts(record, "prompt", "canonical_solution")
    return Sample([Message("user", prompt), Message("assistant", solution)], legal_name(language).lower(), None, number)


def humaneval_x(record: Record, file: Path) -> Sample:
    """As `code_completion`, all of it for tests: nobody may train on the benchmark itself."""
    return code_completion(record, file)._replace(split="test")


_PROBLEM = ("task_id", "prompt", "canonical_solution")
KINDS = {
    "xtreme_up": Kind(
        "XTREME-UP in-language QA: the folder qa_in_lang of xtreme-up-v1.1.jsonl.tgz -> OUT/LANGUAGE/, the owner's splits",
        ("question", "title", "context", "target"),
        xtreme_up,
    ),
    "orca_math": Kind("Orca-Math (microsoft/orca-math-word-problems-200k): Parquet or JSON lines", ("question", "answer"), orca_math),
    "alpaca": Kind("Alpaca-cleaned (yahma/alpaca-cleaned): alpaca_data_cleaned.json", ("instruction", "input", "output"), alpaca),
    "codefuse": Kind(
        "CodeFuse's code sets: chat_rounds, or pairs such as instruction and output; --by data_name makes a task for each name",
        ("chat_rounds", "instruction", "input", "output", "prompt", "response", "answer", "question"),
        codefuse,
    ),
    "code_completion": Kind("code sets in HumanEval-X's fields -> OUT/LANGUAGE/, split by the problem's number", _PROBLEM, code_completion),
    "humaneval_x": Kind("HumanEval-X itself -> OUT/LANGUAGE/test.jsonl, for evaluation only", _PROBLEM, humaneval_x),
}
