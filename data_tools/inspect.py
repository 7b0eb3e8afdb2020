"""Tokenised samples and packed rows as people read them: what is learned, where tokens, turns and documents end.

    python -m data_tools.inspect --config configs/quickstart.json [--task comment --sample 3 | --row 0 | --search TEXT]

What is shown is what training sees: samples come from its cache, rows from its order, and both are laid down as its batches are.
"""

from __future__ import annotations

import sys

if not __package__:  # run as a file, or found by a tool that is, in place of the standard library's `inspect`
    print("run the tools of this folder from the repository's root: python -m data_tools.inspect --help", file=sys.stderr)
    sys.exit(2)

import argparse
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from data_tools.common import experiment_parser, run, whole_number
from data_tools.token_text import PAGE, PAGE_HTML, TERMINAL, TokenReader, Writer
from mftcoder_coba.config import Config, load_config
from mftcoder_coba.errors import UserError, suggestion

if TYPE_CHECKING:
    from mftcoder_coba.data import Corpus, Row

SAMPLES = 2  # of each task, if nothing is asked for
SEARCHED_SAMPLES = 20_000  # of each task


@dataclass(frozen=True)
class Document:
    """A sample at its place in a row.

    Attributes:
        start: where in the row it begins.
        ids: its tokens, int64 [length].
        learned: bool [length], tokens that are the label of the token before them.
        positions: first and last position id.
    """

    task: int
    sample: int
    start: int
    ids: np.ndarray
    learned: np.ndarray
    positions: tuple[int, int]

    @property
    def figures(self) -> str:
        return _figures(len(self.ids), int(self.learned.sum()))


def laid_down(row: Row, corpus: Corpus, split: str, config: Config) -> tuple[list[Document], int]:
    """The row as a batch of training holds it -> (its documents, places of padding behind them).

    Raises:
        RuntimeError: the batch is not what the samples say. That is a defect of the data room.
    """
    from mftcoder_coba.data import collate
    from mftcoder_coba.data.batches import IGNORED

    data, isolate = corpus.splits[split], config.data.packing != "none"
    limit, reduction = config.data.sequence_length, config.training.reduction
    batch = collate([row], data, len(corpus.tasks), corpus.pad_token_id, reduction, max_length=limit, isolate=isolate)
    ids, labels, positions, tasks = (part[0].numpy() for part in (batch.input_ids, batch.labels, batch.position_ids, batch.task_ids))
    documents, start = [], 0
    for task, sample in row:
        stored, supervised = data[task].sample(sample)
        end = start + len(stored)
        learned = np.append(False, labels[start : end - 1] >= 0)
        document = Document(task, sample, start, ids[start:end], learned, (int(positions[start]), int(positions[end - 1])))
        # A place's label is the token behind it, if that is supervised; behind a document's last token there is none.
        expected = np.append(np.where(supervised[1:], stored[1:], IGNORED), IGNORED)
        found, wanted = (ids, labels, positions, tasks), (stored, expected, range(len(stored)), [task] * len(stored))
        if not all(np.array_equal(part[start:end], right) for part, right in zip(found, wanted, strict=True)):
            raise RuntimeError(f"sample {sample} of {corpus.tasks[task]} at {start} of row {row} is not in the batch as it is stored")
        documents.append(document)
        start = end
    if (labels[start:] >= 0).any() or (tasks[start:] >= 0).any():
        raise RuntimeError(f"the padding of row {row} is learned, or belongs to a task")
    return documents, len(ids) - start


