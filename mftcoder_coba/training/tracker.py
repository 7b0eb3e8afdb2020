"""What a run writes down. On ranks other than 0 nothing is written."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
from typing import Any

import numpy as np

from mftcoder_coba.planning import accounting, step_lines
from mftcoder_coba.reporting import MetricsWriter, Progress
from mftcoder_coba.reporting.data_tables import print_data
from mftcoder_coba.training.assembly import Run
from mftcoder_coba.training.run_folder import RunFolder
from mftcoder_coba.training.step import StepOutcome

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "pyarrow", "sentencepiece", "numpy", "flash-attn", "bitsandbytes")


class Tracker:
    """Turns outcomes into the records of the run folder."""

    def __init__(self, run: Run, folder: RunFolder, command: list[str], resume_step: int | None):
        self.tasks, self.run = run.corpus.tasks, run
        self.seen_absent: set[str] = set()
        self.writer: MetricsWriter | None = None
        if not run.processes.is_main:
            return
        tracking = run.config.tracking
        folder.write_json("config.json", run.config.model_dump())
        folder.write_json("environment.json", environment(run, command))
        data = accounting(run.config, run.corpus, run.schedule)
        folder.write_json("accounting.json", data)
        print_data(data)
        print("\n".join(overview(run, folder)), flush=True)
        progress = Progress(run.plan.total_steps, list(self.tasks), tracking.log_every_steps)
        self.writer = MetricsWriter(folder.path, tracking.tensorboard, tracking.wandb, resume_step, also=[progress])

    def train(self, step: int, outcome: StepOutcome, learning_rate: float, seconds: float) -> None:
        rows = step * self.run.plan.global_batch_rows
        self._write(
            "train",
            step,
            epoch=self.run.schedule.epoch_of(rows if self.run.plan.end_row is None else min(rows, self.run.plan.end_row)),
            loss=outcome.loss,
            learning_rate=learning_rate,
            grad_norm=outcome.grad_norm,
            tokens=outcome.total_tokens,
            tokens_per_second=outcome.total_tokens / seconds,
            seconds=seconds,
            tasks=self._by_task(loss=outcome.losses, tokens=outcome.tokens, weight=outcome.weights),
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
        ratios = losses / initial
        measured = ~np.isnan(losses)
        self._write(
            "validation",
            step,
            mean_ratio=float(ratios[measured].mean()),
            loss=float(losses[measured].mean()),
            tasks=self._by_task(loss=losses, ratio=ratios, perplexity=np.exp(np.minimum(losses, 700.0)), tokens=tokens),
        )

    def event(self, step: int, name: str, why: str, **more: Any) -> None:
        self._write("event", step, name=name, why=why, **more)

    def close(self) -> None:
        if self.writer:
            self.writer.close()

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
    versions = {"python": platform.python_version(), "mftcoder_coba": _version("mftcoder-coba")} | {name: _version(name) for name in PACKAGES}
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
        "versions": {name: version for name, version in versions.items() if version},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    number = value.item()
    return None if isinstance(number, float) and math.isnan(number) else number
