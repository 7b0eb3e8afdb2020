"""One `write` for every record of a run; sinks carry it to `metrics.jsonl`, TensorBoard and Weights & Biases.

The charts of TensorBoard and Weights & Biases have the same names in every run, so that runs lie over one another:

    train/NAME         of the whole step: loss, learning_rate, grad_norm, tokens, tokens_per_second, seconds, epoch
    train_NAME/TASK    loss, tokens
    weight/TASK        the task's weight, as used in the step
    valid/NAME         of a full validation: loss, mean_ratio
    valid_NAME/TASK    loss, ratio, perplexity
    balancer/NAME      of an observation: seconds, and what the method shows of the run (CoBa: df, alpha_max)
    balancer_NAME/TASK valid_loss, and what the method shows of a task under its own name (CoBa: ratio, slope, rcs, acs; FAMO: logit, loss; ...)
    event/NAME         texts: why the event came

A group holds one chart for each task, so all weights stand beside one another. The step axis is the optimizer step. What is
null, NaN or infinite has no point.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting.records import METRICS_FILE, read_lines

KINDS = ("train", "balancer", "validation", "event")

# Before "/" stands the group in which TensorBoard shows a chart.
GROUPS = {"train": "train", "balancer": "balancer", "validation": "valid"}
# The weight is charted once, as used in the step; a slot is a number without an order.
NOT_CHARTED = {("balancer", "weight"), ("balancer", "slot"), ("validation", "tokens")}


class Sink(Protocol):
    """Where records go. `progress.Progress` is one as well."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes the records of a run. To be used on rank 0 only.

    Args:
        run_dir: the run folder; made if it is not there.
        tensorboard: also write event files to `tensorboard/`.
        wandb: also log to this Weights & Biases project.
        resume_step: the step after which the run goes on: records of later steps are cut, those of this step stay. None: the run
            starts anew, and the metrics of an earlier one in this folder are kept as `metrics.jsonl.old`.
        also: more sinks, such as the progress display.

    Raises:
        UserError: the wandb package is asked for and missing, or `metrics.jsonl` is broken before its last line.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, wandb: str | None, resume_step: int | None, also: Iterable[Sink] = ()):
        run_dir.mkdir(parents=True, exist_ok=True)
        # wandb first: it alone can fail for a reason that the user mends, and then nothing was touched.
        optional = [WandbSink(run_dir, wandb, fresh=resume_step is None)] if wandb else []
        self.sinks: list[Sink] = [JsonLinesSink(run_dir / METRICS_FILE, resume_step), *optional]
        if tensorboard:
            self.sinks.append(TensorBoardSink(run_dir / "tensorboard", resume_step))
        self.sinks.extend(also)

    def write(self, record: dict[str, Any]) -> None:
        """One record; `kind` and `step` are required, the rest is as in the run folder's contract."""
        if record["kind"] not in KINDS:
            raise ValueError(f"unknown kind of record: {record['kind']!r}")
        for sink in self.sinks:
            sink.write(record)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLinesSink:
    """One JSON object a line, flushed at once so that a killed run keeps what it wrote."""

    def __init__(self, path: Path, resume_step: int | None):
        if path.exists():
            if resume_step is None:
                os.replace(path, path.with_name(path.name + ".old"))
            else:
                cut_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    def __init__(self, folder: Path, resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard then hides what earlier event files hold from this step on.
        self._writer = SummaryWriter(str(folder), purge_step=0 if resume_step is None else resume_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        if record["kind"] == "event":
            self._writer.add_text(f"event/{record['name']}", str(record.get("why", "")), record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """The run's id is kept in the run folder, so that a resumed run goes on in the same charts."""

    def __init__(self, run_dir: Path, project: str, fresh: bool):
        try:
            import wandb
        except ModuleNotFoundError as error:
            if error.name != "wandb":
                raise
            raise UserError("the wandb package is not installed", "tracking.wandb", "pip install wandb, or set tracking.wandb to null") from None
        id_file = run_dir / "wandb_id.txt"
        if fresh or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), id=id_file.read_text(encoding="utf-8"), resume="allow")
        # wandb's own counter may not go back, but a resumed run does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: dict[str, Any]) -> None:
        values = scalars(record)
        if values:
            self._run.log({**values, "step": record["step"]})

    def close(self) -> None:
        self._run.finish()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a record under the names of its charts, as above."""
    kind = record["kind"]
    if kind not in GROUPS:
        return {}
    group = GROUPS[kind]
    found = {f"{group}/{name}": value for name, value in record.items() if name != "step"}
    for task, values in record.get("tasks", {}).items():
        for name, value in values.items():
            if (kind, name) not in NOT_CHARTED:
                found[f"weight/{task}" if name == "weight" else f"{group}_{name}/{task}"] = value
    return {name: float(value) for name, value in found.items() if _is_number(value) and math.isfinite(value)}


def cut_after(path: Path, step: int) -> None:
    """Drops records of steps above `step`, and a torn last line. The file is replaced at once: a crash leaves the old or the new."""
    kept = [line + b"\n" for line, record in read_lines(path) if record["step"] <= step]
    draft = path.with_name(path.name + ".tmp")
    with draft.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON has no word for, as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
