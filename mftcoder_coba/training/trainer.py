"""The loop on one page."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mftcoder_coba.config import Config
from mftcoder_coba.data import Batch, load_tokenizer, prepare
from mftcoder_coba.engine import Processes, build_deepspeed_config, launched_local_rank, launched_world_size
from mftcoder_coba.errors import RunFailure
from mftcoder_coba.models import check_adapter, write_export
from mftcoder_coba.training.assembly import Run, assemble, check_data, check_signals
from mftcoder_coba.training.checkpoints import Checkpoints
from mftcoder_coba.training.learning_rate import learning_rate
from mftcoder_coba.training.observation import Observer
from mftcoder_coba.training.run_folder import RunFolder
from mftcoder_coba.training.step import StepOutcome, train_step
from mftcoder_coba.training.stopping import BestStep
from mftcoder_coba.training.tracker import Tracker

# Steps in a row without a finite loss and gradient after which going on makes no sense.
MAX_SKIPPED_IN_A_ROW = 3


def train(config: Config, command: list[str]) -> Path | None:
    """Trains as `config` says, from the start or from a checkpoint.

    Args:
        command: the command line, for `environment.json`.

    Returns:
        the run folder, on rank 0; None on the others, which have nothing left to do.

    Raises:
        UserError: see the rooms that read what the user gave.
        RunFailure: numbers that are not finite, or ranks that disagree.
    """
    # What can be found wrong without data or model is found first.
    deepspeed_config = build_deepspeed_config(config, launched_world_size())
    check_adapter(config.adapter, deepspeed_config)
    check_signals(config)
    folder = RunFolder(config)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    checkpoint = checkpoints.find(config.checkpoint.resume)
    state = checkpoints.read_state(checkpoint) if checkpoint else None
    # Before any process waits for another: tokenising takes as long as it takes.
    corpus = prepare(config.data, config.model.path, config.model.trust_remote_code, progress=launched_local_rank() == 0)
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    check_data(config, corpus)
    processes = Processes()
    folder.claim(processes, resuming=checkpoint is not None)
    run = assemble(config, deepspeed_config, corpus, tokenizer, processes, state and state["stream_rows"])
    tracker = Tracker(run, folder, command, resume_step=state and state["step"])
    loop = Loop(run, folder, checkpoints, tracker)
    if checkpoint:
        run.engine.load(checkpoint)
        loop.load_state_dict(state)
        tracker.event(loop.step, "resume", f"from {checkpoint.name}")
    else:
        loop.validate_before_training()
    try:
        loop.run_to_end()
    finally:
        tracker.close()
    run.engine.close()
    processes.barrier()
    processes.close()
    return folder.path if processes.is_main else None


class Loop:
    """Step, observe, validate, save, and nothing else."""

    def __init__(self, run: Run, folder: RunFolder, checkpoints: Checkpoints, tracker: Tracker):
        self.run, self.folder, self.checkpoints, self.tracker = run, folder, checkpoints, tracker
        self.config = run.config
        self.observer = Observer(
            run.engine, run.balancer.signals, run.validation, run.stream, getattr(run.config.balancer, "update_interval", 1), self.seed_dropout
        )
        self.best = BestStep(run.config.validation.early_stopping)
        self.initial_losses = np.full(len(run.corpus.tasks), np.nan)
        self.step = 0
        self.skipped_in_a_row = 0
        self.stopped_early = False

    def run_to_end(self) -> None:
        total = self.run.plan.total_steps
        while self.step < total and not self.stopped_early:
            self.step += 1
            self.train_and_observe()
            last = self.step == total
            if last or self.step % self.config.validation.every_steps == 0:
                self.validate()
            if last or self.stopped_early or self.step % self.config.checkpoint.every_steps == 0:
                self.save()

    def train_and_observe(self) -> None:
        """One optimizer step, and what the balancer wants to know of it."""
        batches = self.run.micro_batches(self.step)
        train = functools.partial(self.train, batches)
        if not self.run.balancer.wants(self.step):
            train()
            return
        signals, seconds = self.observer.around(self.step, batches, train)
        self.run.balancer.observe(signals)
        self.tracker.balancer(self.step, seconds, signals.validation_losses, signals.slots)

    def train(self, batches: list[Batch]) -> StepOutcome:
        run, training = self.run, self.config.training
        started = time.perf_counter()
        self.seed_dropout()
        rate = learning_rate(training, self.step, run.plan.warmup_steps, run.plan.total_steps)
        outcome = train_step(run.engine, run.balancer, batches, rate)
        self.tracker.train(self.step, outcome, rate, time.perf_counter() - started)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if outcome.skipped else 0
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self.save()
            raise RunFailure(
                f"loss or gradient were not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {self.step}; none of them changed the model. "
                f"The last good state is {self.checkpoints.folder}/step-{self.step:06d}. Lower the learning rate, or look at the data of these steps."
            )
        return outcome

    def seed_dropout(self) -> None:
        """Dropout is a function of seed, step and rank: a resumed run draws the same without saved generator states."""
        torch.manual_seed(np.random.SeedSequence([self.config.run.seed, self.step, self.run.processes.rank]).generate_state(1, np.uint64)[0])

    def validate_before_training(self) -> None:
        """The denominators v_k(0) of every loss ratio."""
        if not self.run.validation.rows:
            return
        measured = self.run.validation.full()
        self.initial_losses = measured.losses
        self.run.balancer.start(self.initial_losses)
        self.tracker.validation(0, self.initial_losses, self.initial_losses, measured.tokens)

    def validate(self) -> None:
        """Full validation, the best step, early stopping. Without any validation data the last step is the best."""
        if not self.run.validation.rows:
            if self.step == self.run.plan.total_steps:
                self.export("the last step; there is no validation data")
            return
        measured = self.run.validation.full()
        self.tracker.validation(self.step, measured.losses, self.initial_losses, measured.tokens)
        ratios = zip(self.run.corpus.tasks, measured.losses / self.initial_losses, strict=True)
        ratios = {name: ratio for name, ratio in ratios if not math.isnan(ratio)}
        if self.best.update(self.step, ratios):
            self.export(f"{self.best.config.criterion} {self.best.value:.4f}")
            self.folder.write_best(self.run.processes, self.best, ratios)
        elif self.best.exhausted:
            self.stopped_early = True
            self.tracker.event(
                self.step,
                "early_stop",
                f"{self.best.validations_since} validations without a better {self.best.config.criterion} than at step {self.best.step}",
            )

    def export(self, why: str) -> None:
        """The model of this step becomes `export/`, so that a run that is killed later leaves its best model."""
        run = self.run
        model = run.engine.module.model
        state = run.engine.gather_state(model)
        if run.processes.is_main:
            write_export(model, state, run.tokenizer, self.folder.export)
        self.tracker.event(self.step, "best", why)

    def save(self) -> None:
        self.checkpoints.save(self.run.engine, self.step, self.state_dict(), self.best.step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "skipped_in_a_row": self.skipped_in_a_row,
            "initial_losses": [None if math.isnan(loss) else loss for loss in self.initial_losses.tolist()],
            "balancer": self.run.balancer.state_dict(),
            "best": self.best.state_dict(),
            "stream_rows": self.run.stream_rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.skipped_in_a_row = state["step"], state["skipped_in_a_row"]
        self.initial_losses = np.array([math.nan if loss is None else loss for loss in state["initial_losses"]])
        self.run.balancer.load_state_dict(state["balancer"])
        self.best.load_state_dict(state["best"])
        self.stopped_early = self.best.exhausted
