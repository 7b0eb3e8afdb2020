"""The methods of the command `merge` by name, and how its options become a rule. torch is imported when a rule is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mftcoder_coba.errors import UserError, suggestion

if TYPE_CHECKING:
    from mftcoder_coba.merging.rules import Rule

PER_MODEL = ("probabilities", "weight")
# The share of the updates that is kept: 0.2 as the TIES paper recommends (arXiv 2306.01708), 0.1 as DARE's (arXiv 2311.03099).
DENSITIES = {"ties": 0.2, "dare_linear": 0.1, "dare_ties": 0.1}


@dataclass(frozen=True)
class Method:
    """
    Args:
        build: the options of `options` by name, complete -> the rule.
        options: name -> default; those of `PER_MODEL` have a value for each model, 1/K by default.
        least_models: that it can merge.
    """

    build: Callable[..., Rule]
    options: dict[str, Any]
    least_models: int = 1


def _selection(**options) -> Rule:
    from mftcoder_coba.merging.rules import ParameterSelection

    return ParameterSelection(**options)


def _norm_rescaled_average() -> Rule:
    from mftcoder_coba.merging.rules import NormRescaledAverage

    return NormRescaledAverage()


def _library(name: str) -> Method:
    """A method of mergekit. Weights of 1/K make linear and task arithmetic the plain average."""

    def build(seed: int = 0, **parameters) -> Rule:
        from mftcoder_coba.merging.library import LibraryRule

        return LibraryRule(name, parameters, seed)

    if name == "model_stock":
        return Method(build, {}, least_models=2)
    density = {"density": DENSITIES[name]} if name in DENSITIES else {}
    return Method(build, {"weight": None} | density | ({"seed": 0} if name.startswith("dare") else {}))


METHODS: dict[str, Method] = {
    "parameter_selection": Method(_selection, {"probabilities": None, "resample_rounds": 0, "seed": 0}),
    "norm_rescaled_average": Method(_norm_rescaled_average, {}),
    **{name: _library(name) for name in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock")},
}


def build_rule(method: str, models: int, given: dict[str, Any]) -> tuple[Rule, dict[str, Any]]:
    """The rule of a method.

    Args:
        method: a name of `METHODS`.
        models: how many there are, K.
        given: options by name; None or an empty sequence: the method's default. `weight` may be one number for all models.

    Returns:
        The rule, and its options complete with the defaults.

    Raises:
        UserError: there is no such method, the method has no such option, or an option's value is not one that it can have.
    """
    if method not in METHODS:
        raise UserError(f'there is no method "{method}"', "--method", suggestion(method, METHODS))
    chosen = METHODS[method]
    if models < chosen.least_models:
        raise UserError(f"{method} needs at least {chosen.least_models} models, not {models}", "--models", "name more models, or another method")
    options = dict(chosen.options)
    for name, value in given.items():
        if value is None or (isinstance(value, Sequence) and not value):
            continue
        if name not in options:
            able = ", ".join(other for other, its in METHODS.items() if name in its.options)
            raise UserError(f"{method} has no such option", _option(name), f"leave it out; these have it: {able}")
        options[name] = value
    for name in PER_MODEL:
        if name in options:
            options[name] = _per_model(name, options[name], models)
    _check(options)
    return chosen.build(**options), options


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _per_model(name: str, value: Sequence[float] | None, models: int) -> tuple[float, ...]:
    if value is None:
        return (1 / models,) * models
    if name == "weight" and len(value) == 1:
        return tuple(value) * models
    if len(value) != models:
        raise UserError(f"there are {len(value)} values for {models} models", _option(name), "give one for each model, in the order of --models")
    return tuple(value)


def _check(options: dict[str, Any]) -> None:
    """Raises UserError for values out of range."""
    probabilities = options.get("probabilities", (1.0,))
    if not all(p >= 0 for p in probabilities) or not abs(math.fsum(probabilities) - 1) <= 1e-6:
        told = ", ".join(map(str, probabilities))
        raise UserError(f"probabilities are not negative and sum to 1, not {told}", "--probabilities")
    if options.get("resample_rounds", 0) < 0:
        raise UserError(f"a number of rounds is not negative, not {options['resample_rounds']}", "--resample-rounds")
    if not 0 < options.get("density", 1.0) <= 1:
        raise UserError(f"the density is the share that is kept, above 0 and at most 1, not {options['density']}", "--density")
    weight = options.get("weight", (1.0,))
    if not all(map(math.isfinite, weight)) or sum(weight) == 0:
        raise UserError(f"weights are finite, and their sum is not 0; not {', '.join(map(str, weight))}", "--weight")
