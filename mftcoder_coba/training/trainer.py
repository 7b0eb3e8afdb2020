"""The loop on one page."""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mftcoder_coba.config import Config
from mftcoder_coba.data import Batch, load_tokenizer, prepare
from mftcoder_coba.engine import Processes, build_deepspeed_config, launched_local_rank, launched_world_size
from mftcoder_coba.errors import Interrupted, RunFailure
from mftcoder_coba.models import CgcLoraModel, adapter_names, check_adapter, write_export
from mftcoder_coba.training.assembly import Run, assemble, check_data, check_signals
from mftcoder_coba.training.checkpoints import Checkpoints
from mftcoder_coba.training.interruption import Interruption
from mftcoder_coba.training.learning_rate import learning_rate
from mftcoder_coba.training.observation import Observer
from mftcoder_coba.training.resuming import Resumed, identity, resume_from
from mftcoder_coba.training.run_folder import RunFolder
from mftcoder_coba.training.step import StepOutcome, train_step
from mftcoder_coba.training.stopping import BestStep
from mftcoder_coba.training.tracker import Tracker
from mftcoder_coba.training.validation import check_initial_losses, ratios_of

# Steps in a row without a finite loss and gradient after which going on makes no sense.
MAX_SKIPPED_IN_A_ROW = 3


def train(config: Config, command: list[str], allow_config_change: bool = False) -> Path | None:
    """Trains as `config` says, from the start or from a checkpoint.

    Args:
        command: the command line, for `environment.json`.
        allow_config_change: go on from a checkpoint also where the config now makes another run of it.

    Returns:
        the run folder, on rank 0; None on the others, which have nothing left to do.

    Raises:
        UserError: see the rooms that read what the user gave.
        Interrupted: a signal came; everything is saved.
        RunFailure: numbers that are not finite, ranks that disagree, died or hang.
    """
    # What can be found wrong without data or model is found first.
    deepspeed_config = build_deepspeed_config(config, launched_world_size())
    check_adapter(config.adapter, config.data.task_names, deepspeed_config)
    check_signals(config)
    folder = RunFolder(config)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    candidates = checkpoints.candidates(config.checkpoint.resume)
    # Before any process waits for another: tokenising takes as long as it takes.
    corpus = prepare(config.data, config.model.path, config.model.trust_remote_code, progress=launched_local_rank() == 0)
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    check_data(config, corpus)
    hang_timeout = config.run.hang_timeout_minutes * 60
    processes = Processes(hang_timeout)
    folder.claim(processes, resuming=bool(candidates))
    resumed = resume_from(checkpoints, config, corpus, processes, allow_config_change)
    run = assemble(config, deepspeed_config, corpus, tokenizer, processes, resumed and resumed.stream_rows)
    tracker = Tracker(run, folder, command, resumed)
    loop = Loop(run, folder, checkpoints, tracker, identity(config, corpus, processes))
    processes.watch.start(hang_timeout)
    try:
        with Interruption(quiet=not processes.is_main) as interruption:
            loop.begin(resumed)
            loop.run_to_end(interruption)
        processes.barrier()
    except Interrupted:
        tracker.close()
        processes.barrier()  # launchers end the other ranks when the first has ended
        raise
    except RuntimeError as error:  # in practice: a collective that another rank did not join
        raise processes.watch.explain(error) or error from error
    finally:
        processes.watch.stop()
        tracker.close()
    run.engine.close()
    processes.close()
    return folder.path if processes.is_main else None


