"""All parts of a run, built from its config in the order in which data flows."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mftcoder_coba.balancing import VALIDATION_SIGNALS, Balancer, create, resolve, signals_of
from mftcoder_coba.config import Config
from mftcoder_coba.data import BalancerStream, Batch, Corpus, TrainSchedule, collate
from mftcoder_coba.engine import Engine, Processes
from mftcoder_coba.engine.engine import partitioned_loading
from mftcoder_coba.errors import UserError
from mftcoder_coba.models import add_adapter, check_sizes, choose_attention, count_parameters, load_model
from mftcoder_coba.objective import MultiTaskObjective, check_liger
from mftcoder_coba.planning import StepPlan, balancer_stream, plan_steps, training_schedule
from mftcoder_coba.training.validation import Validation


@dataclass
class Run:
    """The parts of one run.

    Attributes:
        config: resolved: "auto" is replaced by what is used.
        stream: the balancer's validation mini-batches; None if a task has no validation data.
        stream_rows: rows of one of them, over all ranks.
        parameters: "total" and "trainable" numbers.
    """

    config: Config
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    processes: Processes
    schedule: TrainSchedule
    plan: StepPlan
    engine: Engine
    balancer: Balancer
    validation: Validation
    stream: BalancerStream | None
    stream_rows: int
    parameters: dict[str, int]

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` (1-based). Any number of ranks sees the same rows in a step."""
        training, world_size = self.config.training, self.processes.world_size
        first_row = (step - 1) * training.global_batch_rows
        rows = training.micro_batch_rows
        batches = []
        for index in range(self.plan.accumulation_steps):
            start = first_row + (index * world_size + self.processes.rank) * rows
            stop = start + rows if self.plan.end_row is None else min(start + rows, self.plan.end_row)
            batches.append(
                collate(
                    self.schedule.rows(start, stop) if start < stop else [],
                    self.corpus.splits["train"],
                    len(self.corpus.tasks),
                    self.corpus.pad_token_id,
                    training.reduction,
                    rows_per_batch=rows,
                    max_length=self.config.data.sequence_length,
                    isolate=self.config.data.packing != "none",
                )
            )
        return batches


def check_data(config: Config, corpus: Corpus) -> None:
    """Raises UserError where the balancer needs validation data that some task does not have."""
    without = [name for name, task in zip(corpus.tasks, corpus.splits["valid"], strict=True) if len(task) == 0]
    if without and signals_of(config.balancer) & VALIDATION_SIGNALS:
        found = [corpus.accounting[name]["valid"].summary() if "valid" in corpus.accounting[name] else f"{name}/valid: no files" for name in without]
        raise UserError(
            f"the balancer {config.balancer.kind} needs validation data of every task; there is none for {', '.join(without)}\n  "
            + "\n  ".join(found),
            "data.tasks[].valid",
            'name `valid` files, or raise data.valid_fraction; for samples that are too long, data.too_long = "truncate"',
        )
    criterion = config.validation.early_stopping.criterion
    if criterion.startswith("task:") and criterion[5:] in without:
        raise UserError(
            f"the best step is to be that of the task {criterion[5:]}, which has no validation data",
            "validation.early_stopping.criterion",
            "name `valid` files of this task, or choose another criterion",
        )


def check_signals(config: Config) -> None:
    """Raises UserError where the balancer wants what cannot be measured under this ZeRO stage."""
    if config.zero_stage == 3 and "full_gradient_products" in signals_of(config.balancer):
        raise UserError(
            "gradients of all parameters are measured with whole parameters on every rank; ZeRO-3 parts them",
            'balancer.gradients = "all"',
            'set it to "output_layer", or choose ZeRO-0, 1 or 2 in `deepspeed`',
        )


def assemble(
    config: Config,
    deepspeed_config: dict[str, Any],
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
    stream_rows: int | None,
) -> Run:
    """Builds the run.

    Args:
        deepspeed_config: from `build_deepspeed_config`.
        stream_rows: rows of the balancer's global mini-batch; None: `validation.balancer_rows_per_rank` on each rank. A
            resumed run keeps the number it began with, also on another number of ranks.

    Raises:
        UserError: settings that do not fit together, before the model is loaded where that can be known.
    """
    data = config.data
    train = corpus.splits["train"]
    schedule = training_schedule(config, train)
    plan = plan_steps(config, schedule, processes.world_size)

    valid = corpus.splits["valid"]
    stream_rows = stream_rows or processes.world_size * config.validation.balancer_rows_per_rank
    stream = balancer_stream(config, valid, stream_rows)
    coverage = stream.coverage if stream else 0
    balancer_config = resolve(config.balancer, coverage)
    balancer = create(balancer_config, corpus.tasks, coverage)

    attention = choose_attention(config.model.attention, processes.device, config.model.dtype)
    if config.model.output_loss == "liger":
        check_liger(processes.device)
    # Initial adapter values must not depend on what ran before.
    random.seed(config.run.seed)
    np.random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    # A quantised model cannot be loaded in parts: each rank quantises all of it, tensor by tensor, and DeepSpeed partitions it afterwards.
    quantise_on = processes.device if config.adapter and config.adapter.quantised else None
    with contextlib.nullcontext() if quantise_on else partitioned_loading(deepspeed_config):
        model = add_adapter(load_model(config.model, attention, quantise_on), config.adapter, corpus.tasks)
    check_sizes(model, tokenizer, config)
    total, trainable = count_parameters(model)
    objective = MultiTaskObjective(model, len(corpus.tasks), config.model.output_loss, config.training.router_loss_coefficient)
    engine = Engine(
        objective,
        deepspeed_config,
        config.training,
        processes,
        external_parameters=[(objective.output_loss, objective.output_loss.external_parameters)],
    )
    first_ids, first_positions = _first_tokens(corpus, processes.device)
    objective.check_output_layer(first_ids, first_positions)
    if data.packing != "none" or "flash" in attention:  # rows are laid end to end for flash-attn
        objective.check_isolation(first_ids)
    validation = Validation(engine, valid, data.sequence_length, data.packing, config.training.micro_batch_rows, corpus.pad_token_id)
    resolved = config.model_copy(
        update={
            "model": config.model.model_copy(update={"attention": attention}),
            "data": data.model_copy(update={"template": corpus.template_name} if data.template == "auto" else {}),
            "balancer": balancer_config,
            "deepspeed": deepspeed_config,
        }
    )
    return Run(
        config=resolved,
        corpus=corpus,
        tokenizer=tokenizer,
        processes=processes,
        schedule=schedule,
        plan=plan,
        engine=engine,
        balancer=balancer,
        validation=validation,
        stream=stream,
        stream_rows=stream_rows,
        parameters={"total": total, "trainable": trainable},
    )


def _first_tokens(corpus: Corpus, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, positions), [1, at most 32] each, of the first training sample."""
    ids, _ = corpus.splits["train"][0].sample(0)
    ids = torch.from_numpy(np.array(ids[:32], dtype=np.int64))[None].to(device)
    return ids, torch.arange(ids.shape[1], device=device)[None]
