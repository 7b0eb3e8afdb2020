"""What is to be measured beside the losses. Importing it never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from mftcoder_coba.config import Config
from mftcoder_coba.config.schema import MetricName
from mftcoder_coba.errors import UserError, suggestion
from mftcoder_coba.evaluation.generation import Decoding


@dataclass(frozen=True)
class Wanted:
    """Attributes:
    metrics: NAME for all tasks, or TASK=NAME; none: those that the experiment's tasks name.
    limit: samples of a task that are answered; None: all.
    code_tasks: files of problems, of `code_format`.
    code_prompt: raw: the model continues the problem's text; chat: it is a user's turn.
    code_as: the task whose experts write code, for an adapter that has some.
    ks: of pass@k.
    allow_code_execution: programs that the model has written may run.
    namespaces: they run in a sandbox; else under limits alone.
    folder: for generations; None: beside `out`.
    """

    metrics: Sequence[str] = ()
    limit: int | None = None
    code_tasks: Sequence[Path] = ()
    code_format: Literal["humaneval", "humaneval_x"] = "humaneval"
    code_prompt: Literal["raw", "chat"] = "raw"
    code_as: str = ""
    ks: Sequence[int] = (1,)
    allow_code_execution: bool = False
    namespaces: bool = True
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    decoding: Decoding = field(default_factory=Decoding)
    folder: Path | None = None
    out: Path | None = None

    @property
    def generations(self) -> Path:
        """Raises UserError where there is no place for them."""
        if self.folder is None and self.out is None:
            raise UserError("generations need a folder", "--generations", "name one, or a file for the results with --out")
        return self.folder or self.out.parent / "generations"

    def check_code(self, tasks: Sequence[str]) -> None:
        """Raises UserError for what does not fit together. tasks: those of the experiment."""
        names = [path.name.split(".")[0] for path in self.code_tasks]
        if len(set(names)) < len(names):
            raise UserError("two files have the same name", "--code-tasks", "rename one of them")
        if self.code_as and self.code_as not in tasks:
            raise UserError(f"the experiment has no task {self.code_as}; {suggestion(self.code_as, tasks)}", f"--code-as {self.code_as}")
        if self.code_tasks and max(self.ks) > self.decoding.samples:
            what = f"pass@{max(self.ks)} needs as many answers to each problem, and --samples is {self.decoding.samples}"
            raise UserError(what, f"--pass-at {max(self.ks)}", f"give --samples {max(self.ks)} or more, with --temperature")


def chosen_metrics(config: Config, tasks: Sequence[str], wanted: Sequence[str]) -> dict[str, list[str]]:
    """Task -> metrics, for those tasks that have some.

    Raises:
        UserError: an unknown metric, or a task that is not evaluated.
    """
    if not wanted:
        return {section.name: list(section.metrics) for section in config.data.tasks if section.name in tasks and section.metrics}
    chosen: dict[str, list[str]] = {}
    known = get_args(MetricName)
    for given in wanted:
        task, _, metric = given.rpartition("=")
        if metric not in known:
            raise UserError(f"no such metric: {metric}; {suggestion(metric, known)}", f"--metric {given}")
        if task and task not in tasks:
            raise UserError(f"no such task is evaluated: {task}; {suggestion(task, tasks)}", f"--metric {given}")
        for name in [task] if task else tasks:
            if metric not in chosen.setdefault(name, []):
                chosen[name].append(metric)
    return chosen
