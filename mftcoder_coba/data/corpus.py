"""JSONL files -> tokens on disk, once: memory-mapped, shared by all ranks, found again by content.

An entry of the cache is one split of one task: `samples.arrow` and `accounting.json` in a folder that is named by the
SHA-256 of all that decides what is in it. It is built under a lock in a folder beside it and published by one rename,
so an entry is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from mftcoder_coba.config import DataConfig, TaskConfig
from mftcoder_coba.data.accounting import SplitAccounting
from mftcoder_coba.data.formats import find_files
from mftcoder_coba.data.samples import TaskData
from mftcoder_coba.data.templates import Template, choose, fingerprint, load_tokenizer
from mftcoder_coba.data.tokenising import Recipe, build_entry
from mftcoder_coba.errors import UserError

CACHE_VERSION = 2
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
    """

    tasks: tuple[str, ...]
    splits: dict[str, list[TaskData]]
    accounting: dict[str, dict[str, SplitAccounting]]
    template_name: str
    pad_token_id: int


@dataclass(frozen=True)
class _Part:
    """One split of one task, before it is tokenised."""

    task: str
    split: str
    where: str  # config path of the files, for messages
    files: list[Path]
    recipe: Recipe


def prepare(config: DataConfig, tokenizer_path: str, trust_remote_code: bool = False, workers: int | None = None, progress: bool = True) -> Corpus:
    """Opens the tokenised data, after building what the cache does not hold yet.

    Args:
        workers: processes that tokenise; None is one for each core.
        progress: show a bar while something is built, if there is a terminal.

    Raises:
        UserError: a missing or broken file, a broken line, no tokenizer, a task without usable training samples.
    """
    parts = [part for index, task in enumerate(config.tasks) for part in _parts(index, task, config)]
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code)
    template = choose(config.template, tokenizer)
    cache = _cache_folder(config)
    folders = [cache / _key(part, template, tokenizer) for part in parts]
    with _quiet(), _bar(progress) as bar:
        steps = bar.add_task("", total=len(parts))
        for part, folder in zip(parts, folders, strict=True):
            bar.update(steps, description=f"tokenising {part.task}/{part.split}", refresh=True)
            _ensure(folder, part, template, workers or len(os.sched_getaffinity(0)))
            bar.advance(steps)
    data = {(part.task, part.split): _open(folder, part) for part, folder in zip(parts, folders, strict=True)}
    names = tuple(config.task_names)
    accounting = {name: {split: data[name, split][1] for split in SPLITS if (name, split) in data} for name in names}
    for index, name in enumerate(names):
        _require_samples(accounting[name]["train"], f"data.tasks[{index}].train ({name})", config)
    return Corpus(
        tasks=names,
        splits={split: [data[name, split][0] if (name, split) in data else TaskData.from_samples([]) for name in names] for split in SPLITS},
        accounting=accounting,
        template_name=template.name,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def _parts(index: int, task: TaskConfig, config: DataConfig) -> list[_Part]:
    """Splits of a task that have files. Without files of its own, `valid` is a part of `train`, chosen by hash."""

    def part(split: str, patterns: list[str], role: str) -> _Part:
        source = "train" if role == "valid" else split
        where = f"data.tasks[{index}].{source} ({task.name})"
        fraction = config.valid_fraction if role != "all" else 0.0
        recipe = Recipe(task.format, role, fraction, config.sequence_length, config.too_long, config.on_error)
        return _Part(task.name, split, where, find_files(patterns, where), recipe)

    held_out = not task.valid and config.valid_fraction > 0
    parts = [part("train", task.train, "train" if held_out else "all")]
    if task.valid or held_out:
        parts.append(part("valid", task.valid or task.train, "valid" if held_out else "all"))
    if task.test:
        parts.append(part("test", task.test, "all"))
    return parts


def _key(part: _Part, template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the content of the files and over all that decides what becomes of it."""
    contents = []
    for file in part.files:
        try:
            with open(file, "rb") as stream:
                contents.append([file.suffix, hashlib.file_digest(stream, "sha256").hexdigest()])
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", str(file)) from None
    what = [CACHE_VERSION, asdict(part.recipe), template.name, fingerprint(tokenizer), contents]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _cache_folder(config: DataConfig) -> Path:
    root = Path(config.cache_dir) if config.cache_dir else Path.home() / ".cache" / "mftcoder_coba"
    try:
        (root / "corpus").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache folder {root} cannot be made: {error.strerror}", "data.cache_dir", "name one that you may write to") from None
    return root / "corpus"


def _ensure(folder: Path, part: _Part, template: Template, workers: int) -> None:
    """Builds the entry if it is not there. A second builder waits for the first and finds the entry."""
    if folder.is_dir():
        return
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        # Whoever holds the lock is alone: what lies here was left by a build that was killed.
        for stale in folder.parent.glob(f"{folder.name}.building*"):
            shutil.rmtree(stale)
        building = Path(f"{folder}.building-{os.getpid()}")
        building.mkdir()
        try:
            accounting = build_entry(building, part.task, part.split, part.files, part.recipe, template, workers)
            (building / "accounting.json").write_text(json.dumps(accounting.to_dict(), ensure_ascii=False), encoding="utf-8")
            building.rename(folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


def _open(folder: Path, part: _Part) -> tuple[TaskData, SplitAccounting]:
    values = json.loads((folder / "accounting.json").read_text(encoding="utf-8"))
    # The entry belongs to the content: task and files may go by other names than when it was built.
    names = {"task": part.task, "split": part.split}
    skipped = [line | {"file": str(part.files[int(line["file"])])} for line in values["skipped"]]
    accounting = SplitAccounting.from_dict(values | names | {"skipped": skipped})
    accounting.check()
    return TaskData(pa.ipc.open_stream(pa.memory_map(str(folder / "samples.arrow"))).read_all()), accounting


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


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of `datasets`, and no threads of the tokenizers beside the worker processes."""
    shown, threads = not are_progress_bars_disabled(), os.environ.get("TOKENIZERS_PARALLELISM")
    disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if threads is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = threads


def _bar(progress: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal))
