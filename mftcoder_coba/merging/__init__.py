"""Models fine-tuned from one base merged into one: parameter selection (arXiv 2410.03743) and its baselines.

methods           the rules by name, and their options
rules, library    one tensor of several models -> one tensor; pure
folders           Hugging Face folders, a tensor at a time
checking          what does not fit, told before anything is written
full_models       full models, streaming         adapters, lora_updates, svd    LoRA adapters, in what they add to the weights
writing           an output folder, whole or not there       provenance        what lies beside the weights

Selection keeps the length of the update: with K updates of equal length and pairwise cosine rho, every selected scalar has the mean square
of the updates' scalars, while the average of the updates is sqrt(rho + (1 - rho) / K) times as long as each. `norm_rescaled_average`
has the direction of the average and the length of selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mftcoder_coba.caches import cache_folder, keep_libraries_in
from mftcoder_coba.errors import UserError
from mftcoder_coba.merging.methods import METHODS, build_rule

__all__ = ["METHODS", "build_rule", "merge"]

MAX_SHARD_BYTES = 5_000_000_000


def merge(
    base: str,
    models: Sequence[Path],
    method: str,
    out: Path,
    dtype: str | None = None,
    rank: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **options: Any,
) -> list[str]:
    """Writes the merged model to `out`.

    Args:
        base: what all were trained from: a Hugging Face folder, or the id of a model on the hub.
        models: folders of fine-tuned full models, or of LoRA adapters, or of runs that exported such.
        method: a name of `METHODS`.
        dtype: of the merged full model; None: the models' own.
        rank: adapters become a LoRA adapter of this rank; None: a full model.
        max_shard_bytes: of a full model's weights in one file.
        options: of the method, by name; None: its default.

    Returns:
        What was written, for people.

    Raises:
        UserError: the inputs do not fit each other or the options, or are damaged, or `out` is not empty or cannot be written; nothing is
            left there then.
    """
    if not models:
        raise UserError("there is no model to merge", "--models", "name the fine-tuned models, or their runs")
    keep_libraries_in(cache_folder(None))  # before what reads it is imported
    from mftcoder_coba.merging.adapters import merge_adapters
    from mftcoder_coba.merging.full_models import merge_full_models
    from mftcoder_coba.models.cgc_lora.model import CONFIG_FILE
    from mftcoder_coba.models.exported import exported_folder

    rule, complete = build_rule(method, len(models), options)
    folders = [exported_folder(Path(model)) for model in models]
    adapters = [(folder / CONFIG_FILE).is_file() for folder in folders]
    if all(adapters):
        _refuse(dtype, "--dtype", "adapters are merged in float32, and into the dtype of the base model")
        return merge_adapters(base, folders, rule, method, complete, Path(out), rank, max_shard_bytes)
    if any(adapters):
        adapter, model = folders[adapters.index(True)], folders[adapters.index(False)]
        raise UserError(f"is a LoRA adapter, and {model} a full model", str(adapter), "merge models of one kind; `export --merged` makes full ones")
    _refuse(rank, "--rank", "it is of a LoRA adapter, and these are full models")
    return merge_full_models(base, folders, rule, method, complete, Path(out), dtype, max_shard_bytes)


def _refuse(value: Any, option: str, why: str) -> None:
    if value is not None:
        raise UserError(why, option, "leave it out")