class Inspector:
    """Finds samples and rows of an experiment and shows them.

    Args:
        write: draws the text; see `Writer`.
    """

    def __init__(self, config: Config, write: Writer):
        from mftcoder_coba.data import load_tokenizer, prepare
        from mftcoder_coba.planning import training_schedule

        self._config, self._write = config, write
        self._corpus = prepare(config.data, config.model.path, config.model.trust_remote_code)
        self._schedule = training_schedule(config, self._corpus.splits["train"])
        self._tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        self._reader = TokenReader(self._tokenizer)

    def tasks(self, name: str | None, split: str) -> list[int]:
        """Numbers of the task asked for, or of all tasks that have samples in the split.

        Raises:
            UserError: there is no such task, or no such sample.
        """
        names, data = self._corpus.tasks, self._corpus.splits[split]
        if name is not None and name not in names:
            raise UserError(f"there is no task {name}: {suggestion(name, names)}", "--task")
        found = [task for task, samples in enumerate(data) if name in (None, names[task]) and len(samples)]
        if not found:
            whose = "the experiment" if name is None else name
            fix = f"name files there (data.tasks[...].{split}), or show another split"
            raise UserError(f"{whose} has no samples in the split {split}", f"--split {split}", fix)
        return found

    def samples(self, tasks: list[int], split: str, first: int, count: int) -> list[tuple[int, int]]:
        """(task, sample) of the samples first..first+count-1 of each task.

        Raises:
            UserError: a task has no sample `first`.
        """
        for task in tasks:
            size = len(self._corpus.splits[split][task])
            if first >= size:
                raise UserError(f"{self._corpus.tasks[task]}/{split} has {size:,} samples: 0 to {size - 1}", f"--sample {first}")
        return [(task, sample) for task in tasks for sample in range(first, min(first + count, len(self._corpus.splits[split][task])))]

    def search(self, tasks: list[int], split: str, text: str, count: int) -> list[tuple[int, int]]:
        """(task, sample) of the first `count` samples of each task whose text has `text` in it.

        Raises:
            UserError: there is none.
        """
        found = [(task, sample) for task in tasks for sample in islice(self._containing(task, split, text), count)]
        if not found:
            where = ", ".join(f"{self._corpus.tasks[task]}/{split}" for task in tasks)
            raise UserError(f"not found in the first {SEARCHED_SAMPLES:,} samples of {where}", f"--search {text!r}")
        return found

    def _containing(self, task: int, split: str, text: str) -> Iterator[int]:
        data = self._corpus.splits[split][task]
        for sample in range(min(len(data), SEARCHED_SAMPLES)):
            ids, _ = data.sample(sample)
            if text in self._tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False):
                yield sample

    def rows(self, first: int, count: int) -> list[tuple[int, Row]]:
        """(number, row) of the rows first..first+count-1 of the training order.

        Raises:
            UserError: the run ends before row `first`.
        """
        from mftcoder_coba.planning import plan_steps

        # The order is endless, and how many rows an epoch has is known when it is packed: the run's end is looked for only where it matters.
        end = self._schedule.rows_in_epoch(0)
        if first + count > end:
            steps = plan_steps(self._config, self._schedule, world_size=1)
            end = max(end, steps.end_row or steps.total_steps * steps.global_batch_rows)
        if first >= end:
            raise UserError(f"there are {end:,} rows: 0 to {end - 1}", f"--row {first}")
        return list(enumerate(self._schedule.rows(first, min(first + count, end)), first))

    def show_sample(self, task: int, sample: int, split: str) -> None:
        [document], _ = laid_down([(task, sample)], self._corpus, split, self._config)
        source = self._corpus.splits[split][task].source(sample)
        self._write.head(f"{self._corpus.tasks[task]}/{split} sample {sample:,}: {document.figures}; {source}")
        self._write.tokens(self._reader, document.ids, document.learned)

    def show_row(self, number: int, row: Row) -> None:
        names, limit = self._corpus.tasks, self._config.data.sequence_length
        documents, padding = laid_down(row, self._corpus, "train", self._config)
        tokens, learned = (sum(map(len, part)) for part in ([d.ids for d in documents], [d.ids[d.learned] for d in documents]))
        of_task = Counter(names[document.task] for document in documents)
        epoch = int(self._schedule.epoch_of(number)) + 1
        self._write.head(
            f"row {number:,} (epoch {epoch}): {_figures(tokens, learned)}; {100 * tokens / limit:.1f} % of {limit:,} filled, {padding} of padding; "
            f"{len(documents)} documents: {', '.join(f'{name} {count}' for name, count in of_task.items())}"
        )
        for place, document in enumerate(documents, 1):
            end, (first, last) = document.start + len(document.ids), document.positions
            source = self._corpus.splits["train"][document.task].source(document.sample)
            self._write.border(
                f"{place}/{len(documents)} {names[document.task]} sample {document.sample:,}: {document.figures}; "
                f"at {document.start:,}-{end - 1:,}, positions {first:,}-{last:,}; {source}"
            )
            self._write.tokens(self._reader, document.ids, document.learned)


