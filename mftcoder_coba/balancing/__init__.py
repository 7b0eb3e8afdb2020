"""Measurements of the tasks in, task weights out.

The picture: the training loss of one step is sum_k w_k * (mean loss of task k). A balancer chooses the w_k.

What goes in: the K task names, in one fixed order that every array here follows; the tasks' validation losses before
training (`start`); and, after the steps that the balancer `wants`, the `Signals` that it declares in `signals`. The
caller pays only for what is declared. `signals_of(config)` says it before anything is built.

What comes out: `weights(denominators)`, K positive float64 numbers with the sum 1 for the next step (only `proportional`
gives 0, to a task that the step's batch does not hold); `record()`, what the method has to show, as JSON values;
`state_dict()`, from which it goes on as if it had never stopped.

Who calls: the training loop, on every rank, with the same all-reduced float64 values. There is no process group, device,
file, clock or BLAS call in here, and sums run in a fixed order, so equal inputs give equal bits on every rank.

A step of the loop:

    weights = balancer.weights(denominators)
    ...                                                   # forward, backward, optimizer
    if balancer.wants(step):
        balancer.observe(Signals(step=step, validation_losses=..., slots=...))
        write(balancer.record())

A new method is a file with one class, a line in `METHODS`, and, where it needs a new signal, a field of `Signals` (and a
name in `VALIDATION_SIGNALS`, if it takes validation data to measure it).
"""

from __future__ import annotations

from collections.abc import Sequence

from mftcoder_coba.balancing.base import VALIDATION_SIGNALS, Balancer, Signals
from mftcoder_coba.balancing.coba import Coba
from mftcoder_coba.balancing.dwa import Dwa
from mftcoder_coba.balancing.famo import Famo
from mftcoder_coba.balancing.fixed import Fixed
from mftcoder_coba.balancing.gradnorm import GradNorm
from mftcoder_coba.balancing.lbtw import Lbtw
from mftcoder_coba.balancing.metaweighting import MetaWeighting
from mftcoder_coba.balancing.proportional import Proportional
from mftcoder_coba.balancing.random import Random
from mftcoder_coba.balancing.uncertainty import Uncertainty
from mftcoder_coba.balancing.uniform import Uniform
from mftcoder_coba.config import BalancerConfig, CobaConfig
from mftcoder_coba.errors import UserError

__all__ = ["METHODS", "VALIDATION_SIGNALS", "Balancer", "Signals", "create", "resolve", "signals_of"]

METHODS = {
    "coba": Coba,
    "uniform": Uniform,
    "proportional": Proportional,
    "fixed": Fixed,
    "random": Random,
    "lbtw": Lbtw,
    "dwa": Dwa,
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
    "famo": Famo,
    "metaweighting": MetaWeighting,
}


def create(config: BalancerConfig, tasks: Sequence[str], coverage: int) -> Balancer:
    """The balancer that `config` describes, at its start.

    Args:
        tasks: the K names; their order is the order of every array that goes in or comes out.
        coverage: M, the number of validation mini-batches that cover the validation set.

    Raises:
        UserError: see `resolve`.
    """
    return METHODS[config.kind](resolve(config, coverage), tuple(tasks))


def signals_of(config: BalancerConfig) -> frozenset[str]:
    """The fields of `Signals` that the balancer of `config` needs."""
    method = METHODS[config.kind]
    return method.signals if method.choice is None else method.SIGNALS[getattr(config, method.choice)]


def resolve(config: BalancerConfig, coverage: int) -> BalancerConfig:
    """`config` with every "auto" replaced by its number: the window N = 2 M, the warm-up W = M.

    Raises:
        UserError: a method that measures on validation data, without such data; paired slopes with a window in which no
            slot would come twice; CoBa's variant "mftcoder" with a window below the warm-up or with `df_history` "all".
    """
    if coverage < 1 and signals_of(config) & VALIDATION_SIGNALS:
        where, instead = _way_out(config)
        fix = f"give every task `valid` files or set data.valid_fraction above 0, or {instead}"
        raise UserError(f"{config.kind} needs validation data and there is none", where, fix)
    return _resolve_coba(config, coverage) if isinstance(config, CobaConfig) else config


def _way_out(config: BalancerConfig) -> tuple[str, str]:
    """The key of the config that can be changed so that no validation data is needed, and what to do with it."""
    method = METHODS[config.kind]
    for value, signals in method.SIGNALS.items() if method.choice else ():
        if not signals & VALIDATION_SIGNALS:
            return f"balancer.{method.choice}", f'set this to "{value}"'
    return "balancer.kind", "choose another balancer"


def _resolve_coba(config: CobaConfig, coverage: int) -> CobaConfig:
    window = 2 * coverage if config.window == "auto" else config.window
    warmup = coverage if config.warmup == "auto" else config.warmup
    if config.slope == "paired" and window <= coverage:
        what = f"a validation mini-batch returns after {coverage} observations, so paired slopes need a window above that; it is {window}"
        raise UserError(what, "balancer.window", f'set it to "auto" ({2 * coverage}), or balancer.slope to "ols"')
    if config.variant == "mftcoder" and window < warmup:
        what = f'"variant": "mftcoder" scores the slopes since the warm-up inside the window, so the window ({window}) may not be below it ({warmup})'
        raise UserError(what, "balancer.window", f"set it to {warmup} or more, or lower balancer.warmup")
    if config.variant == "mftcoder" and config.df_history == "all":
        what = '"variant": "mftcoder" starts the divergence factor\'s history at the warm-up; "df_history": "all" is of the paper\'s formula'
        raise UserError(what, "balancer.df_history", 'leave it out, or set balancer.variant to "paper"')
    return config.model_copy(update={"window": window, "warmup": warmup})
