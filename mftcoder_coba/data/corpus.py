"""Files -> tokens on disk, once: memory-mapped, shared by all ranks, found again by content.

An entry of the cache is one split of one task: `samples.arrow` and `accounting.json` in a folder that is named by the
SHA-256 of all that decides what is in it. It is built under a lock in a folder beside it and published by one rename,
so an entry is complete or absent. What is missing is built in a process of its own: the memory that it takes goes with it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from filelock import FileLock

from mftcoder_coba.caches import cache_folder
from mftcoder_coba.config import DataConfig, TaskConfig
from mftcoder_coba.data.accounting import SplitAccounting
from mftcoder_coba.data.digests import FileDigest, digest_of
from mftcoder_coba.data.files import find_files
from mftcoder_coba.data.formats import choose_format
from mftcoder_coba.data.samples import TaskData
from mftcoder_coba.data.templates import Template, choose, fingerprint, load_tokenizer
from mftcoder_coba.data.tokenising import Recipe, Source, build_entries
from mftcoder_coba.errors import RunFailure, UserError

CACHE_VERSION = 3
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Corpus:
    """All tokenised data of an experiment.

    Attributes:
        tasks: names in the order of the config; a task's number is its place here.
        splits: "train", "valid", "test" -> one `TaskData` for each task; an empty one where a task has no such split.
        accounting: task -> split -> figures; only splits that have files.
        template_name: the template used, "auto" resolved.
        pad_token_id: what fills rows; never supervised.
        fingerprints: task -> split -> {"key", "samples"} of what is trained and validated on, as plain values: equal keys mean the same
            samples in the same order. A setting that nothing came of is not in the key.
    """

    tasks: tuple[str, ...]
    splits: dict[str, list[TaskData]]
    accounting: dict[str, dict[str, SplitAccounting]]
    template_name: str
    pad_token_id: int
    fingerprints: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """Where a source's tokens are, or will be.

    Attributes:
        digests: of its files, as they were when the folder was named.
        decides: all that decides what is in it beside the recipe, as plain values.
    """

    folder: Path
    source: Source
    digests: list[FileDigest]
    decides: list[Any]


def prepare(
    config: DataConfig,
    tokenizer_path: str,
    trust_remote_code: bool = False,
    workers: int | None = None,
    progress: bool = True,
    splits: Collection[str] = SPLITS,
) -> Corpus:
    """Opens the tokenised data, after building what the cache does not hold yet.

    Args:
        workers: processes that tokenise; None is one for each core.
        progress: show a bar while something is built, if there is a terminal.
        splits: the wanted ones; files of the others need not exist, and their `TaskData` are empty. Without files of its own, `valid`
            is read from those of `train`.

    Raises:
        UserError: a missing or broken file, a broken line, no tokenizer, a task without usable training samples.
        RunFailure: the process that builds was killed.
    """
    sources = sources_of(config, splits)
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code)
    template = choose(config.template, tokenizer)
    cache = _cache_folder(config)
    tokens_from = [CACHE_VERSION, template.identity, fingerprint(tokenizer)]
    entries = [_entry(source, tokens_from, cache) for source in sources]
    missing = [entry for entry in entries if not entry.folder.is_dir()]
    if missing:
        _in_a_process(_build, missing, template, workers or len(os.sched_getaffinity(0)), progress and sys.stderr.isatty())
    data = {(entry.source.task, entry.source.split): _open(entry) for entry in entries}
    names = tuple(config.task_names)
    accounting = {name: {split: data[name, split][1] for split in SPLITS if (name, split) in data} for name in names}
    for index, name in enumerate(names if "train" in splits else ()):
        _require_samples(accounting[name]["train"], f"data.tasks[{index}].train ({name})", config)
    return Corpus(
        tasks=names,
        splits={split: [data[name, split][0] if (name, split) in data else TaskData.from_samples([]) for name in names] for split in SPLITS},
        accounting=accounting,
        fingerprints=_fingerprints(entries, accounting),
        template_name=template.name,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def sources_of(config: DataConfig, splits: Collection[str] = SPLITS) -> list[Source]:
    """The wanted splits that have files, task by task. Raises UserError for files that do not exist, and for fields that do not fit the format."""
    return [source for index, task in enumerate(config.tasks) for source in _sources(index, task, config, splits)]


def _sources(index: int, task: TaskConfig, config: DataConfig, splits: Collection[str]) -> list[Source]:
    """Without files of its own, `valid` is a part of `train`, chosen by hash."""

    format = choose_format(task.format, task.fields, f"data.tasks[{index}].fields ({task.name})")

    def source(split: str, patterns: list[str], role: str) -> Source:
        where = f"data.tasks[{index}].{'train' if role == 'valid' else split} ({task.name})"
        fraction = config.valid_fraction if role != "all" else 0.0
        recipe = Recipe(format, role, fraction, config.sequence_length, config.too_long, config.on_error)
        return Source(task.name, split, find_files(patterns, where), recipe)

    held_out = not task.valid and config.valid_fraction > 0
    existing = {"train": (task.train, "train" if held_out else "all")}
    if task.valid or held_out:
        existing["valid"] = (task.valid or task.train, "valid" if held_out else "all")
    if task.test:
        existing["test"] = (task.test, "all")
    return [source(split, *existing[split]) for split in existing if split in splits]


def _entry(source: Source, tokens_from: list[Any], cache: Path) -> _Entry:
    """The folder's name is the SHA-256 of the files' content and of all that decides what becomes of it."""
    digests = [digest_of(file, cache / "digests") for file in source.files]
    contents = [[file.suffix, digest.sha256] for file, digest in zip(source.files, digests, strict=True)]
    key = _sha256([tokens_from, asdict(source.recipe), contents])
    return _Entry(cache / "corpus" / key, source, digests, [tokens_from, contents])


def _sha256(tree: list[Any]) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


def _fingerprints(entries: list[_Entry], accounting: dict[str, dict[str, SplitAccounting]]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in entries:
        source = entry.source
        if source.split == "test":
            continue
        figures = accounting[source.task][source.split]
        recipe = asdict(source.recipe)
        del recipe["on_error"]  # "stop" has an entry only where no line is skipped, and then it is that of "skip"
        if not (figures.too_long.samples or figures.truncated.samples or figures.split_samples):
            del recipe["too_long"]
        found.setdefault(source.task, {})[source.split] = {"key": _sha256([entry.decides, recipe]), "samples": figures.used.samples}
    return found


def _cache_folder(config: DataConfig) -> Path:
    root = cache_folder(config.cache_dir)
    try:
        for name in ("corpus", "digests"):
            (root / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache folder {root} cannot be made: {error.strerror}", "data.cache_dir", "name one that you may write to") from None
    return root


def _in_a_process(function: Callable[..., None], *arguments: Any) -> None:
    """Calls `function` in a process of its own and waits for it.

    Raises:
        UserError: what the function raised.
        RunFailure: the process ended in another way.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_to, args=(sender, function, *arguments))
    process.start()
    sender.close()
    try:
        error = receiver.recv()
    except EOFError:  # it has ended without a word
        error = None
    except BaseException:  # an interrupt
        process.terminate()
        raise
    finally:
        process.join()
    if error:
        raise error
    if process.exitcode:
        killed = f"was killed by signal {-process.exitcode}: too little memory?" if process.exitcode < 0 else "failed, see above"
        raise RunFailure(f"the process that tokenises the data {killed} The cache holds whole entries only; the next start goes on.")


