"""Public data sets, from the files that their owners publish, in MFTCoder's chat format.

    python -m data_tools.convert_public --kind xtreme_up --source xtreme-up-v1.1/qa_in_lang --out data/xtreme_up
    python -m data_tools.convert_public --kind orca_math --source orca-math/data --out data/mdqa/math
    python -m data_tools.convert_public --kind alpaca --source alpaca_data_cleaned.json --out data/mdqa/instruct
    python -m data_tools.convert_public --kind codefuse --source CodeExercise-Python-27k.jsonl --out data/mdqa/text2code
    python -m data_tools.convert_public --kind codefuse --by data_name --source crt/ --out data/crt

Writes OUT/{train,valid,test}.jsonl, or OUT/TASK/ with these files for each task of a release, and OUT/conversion.json with all counts.
Where the owner has no splits, a hash of the prompt decides: about 90 % train, 5 % valid, 5 % test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from data_tools.build_stdlib_tasks import split_of
from data_tools.common import replaced_folder, run, write_json
from data_tools.mftcoder_data import legal_name
from data_tools.public_kinds import KINDS, Kind, Record, Sample
from mftcoder_coba.data.files import find_files, read_lines
from mftcoder_coba.data.formats import BadSample
from mftcoder_coba.errors import UserError

MARK = "conversion.json"
SPLITS = ("train", "valid", "test")
MFTCODER_ROLES = {"system": "system", "user": "human", "assistant": "bot"}
SKIPPED_LISTED = 20


@dataclass
class Counts:
    """What became of every record: `kept` by task and split, `left_out` by reason, and where the first that could not be read are."""

    kept: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    left_out: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)

    def written(self) -> dict[str, Any]:
        tasks = {task: {split: splits[split] for split in SPLITS if splits[split]} for task, splits in sorted(self.kept.items())}
        return {"tasks": tasks, "left_out": dict(self.left_out), "skipped": self.skipped}


class Files:
    """The files of a result, opened as samples for them come; closed by the stack."""

    def __init__(self, folder: Path, stack: ExitStack):
        self._folder, self._stack = folder, stack
        self._open: dict[Path, TextIO] = {}

    def write(self, task: str | None, split: str, line: str) -> None:
        path = self._folder / (task or "") / f"{split}.jsonl"
        if path not in self._open:
            path.parent.mkdir(exist_ok=True)
            self._open[path] = self._stack.enter_context(open(path, "w", encoding="utf-8"))
        self._open[path].write(line + "\n")


def source_files(sources: list[str]) -> list[Path]:
    """Files, folders and globs as in a config's task; also .json files named one by one.

    Raises:
        UserError: nothing is there, or a file is of another kind.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source).expanduser().absolute()
        found |= dict.fromkeys([path] if path.suffix == ".json" and path.is_file() else find_files([source], "--source"))
    return list(found)


def read_records(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Record | BadSample]]:
    """The JSON objects of a file with their numbers from 1: of an array, or else line by line (rows of Parquet)."""
    if file.suffix == ".json" and _first_byte(file) == b"[":
        try:
            items = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot be read as a JSON array: {error}", str(file), "copy or fetch the file again") from None
        for number, item in enumerate(items, start=1):
            yield number, item if isinstance(item, dict) else BadSample("no JSON object { ... }")
        return
    for number, line in read_lines(file, columns):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, BadSample(f"not JSON: {error}")
        else:
            yield number, record if isinstance(record, dict) else BadSample("no JSON object { ... }")


def _first_byte(file: Path) -> bytes:
    try:
        with open(file, "rb") as stream:
            return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(file)) from None


