"""The command `evaluate`: how well does a trained model do each task?

    experiment   what the user names -> the config, the tasks, the split; all that is known without the model
    loading      the model as training had it in its validations
    losses       exact loss and perplexity of each task
    showing      the table, and the JSON file

A metric is a function of the model and a split of the data that gives each task a dictionary of numbers. Those of one task are merged; each
is a column of the table (`showing.COLUMNS`) and a key of the JSON file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mftcoder_coba.caches import cache_folder, keep_libraries_in
from mftcoder_coba.evaluation.experiment import check_alone, chosen_split, chosen_tasks, experiment_of

__all__ = ["evaluate"]


def evaluate(
    source: Path,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    tasks: Sequence[str] = (),
    split: str | None = None,
    out: Path | None = None,
    base_model: str | None = None,
    batch_rows: int | None = None,
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

    Returns:
        {"source", "split", "tasks": {NAME: {"samples", "tokens", "loss", "perplexity"}}, "mean_loss"} as in the JSON file.

    Raises:
        UserError: what is named does not exist, does not fit together, or cannot be read; or `out` cannot be written.
    """
    check_alone()
    experiment = experiment_of(source, config, overrides, base_model)
    names = chosen_tasks(experiment, tasks)
    split = chosen_split(experiment, names, split)
    # Before what reads it is imported.
    keep_libraries_in(cache_folder(experiment.data.cache_dir))
    from mftcoder_coba.evaluation.loading import find_model, load, load_data
    from mftcoder_coba.evaluation.losses import mean_loss, task_losses
    from mftcoder_coba.evaluation.showing import json_file, print_results

    found = find_model(source, experiment, names, base_model is not None)
    with json_file(out) as write:
        data = load_data(found, names, split)
        model = load(found, names)
        measured = task_losses(model, data, found.config, batch_rows or found.config.training.micro_batch_rows)
        results = {"source": str(source), "split": split, "tasks": measured, "mean_loss": mean_loss(measured)}
        try:
            write(results)
        finally:
            print_results(results, found.description, data.notes)
    return results
