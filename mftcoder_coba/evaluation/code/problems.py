"""The files of HumanEval and HumanEval-X: JSONL or JSONL.gz in their owners' fields, a problem a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mftcoder_coba.data.files import read_lines
from mftcoder_coba.errors import UserError, suggestion
from mftcoder_coba.evaluation.code.languages import LANGUAGES, Language

CodeFormat = Literal["humaneval", "humaneval_x"]
FIELDS = {"humaneval": ("task_id", "prompt", "entry_point", "test"), "humaneval_x": ("task_id", "prompt", "declaration", "test")}
MORE_FIELDS = {"Go": ("import", "test_setup")}


@dataclass(frozen=True)
class Problem:
    """Attributes:
    record: the line.
    """

    language: Language
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return self.record["task_id"]

    @property
    def prompt(self) -> str:
        """What a model is to continue."""
        return self.language.prompt(self.record)

    @property
    def solution(self) -> str:
        """The data set's own. Raises UserError where it has none."""
        if not isinstance(self.record.get("canonical_solution"), str):
            raise UserError("has no canonical_solution", self.name)
        return self.record["canonical_solution"]


def read_problems(path: Path, format: CodeFormat) -> list[Problem]:
    """All problems of a file. The language of HumanEval's is Python, that of HumanEval-X's is in the `task_id`: Java/12.

    Raises:
        UserError: the file cannot be read; a line is not of the format, of an unknown language, or there twice.
    """
    if not path.is_file():
        raise UserError("no such file", str(path), "name a .jsonl or .jsonl.gz file with --code-tasks")
    problems: dict[str, Problem] = {}
    for line, text in read_lines(path, ()):
        where = f"{path}:{line}"
        try:
            record = json.loads(text)
        except ValueError as error:
            raise UserError(f"not JSON: {error}", where) from None
        problem = _problem(record, format, where)
        if problem.name in problems:
            raise UserError(f"the problem {problem.name} is there twice", where)
        problems[problem.name] = problem
    if not problems:
        raise UserError("holds no problems", str(path))
    return list(problems.values())


def _problem(record: Any, format: CodeFormat, where: str) -> Problem:
    found = record if isinstance(record, dict) else {}
    lacking = [name for name in FIELDS[format] if not isinstance(found.get(name), str)]
    if lacking:
        raise UserError(f"is no problem of the format {format}: no text in {', '.join(lacking)}", where, "choose the format with --code-format")
    name = "Python" if format == "humaneval" else found["task_id"].split("/")[0]
    if name not in LANGUAGES:
        raise UserError(f"the language {name} of {found['task_id']} is not known; {suggestion(name, LANGUAGES)}", where)
    lacking = [field for field in MORE_FIELDS.get(name, ()) if not isinstance(found.get(field), str)]
    if lacking:
        raise UserError(f"a problem in {name} needs text in {', '.join(lacking)}", where)
    return Problem(LANGUAGES[name], found)
