"""The replay itself: losses to a balancer, as the training loop would give them; and who was held back when."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mftcoder_coba.balancing import Balancer, Signals, create, resolve, signals_of
from mftcoder_coba.config import BalancerConfig, CobaConfig
from mftcoder_coba.errors import UserError
from mftcoder_coba.replaying.recordings import Recording
from mftcoder_coba.replaying.variants import Variant

LOSS_ONLY = frozenset({"validation_losses", "slots"})
# Methods that measure nothing, and whose weights are not constant.
OTHERWISE = {
    "proportional": "the weights of proportional are each step's numbers of supervised tokens",
    "random": "the weights of random are drawn, whatever the losses",
}
# A task counts as held back while its weight is below 1 / K by more than this part of it.
MARGIN = 0.1


@dataclass(frozen=True)
class Replay:
    """What one balancer would have chosen.

    Attributes:
        config: with numbers instead of "auto".
        weights: [n, K] after the observation of each recorded step; the next step trains with them.
        observed: how many of the n observations the balancer took (it may take every u-th step only).
    """

    recording: Recording
    variant: Variant
    config: BalancerConfig
    weights: NDArray[np.float64]
    observed: int

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.recording.tasks

    @property
    def steps(self) -> NDArray[np.int64]:
        return self.recording.steps


@dataclass(frozen=True)
class Span:
    """From the first to the last step after whose observation a task was held back, in how many of them it was, and the lowest weight."""

    first: int
    last: int
    observations: int
    lowest: float
    lowest_step: int


def replay_variant(recording: Recording, variant: Variant, coverage: int | None = None) -> Replay:
    """The weights that `variant` would have chosen.

    Args:
        coverage: M; None: the recording's.

    Raises:
        UserError: the method looks at more than validation losses, or needs what the recording does not hold.
    """
    config = variant.config
    coverage = coverage or recording.coverage
    unknown = [name for name in ("window", "warmup") if getattr(config, name, None) == "auto"]
    if coverage is None and unknown:
        raise UserError(
            f"{' and '.join(unknown)} of {variant.label} follow from the number of mini-batches that cover the validation set, and nothing tells it",
            str(recording.source),
            "give it as --coverage, or give numbers: --set window=200 --set warmup=100",
        )
    if getattr(config, "slope", None) == "paired" and recording.slots is None:
        fix = 'use "slope": "ols"; in a CSV, columns TASK.slot tell which mini-batch of its cycle each loss is from'
        raise UserError(f"{variant.label} pairs losses of equal mini-batches, and the recording does not hold every slot", str(recording.source), fix)
    check_signals(config)
    config = resolve(config, coverage or 1)  # 1: with numbers given, nothing depends on it
    balancer = create(config, recording.tasks, coverage or 1)
    weights, observed = run_through(balancer, recording)
    return Replay(recording, variant, config, weights, observed)


def check_signals(config: BalancerConfig) -> None:
    """Raises UserError for a method whose weights do not follow from validation losses alone."""
    others = sorted(signals_of(config) - LOSS_ONLY)
    if not others and config.kind not in OTHERWISE:
        return
    what = OTHERWISE.get(config.kind) or f"{config.kind} also looks at {', '.join(others)}"
    fix = "train with it, and compare the two runs"
    if hasattr(config, "signal") and not signals_of(config.model_copy(update={"signal": "validation"})) - LOSS_ONLY:
        fix = f'its form for validation losses can be replayed: --balancer \'{{"kind": "{config.kind}", "signal": "validation"}}\''
    raise UserError(f"{what}; a replay has validation losses only", f"--balancer {config.kind}", fix)


def run_through(balancer: Balancer, recording: Recording) -> tuple[NDArray[np.float64], int]:
    """(weights [n, K] after each recorded step, number of observations taken) of a balancer at its start."""
    balancer.start(recording.initial)
    weights, observed = np.empty(recording.losses.shape), 0
    tokens = np.ones(len(recording.tasks))  # not known; `proportional`, which looks at them, is refused
    for row, step in enumerate(recording.steps.tolist()):
        if balancer.wants(step):
            slots = None if recording.slots is None else recording.slots[row]
            balancer.observe(Signals(step=step, validation_losses=recording.losses[row], slots=slots))
            observed += 1
        weights[row] = balancer.weights(tokens)
    return weights, observed


def equals_recorded(replay: Replay) -> bool | None:
    """Whether the weights are those of the run, bit for bit. None where this is not the run's own balancer, or it recorded none."""
    recorded = replay.recording.weights
    if not replay.variant.own or recorded is None or np.isnan(recorded).any():
        return None
    return bool((replay.weights == recorded).all())


def held_back(steps: NDArray[np.int64], weights: NDArray[np.float64], tasks: int, margin: float = MARGIN) -> list[Span]:
    """Spans in which one task's weight is below (1 - margin) / K.

    A gap of up to 2 observations, or up to half a percent of all, does not end a span: noise is no decision.

    Args:
        steps, weights: [n], of one task.
    """
    low = np.flatnonzero(weights < (1.0 - margin) / tasks)
    if not len(low):
        return []
    gap = max(2, len(steps) // 200)
    spans = []
    for rows in np.split(low, np.flatnonzero(np.diff(low) > gap + 1) + 1):
        lowest = rows[weights[rows].argmin()]
        spans.append(Span(int(steps[rows[0]]), int(steps[rows[-1]]), len(rows), float(weights[lowest]), int(steps[lowest])))
    return spans


def warmup_end(replay: Replay) -> int | None:
    """The step of CoBa's W-th observation, with which its weights begin to differ from 1 / K; None if it never comes."""
    config = replay.config
    if not isinstance(config, CobaConfig) or replay.observed < config.warmup:
        return None
    taken = replay.steps[replay.steps % config.update_interval == 0]
    return int(taken[config.warmup - 1])
