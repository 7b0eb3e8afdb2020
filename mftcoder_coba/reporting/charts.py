"""The charts of TensorBoard and Weights & Biases have the same names in every run, so that runs lie over one another:

    train/NAME         of the whole step: loss, learning_rate, grad_norm, tokens, tokens_per_second, seconds, epoch
    train_NAME/TASK    loss, tokens
    weight/TASK        the task's weight, as used in the step
    valid/NAME         of a full validation: loss, mean_ratio
    valid_NAME/TASK    loss, ratio, perplexity
    balancer/NAME      of an observation: seconds, and what the method shows of the run (CoBa: df, alpha_max)
    balancer_NAME/TASK valid_loss, and what the method shows of a task under its own name (CoBa: ratio, slope, rcs, acs; FAMO: logit, loss; ...)
    event/NAME         texts: why the event came

A group holds one chart for each task, so all weights stand beside one another. The step axis is the optimizer step. What is
null, NaN or infinite has no point. Records of gates have no charts: the report shows them.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting.appending import AppendedFile

# Before "/" stands the group in which TensorBoard shows a chart.
GROUPS = {"train": "train", "balancer": "balancer", "validation": "valid"}
# The weight is charted once, as used in the step; a slot is a number without an order.
NOT_CHARTED = {("balancer", "weight"), ("balancer", "slot"), ("validation", "tokens")}

_file_numbers = itertools.count()  # of event files that this process made


class TensorBoardSink:
    """An event file of a run, written here: SummaryWriter writes in a thread of its own, where a full disk ends in a traceback."""

    def __init__(self, folder: Path, resume_step: int | None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}.{next(_file_numbers)}"
        self._file = AppendedFile(folder / name)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard then hides what earlier event files hold from this step on.
        purge_step = 0 if resume_step is None else resume_step + 1
        self._write(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, record: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard.summary import text

        if record["kind"] == "event":
            summary = text(f"event/{record['name']}", str(record.get("why", "")))
        else:
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars(record).items()])
        if summary.value:
            self._write(Event(wall_time=time.time(), step=record["step"], summary=summary))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        framed = io.BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        self._file.write(framed.getvalue())


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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
