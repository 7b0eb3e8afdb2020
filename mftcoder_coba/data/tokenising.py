"""Builds one entry of the cache: raw lines -> Arrow, tokenised in parallel by Hugging Face datasets, sorted into used and not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset

from mftcoder_coba.data.accounting import Count, Skipped, SplitAccounting
from mftcoder_coba.data.formats import BadSample, Message, parse_line, read_lines
from mftcoder_coba.data.samples import SCHEMA, spans_of
from mftcoder_coba.data.templates import Encoded, Template
from mftcoder_coba.errors import UserError

LINES_PER_WORKER = 2000  # fewer are tokenised sooner than a process starts
BATCH_LINES = 1000
BATCH_SAMPLES = 4096  # of a record batch in the entry

LINES = pa.schema([("file", pa.int32()), ("line", pa.int64()), ("text", pa.large_binary())])


class Fate(IntEnum):
    USED = 0
    SKIPPED = 1
    OTHER_SPLIT = 2
    TOO_LONG = 3
    WITHOUT_SUPERVISION = 4
    STOP = 5  # nothing of this kind can be used, whatever `on_error` says


@dataclass(frozen=True)
class Recipe:
    """What becomes of the lines; the keys of `data` in the config.

    Attributes:
        role: "all" takes every sample; "train" leaves `valid_fraction` of them, chosen by hash, to "valid".
    """

    format: str
    role: str
    valid_fraction: float
    sequence_length: int
    too_long: str
    on_error: str


@dataclass
class _Outcome:
    """A line after tokenising."""

    fate: Fate
    reason: str = ""
    content_hash: int = 0
    tokens: int = 0  # before truncation
    kept_tokens: int = 0  # after it
    encoded: Encoded | None = None  # of used samples


FATES = pa.schema(
    [
        ("file", pa.int32()),
        ("line", pa.int64()),
        ("fate", pa.int8()),
        ("reason", pa.string()),
        ("content_hash", pa.uint64()),
        ("tokens", pa.int64()),
        ("kept_tokens", pa.int64()),
        *SCHEMA,
    ]
)


def build_entry(folder: Path, task: str, split: str, files: list[Path], recipe: Recipe, template: Template, workers: int) -> SplitAccounting:
    """Writes `folder/samples.arrow` (of `samples.SCHEMA`) and returns where every line went. Other files there are gone afterwards.

    In the result, `Skipped.file` is the number of the file in `files`.

    Raises:
        UserError: a file cannot be read; a line cannot be used and `on_error` is "stop"; the template cannot be used.
    """
    raw, rows = folder / "lines.arrow", 0
    with pa.OSFile(str(raw), "wb") as sink, pa.ipc.new_stream(sink, LINES) as writer:
        for batch in _line_batches(files):
            writer.write_batch(batch)
            rows += batch.num_rows
    tokenised = Dataset.from_file(str(raw)).with_format("arrow")
    workers = min(workers, rows // LINES_PER_WORKER)
    if rows:
        tokenised = tokenised.map(
            Tokenise(recipe, template),
            batched=True,
            batch_size=BATCH_LINES,
            num_proc=workers if workers > 1 else None,
            remove_columns=LINES.names,
            cache_file_name=str(folder / "tokenised.arrow"),
            load_from_cache_file=False,
            new_fingerprint="tokenised",
        )
        fates = tokenised.data.table.select([name for name in FATES.names if name not in ("input_ids", "supervised")])
        _stop_at_bad_line(fates, files, recipe)
    else:
        fates = FATES.empty_table()
    with pa.OSFile(str(folder / "samples.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for table in tokenised.iter(BATCH_SAMPLES) if rows else ():
            used = table.filter(pa.compute.equal(table["fate"], Fate.USED)).select(SCHEMA.names).cast(SCHEMA)
            writer.write_table(used.combine_chunks())
    accounting = _account(task, split, fates)
    accounting.check()
    del tokenised
    for file in folder.iterdir():
        if file.name != "samples.arrow":
            file.unlink()
    return accounting


def _line_batches(files: list[Path]) -> Iterable[pa.RecordBatch]:
    lines = ((index, number, text) for index, file in enumerate(files) for number, text in read_lines(file))
    while batch := list(islice(lines, BATCH_LINES)):
        columns = zip(zip(*batch, strict=True), LINES.types, strict=True)
        yield pa.RecordBatch.from_arrays([pa.array(column, kind) for column, kind in columns], schema=LINES)


@dataclass
class Tokenise:
    """Lines (table of `LINES`) -> fates and tokens (table of `FATES`), one row for each line. Runs in worker processes."""

    recipe: Recipe
    template: Template

    def __call__(self, lines: pa.Table) -> pa.Table:
        outcomes, documents, places = [], [], []
        for text in lines["text"].to_pylist():
            outcome = _Outcome(Fate.USED)
            outcomes.append(outcome)
            try:
                messages = parse_line(text, self.recipe.format)
                outcome.content_hash = content_hash(messages)
                if not self._belongs(outcome.content_hash):
                    outcome.fate = Fate.OTHER_SPLIT
                    continue
                documents.append(self.template.render(messages))
                places.append(outcome)
            except BadSample as error:
                outcome.fate, outcome.reason = Fate.SKIPPED, str(error)
            except UserError as error:
                outcome.fate, outcome.reason = Fate.STOP, "\n".join(filter(None, (error.what, error.fix)))
        for outcome, encoded in zip(places, self.template.tokenise(documents), strict=True):
            self._decide(outcome, *encoded)
        return _table(lines, outcomes)

    def _belongs(self, number: int) -> bool:
        held_out = number < self.recipe.valid_fraction * 2**64
        return self.recipe.role == "all" or held_out == (self.recipe.role == "valid")

    def _decide(self, outcome: _Outcome, ids: np.ndarray, mask: np.ndarray) -> None:
        limit = self.recipe.sequence_length
        outcome.tokens = outcome.kept_tokens = len(ids)
        if len(ids) > limit:
            if self.recipe.too_long == "drop":
                outcome.fate = Fate.TOO_LONG
                return
            start = kept_window(mask, limit)
            ids, mask, outcome.kept_tokens = ids[start : start + limit], mask[start : start + limit], limit
        if mask[1:].any():
            outcome.encoded = ids, mask
        else:
            outcome.fate = Fate.WITHOUT_SUPERVISION


def kept_window(mask: np.ndarray, limit: int) -> int:
    """Where the `limit` tokens that are kept of a longer sample begin.

    At its start, if there is something to learn in them. Else so that they end with the first answer, behind the end of its
    prompt; an answer of more than half of them begins in their middle.

    Args:
        mask: bool [length], supervised tokens.
    """
    if mask[1:limit].any() or not mask.any():
        return 0
    start, end = (int(place) for place in spans_of(mask)[:2])
    return min(start - limit // 2, end - limit)


def content_hash(messages: list[Message]) -> int:
    """64 bits of what is said and by whom: equal samples are equal here, whatever else their lines hold."""
    text = "\x1e".join(f"{message.role}\x1f{message.content}" for message in messages)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _table(lines: pa.Table, outcomes: list[_Outcome]) -> pa.Table:
    nothing = np.zeros(0, np.int32), np.zeros(0, np.bool_)
    ids, masks = zip(*(outcome.encoded or nothing for outcome in outcomes), strict=True)
    columns = {
        "file": lines["file"],
        "line": lines["line"],
        "fate": [outcome.fate for outcome in outcomes],
        "reason": [outcome.reason for outcome in outcomes],
        "content_hash": pa.array([outcome.content_hash for outcome in outcomes], pa.uint64()),
        "tokens": [outcome.tokens for outcome in outcomes],
        "kept_tokens": [outcome.kept_tokens for outcome in outcomes],
        "input_ids": _lists(ids),
        "supervised": _lists([spans_of(mask) for mask in masks]),
        "supervised_tokens": [int(np.count_nonzero(mask[1:])) for mask in masks],
    }
    return pa.table(columns).cast(FATES)


def _lists(arrays: Iterable[np.ndarray]) -> pa.ListArray:
    arrays = list(arrays)
    offsets = np.cumsum([0] + [len(array) for array in arrays]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def _stop_at_bad_line(fates: pa.Table, files: list[Path], recipe: Recipe) -> None:
    """Raises UserError for the first line that does not allow to go on, in the order of the files."""
    kinds = fates["fate"].to_numpy()
    bad = np.flatnonzero((kinds == Fate.STOP) | ((kinds == Fate.SKIPPED) & (recipe.on_error == "stop")))
    if not len(bad):
        return
    first = {name: fates[name][int(bad[0])].as_py() for name in ("file", "line", "fate", "reason")}
    what, _, fix = first["reason"].partition("\n")
    if first["fate"] == Fate.SKIPPED:
        fix = f'mend the line, or set "data.on_error": "skip" to leave such lines out ({len(bad)} in the files of this split)'
    raise UserError(what, f"{files[first['file']]}:{first['line']}", fix)


def _account(task: str, split: str, fates: pa.Table) -> SplitAccounting:
    kinds, tokens, kept = (fates[name].to_numpy() for name in ("fate", "tokens", "kept_tokens"))

    def count(fate: Fate) -> Count:
        return Count(int((kinds == fate).sum()), int(kept[kinds == fate].sum()))

    used = kinds == Fate.USED
    lines = fates.filter(pa.array(kinds == Fate.SKIPPED)).select(["file", "line", "reason"]).to_pylist()
    return SplitAccounting(
        task=task,
        split=split,
        read=Count(len(kinds), int(tokens.sum())),
        skipped=tuple(Skipped(str(line["file"]), line["line"], line["reason"]) for line in lines),
        other_split=count(Fate.OTHER_SPLIT),
        too_long=count(Fate.TOO_LONG),
        truncated=Count(int((tokens > kept).sum()), int((tokens - kept).sum())),
        without_supervision=count(Fate.WITHOUT_SUPERVISION),
        used=count(Fate.USED),
        supervised_tokens=int(fates["supervised_tokens"].to_numpy().sum()),
        duplicates=int(used.sum()) - len(np.unique(fates["content_hash"].to_numpy()[used])),
    )