class Loop:
    """Step, observe, validate, save, and nothing else.

    Args:
        identity: what every checkpoint says of the run.
    """

    def __init__(self, run: Run, folder: RunFolder, checkpoints: Checkpoints, tracker: Tracker, identity: dict[str, Any]):
        self.run, self.folder, self.checkpoints, self.tracker, self.identity = run, folder, checkpoints, tracker, identity
        self.config = run.config
        self.observer = Observer(
            run.engine, run.balancer.signals, run.validation, run.stream, getattr(run.config.balancer, "update_interval", 1), self.seed_dropout
        )
        self.best = BestStep(run.config.validation.early_stopping)
        self.initial_losses = np.full(len(run.corpus.tasks), np.nan)
        self.step = 0
        self.skipped_in_a_row = 0
        self.pending = False  # the step is done, its validation and checkpoint are not
        self.saved: tuple[int, bool] | None = None  # (step, pending) of the last checkpoint
        self.stopped_early = False

    def begin(self, resumed: Resumed | None) -> None:
        if resumed is None:
            self.validate_before_training()
            return
        self.run.engine.load(resumed.checkpoint)
        self.load_state_dict(resumed)
        for message in resumed.damaged:
            self.tracker.event(self.step, "damaged_checkpoint", message)
        if resumed.set_aside:
            self.tracker.event(self.step, "set_aside", f"checkpoints of later steps, which this run no longer has: {', '.join(resumed.set_aside)}")
        self.tracker.event(self.step, "resume", resumed.story(self.run.processes.world_size, self.config.zero_stage))

    def run_to_end(self, interruption: Interruption) -> None:
        total = self.run.plan.total_steps
        while self.pending or (self.step < total and not self.stopped_early):
            if not self.pending:
                self.step += 1
                self.run.processes.watch.mark("reading data", self.step)
                self.train_and_observe()
                self.pending = True
                self.stop_if_asked(interruption)
            ends = self.step == total
            validated = ends or self.step % self.config.validation.every_steps == 0
            if validated:
                self.validate()
            self.pending = False
            if ends or self.stopped_early or self.step % self.config.checkpoint.every_steps == 0:
                self.save()
            if validated and not (ends or self.stopped_early):
                self.stop_if_asked(interruption)  # a validation may have taken long

    def stop_if_asked(self, interruption: Interruption) -> None:
        """Ends the run with a checkpoint when any rank got a signal: it comes to some ranks earlier than to others."""
        if not self.run.processes.any(interruption.requested is not None):
            return
        name = next(filter(None, self.run.processes.gather_objects(interruption.requested)))
        problem = None if self.saved == (self.step, self.pending) else self.save()
        where = self.checkpoints.folder / f"step-{self.step:06d}"
        saved = f"everything is saved in {where}" if problem is None else f"the checkpoint of step {self.step} could not be saved ({problem})"
        self.tracker.event(self.step, "interrupted", name)
        raise Interrupted(f"stopped after step {self.step} by {name}; {saved}. The same command goes on from the last checkpoint.")

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
            # Who goes on from here has changed something: the count begins anew, and this step's validation is not left out.
            self.skipped_in_a_row, self.pending = 0, True
            problem = self.save()
            saved = f"is {self.checkpoints.folder}/step-{self.step:06d}" if problem is None else f"could not be saved ({problem})"
            raise RunFailure(
                f"loss or gradient were not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {self.step}; none of them changed the model. "
                f"The last good state {saved}. Lower the learning rate, or look at the data of these steps."
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
        check_initial_losses(self.run.corpus.tasks, measured)
        self.initial_losses = measured.losses
        self.run.balancer.start(self.initial_losses)
        self.tracker.validation(0, self.initial_losses, self.initial_losses, measured.tokens)
        self.record_gates()

    def validate(self) -> None:
        """Full validation, the best step, early stopping. Without any validation data the last step is the best."""
        if not self.run.validation.rows:
            if self.step == self.run.plan.total_steps:
                self.export("the last step; there is no validation data")
            return
        measured = self.run.validation.full()
        self.tracker.validation(self.step, measured.losses, self.initial_losses, measured.tokens)
        self.record_gates()
        ratios = ratios_of(self.run.corpus.tasks, measured.losses, self.initial_losses)
        if self.best.update(self.step, ratios):
            self.export(f"{self.best.config.criterion} {self.best.value:.4f}", ratios)
        elif self.best.exhausted:
            self.stopped_early = True
            self.tracker.event(
                self.step,
                "early_stop",
                f"{self.best.validations_since} validations without a better {self.best.config.criterion} than at step {self.best.step}",
            )

    def record_gates(self) -> None:
        """How each task mixes its experts, where there are any."""
        model = self.run.engine.module.model
        if isinstance(model, CgcLoraModel):
            with torch.no_grad(), self.run.engine.gathered(list(model.gates.parameters())):
                gates = {task: model.gates.of(task).cpu().numpy() for task in self.run.corpus.tasks}
            experts = {task: model.structure.expert_names(task) for task in gates}
            self.tracker.gates(self.step, model.layer_names, experts, gates)

    def export(self, why: str, ratios: dict[str, float] | None = None) -> None:
        """The model of this step becomes `export/`, with `best.json` where there are ratios: a run that is killed later leaves its best model."""
        run = self.run
        run.processes.watch.mark("exporting the model")
        model = run.engine.module.model
        state = run.engine.gather_state(model, adapter_names(model))
        problem = ""
        if run.processes.is_main:
            try:
                write_export(model, state, run.tokenizer, self.folder.export)
                if ratios is not None:
                    self.folder.write_best(self.best, ratios)
            except OSError as error:
                problem = f"{why}, but the model could not be exported ({error}); an earlier export stays, and training goes on"
        self.tracker.event(self.step, "export_failed" if problem else "best", problem or why)

    def save(self) -> str | None:
        """None, or why there is no checkpoint of this step: then the last one stays, and training goes on."""
        self.run.processes.watch.mark("saving a checkpoint")
        self.tracker.flush()  # a checkpoint never knows of steps whose records are not on the disk
        problem = self.checkpoints.save(self.run.engine, self.step, self.state_dict(), self.best.step)
        if problem is None:
            self.saved = (self.step, self.pending)
        else:
            self.tracker.event(self.step, "checkpoint_failed", f"{problem}; the earlier checkpoints are untouched, and training goes on")
        return problem

    def state_dict(self) -> dict[str, Any]:
        """All that goes on, as plain values. The data cursor is the step: rows and mini-batches follow from it, and dropout from it and the seed."""
        return self.identity | {
            "step": self.step,
            "pending": self.pending,
            "rows": self.step * self.config.training.global_batch_rows,
            "skipped_in_a_row": self.skipped_in_a_row,
            "initial_losses": [None if math.isnan(loss) else loss for loss in self.initial_losses.tolist()],
            "balancer": self.run.balancer.state_dict(),
            "balancer_config": self.config.balancer.model_dump(),
            "best": self.best.state_dict(),
            "stream_rows": self.run.stream_rows,
            "tracker": self.tracker.state_dict(),
        }

    def load_state_dict(self, resumed: Resumed) -> None:
        state = resumed.state
        self.step, self.pending, self.skipped_in_a_row = state["step"], state["pending"], state["skipped_in_a_row"]
        self.initial_losses = np.array([math.nan if loss is None else loss for loss in state["initial_losses"]])
        if resumed.changes.refused and state["balancer_config"] != json.loads(self.config.balancer.model_dump_json()):
            self.run.balancer.start(self.initial_losses)
            self.tracker.event(self.step, "balancer_anew", "its settings or the validation data changed: it begins without a history")
        else:
            self.run.balancer.load_state_dict(state["balancer"])
        self.best.load_state_dict(state["best"])
        self.tracker.load_state_dict(state["tracker"])
        self.stopped_early = self.best.exhausted
