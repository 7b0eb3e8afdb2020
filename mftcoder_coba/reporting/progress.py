"""The run as people watch it: a live display on a terminal, plain lines in a log file, and the final table."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mftcoder_coba.reporting.records import read_run
from mftcoder_coba.reporting.summary import best_step, task_summaries

PLAIN_WIDTH = 100  # columns of a table that goes to a file, at least
LINE_TASKS = 8  # a line of a log names no more; metrics.jsonl has all
NAME_LENGTH = 40  # a longer name loses its middle
HEAD_ROWS = 6  # of the live display, beside its rows of tasks


class Progress:
    """A sink of records that shows them; to be used on rank 0 only.

    Of more than 8 tasks, or of more than the terminal has rows for, those with the largest and the smallest weights are shown; a
    validation's line shows those with the highest and the lowest ratios. What is not known yet, or not defined, is "-".

    Args:
        total_steps: optimizer steps of the whole run.
        tasks: names, in the order shown.
        log_every_steps: steps between two plain lines; validations have lines of their own, and so
            have events, of one name no more often than this.
        terminal: live display, or plain lines; None: whether `file` is a terminal.
        file: where to; None: standard output.
        clock: seconds, for the time left.
    """

    def __init__(
        self,
        total_steps: int,
        tasks: list[str],
        log_every_steps: int = 10,
        terminal: bool | None = None,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps, self.tasks, self.log_every_steps = total_steps, tasks, log_every_steps
        self._file, self._clock = file or sys.stdout, clock
        self._train: dict[str, Any] = {"step": 0, "tasks": {}}
        self._ratios: dict[str, float] = {}
        # Small tasks are not in every step, and one step's loss is noisy: shown is the mean over the newest steps that have it.
        self._losses = {task: deque[float](maxlen=max(1, log_every_steps)) for task in tasks}
        self._event_steps: dict[str, int] = {}  # name -> step of the newest event shown
        self._seen: deque[tuple[int, float]] = deque(maxlen=50)  # (step, time) of the newest steps: they tell the pace
        terminal = _is_terminal(self._file) if terminal is None else terminal
        self._console = Console(file=self._file, force_terminal=terminal)
        # The display is redrawn by its own clock, whole and in place: a step that takes 1 ms does not make it flicker.
        self._live = Live(get_renderable=self._display, console=self._console, refresh_per_second=4) if terminal else None
        if self._live:
            self._live.start()

    def write(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "train":
            self._train = record
            for task, losses in self._losses.items():
                loss = record["tasks"].get(task, {}).get("loss")
                if _known(loss):
                    losses.append(loss)
            self._seen.append((record["step"], self._clock()))
            if not self._live and (record["step"] % self.log_every_steps == 0 or record["step"] in (1, self.total_steps)):
                self._print(self._line())
        elif kind == "validation":
            self._ratios = {task: values["ratio"] for task, values in record["tasks"].items() if _known(values.get("ratio"))}
            self._print(self._validation_line(record))
        elif kind == "event" and self._is_news(record):
            self._print(f"step {record['step']}/{self.total_steps} | {record['name']}" + (f": {record['why']}" if record.get("why") else ""))

    def _is_news(self, event: dict[str, Any]) -> bool:
        """Whether to show an event: one that comes at every step, such as an absent task, must not flood a log."""
        last = self._event_steps.get(event["name"])
        news = last is None or event["step"] == last or event["step"] - last >= self.log_every_steps
        if news:
            self._event_steps[event["name"]] = event["step"]
        return news

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, line: str) -> None:
        """A line that stays: above the live display, or in the log. Never wrapped in a log."""
        if self._live:
            self._console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._file, flush=True)

    def _line(self) -> str:
        tasks, weights = [], self._weights()
        for task in self._extremes(weights, LINE_TASKS):
            ratio = f" ratio {self._ratios[task]:.2f}" if task in self._ratios else ""
            tasks.append(f"{_name(task)} {_number(self._loss(task), '.2f')} x{_number(weights[task], '.2f')}{ratio}")
        left = self._seconds_left()
        time_left = [f"{_clock_time(left)} left"] if left else []
        return " | ".join([f"step {self._train['step']}/{self.total_steps}", *self._speed(), *time_left, *tasks, *self._hidden(LINE_TASKS)])

    def _weights(self) -> dict[str, float | None]:
        return {task: self._train["tasks"].get(task, {}).get("weight") for task in self.tasks}

    def _extremes(self, values: Mapping[str, float | None], count: int) -> list[str]:
        """The tasks to show where there is room for `count`: those with the largest and the smallest values, in their order."""
        if len(self.tasks) <= count:
            return self.tasks
        known = sorted((task for task in self.tasks if _known(values.get(task))), key=lambda task: -values[task])
        others = [task for task in self.tasks if task not in known]
        ranked = known[: (count + 1) // 2] + others + known[(count + 1) // 2 :]
        chosen = set(ranked[: (count + 1) // 2] + ranked[len(ranked) - count // 2 :])
        return [task for task in self.tasks if task in chosen]

    def _hidden(self, count: int) -> list[str]:
        return [f"{len(self.tasks) - count} more in between"] if len(self.tasks) > count else []

    def _loss(self, task: str) -> float | None:
        losses = self._losses[task]
        return sum(losses) / len(losses) if losses else None

    def _validation_line(self, record: dict[str, Any]) -> str:
        head = f"step {record['step']}/{self.total_steps} | validation: mean ratio {_number(record.get('mean_ratio'), '.3f')}"
        found = record["tasks"]
        shown = self._extremes({task: values.get("ratio") for task, values in found.items()}, LINE_TASKS)
        tasks = [
            f"{_name(task)} {_number(found[task].get('loss'), '.3f')} ratio {_number(found[task].get('ratio'), '.3f')}"
            for task in shown
            if task in found
        ]
        return " | ".join([head, *tasks, *self._hidden(LINE_TASKS)])

    def _speed(self) -> list[str]:
        train = self._train
        return [
            f"loss {_number(train.get('loss'), '.3f')}",
            f"lr {_number(train.get('learning_rate'), '.3g')}",
            f"{_number(train.get('tokens_per_second'), ',.0f')} tok/s",
        ]

    def _seconds_left(self) -> float | None:
        if len(self._seen) < 2:
            return None
        (first_step, started), (step, now) = self._seen[0], self._seen[-1]
        return (self.total_steps - step) * (now - started) / max(step - first_step, 1)

    def _display(self) -> Group:
        step, left = self._train["step"], self._seconds_left()
        head = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None):
            head.add_column(ratio=ratio, no_wrap=True)
        head.add_row(f"step {step}/{self.total_steps}", ProgressBar(self.total_steps, step), f"{_clock_time(left)} left" if left is not None else "")
        table = _table("task", "loss", "weight", "ratio")
        weights = self._weights()
        room = max(self._console.height - HEAD_ROWS, 2)
        for task in self._extremes(weights, room):
            table.add_row(_name(task), _number(self._loss(task), ".3f"), _number(weights[task], ".3f"), _number(self._ratios.get(task), ".3f"))
        for text in self._hidden(room):
            table.add_row(Text(text, style="dim"))
        return Group(head, Text(" | ".join(self._speed()), overflow="ellipsis", no_wrap=True), table)


def print_final_table(run_dir: Path, outputs: Mapping[str, Path], file: TextIO | None = None) -> None:
    """The end of a run: per task the validation loss before and at the best step, their ratio and the final weight; then the paths.

    Args:
        run_dir: the run folder, from which all numbers are read.
        outputs: what was written where, such as {"adapter": ..., "report": ...}.
        file: where to; None: standard output.
    """
    run = read_run(run_dir)
    best = best_step(run)
    table = _table("task", "loss before", f"at step {best.step}" if best else "at best step", "ratio", "final weight")
    for task in task_summaries(run):
        numbers = (task.loss_before, task.loss_best, task.ratio, task.final_weight)
        table.add_row(task.name, *(_number(number, ".3f") for number in numbers))
    title = f"{run.name}: validation loss per task" + (f"; best step {best.step} by {best.rule}" if best else "")
    terminal = _is_terminal(file or sys.stdout)
    console = Console(file=file, force_terminal=terminal)
    if not terminal:  # a file has no width: a line is as long as it needs to be
        console = Console(file=file, force_terminal=False, width=max(PLAIN_WIDTH, Console(width=10_000).measure(table).maximum))
    console.print(f"\n{title}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    longest = max((len(name) for name in outputs), default=0)
    for name, path in outputs.items():
        console.print(f"{name:<{longest}}  {path}", markup=False, highlight=False, soft_wrap=True)


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold", min_width=4)
    for name in numbers:
        table.add_column(name, justify="right", min_width=5)
    return table


def _is_terminal(file: TextIO) -> bool:
    """Whether somebody watches. FORCE_COLOR and its like, which rich follows, would draw the display into a log file."""
    return file.isatty() and os.environ.get("TERM") != "dumb"


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None, form: str) -> str:
    return format(value, form) if _known(value) else "-"


def _name(task: str) -> str:
    return task if len(task) <= NAME_LENGTH else f"{task[: NAME_LENGTH // 2 - 2]}..{task[-NAME_LENGTH // 2 :]}"


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