def _figures(tokens: int, supervised: int) -> str:
    return f"{tokens:,} tokens, {supervised:,} supervised ({100 * supervised / tokens:.1f} %)"


def _arguments() -> argparse.Namespace:
    description = "Show tokenised samples and packed rows: what is learned, and where tokens, turns and documents end."
    parser = experiment_parser("inspect", description)
    parser.add_argument("--task", metavar="NAME", help="show samples of this task (default: of each task)")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="train", help="of the samples (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--sample", type=whole_number(0), metavar="N", help="show sample N of the split, from 0 on")
    what.add_argument(
        "--row", type=whole_number(0), metavar="N", help="show row N of the training order, from 0 on, and the documents packed into it"
    )
    what.add_argument("--search", metavar="TEXT", help=f"show the first samples with this text, of the first {SEARCHED_SAMPLES:,} of each task")
    how_many = f"how many samples of each task, or rows (default: {SAMPLES} samples; 1 with --sample and --row)"
    parser.add_argument("--samples", type=whole_number(1), metavar="K", help=how_many)
    parser.add_argument("--ids", action="store_true", help="put its id behind each token")
    longest = "of longer stretches of learned or other tokens show head and tail; 0: show all (default: %(default)s)"
    parser.add_argument("--max-tokens", type=whole_number(0), default=600, metavar="N", help=longest)
    when = "auto: in a terminal of 256 colours, unless NO_COLOR is set; without colour, marks show the same (default: %(default)s)"
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help=when)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead, in colour")
    arguments = parser.parse_args()
    if arguments.row is not None and (arguments.task or arguments.split != "train"):
        parser.error("--row shows a row of all tasks' training samples: it goes without --task and --split")
    return arguments


def _console(color: str, html: Path | None) -> tuple[Console, bool]:
    """(the console to write to, whether by colour)"""
    if html:
        return Console(file=io.StringIO(), record=True, force_terminal=True, color_system="truecolor", no_color=False, theme=PAGE), True
    sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal's encoding lacks a sign
    if color == "always":
        return Console(force_terminal=True, color_system="256", no_color=False, theme=TERMINAL), True
    console = Console(theme=TERMINAL)
    # Of 16 colours, no two greens can be told apart.
    coloured = color == "auto" and console.is_terminal and console.color_system in ("256", "truecolor") and not console.no_color
    return (console, True) if coloured else (Console(color_system=None, theme=TERMINAL), False)


def main() -> None:
    arguments = _arguments()
    config = load_config(arguments.config, arguments.overrides)
    console, coloured = _console(arguments.color, arguments.html)
    writer = Writer(console, coloured, arguments.ids, arguments.max_tokens)
    _show(Inspector(config, writer), writer, arguments)
    if arguments.html:
        try:
            arguments.html.write_text(console.export_html(code_format=PAGE_HTML), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", f"--html {arguments.html}") from None
        print(f"page: {arguments.html}")


def _show(inspector: Inspector, writer: Writer, arguments: argparse.Namespace) -> None:
    if arguments.row is not None:
        rows = inspector.rows(arguments.row, arguments.samples or 1)
        writer.legend()
        for number, row in rows:
            inspector.show_row(number, row)
        return
    tasks, split = inspector.tasks(arguments.task, arguments.split), arguments.split
    if arguments.search is not None:
        samples = inspector.search(tasks, split, arguments.search, arguments.samples or SAMPLES)
    elif arguments.sample is not None:
        samples = inspector.samples(tasks, split, arguments.sample, arguments.samples or 1)
    else:
        samples = inspector.samples(tasks, split, 0, arguments.samples or SAMPLES)
    writer.legend()
    for task, sample in samples:
        inspector.show_sample(task, sample, split)


if __name__ == "__main__":
    run(main)
