"""Four code tasks from the standard library of the running Python, in MFTCoder's chat format.

    python -m data_tools.build_stdlib_tasks --out data/stdlib

completion   signature and docstring -> body
comment      function without docstring -> docstring
text2code    docstring -> function
unittest     function -> a test of it (only where the library's own tests are installed)

The samples are a function of the library alone: same Python, same files. A function is in the same split in every task. Lines are in
an order fixed by hash, so the first N lines of a file are a fair small sample; `--limit` takes those.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.common import replaced_folder, run, write_json
from data_tools.stdlib_source import Function, Material, TestMethod, read_stdlib
from mftcoder_coba.errors import UserError, suggestion

MARK = "summary.json"
TASKS = ("completion", "comment", "text2code", "unittest")
SPLITS = ("train", "valid", "test")
SHORTEST_DOCSTRING_WORDS = 4
# re.compile alone is called by hundreds of tests.
MOST_TESTS_OF_A_FUNCTION = 8

WORDINGS = {
    "completion": (
        "Complete the following Python function.",
        "Write the body of this Python function.",
        "Here is the signature and the docstring of a Python function. Write the rest of it.",
        "Implement this function as its docstring says.",
    ),
    "comment": (
        "Write a docstring for the following Python function.",
        "What does this Python function do? Answer with its docstring.",
        "Document this function.",
        "Describe the following Python code as a docstring would.",
    ),
    "text2code": (
        "Write a Python function `{name}` for this description.",
        "Implement a Python function named `{name}`. It is described as follows.",
        "Write the function `{name}` in Python from its documentation.",
        "I need a Python function called `{name}` that does this:",
    ),
    "unittest": (
        "Write a unit test for the following Python function.",
        "Write a test method, as in a `unittest.TestCase`, for `{name}` of the module `{module}`.",
        "How would you test this function? Write one test method.",
        "Here is `{module}.{name}`. Write a unit test for it.",
    ),
}


@dataclass(frozen=True)
class Sample:
    task: str
    split: str
    source: str
    prompt: str
    answer: str

    @property
    def id(self) -> str:
        return _hash(self.task, self.prompt, self.answer)[:12]

    def line(self) -> str:
        rounds = [{"role": "human", "content": self.prompt}, {"role": "bot", "content": self.answer}]
        return json.dumps({"id": self.id, "data_name": self.task, "source": self.source, "chat_rounds": rounds}, ensure_ascii=False)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def split_of(function_key: str) -> str:
    """The split of a function, in every task: about 90 % train, 5 % valid, 5 % test."""
    place = int(_hash("split", function_key)[:8], 16) % 100
    return "train" if place < 90 else "valid" if place < 95 else "test"


def _instruction(task: str, function: Function) -> str:
    wordings = WORDINGS[task]
    choice = wordings[int(_hash("wording", task, function.key)[:8], 16) % len(wordings)]
    return choice.format(name=function.name, module=function.module)


def function_samples(functions: Iterable[Function]) -> Iterator[Sample]:
    """The samples of the first three tasks: one per task and function."""
    for function in functions:
        if len(function.docstring.split()) < SHORTEST_DOCSTRING_WORDS:
            continue
        pairs = {
            "completion": (function.head, function.body),
            "comment": (function.code, function.docstring),
            "text2code": (function.docstring, function.code),
        }
        for task, (given, answer) in pairs.items():
            yield _sample(task, function, given, answer)


def _sample(task: str, function: Function, given: str, answer: str) -> Sample:
    source = f"python{sys.version_info.major}.{sys.version_info.minor}/{function.module}:{function.qualified_name}"
    return Sample(task, split_of(function.key), source, f"{_instruction(task, function)}\n\n{given}", answer)


def unittest_samples(functions: Iterable[Function], tests: Iterable[TestMethod]) -> Iterator[Sample]:
    """Pairs each test with one module-level function that it calls, of the module that the test's file is named after.

    Of several such functions, the one that the test's own name contains goes first, then the one that is called first.
    """
    index = {(function.module, function.name): function for function in functions if function.qualified_name == function.name}
    for test in tests:
        subjects = {part.removeprefix("test_") for part in test.module.split(".")}
        called = [index[call] for call in test.calls if call in index and subjects & set(call[0].split("."))]
        named = [function for function in called if function.name.lower().strip("_") in test.qualified_name.lower()]
        if called:
            function = (named or called)[0]
            # Any function named `name` of a module that was imported under a condition is defined once in `index`: the last one, as at run time.
            yield _sample("unittest", function, function.head + "\n" + function.body if function.head else function.code, test.code)


def collect(material: Material, max_chars: int) -> tuple[dict[str, dict[str, list[Sample]]], dict[str, int]]:
    """All samples by task and split, each list in its final order; and how many were left out, by reason."""
    left_out = {"too long": 0, "duplicate": 0, "many tests of one function": 0}
    tests_by_prompt: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    table: dict[str, dict[str, list[Sample]]] = {task: {split: [] for split in SPLITS} for task in TASKS}
    for sample in [*function_samples(material.functions), *unittest_samples(material.functions, material.tests)]:
        # A prompt or an answer that occurs twice in a task could be in train and in valid; many tests share their prompt by nature.
        marks = [(sample.task, "answer", _normalised(sample.answer))]
        if sample.task != "unittest":
            marks.append((sample.task, "prompt", _normalised(sample.prompt.split("\n\n", 1)[1])))
        keys = {(task, _hash(kind, text)) for task, kind, text in marks}
        if len(sample.prompt) + len(sample.answer) > max_chars:
            left_out["too long"] += 1
        elif keys & seen:
            left_out["duplicate"] += 1
        elif sample.task == "unittest" and tests_by_prompt[sample.prompt] == MOST_TESTS_OF_A_FUNCTION:
            left_out["many tests of one function"] += 1
        else:
            tests_by_prompt[sample.prompt] += 1
            seen |= keys
            table[sample.task][sample.split].append(sample)
    for splits in table.values():
        for samples in splits.values():
            samples.sort(key=lambda sample: _hash("order", sample.id))
    return {task: splits for task, splits in table.items() if splits["train"]}, left_out


def _normalised(text: str) -> str:
    return " ".join(text.split())


def build(material: Material, out: Path, max_chars: int, limits: dict[str, int], held_out_limit: int | None) -> dict[str, Any]:
    """Writes `out`/TASK/{train,valid,test}.jsonl and summary.json; returns the summary.

    Args:
        max_chars: characters of prompt and answer at most.
        limits: largest number of train samples, by task.
        held_out_limit: largest number of samples of valid and of test, for every task.
    """
    table, left_out = collect(material, max_chars)
    summary: dict[str, Any] = {
        "python": platform.python_version(),
        "max_chars": max_chars,
        "files": material.files,
        "unparsed_files": material.unparsed_files,
        "left_out": left_out,
        "tasks": {},
    }
    with replaced_folder(out, MARK) as aside:
        for task, splits in table.items():
            (aside / task).mkdir()
            counts = summary["tasks"][task] = {}
            for split, samples in splits.items():
                kept = samples[: limits.get(task) if split == "train" else held_out_limit]
                text = "".join(sample.line() + "\n" for sample in kept)
                (aside / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
                counts[split] = len(kept)
        write_json(aside / MARK, summary)
    return summary


def parse_limits(text: str) -> dict[str, int]:
    """`completion=1200,comment=500` -> numbers by task."""
    limits = {}
    for part in filter(None, text.split(",")):
        task, _, number = part.partition("=")
        if task not in TASKS:
            raise UserError(f"no task {task!r}: {suggestion(task, TASKS)}", f"--limit {text}")
        if not number.isdecimal() or int(number) < 1:
            raise UserError(f"{part!r} is not TASK=N with N of at least 1", f"--limit {text}", "for example --limit completion=1200,comment=500")
        limits[task] = int(number)
    return limits


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_tools.build_stdlib_tasks", description="Code tasks from Python's standard library.")
    parser.add_argument("--out", type=Path, default=Path("data/stdlib"), help="folder to make (default: %(default)s)")
    parser.add_argument("--max-chars", type=int, default=4000, metavar="N", help="longest sample, prompt and answer (default: %(default)s)")
    parser.add_argument("--limit", default="", metavar="TASK=N,...", help="largest number of train samples of a task")
    parser.add_argument("--valid-limit", type=int, metavar="N", help="largest number of valid and of test samples of every task")
    options = parser.parse_args()
    for name, value in {"--max-chars": options.max_chars, "--valid-limit": options.valid_limit}.items():
        if value is not None and value < 1:
            raise UserError(f"{value} is not a positive number", name)
    start = time.monotonic()
    limits, out = parse_limits(options.limit), options.out.expanduser().absolute()
    material = read_stdlib(Path(sysconfig.get_path("stdlib")))
    summary = build(material, out, options.max_chars, limits, options.valid_limit)
    for task, counts in summary["tasks"].items():
        print(f"{task:<12}" + "".join(f"{split} {count:>6}   " for split, count in counts.items()))
    if "unittest" not in summary["tasks"]:
        print("unittest     left out: this Python comes without the library's tests")
    print(f"{summary['files']} files, {summary['unparsed_files']} not parsed, {time.monotonic() - start:.1f} s: {options.out}")


if __name__ == "__main__":
    run(main)