def _report_to(sender: Connection, function: Callable[..., None], *arguments: Any) -> None:
    try:
        function(*arguments)
    except UserError as error:
        sender.send(error)


def _build(missing: list[_Entry], template: Template, workers: int, progress: bool) -> None:
    """Builds entries. A second builder waits for the first and finds the entry."""
    # No threads of the tokenizers beside the worker processes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ExitStack() as locks:
        # In one order everywhere, so that two builders never wait for each other. An entry may be listed twice.
        for folder in sorted({entry.folder for entry in missing}):
            locks.enter_context(FileLock(f"{folder}.lock"))
        entries = {entry.folder: entry for entry in missing if not entry.folder.is_dir()}
        if entries:
            _build_locked(list(entries.values()), template, workers, progress)


def _build_locked(entries: list[_Entry], template: Template, workers: int, progress: bool) -> None:
    # Whoever holds the locks is alone: what lies here was left by a build that was killed.
    for entry in entries:
        for stale in entry.folder.parent.glob(f"{entry.folder.name}.building*"):
            shutil.rmtree(stale)
    folders = [Path(f"{entry.folder}.building-{os.getpid()}") for entry in entries]
    try:
        for folder in folders:
            folder.mkdir()
        outcomes = build_entries([entry.source for entry in entries], folders, template, workers, progress)
        for entry, folder, outcome in zip(entries, folders, outcomes, strict=True):
            if isinstance(outcome, SplitAccounting):
                _publish(entry, folder, outcome)
        for outcome in outcomes:
            if isinstance(outcome, UserError):
                raise outcome
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _publish(entry: _Entry, folder: Path, accounting: SplitAccounting) -> None:
    (folder / "accounting.json").write_text(json.dumps(accounting.to_dict(), ensure_ascii=False), encoding="utf-8")
    for file, digest in zip(entry.source.files, entry.digests, strict=True):
        digest.check_unchanged(file)
    folder.rename(entry.folder)


def _open(entry: _Entry) -> tuple[TaskData, SplitAccounting]:
    folder, source = entry.folder, entry.source
    values = json.loads((folder / "accounting.json").read_text(encoding="utf-8"))
    # The entry belongs to the content: task and files may go by other names than when it was built.
    names = {"task": source.task, "split": source.split}
    skipped = [line | {"file": str(source.files[int(line["file"])])} for line in values["skipped"]]
    accounting = SplitAccounting.from_dict(values | names | {"skipped": skipped})
    accounting.check()
    return TaskData(open(folder / "samples.arrow", "rb"), source.files), accounting


def _require_samples(train: SplitAccounting, where: str, config: DataConfig) -> None:
    if train.used.samples:
        return
    if not train.read.samples:
        raise UserError("the task is empty: its training files hold no lines", where, "name other files, or take the task out")
    reasons = {
        "could not be read": len(train.skipped),
        f"fell to validation (valid_fraction {config.valid_fraction:g})": train.other_split.samples,
        f"are longer than sequence_length ({config.sequence_length} tokens)": train.too_long.samples,
        "have no supervised tokens": train.without_supervision.samples,
    }
    found = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items() if number)
    raise UserError(f"the task has no usable training sample: {train.read.samples:,} read, of which {found}", where)
