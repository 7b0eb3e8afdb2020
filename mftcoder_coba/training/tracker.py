"""What a run writes down. On ranks other than 0 nothing is written."""

from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np

from mftcoder_coba.errors import UserError
from mftcoder_coba.planning import accounting, step_lines
from mftcoder_coba.reporting import MetricsWriter, Progress
from mftcoder_coba.reporting.data_tables import print_data
from mftcoder_coba.training.assembly import Run
from mftcoder_coba.training.resuming import Resumed
from mftcoder_coba.training.run_folder import RunFolder
from mftcoder_coba.training.step import StepOutcome
from mftcoder_coba.training.versions import versions


class Tracker:
    """Turns outcomes into the records of the run folder."""

    def __init__(self, run: Run, folder: RunFolder, command: list[str], resumed: Resumed | None):
        self.tasks, self.run = run.corpus.tasks, run
        self.seen_absent: set[str] = set()
        self.seen_not_finite: set[str] = set()
        self.writer: MetricsWriter | None = None
        if not run.processes.is_main:
            return
        tracking = run.config.tracking
        data = accounting(run.config, run.corpus, run.schedule)
        try:
            folder.write_json("config.json", run.config.model_dump())
            folder.write_json("environment.json", environment(run, command))
            folder.write_json("accounting.json", data)
        except OSError as error:
            raise UserError(
                f"the run folder cannot be written: {error.strerror}", str(folder.path), "make room there, or choose another run.dir"
            ) from None
        print_data(data)
        print("\n".join(overview(run, folder)), flush=True)
        progress = Progress(run.plan.total_steps, list(self.tasks), tracking.log_every_steps)
        self.writer = MetricsWriter(
            folder.path,
            tracking.tensorboard,
            tracking.wandb,
            resumed and resumed.step,
            pending=bool(resumed and resumed.state["pending"]),
            also=[progress],
        )

    def train(self, step: int, outcome: StepOutcome, learning_rate: float, seconds: float) -> None:
        rows = step * self.run.plan.global_batch_rows
        self._write(
            "train",
            step,
            epoch=self.run.schedule.epoch_of(rows if self.run.plan.end_row is None else min(rows, self.run.plan.end_row)),
            loss=_plain(np.float64(outcome.loss)),
            learning_rate=learning_rate,
            grad_norm=_plain(np.float64(outcome.grad_norm)),
            tokens=outcome.total_tokens,
            tokens_per_second=outcome.total_tokens / seconds,
            seconds=seconds,
            tasks=self._by_task(loss=outcome.losses, tokens=outcome.tokens, weight=outcome.weights),
            **({} if outcome.router_loss is None else {"router_loss": _plain(np.float64(outcome.router_loss))}),
        )
        if outcome.skipped:
            self.event(step, "skipped_step", "loss or gradient were not finite; the model is unchanged")
        for name, tokens in zip(self.tasks, outcome.tokens, strict=True):
            if tokens == 0 and name not in self.seen_absent:
                self.seen_absent.add(name)
                self.event(
                    step,
                    "absent_task",
                    f"{name} has no supervised token in this step's global batch; it contributes 0. Told once; the report counts all",
                    task=name,
                )

    def balancer(self, step: int, seconds: float, losses: np.ndarray | None, slots: np.ndarray | None) -> None:
        """`losses` and `slots` [K] of the validation mini-batch, if the balancer looked at one: whatever it records, a replay needs them."""
        record = self.run.balancer.record()
        if losses is not None:
            for name, measured in self._by_task(valid_loss=losses, slot=slots).items():
                record["tasks"][name] = measured | record["tasks"][name]
        self._write("balancer", step, seconds=seconds, **record)

    def validation(self, step: int, losses: np.ndarray, initial: np.ndarray, tokens: np.ndarray) -> None:
        """A loss that is not finite is null, and so are the means with it; a task without validation data is not in them."""
        measured = tokens > 0
        losses = np.where(np.isfinite(losses), losses, np.nan)
        ratios = losses / initial
        self._write(
            "validation",
            step,
            mean_ratio=_plain(ratios[measured].mean()),
            loss=_plain(losses[measured].mean()),
            tasks=self._by_task(loss=losses, ratio=ratios, perplexity=np.exp(np.minimum(losses, 700.0)), tokens=tokens),
        )
        for name, loss, known in zip(self.tasks, losses, measured, strict=True):
            if known and np.isnan(loss) and name not in self.seen_not_finite:
                self.seen_not_finite.add(name)
                why = f"the validation loss of {name} is not finite: no best step until it is finite again. Told once; the records show all"
                self.event(step, "validation_not_finite", why, task=name)

    def gates(self, step: int, layers: list[str], experts: dict[str, list[str]], gates: dict[str, np.ndarray]) -> None:
        """gates: [layers, experts] of each task."""
        tasks = {task: {"experts": experts[task], "values": values.astype(np.float64).round(5).tolist()} for task, values in gates.items()}
        self._write("gates", step, layers=layers, tasks=tasks)

    def event(self, step: int, name: str, why: str, **more: Any) -> None:
        self._write("event", step, name=name, why=why, **more)

    def flush(self) -> None:
        """Records are on the disk then."""
        if self.writer:
            self.writer.flush()

    def state_dict(self) -> dict[str, Any]:
        return {"seen_absent": sorted(self.seen_absent), "seen_not_finite": sorted(self.seen_not_finite)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen_absent, self.seen_not_finite = set(state["seen_absent"]), set(state["seen_not_finite"])

    def close(self) -> None:
        if self.writer:
            self.writer.close()
            self.writer = None

    def _write(self, kind: str, step: int, **values: Any) -> None:
        if self.writer:
            self.writer.write({"kind": kind, "step": step, **values})

    def _by_task(self, **columns: np.ndarray) -> dict[str, dict[str, Any]]:
        return {name: {key: _plain(column[index]) for key, column in columns.items()} for index, name in enumerate(self.tasks)}


def overview(run: Run, folder: RunFolder) -> list[str]:
    """The numbers that follow from config and data, each with its calculation, a line each."""
    config, plan, processes = run.config, run.plan, run.processes
    total, trained = run.parameters["total"], run.parameters["trainable"]
    kind = f"{config.adapter.kind}, rank {config.adapter.rank}" if config.adapter else "all"
    lines = [
        f"run         {folder.path}",
        f"model       {total:,} parameters, {trained:,} trained ({kind}); {config.model.dtype}, attention {config.model.attention}",
        f"processes   {processes.world_size} on {processes.device.type}, ZeRO-{config.zero_stage}",
    ]
    lines += step_lines(config, plan, run.stream, run.stream_rows)
    return lines


def environment(run: Run, command: list[str]) -> dict[str, Any]:
    """Versions, processes and the numbers that follow from config and data."""
    plan = run.plan
    return {
        "command": command,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "world_size": run.processes.world_size,
        "device": str(run.processes.device.type),
        "parameters": run.parameters,
        "plan": {
            "accumulation_steps": plan.accumulation_steps,
            "rows_per_epoch": plan.rows_per_epoch,
            "total_steps": plan.total_steps,
            "warmup_steps": plan.warmup_steps,
            "validation_mini_batches": run.stream.coverage if run.stream else None,
        },
        "versions": versions(),
    }


def _plain(value: Any) -> Any:
    number = value.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number
