"""Builds entries of the cache: raw lines -> Arrow, tokenised in parallel, sorted into used and not."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mftcoder_coba.data.accounting import Count, Skipped, SplitAccounting
from mftcoder_coba.data.files import read_lines
from mftcoder_coba.data.formats import BadSample, Format, Message, parse_line
from mftcoder_coba.data.samples import SCHEMA, spans_of
from mftcoder_coba.data.templates import Encoded, Template
from mftcoder_coba.errors import UserError

BATCH_LINES = 500  # of one piece of work, and of a record batch in the entry
BATCHES_AHEAD = 4  # read for each worker before the oldest one is done
SHORTEST_BIN = 4  # of the length histogram, as a power of 2

LINES = pa.schema([("source", pa.int32()), ("file", pa.int32()), ("line", pa.int64()), ("text", pa.large_binary())])


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

    format: Format
    role: str
    valid_fraction: float
    sequence_length: int
    too_long: str
    on_error: str

    def takes(self, content_hash: int) -> bool:
        """Whether a sample belongs to this split."""
        held_out = content_hash < self.valid_fraction * 2**64
        return self.role == "all" or held_out == (self.role == "valid")


@dataclass(frozen=True)
class Source:
    """One split of one task, before it is tokenised."""

    task: str
    split: str
    files: list[Path]
    recipe: Recipe


@dataclass
class _Outcome:
    """What became of a line, or of one of the documents that it was split into."""

    place: int  # of the line in its batch
    fate: Fate = Fate.USED
    reason: str = ""
    content_hash: int = 0
    sample_tokens: int | None = None  # of the whole sample; None of a document that is not its first
    tokens: int = 0  # of this document, before truncation
    kept_tokens: int = 0  # after it
    encoded: Encoded | None = None  # of what is used


FATES = pa.schema(
    [
        ("source", pa.int32()),
        ("bytes", pa.int64()),  # of the line; 0 for a document that is not its first
        ("fate", pa.int8()),
        ("reason", pa.string()),
        ("content_hash", pa.uint64()),
        ("sample_tokens", pa.int64()),
        ("tokens", pa.int64()),
        ("kept_tokens", pa.int64()),
        *SCHEMA,
    ]
)
TOKENS = ["input_ids", "supervised"]  # columns that are written and let go


def build_entries(sources: list[Source], folders: list[Path], template: Template, workers: int, progress: bool) -> list[SplitAccounting | UserError]:
    """Writes `samples.arrow` (of `samples.SCHEMA`) into each source's folder.

    All sources go through the workers together: many small ones keep them as busy as a big one. Memory does not grow with the
    data but for some 100 bytes a line.

    Args:
        progress: show a bar.

    Returns:
        where every line of each source went (`Skipped.file` is the number of the file in its `files`); or its error: a line
        cannot be used and `on_error` is "stop", or the template cannot be used.

    Raises:
        UserError: a file cannot be read.
    """
    fates: list[list[pa.Table]] = [[FATES.empty_table().drop_columns(TOKENS)] for _ in sources]
    with ExitStack() as stack:
        bar = stack.enter_context(_bar(progress))
        shown = bar.add_task("tokenising", total=_size(sources), lines=0)
        sinks = [stack.enter_context(pa.OSFile(str(folder / "samples.arrow"), "wb")) for folder in folders]
        writers = [stack.enter_context(pa.ipc.new_stream(sink, SCHEMA)) for sink in sinks]
        tokenise = Tokenise([source.recipe for source in sources], template)
        lines = 0
        for table in _in_parallel(tokenise, _line_batches(sources), workers):
            (number,) = table["source"].unique().to_pylist()
            used = table.filter(pa.compute.equal(table["fate"], Fate.USED)).select(SCHEMA.names)
            writers[number].write_table(used.combine_chunks())
            fates[number].append(table.drop_columns(TOKENS))
            lines += table.num_rows
            bar.update(shown, advance=pa.compute.sum(table["bytes"]).as_py(), lines=lines)
    return [_outcome(source, pa.concat_tables(tables)) for source, tables in zip(sources, fates, strict=True)]


def _line_batches(sources: list[Source]) -> Iterator[pa.Table]:
    """Tables of `LINES`, each of one source."""
    for number, source in enumerate(sources):
        columns = source.recipe.format.names.values()
        lines = ((number, index, line, text) for index, file in enumerate(source.files) for line, text in read_lines(file, columns))
        while batch := list(islice(lines, BATCH_LINES)):
            arrays = zip(zip(*batch, strict=True), LINES.types, strict=True)
            yield pa.Table.from_arrays([pa.array(array, kind) for array, kind in arrays], schema=LINES)


def _in_parallel(tokenise: Tokenise, batches: Iterable[pa.Table], workers: int) -> Iterator[pa.Table]:
    """The results in the order of the batches. One batch alone, or one worker, needs no other process."""
    batches = iter(batches)
    first = list(islice(batches, 2))
    if workers == 1 or len(first) < 2:
        yield from map(tokenise, chain(first, batches))
        return
    # A forked worker has the tokenizer already: handing it over would take as long as tokenising a thousand lines.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, initializer=_begin_work, initargs=(tokenise,)) as pool:
        waiting: deque[Future[pa.Table]] = deque()
        for batch in chain(first, batches):
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > BATCHES_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _begin_work(tokenise: Tokenise) -> None:
    """Called once in each worker process."""
    global _of_this_worker, _thread_of_this_worker
    gc.freeze()  # else each collection goes through all that was inherited, and writing to it copies it
    # Memory that a batch frees is given back to the system at once in the main thread, and asked for again by the next batch.
    _of_this_worker, _thread_of_this_worker = tokenise, ThreadPoolExecutor(1)


def _work(batch: pa.Table) -> pa.Table:
    return _thread_of_this_worker.submit(_of_this_worker, batch).result()


def _size(sources: list[Source]) -> int | None:
    """Bytes of all lines; None where files are packed, and nobody knows before they are read."""
    files = [file for source in sources for file in source.files]
    return sum(file.stat().st_size for file in files) if all(file.suffix == ".jsonl" for file in files) else None


def _bar(progress: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[lines]:,} lines"), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress)


def _outcome(source: Source, fates: pa.Table) -> SplitAccounting | UserError:
    error = _bad_line(fates, source)
    if error:
        return error
    accounting = _account(source, fates)
    accounting.check()
    return accounting


@dataclass
class Tokenise:
    """Lines (table of `LINES`) -> fates and tokens (table of `FATES`), a row for each document. Runs in worker processes."""

    recipes: list[Recipe]  # of each source
    template: Template

    def __call__(self, lines: pa.Table) -> pa.Table:
        outcomes, read, conversations = [], [], []
        recipes = [self.recipes[source] for source in lines["source"].to_pylist()]
        for place, (text, recipe) in enumerate(zip(lines["text"].to_pylist(), recipes, strict=True)):
            outcome = _Outcome(place)
            outcomes.append([outcome])
            try:
                messages = parse_line(text, recipe.format)
            except BadSample as error:
                outcome.fate, outcome.reason = Fate.SKIPPED, str(error)
                continue
            outcome.content_hash = content_hash(messages)
            if recipe.takes(outcome.content_hash):
                read.append(outcome)
                conversations.append(messages)
            else:
                outcome.fate = Fate.OTHER_SPLIT
        for outcome, encoded in zip(read, self.template.encode_batch(conversations), strict=True):
            if isinstance(encoded, BadSample):
                outcome.fate, outcome.reason = Fate.SKIPPED, str(encoded)
            elif isinstance(encoded, UserError):
                outcome.fate, outcome.reason = Fate.STOP, "\n".join(filter(None, (encoded.what, encoded.fix)))
            else:
                outcomes[outcome.place] = _documents(outcome, *encoded, recipes[outcome.place])
        return _table(lines, [document for documents in outcomes for document in documents])


def _documents(sample: _Outcome, ids: np.ndarray, mask: np.ndarray, recipe: Recipe) -> list[_Outcome]:
    """The documents that a sample becomes: one, but for samples that are split."""
    limit = recipe.sequence_length
    sample.sample_tokens = sample.tokens = sample.kept_tokens = len(ids)
    if len(ids) <= limit:
        return [_settled(sample, ids, mask)]
    if recipe.too_long == "drop":
        sample.fate = Fate.TOO_LONG
        return [sample]
    if recipe.too_long == "truncate":
        start, sample.kept_tokens = kept_window(mask, limit), limit
        return [_settled(sample, ids[start : start + limit], mask[start : start + limit])]
    documents = []
    for number, start in enumerate(range(0, len(ids), limit)):
        part = slice(start, start + limit)
        document = replace(sample, content_hash=(sample.content_hash + number) % 2**64, tokens=len(ids[part]), kept_tokens=len(ids[part]))
        document.sample_tokens = None if number else len(ids)
        documents.append(_settled(document, ids[part], mask[part]))
    return documents


def _settled(outcome: _Outcome, ids: np.ndarray, mask: np.ndarray) -> _Outcome:
    """With its tokens, if there is something to learn in them."""
    if mask[1:].any():
        outcome.encoded = ids, mask
    else:
        outcome.fate = Fate.WITHOUT_SUPERVISION
    return outcome


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
    places = pa.array([outcome.place for outcome in outcomes], pa.int64())
    first = pa.array(np.diff(places, prepend=-1) != 0)
    columns = {
        "fate": [outcome.fate for outcome in outcomes],
        "reason": [outcome.reason for outcome in outcomes],
        "content_hash": pa.array([outcome.content_hash for outcome in outcomes], pa.uint64()),
        "sample_tokens": pa.array([outcome.sample_tokens for outcome in outcomes], pa.int64()),
        "tokens": [outcome.tokens for outcome in outcomes],
        "kept_tokens": [outcome.kept_tokens for outcome in outcomes],
        "source": lines["source"].take(places),
        "bytes": pa.compute.if_else(first, pa.compute.binary_length(lines["text"]).take(places), 0),
        "file": lines["file"].take(places),
        "line": lines["line"].take(places),
        "input_ids": _lists(ids),
        "supervised": _lists([spans_of(mask) for mask in masks]),
        "supervised_tokens": [int(np.count_nonzero(mask[1:])) for mask in masks],
    }
    return pa.table(columns).select(FATES.names).cast(FATES)


def _lists(arrays: Iterable[np.ndarray]) -> pa.ListArray:
    arrays = list(arrays)
    offsets = np.cumsum([0] + [len(array) for array in arrays]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def _bad_line(fates: pa.Table, source: Source) -> UserError | None:
    """The first line that does not allow to go on, in the order of the files."""
    kinds = fates["fate"].to_numpy()
    bad = np.flatnonzero((kinds == Fate.STOP) | ((kinds == Fate.SKIPPED) & (source.recipe.on_error == "stop")))
    if not len(bad):
        return None
    first = {name: fates[name][int(bad[0])].as_py() for name in ("file", "line", "fate", "reason")}
    what, _, fix = first["reason"].partition("\n")
    if first["fate"] == Fate.SKIPPED:
        fix = f'mend the line, or set "data.on_error": "skip" to leave such lines out ({len(bad)} in the files of this split)'
    return UserError(what, f"{source.files[first['file']]}:{first['line']}", fix)


def _account(source: Source, fates: pa.Table) -> SplitAccounting:
    kinds, tokens, kept, supervised = (fates[name].to_numpy() for name in ("fate", "tokens", "kept_tokens", "supervised_tokens"))
    tokenised = (kinds != Fate.SKIPPED) & (kinds != Fate.OTHER_SPLIT)
    lengths = fates["sample_tokens"].drop_null().to_numpy()
    used = kinds == Fate.USED
    # Of the documents of a split sample, only the first one knows the sample's length.
    whole = fates["sample_tokens"].is_valid().to_numpy()
    added = int((tokenised & ~whole).sum())

    def count(fate: Fate) -> Count:
        return Count(int((kinds == fate).sum()), int(kept[kinds == fate].sum()))

    lines = fates.filter(pa.array(kinds == Fate.SKIPPED)).select(["file", "line", "reason"]).to_pylist()
    return SplitAccounting(
        task=source.task,
        split=source.split,
        read=Count(len(kinds) - added, int(tokens.sum())),
        skipped=tuple(Skipped(str(line["file"]), line["line"], line["reason"]) for line in lines),
        other_split=count(Fate.OTHER_SPLIT),
        too_long=count(Fate.TOO_LONG),
        truncated=Count(int((tokens > kept).sum()), int((tokens - kept).sum())),
        split_samples=int((lengths > tokens[whole]).sum()),
        added_documents=added,
        without_supervision=count(Fate.WITHOUT_SUPERVISION),
        used=count(Fate.USED),
        supervised_tokens=int(supervised.sum()),
        duplicates=int(used.sum()) - len(np.unique(fates["content_hash"].to_numpy()[used])),
        lengths=_histogram(lengths),
    )


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(16, samples of at most 16 tokens), (32, ...) and so on in powers of 2, from the first to the last that holds a sample."""
    if not len(lengths):
        return ()
    powers = np.maximum(np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64), SHORTEST_BIN)
    return tuple((2**power, int((powers == power).sum())) for power in range(int(powers.min()), int(powers.max()) + 1))
