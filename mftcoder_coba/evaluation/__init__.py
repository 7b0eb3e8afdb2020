"""The command `evaluate`: how well does a trained model do each task?

    experiment    what the user names -> the config, the tasks, the split; all that is known without the model
    wanted        what is to be measured beside the losses
    loading       the model as training had it in its validations
    losses        exact loss and perplexity of each task
    prompts       what the model is asked
    generation    answers in batches, written down as they come; `engines` makes them
    text_metrics  span F1, exact match, BLEU
    code          pass@k of programs, in a sandbox
    answers       the above, for tasks and for files of code problems
    showing       the tables, and the JSON file

A metric gives each task a dictionary of numbers. Those of one task are merged; each is a column of the table (`showing.COLUMNS`) and a key of
the JSON file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftcoder_coba.caches import cache_folder, keep_libraries_in
from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation.code.passing import check_allowed
from mftcoder_coba.evaluation.experiment import check_alone, chosen_split, chosen_tasks, experiment_of
from mftcoder_coba.evaluation.wanted import Wanted, chosen_metrics

if TYPE_CHECKING:
    from mftcoder_coba.config import Config
    from mftcoder_coba.evaluation.answers import CodeFile

__all__ = ["Wanted", "evaluate"]


def evaluate(
    source: Path,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    tasks: Sequence[str] = (),
    split: str | None = None,
    out: Path | None = None,
    base_model: str | None = None,
    batch_rows: int | None = None,
    wanted: Wanted | None = None,
) -> dict[str, Any]:
    """Evaluates a model on data of an experiment, prints a table, and writes the same to `out`.

    Args:
        source: a run folder; or the folder of an adapter or of a full model, together with `config`.
        config: the experiment whose data is used; None: that of the run.
        overrides: of the config, `a.b=value` each.
        tasks: names; none: all tasks of the experiment.
        split: "valid", "test" or "train"; None: test where each of the tasks has test files, else valid.
        out: a JSON file.
        base_model: the adapter's base model, where it is not the config's.
        batch_rows: rows of one forward pass; None: `training.micro_batch_rows`.
        wanted: metrics of generated answers, and files of code problems.

    Returns:
        {"source", "split", "tasks": {NAME: {"samples", "tokens", "loss", "perplexity"}}, "mean_loss"} as in the JSON file. With metrics, tasks
        also have "answers" and each metric; with code, there is "code": {FILE: {LANGUAGE: {"problems", "samples", "passed", "pass@K"}}}; with
        either, "decoding" says how answers were made.

    Raises:
        UserError: what is named does not exist, does not fit together, or cannot be read; or `out` cannot be written.
    """
    check_alone()
    experiment = experiment_of(source, config, overrides, base_model)
    names = chosen_tasks(experiment, tasks)
    split = chosen_split(experiment, names, split)
    wanted = dataclasses.replace(wanted or Wanted(), out=out)
    wanted.check_code(experiment.data.task_names)
    metrics = chosen_metrics(experiment, names, wanted.metrics)
    answering = bool(metrics or wanted.code_tasks) and wanted.generations  # a folder for them has to be known
    if wanted.code_tasks:
        check_allowed(wanted.allow_code_execution, wanted.namespaces)
    # Before what reads it is imported.
    keep_libraries_in(cache_folder(experiment.data.cache_dir))
    from mftcoder_coba.evaluation.loading import find_model, load, load_data
    from mftcoder_coba.evaluation.losses import mean_loss, task_losses
    from mftcoder_coba.evaluation.showing import json_file, print_results

    files, notes = _code_files(wanted, experiment)
    found = find_model(source, experiment, names, base_model is not None)
    if files and found.has_experts and not wanted.code_as:
        raise UserError("the adapter has experts for each task, and nothing says whose write code", "--code-tasks", "name a task with --code-as")
    with json_file(out) as write:
        data = load_data(found, names, split)
        model = load(found, [*names, *([wanted.code_as] if wanted.code_as and wanted.code_as not in names else [])])
        measured = task_losses(model, data, found.config, batch_rows or found.config.training.micro_batch_rows)
        results = {"source": str(source), "split": split, "tasks": measured, "mean_loss": mean_loss(measured)}
        if answering:
            from mftcoder_coba.evaluation.answers import Answering

            answers = Answering(model, found, wanted)
            for task, numbers in answers.tasks(metrics, split).items():
                measured[task] |= numbers
            results |= {"code": answers.code(files)} if files else {}
            results["decoding"] = dataclasses.asdict(wanted.decoding) | {"engine": answers.engine}
            notes += answers.notes
        try:
            write(results)
        finally:
            print_results(results, found.description, [*data.notes, *notes])
    return results


def _code_files(wanted: Wanted, experiment: Config) -> tuple[list[CodeFile], list[str]]:
    """The files of code problems, and lines about languages that are left out. Raises UserError where a file or a language is missing."""
    from mftcoder_coba.evaluation.answers import CodeFile
    from mftcoder_coba.evaluation.code import libraries_folder
    from mftcoder_coba.evaluation.code.passing import installed
    from mftcoder_coba.evaluation.code.problems import read_problems

    files, notes = [], []
    for path in wanted.code_tasks:
        problems, lines = installed(read_problems(path, wanted.code_format), libraries_folder(experiment.data.cache_dir))
        files.append(CodeFile(path.name.split(".")[0], problems[: wanted.limit]))
        notes += lines
    return files, notes
