"""Models -> results on the disk: validation losses of a merged model, losses of training samples of any. What is there is not done again.

OUT/results/NAME.json           validation losses of a merged model
OUT/results/NAME-samples.json   mean token loss of training samples, of a merge or a run
OUT/merged/NAME/                the merged model, while it is measured, or for good
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mftcoder_coba.comparing import PlannedRun
from mftcoder_coba.config import Config
from mftcoder_coba.data import Row
from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation.loading import EvaluationData, FoundModel, find_model, load, load_data
from mftcoder_coba.evaluation.losses import mean_loss, task_losses
from mftcoder_coba.evaluation.sample_losses import choose_samples, sample_losses
from mftcoder_coba.evaluation.showing import json_file
from mftcoder_coba.merging import merge
from mftcoder_coba.orders.merges import Merge


@dataclass(frozen=True)
class Bench:
    """What models are measured on.

    Attributes:
        out: the folder of the command.
        config: the experiment.
        samples: (task, sample) of the training data; empty: none are measured.
    """

    out: Path
    config: Config
    valid: EvaluationData
    train: EvaluationData
    samples: Row

    @classmethod
    def of(cls, out: Path, config: Config, tasks: Sequence[str], positions: int) -> Bench:
        """positions: how many training samples are measured, at most. Raises UserError where the data cannot be read."""
        base = FoundModel(config, Path(config.model.path), None)
        valid, train = (load_data(base, tasks, split) for split in ("valid", "train"))
        return cls(out, config, valid, train, choose_samples(train.splits, positions, config.run.seed))

    def merged(self, what: Merge) -> Path:
        return self.out / "merged" / what.name

    def result(self, name: str) -> Path:
        return self.out / "results" / f"{name}.json"


def measure_run(bench: Bench, run: PlannedRun, say: Callable[[str], None]) -> None:
    """The losses of the training samples of a run's model. Its validation losses are in its records.

    Raises:
        UserError: the model cannot be loaded, or the result not be written.
    """
    origin = {"models": best_of([run])}
    if bench.samples and _kept(bench.result(f"{run.name}-samples"), origin, bench.samples) is None:
        say(f"{run.name}: losses of {len(bench.samples):,} training samples")
        _write_samples(bench, run.name, origin, _model(bench, run.folder))


def measure_merge(bench: Bench, what: Merge, runs: Sequence[PlannedRun], keep_model: bool) -> str:
    """Merges the runs' models and measures the merged one; then it goes, unless it is to be kept. Returns what was done.

    Raises:
        UserError: the models cannot be merged, or the merged one not be loaded, or something not be written.
    """
    origin, folder = origin_of(what, runs), bench.merged(what)
    measured = _kept(bench.result(what.name), origin) is not None
    samples = bool(bench.samples) and what.first
    complete = not samples or _kept(bench.result(f"{what.name}-samples"), origin, bench.samples) is not None
    if measured and complete and (folder.is_dir() or not keep_model):
        return "measured before"
    shutil.rmtree(folder, ignore_errors=True)  # a call that was killed may have left it
    merge(bench.config.model.path, [run.folder for run in runs], what.method, folder, **what.options)
    if not measured or not complete:
        model = _model(bench, folder)
        if not measured:
            losses = task_losses(model, bench.valid, bench.config, bench.config.training.micro_batch_rows)
            with json_file(bench.result(what.name)) as write:
                write({"origin": origin, "split": "valid", "tasks": losses, "mean_loss": mean_loss(losses)})
        if not complete:
            _write_samples(bench, what.name, origin, model)
    if not keep_model:
        shutil.rmtree(folder)
    return "merged and measured"


def clear_left_overs(out: Path) -> None:
    """Removes what a merge that was killed left half-written. Nobody else may be working in the folder."""
    for left in (out / "merged").glob(".*"):
        shutil.rmtree(left)


def validation_losses(bench: Bench, what: Merge, runs: Sequence[PlannedRun]) -> dict[str, dict[str, float]]:
    """{"loss", "perplexity"} of each task, of a merge that was measured. NaN where the model's loss is not finite."""
    tasks = _kept(bench.result(what.name), origin_of(what, runs))["tasks"]
    return {task: {metric: _number(values[metric]) for metric in ("loss", "perplexity")} for task, values in tasks.items()}


def measured_samples(bench: Bench, name: str, origin: dict[str, Any]) -> NDArray[np.float64]:
    """[samples] of a model that was measured."""
    return np.array([_number(loss) for loss in _kept(bench.result(f"{name}-samples"), origin, bench.samples)["losses"]])


def best_of(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """By the run's name: which of its checkpoints is the model, and its values, which no other training would have to the last digit.

    Raises:
        UserError: a run's model is not there.
    """
    for run in runs:
        if not (run.folder / "export").is_dir():
            what = f"the run {run.name} is finished, and its model is not there any more"
            raise UserError(what, str(run.folder / "export"), "remove the run's folder: the same command trains it again")
    return {run.name: json.loads((run.folder / "best.json").read_text(encoding="utf-8")) for run in runs}


def origin_of(what: Merge, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """All that a merge depends on."""
    return {"method": what.method, "options": what.options, "models": best_of(runs)}


def _model(bench: Bench, folder: Path) -> nn.Module:
    return load(find_model(folder, bench.config, bench.valid.tasks, False), bench.valid.tasks)


def _write_samples(bench: Bench, name: str, origin: dict[str, Any], model: nn.Module) -> None:
    losses = sample_losses(model, bench.train, bench.samples, bench.config, bench.config.training.micro_batch_rows).tolist()
    with json_file(bench.result(f"{name}-samples")) as write:
        known = [loss if math.isfinite(loss) else None for loss in losses]
        write({"origin": origin, "tasks": bench.train.tasks, "samples": bench.samples, "losses": known})


def _kept(file: Path, origin: dict[str, Any], samples: Row | None = None) -> dict[str, Any] | None:
    """An earlier result of the same origin, and for the same samples.

    Raises:
        UserError: it cannot be read.
    """
    if not file.is_file():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        same = tree["origin"] == origin and (samples is None or [tuple(sample) for sample in tree["samples"]] == samples)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"is no result of this command: {error}", str(file), "remove it: the same command measures it again") from None
    return tree if same else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
