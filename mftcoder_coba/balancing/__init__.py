"""Losses in, task weights out.

The picture: the training loss of one step is sum_k w_k * (mean loss of task k). A balancer chooses the w_k.

What goes in: the K task names, in one fixed order that every array here follows; the tasks' validation losses before
training (`start`); and, after the steps that the balancer `wants`, the `Signals` that it declares in `signals`. The
caller pays only for what is declared.

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

A new method is a file with one class, a line in `METHODS`, and, where it needs a new signal, a field of `Signals`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mftcoder_coba.balancing.base import Balancer, Signals
from mftcoder_coba.balancing.coba import Coba
from mftcoder_coba.balancing.fixed import Fixed
from mftcoder_coba.balancing.proportional import Proportional
from mftcoder_coba.balancing.uniform import Uniform
from mftcoder_coba.config import BalancerConfig, CobaConfig
from mftcoder_coba.errors import UserError

__all__ = ["METHODS", "Balancer", "Signals", "create", "resolve"]

METHODS = {"coba": Coba, "uniform": Uniform, "proportional": Proportional, "fixed": Fixed}


def create(config: BalancerConfig, tasks: Sequence[str], coverage: int) -> Balancer:
    """The balancer that `config` describes, at its start.

    Args:
        tasks: the K names; their order is the order of every array that goes in or comes out.
        coverage: M, the number of validation mini-batches that cover the validation set.

    Raises:
        UserError: see `resolve`.
    """
    return METHODS[config.kind](resolve(config, coverage), tuple(tasks))


def resolve(config: BalancerConfig, coverage: int) -> BalancerConfig:
    """`config` with every "auto" replaced by its number: the window N = 2 M, the warm-up W = M.

    Raises:
        UserError: CoBa without validation data, or paired slopes with a window in which no slot would come twice.
    """
    if not isinstance(config, CobaConfig):
        return config
    if coverage < 1:
        fix = "give every task `valid` files or set data.valid_fraction above 0, or choose another balancer"
        raise UserError("CoBa needs validation data and there is none", "balancer.kind", fix)
    window = 2 * coverage if config.window == "auto" else config.window
    warmup = coverage if config.warmup == "auto" else config.warmup
    if config.slope == "paired" and window <= coverage:
        what = f"a validation mini-batch returns after {coverage} observations, so paired slopes need a window above that; it is {window}"
        raise UserError(what, "balancer.window", f'set it to "auto" ({2 * coverage}), or balancer.slope to "ols"')
    return config.model_copy(update={"window": window, "warmup": warmup})
