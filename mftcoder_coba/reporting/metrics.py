"""One `write` for every record of a run; sinks carry it to `metrics.jsonl`, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting.appending import AppendedFile, warn
from mftcoder_coba.reporting.charts import TensorBoardSink, WandbSink
from mftcoder_coba.reporting.records import METRICS_FILE, read_lines

KINDS = ("train", "balancer", "validation", "gates", "event")
OF_VALIDATION = ("validation", "gates")  # what a validation writes, in either order


class Sink(Protocol):
    """Where records go. `progress.Progress` is one as well."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes the records of a run. To be used on rank 0 only.

    Once it is there, a full disk ends nothing: records wait in memory until there is room. A sink for people who watch that cannot be
    written warns once, and misses records.

    Args:
        run_dir: the run folder; made if it is not there.
        tensorboard: also write event files to `tensorboard/`.
        wandb: also log to this Weights & Biases project.
        resume_step: the step after which the run goes on: records of later steps are cut, those of this step stay. None: the run
            starts anew, and the metrics of an earlier one in this folder are kept as `metrics.jsonl.old`.
        also: more sinks, such as the progress display.
        pending: the checkpoint of `resume_step` was saved before the validation of that step, which the run does again: its record and
            all after it are cut as well.

    Raises:
        UserError: the wandb package is asked for and missing, `metrics.jsonl` is broken before its last line, or the folder cannot be
            written.
    """

    def __init__(
        self, run_dir: Path, tensorboard: bool, wandb: str | None, resume_step: int | None, also: Iterable[Sink] = (), pending: bool = False
    ):
        self._warned: set[int] = set()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            # wandb first: where its package is missing, nothing was touched.
            optional: list[Sink] = [WandbSink(run_dir, wandb, fresh=resume_step is None)] if wandb else []
            self._lines = JsonLinesSink(run_dir / METRICS_FILE, resume_step, pending)
            if tensorboard:
                optional.append(TensorBoardSink(run_dir / "tensorboard", resume_step))
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", str(error.filename or run_dir)) from None
        self.sinks: list[Sink] = [self._lines, *optional, *also]

    def write(self, record: dict[str, Any]) -> None:
        """One record; `kind` and `step` are required, the rest is as in the run folder's contract."""
        if record["kind"] not in KINDS:
            raise ValueError(f"unknown kind of record: {record['kind']!r}")
        for number, sink in enumerate(self.sinks):
            with self._warning_once(number):
                sink.write(record)

    def flush(self) -> None:
        """Brings `metrics.jsonl` to the disk, as far as there is room: before a checkpoint is saved, so that what is before it is there
        whatever happens to the machine."""
        self._lines.flush()

    def close(self) -> None:
        for number, sink in enumerate(self.sinks):
            with self._warning_once(number):
                sink.close()

    @contextlib.contextmanager
    def _warning_once(self, number: int) -> Iterator[None]:
        """An output that cannot be written (a log on a full disk, a closed pipe) does not end the training."""
        try:
            yield
        except OSError as error:
            if number not in self._warned:
                warn(f"{type(self.sinks[number]).__name__}: {error}; the training goes on")
            self._warned.add(number)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLinesSink:
    """One JSON object a line."""

    def __init__(self, path: Path, resume_step: int | None, pending: bool = False):
        if path.exists():
            if resume_step is None:
                os.replace(path, path.with_name(path.name + ".old"))
            else:
                cut_after(path, resume_step, pending)
        self._file = AppendedFile(path)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def cut_after(path: Path, step: int, pending: bool = False) -> None:
    """Drops the records after those of `step`, and a torn last line; with `pending`, also what the first validation
    of `step` wrote, and all after it.

    The end of the file is cut off where it lies, which needs no room.

    Raises:
        UserError: a line other than the last is not a record.
        OSError: the file cannot be written.
    """
    whole = 0
    for line, record in read_lines(path):
        if record["step"] > step or (pending and record["step"] == step and record["kind"] in OF_VALIDATION):
            break
        whole += len(line) + 1
    with path.open("r+b") as file:
        if whole > file.seek(0, os.SEEK_END):  # the last line is whole but for its end
            file.write(b"\n")
        file.truncate(whole)
        os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON has no word for, as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