def convert(kind: str, files: list[Path], out: Path, by: str | None = None, on_error: str = "stop") -> Counts:
    """Writes the samples of `files` to the new folder `out`.

    Args:
        kind: a name in `KINDS`.
        by: a field of the records whose values name tasks, in the place of the kind's own.
        on_error: "stop" or "skip": what happens at a record that cannot be read.

    Raises:
        UserError: a record cannot be read, no sample is left, or something else is in `out`.
    """
    counts, seen = Counts(), set()
    columns = KINDS[kind].columns + ((by,) if by else ())
    with replaced_folder(out, MARK) as aside:
        with ExitStack() as stack:
            result = Files(aside, stack)
            for file in files:
                for number, record in read_records(file, columns):
                    try:
                        sample = _sample(KINDS[kind], record, file, by)
                    except BadSample as error:
                        _skip(counts, f"{file}:{number}", error, on_error)
                        continue
                    _keep(sample, out.name, f"{file.name}:{number}", result, counts, seen)
        if not counts.kept:
            raise UserError(f"no sample is left: {dict(counts.left_out) or 'the files are empty'}", ", ".join(map(str, files)))
        write_json(aside / MARK, {"kind": kind, "by": by, "sources": [_described(file) for file in files], **counts.written()})
    return counts


def _sample(kind: Kind, record: Record | BadSample, file: Path, by: str | None) -> Sample:
    if isinstance(record, BadSample):
        raise record
    sample = kind.read(record, file)
    if by is None:
        return sample
    value = record.get(by)
    task = legal_name(value) if isinstance(value, str) else ""
    if not task:
        raise BadSample(f'"{by}" is {str(value)[:40]!r}, which names no task')
    return sample._replace(task=task)


def _skip(counts: Counts, place: str, error: BadSample, on_error: str) -> None:
    if on_error == "stop":
        raise UserError(
            str(error), place, "correct the file or choose another --kind; --on-error skip leaves such records out and lists them"
        ) from None
    counts.left_out["could not be read"] += 1
    if len(counts.skipped) < SKIPPED_LISTED:
        counts.skipped.append(f"{place}: {error}")


def _keep(sample: Sample, folder: str, source: str, result: Files, counts: Counts, seen: set[str]) -> None:
    """Writes a sample unless it has no answer, or was there before in a release without splits of its own."""
    if not all(message.content.strip() for message in sample.messages if message.role == "assistant"):
        counts.left_out["empty answer"] += 1
        return
    task = sample.task or folder
    rounds = [{"role": MFTCODER_ROLES[message.role], "content": message.content} for message in sample.messages]
    digest = hashlib.sha256(json.dumps([task, rounds]).encode()).hexdigest()
    if sample.split is None and digest in seen:
        counts.left_out["duplicate"] += 1
        return
    seen.add(digest)
    split = sample.split or split_of(sample.key)
    line = {"id": digest[:12], "data_name": task, "source": source, "chat_rounds": rounds}
    result.write(sample.task, split, json.dumps(line, ensure_ascii=False))
    counts.kept[task][split] += 1


def _described(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        return {"file": str(file), "bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    kinds = "\n".join(f"  {name:<16}{kind.what}" for name, kind in KINDS.items())
    description = "Public data sets in MFTCoder's chat format."
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.convert_public", description=description, epilog=f"kinds:\n{kinds}", formatter_class=form
    )
    parser.add_argument("--kind", required=True, choices=KINDS, help="whose fields the files have")
    parser.add_argument("--source", required=True, nargs="+", metavar="PATH", help="files, folders or globs: .json, .jsonl, .jsonl.gz, .parquet")
    parser.add_argument("--out", required=True, type=Path, help="folder to make; an earlier result in it is replaced")
    parser.add_argument("--by", metavar="FIELD", help="a task for each value of this field, in OUT/VALUE/")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="at a record that cannot be read (default: %(default)s)")
    options = parser.parse_args()
    files = source_files(options.source)
    counts = convert(options.kind, files, options.out.expanduser().absolute(), options.by, options.on_error)
    for task, splits in sorted(counts.kept.items()):
        print(f"{task:<16}" + "".join(f"{split} {splits[split]:>7}   " for split in SPLITS))
    for reason, number in counts.left_out.items():
        print(f"left out: {number} ({reason})")
    print(f"{len(files)} files: {options.out}")


if __name__ == "__main__":
    run(main)
