"""The model that is evaluated, as training had it in its validations: base model, adapter, dtype, tokenised data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from mftcoder_coba.config import Config
from mftcoder_coba.data import SplitAccounting, TaskData, load_tokenizer, prepare
from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation.experiment import way_out
from mftcoder_coba.models import CgcLoraModel, check_sizes, choose_attention, load_model
from mftcoder_coba.models.cgc_lora import read_adapter
from mftcoder_coba.models.cgc_lora.model import CONFIG_FILE, PEFT_TYPE
from mftcoder_coba.models.exported import adapter_config, check_plain_adapter, exported_folder, load_plain_adapter
from mftcoder_coba.models.quantisation import check_quantisation

OTHER_BASE = "--model names the base model that the adapter was trained on"


@dataclass(frozen=True)
class FoundModel:
    """Where the model is, before it is loaded.

    Attributes:
        config: the experiment; `model.path` is the base model's, or the full model's own.
        folder: of the adapter or the full model.
        kind: the adapter's type as PEFT names it; None: a full model.
        quantised: the base model is to be in 4 bits.
    """

    config: Config
    folder: Path
    kind: str | None
    quantised: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether it answers as one task or another."""
        return self.kind == PEFT_TYPE

    @property
    def description(self) -> str:
        """For people."""
        form = "4 bits" if self.quantised else self.config.model.dtype
        return f"{self.kind} adapter on {self.config.model.path} in {form}" if self.kind else f"full model {self.folder} in {form}"


@dataclass(frozen=True)
class EvaluationData:
    """A split of the tasks.

    Attributes:
        tasks: names; a task's number in a batch is its place here.
        splits: one for each task, none of them empty.
        first_tokens: ids of the beginning of a sample, at most 32.
        notes: what was left out of each split, for people.
    """

    tasks: list[str]
    splits: list[TaskData]
    pad_token_id: int
    first_tokens: list[int]
    notes: list[str]


def find_model(source: Path, config: Config, tasks: Sequence[str], base_is_named: bool) -> FoundModel:
    """Looks at what is in the folder, without loading a model.

    Args:
        base_is_named: `config.model.path` was named for this adapter, and does not come from the experiment.

    Raises:
        UserError: there is no model; it does not know a task; it is of another base model; it cannot be loaded here.
    """
    folder = exported_folder(source)
    if not (folder / CONFIG_FILE).is_file():
        if base_is_named:
            raise UserError("is a full model, which has no base model", str(folder), "leave out --model")
        section = config.model.model_copy(update={"path": str(folder.absolute())})
        return FoundModel(config.model_copy(update={"model": section}), folder, None)
    tree = adapter_config(folder)
    kind, base = tree.get("peft_type"), tree.get("base_model_name_or_path")
    if kind == PEFT_TYPE:
        known = read_adapter(folder)[0].tasks
        unknown = [task for task in tasks if task not in known]
        if unknown:
            what = f"the adapter knows no task {', '.join(unknown)}; it knows {', '.join(known)}"
            raise UserError(what, str(folder), "choose among these with --task")
    elif kind == "LORA":
        check_plain_adapter(folder)
    else:
        raise UserError(f"holds an adapter of the type {kind}; known are {PEFT_TYPE} and LORA", str(folder))
    if base and not base_is_named and os.path.realpath(base) != os.path.realpath(config.model.path):
        what = f"the adapter was trained on {base}, and the experiment's model is {config.model.path}"
        raise UserError(what, str(folder / CONFIG_FILE), "name the base model to use with --model")
    if os.path.isabs(config.model.path) and not os.path.isdir(config.model.path):
        raise UserError("no such folder", f"model.path = {config.model.path}", OTHER_BASE)
    quantised = bool(config.adapter and config.adapter.quantised)
    if quantised:
        check_quantisation(config.adapter, {})
    return FoundModel(config, folder, kind, quantised)


def load_data(found: FoundModel, tasks: Sequence[str], split: str) -> EvaluationData:
    """The split, tokenised for the model.

    Raises:
        UserError: it cannot be read, or nothing of a task can be used.
    """
    section = found.config.model
    with _base_may_be_elsewhere(found):
        chosen = found.config.data.model_copy(update={"tasks": [task for task in found.config.data.tasks if task.name in tasks]})
        corpus = prepare(chosen, section.path, section.trust_remote_code, splits=[split])
    parts = [corpus.accounting[task][split] for task in tasks]
    without = [part.task for part in parts if not part.used.samples]
    if without:
        summaries = "\n  ".join(part.summary() for part in parts if part.task in without)
        raise UserError(f"nothing can be evaluated for {', '.join(without)}\n  {summaries}", f"data.tasks[].{split}", way_out(split, tasks, without))
    return EvaluationData(
        tasks=list(corpus.tasks),
        splits=corpus.splits[split],
        pad_token_id=corpus.pad_token_id,
        first_tokens=corpus.splits[split][0].sample(0)[0][:32].tolist(),
        notes=[part.summary() for part in parts if _incomplete(part)],
    )


def _incomplete(part: SplitAccounting) -> bool:
    """Whether something of the split's own samples is not evaluated."""
    return bool(part.skipped or part.too_long.samples or part.truncated.samples or part.without_supervision.samples)


def load(found: FoundModel, tasks: Sequence[str]) -> nn.Module:
    """The model on its device, without dropout. tasks: the names that task numbers in a batch stand for.

    Raises:
        UserError: it cannot be loaded, or is not made for such data.
    """
    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    section = found.config.model.model_copy(update={"gradient_checkpointing": False})
    attention = choose_attention(section.attention, device, section.dtype)
    with _base_may_be_elsewhere(found):
        model = load_model(section, attention, device if found.quantised else None)
    if found.kind == PEFT_TYPE:
        model = CgcLoraModel.load(model, found.folder, tasks)
    elif found.kind:
        model = load_plain_adapter(model, found.folder, OTHER_BASE)
    for parameter in model.parameters():  # as DeepSpeed does in training; packed 4-bit weights are no numbers
        if not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(getattr(torch, section.dtype))
    check_sizes(model, load_tokenizer(section.path, section.trust_remote_code), found.config)
    return (model if found.quantised else model.to(device)).eval()  # a quantised one is there already


@contextlib.contextmanager
def _base_may_be_elsewhere(found: FoundModel) -> Iterator[None]:
    """Adds to an error about the base model of an adapter that another one can be named."""
    try:
        yield
    except UserError as error:
        if not found.kind or not error.where.startswith("model.path"):
            raise
        raise UserError(error.what, error.where, "; ".join(filter(None, [error.fix, OTHER_BASE]))) from error
