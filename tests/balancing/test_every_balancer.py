"""What holds for every method: sum 1, positive, repeatable, restored bit for bit, absent tasks untouched."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftcoder_coba.balancing import METHODS, VALIDATION_SIGNALS, Signals, create, resolve, signals_of
from mftcoder_coba.config import (
    CobaConfig,
    DwaConfig,
    FamoConfig,
    FixedConfig,
    GradNormConfig,
    LbtwConfig,
    MetaWeightingConfig,
    ProportionalConfig,
    RandomConfig,
    UncertaintyConfig,
    UniformConfig,
)
from mftcoder_coba.errors import UserError

TASKS = ["math", "code", "chat"]
COUNTS = np.array([10, 20, 30])
COVERAGE = 4
INITIAL = np.array([0.9, 1.7, 3.1])
# Those that learn task by task; CoBa counts a missing loss as a slope and has tests of its own.
LEARNED = {
    "lbtw": LbtwConfig(kind="lbtw"),
    "lbtw*": LbtwConfig(kind="lbtw", signal="validation"),
    "dwa": DwaConfig(kind="dwa", window=3),
    "uncertainty": UncertaintyConfig(kind="uncertainty"),
    "famo": FamoConfig(kind="famo"),
    "famo*": FamoConfig(kind="famo", signal="validation"),
    "gradnorm": GradNormConfig(kind="gradnorm"),
    "gradnorm*": GradNormConfig(kind="gradnorm", signal="validation"),
    "metaweighting": MetaWeightingConfig(kind="metaweighting"),
    "metaweighting of all": MetaWeightingConfig(kind="metaweighting", gradients="all"),
}
ALL = LEARNED | {
    "coba": CobaConfig(kind="coba"),
    "coba paired": CobaConfig(kind="coba", slope="paired"),
    "coba rcs": CobaConfig(kind="coba", scores=["rcs"], update_interval=2),
    "coba mftcoder": CobaConfig(kind="coba", variant="mftcoder"),
    "coba mftcoder every second": CobaConfig(kind="coba", variant="mftcoder", update_interval=2),
    "uniform": UniformConfig(kind="uniform"),
    "proportional": ProportionalConfig(kind="proportional"),
    "fixed": FixedConfig(kind="fixed", weights={"math": 1.0, "code": 2.0, "chat": 3.0}),
    "random": RandomConfig(kind="random"),
}
LOSSES = ("train_losses", "train_losses_after", "validation_losses", "validation_losses_before")
NORMS = ("output_gradient_norms", "validation_output_gradient_norms")
PRODUCTS = ("output_gradient_products", "full_gradient_products")
MEASURED = (*LOSSES, *NORMS, *PRODUCTS)
every = pytest.mark.parametrize("config", ALL.values(), ids=ALL)
learned = pytest.mark.parametrize("config", LEARNED.values(), ids=LEARNED)


def begun(config):
    balancer = create(config, TASKS, COVERAGE)
    balancer.start(INITIAL)
    return balancer


def measurements(seed=11, count=60, missing=0.2):
    """The signals of `count` steps, all fields."""
    rng = np.random.default_rng(seed)
    positive = np.exp(np.cumsum(rng.normal(-0.005, 0.05, (count, len(LOSSES + NORMS), 3)), axis=0))
    values = np.concatenate([positive, rng.normal(0.01, 0.05, (count, len(PRODUCTS), 3))], axis=1)
    values[rng.random(values.shape) < missing] = np.nan
    slots = np.arange(count)[:, None] % [4, 3, 2]
    return [Signals(t + 1, **dict(zip(MEASURED, values[t], strict=True)), slots=slots[t]) for t in range(count)]


def steps(balancer, seen):
    """Runs the loop over `seen`; the weights that each step was trained with, and the record after it."""
    result = []
    for signals in seen:
        weights = balancer.weights(COUNTS)
        if balancer.wants(signals.step):
            balancer.observe(signals)
        result.append((weights.tobytes(), json.dumps(balancer.record(), allow_nan=False)))
    return result


def test_every_method_is_here():
    assert {config.kind for config in ALL.values()} == set(METHODS)


@every
@pytest.mark.parametrize("stop", [0, 1, 5, 8, 33])
def test_a_run_stopped_anywhere_and_restored_through_json_goes_on_bit_for_bit(config, stop):
    whole, before, after = begun(config), begun(config), create(config, TASKS, COVERAGE)
    seen = measurements()
    steps(whole, seen[:stop])
    steps(before, seen[:stop])
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    assert after.state_dict() == before.state_dict()
    if config.kind not in ("uniform", "proportional", "fixed"):  # those show what they gave, and a restored one gave nothing
        assert after.record() == whole.record()
    assert steps(after, seen[stop:]) == steps(whole, seen[stop:])
    assert after.state_dict() == whole.state_dict()


@every
def test_equal_runs_have_equal_bits(config):
    assert steps(begun(config), measurements()) == steps(begun(config), measurements())


@every
def test_taking_a_state_or_a_record_does_not_tie_it_to_the_run(config):
    balancer = begun(config)
    steps(balancer, measurements()[:10])
    state, record = balancer.state_dict(), balancer.record()
    kept = json.dumps([state, record])
    steps(balancer, measurements()[10:])
    assert json.dumps([state, record]) == kept


@every
def test_a_balancer_needs_only_the_signals_that_it_declares(config):
    full, sparse = begun(config), begun(config)
    assert full.signals == signals_of(config) and full.signals <= set(MEASURED)
    kept = full.signals | {"step", "slots"}
    few = [Signals(**{name: value for name, value in vars(signals).items() if name in kept}) for signals in measurements()]
    assert steps(sparse, few) == steps(full, measurements())


@learned
def test_an_absent_task_leaves_its_part_of_the_state_as_it_is(config):
    balancer = begun(config)
    seen = measurements(missing=0.0)
    steps(balancer, seen[:20])
    before = dict(balancer.state)
    for signals in seen[20:25]:
        absent = {name: np.where([True, False, True], getattr(signals, name), np.nan) for name in MEASURED}
        balancer.observe(Signals(signals.step, **absent))
    for name, values in balancer.state.items():
        assert values[..., 1].tobytes() == before[name][..., 1].tobytes()
    assert any(values[..., 0].tobytes() != before[name][..., 0].tobytes() for name, values in balancer.state.items())


@learned
def test_steps_must_increase_and_measurements_must_have_the_shape_of_the_tasks(config):
    balancer = begun(config)
    with pytest.raises(ValueError, match="shape"):
        balancer.observe(Signals(1, **dict.fromkeys(MEASURED, np.ones(2))))
    balancer.observe(Signals(2, **dict.fromkeys(MEASURED, np.ones(3))))
    with pytest.raises(ValueError, match="step 2"):
        balancer.observe(Signals(2, **dict.fromkeys(MEASURED, np.ones(3))))


@learned
def test_a_state_of_other_tasks_or_of_another_balancer_is_refused(config):
    with pytest.raises(UserError, match="chat, code"):
        begun(config).load_state_dict(create(config, ["math", "chat", "code"], COVERAGE).state_dict())
    with pytest.raises(UserError, match=f"another balancer than {config.kind}"):
        begun(config).load_state_dict(begun(ALL["random"]).state_dict())


@pytest.mark.parametrize(
    ("ours", "theirs", "where"),
    [
        ("lbtw", "lbtw*", "balancer.signal"),
        ("famo", "famo*", "balancer.signal"),
        ("gradnorm", "gradnorm*", "balancer.signal"),
        ("metaweighting", "metaweighting of all", "balancer.gradients"),
    ],
)
def test_a_state_of_other_signals_is_refused(ours, theirs, where):
    with pytest.raises(UserError) as refused:
        begun(LEARNED[ours]).load_state_dict(begun(LEARNED[theirs]).state_dict())
    assert refused.value.where == where


# What to change where there is no validation data; the other methods do without.
WAY_OUT = {
    "lbtw*": ("balancer.signal", 'set this to "train"'),
    "famo*": ("balancer.signal", 'set this to "train"'),
    "gradnorm*": ("balancer.signal", 'set this to "train"'),
    "metaweighting": ("balancer.kind", "choose another balancer"),
    "metaweighting of all": ("balancer.kind", "choose another balancer"),
} | {name: ("balancer.kind", "choose another balancer") for name in ALL if name.startswith("coba")}


@pytest.mark.parametrize("name", ALL)
def test_without_validation_data_only_a_method_that_measures_it_is_refused(name):
    config = ALL[name]
    if name not in WAY_OUT:
        assert resolve(config, 0) == config
        return
    where, instead = WAY_OUT[name]
    with pytest.raises(UserError, match=f"{config.kind} needs validation data") as refused:
        resolve(config, 0)
    assert refused.value.where == where and refused.value.fix.endswith(instead)


def test_a_signal_takes_validation_data_if_and_only_if_its_name_or_its_products_say_so():
    assert VALIDATION_SIGNALS == {name for name in MEASURED if name.startswith("validation") or name in PRODUCTS}


strange = st.sampled_from([0.0, 1.0, -1.0, 5e-324, 1e-300, 1e-160, 1e-8, 1e99, 1e150, 1.7e308, np.nan, np.inf, -np.inf])
number = st.floats(-10, 10) | strange


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("config", [config for config in ALL.values() if signals_of(config)], ids=[name for name in ALL if signals_of(ALL[name])])
@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.data())
def test_weights_are_positive_and_sum_to_one_whatever_is_observed(config, data):
    balancer = begun(config)
    row = st.lists(number, min_size=3 * len(balancer.signals), max_size=3 * len(balancer.signals))
    for step, values in enumerate(data.draw(st.lists(row, min_size=1, max_size=16)), start=1):
        measured = dict(zip(sorted(balancer.signals), np.array(values).reshape(-1, 3), strict=True))
        if balancer.wants(step):
            balancer.observe(Signals(step, **measured, slots=np.array([step % 2] * 3)))
        weights = balancer.weights(COUNTS)
        assert weights.dtype == np.float64 and weights.shape == (3,)
        assert weights.min() > 0 and abs(weights.sum() - 1) <= 1e-12
    json.dumps([balancer.record(), balancer.state_dict()], allow_nan=False)


@pytest.mark.parametrize("name", [name for name, config in ALL.items() if not signals_of(config)])
def test_weights_that_measure_nothing_are_positive_and_sum_to_one(name):
    balancer = begun(ALL[name])
    for _ in range(20):
        weights = balancer.weights(COUNTS)
        assert weights.dtype == np.float64 and weights.min() > 0 and abs(weights.sum() - 1) <= 1e-12


@learned
def test_weights_follow_the_tasks_when_their_order_changes(config):
    order = [2, 0, 1]
    ours, theirs = begun(config), create(config, [TASKS[k] for k in order], COVERAGE)
    theirs.start(INITIAL[order])
    for signals in measurements():
        ours.observe(signals)
        theirs.observe(Signals(signals.step, **{name: getattr(signals, name)[order] for name in MEASURED}))
        np.testing.assert_allclose(theirs.weights(COUNTS), ours.weights(COUNTS)[order], rtol=1e-10)
    assert np.ptp(ours.weights(COUNTS)) > 0.01
