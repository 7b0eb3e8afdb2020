"""Whatever is measured and whatever a config allows: weights are numbers above 0 with the sum 1, and the state stays JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftcoder_coba.balancing import METHODS, Signals, create, resolve, signals_of
from mftcoder_coba.config import BALANCERS

COVERAGE = 3
# Every method, with each choice that changes its formulas.
SECTIONS = {
    "coba": {},
    "coba paired": {"slope": "paired"},
    "coba all": {"df_history": "all", "warmup": 2, "window": 2},
    "coba rcs": {"scores": ["rcs"]},
    "coba acs every third": {"scores": ["acs"], "update_interval": 3},
    "coba mftcoder": {"variant": "mftcoder"},
    "lbtw": {},
    "lbtw validation": {"signal": "validation"},
    "dwa": {"window": 2},
    "uncertainty": {},
    "gradnorm": {},
    "gradnorm validation": {"signal": "validation"},
    "famo": {},
    "famo validation": {"signal": "validation"},
    "metaweighting": {},
    "metaweighting all": {"gradients": "all"},
    "uniform": {},
    "proportional": {},
    "random": {},
    "fixed": {"weights": {}},  # filled in for the tasks
}
# Settings at the ends of what a config allows.
EXTREMES = {
    "coba": {"tau": [5e-324, 1e308]},
    "lbtw": {"exponent": [5e-324, 1e308]},
    "dwa": {"temperature": [5e-324, 1e308]},
    "uncertainty": {"learning_rate": [5e-324, 1e308]},
    "gradnorm": {"learning_rate": [5e-324, 1e308], "alpha": [0.0, 1e308]},
    "famo": {"learning_rate": [5e-324, 1e308], "decay": [0.0, 1e308]},
    "metaweighting": {"learning_rate": [5e-324, 1e308]},
}
ENDS = [(kind, key, end) for kind, keys in EXTREMES.items() for key, ends in keys.items() for end in ends]
SIZES = [0.0, 5e-324, 1e-308, 1e-30, 1.0, 3.7, 1e99, 1e160, 1.7e308]
NO_NUMBERS = [np.nan, np.inf, -np.inf]


def section(name, tasks, **changes):
    kind = name.split()[0]
    tree = {"kind": kind} | SECTIONS[name] | changes
    if kind == "fixed":
        tree["weights"] = {task: size for task, size in zip(tasks, [1e308, 5e-324, 1e308, 1.0], strict=False)}
    return BALANCERS[kind].model_validate(tree)


@st.composite
def histories(draw, count):
    """[steps, count] of one signal: each task ordinary, constant, missing for ever, jumping, or any numbers at all."""
    length, columns = draw(st.integers(1, 12)), []
    anything = st.sampled_from([*SIZES, *[-size for size in SIZES], *NO_NUMBERS]) | st.floats(0, 20)
    for _ in range(count):
        match draw(st.sampled_from(["anything", "falling", "constant", "missing", "jump"])):
            case "anything":
                columns.append(draw(st.lists(anything, min_size=length, max_size=length)))
            case "falling":
                columns.append(list(2.0 * 0.9 ** np.arange(length)))
            case "constant":
                columns.append([draw(st.sampled_from(SIZES))] * length)
            case "missing":
                columns.append([np.nan] * length)
            case "jump":
                columns.append([draw(st.sampled_from(SIZES)) if step == length // 2 else 1.0 for step in range(length)])
    return np.array(columns).T


def is_good(weights, count, may_be_zero=False):
    return (
        weights.shape == (count,)
        and weights.dtype == np.float64
        and bool(np.isfinite(weights).all())
        and (weights.min() >= 0 if may_be_zero else weights.min() > 0)
        and abs(weights.sum() - 1) <= 1e-12
    )


def run_through(data, name, **changes):
    count = data.draw(st.integers(1, 4))
    tasks = [f"task{number}" for number in range(count)]
    config = resolve(section(name, tasks, **changes), COVERAGE)
    balancer = create(config, tasks, COVERAGE)
    balancer.start(np.array(data.draw(st.lists(st.sampled_from(SIZES[1:]), min_size=count, max_size=count))))
    wanted = sorted(signals_of(config) - {"slots"})
    seen = [data.draw(histories(count)) for _ in wanted]
    slots = st.lists(st.sampled_from([0, 1, 2, 7, 999]), min_size=count, max_size=count)
    step = 0
    for row in range(min((len(history) for history in seen), default=3)):
        step += data.draw(st.sampled_from([1, 2, 1000])) if seen else 1
        while not balancer.wants(step) and seen:
            step += 1
        if seen:
            measured = {signal: history[row] for signal, history in zip(wanted, seen, strict=True)}
            balancer.observe(Signals(step, **measured, slots=np.array(data.draw(slots))))
        counts = np.array(data.draw(st.lists(st.sampled_from([0, 1, 10**9]), min_size=count, max_size=count)))
        weights = balancer.weights(counts)
        assert is_good(weights, count, may_be_zero=config.kind == "proportional"), weights
        other = create(config, tasks, COVERAGE)
        other.load_state_dict(json.loads(json.dumps(balancer.state_dict(), allow_nan=False)))
        if config.kind != "random":  # it draws anew for each step
            assert other.weights(counts).tobytes() == balancer.weights(counts).tobytes()
        json.dumps(balancer.record(), allow_nan=False)
        balancer = other


def test_every_method_is_here():
    assert {name.split()[0] for name in SECTIONS} == set(BALANCERS) == set(METHODS)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SECTIONS)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.data())
def test_weights_are_above_0_with_the_sum_1_whatever_is_measured_and_after_each_restart(name, data):
    run_through(data, name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("kind", "key", "value"), ENDS)
@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.data())
def test_settings_at_the_ends_of_what_a_config_allows_give_weights_all_the_same(kind, key, value, data):
    run_through(data, kind, **{key: value})
