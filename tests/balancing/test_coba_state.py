"""What CoBa shows, keeps, restores and refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mftcoder_coba.balancing import Signals, create, resolve
from mftcoder_coba.config import CobaConfig
from mftcoder_coba.errors import UserError

TASKS = ["math", "code", "chat"]


def coba(tasks=TASKS, coverage=4, **config):
    return create(CobaConfig(kind="coba", **config), tasks, coverage)


def observation(step, losses, slots=None):
    return Signals(step, validation_losses=losses, slots=slots)


def observations(count=80, missing=0.2):
    rng = np.random.default_rng(11)
    losses = np.exp(np.cumsum(rng.normal(-0.005, 0.02, (count, 3)), axis=0))
    losses[rng.random(losses.shape) < missing] = np.nan
    return [observation(3 * t, losses[t - 1], (t - 1) % np.array([4, 3, 2])) for t in range(1, count + 1)]


@pytest.mark.parametrize("slope", ["ols", "paired"])
@pytest.mark.parametrize("stop", [0, 2, 7, 37, 63], ids=lambda stop: f"stopped after {stop}")
def test_a_run_stopped_and_restored_through_json_goes_on_bit_for_bit(slope, stop):
    seen = observations()
    whole, before, after = (coba(slope=slope, window=9, warmup=4) for _ in range(3))
    whole.start(np.array([0.9, 1.7, 3.1]))
    before.start(np.array([0.9, 1.7, 3.1]))
    for signals in seen[:stop]:
        whole.observe(signals)
        before.observe(signals)
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    assert after.record() == whole.record()
    assert after.weights(np.ones(3)).tobytes() == whole.weights(np.ones(3)).tobytes()
    for signals in seen[stop:]:
        whole.observe(signals)
        after.observe(signals)
        assert after.record() == whole.record()
        assert after.weights(np.ones(3)).tobytes() == whole.weights(np.ones(3)).tobytes()


def test_loading_replaces_what_the_balancer_had_seen():
    fresh, used = coba(), coba()
    fresh.start(np.ones(3))
    used.start(np.ones(3) * 2)
    for signals in observations():
        used.observe(signals)
    used.load_state_dict(fresh.state_dict())
    assert used.state_dict() == fresh.state_dict()


def test_a_record_holds_plain_json_values_of_the_observation_and_the_next_weights():
    balancer = coba(window=4, warmup=2)
    balancer.start(np.array([2.0, 4.0, 1.0]))
    balancer.observe(observation(1, np.array([1.8, 3.0, 0.5]), np.array([0, 1, 2])))
    balancer.observe(observation(2, np.array([1.6, np.nan, np.inf]), np.array([1, 0, 0])))
    record = json.loads(json.dumps(balancer.record(), allow_nan=False))
    math, code, chat = (record["tasks"][name] for name in TASKS)
    assert list(math) == ["valid_loss", "ratio", "slope", "rcs", "acs", "weight", "slot"]
    assert (math["valid_loss"], math["ratio"], math["slot"]) == (1.6, 0.8, 1)
    assert math["slope"] == pytest.approx(-0.1)
    assert (code["valid_loss"], code["ratio"], code["slope"]) == (None, None, 0.0)
    assert (chat["valid_loss"], chat["ratio"], chat["slope"]) == (None, None, 0.0)
    assert [task["weight"] for task in (math, code, chat)] == balancer.weights(np.ones(3)).tolist()
    assert record["df"] == 1.0 and record["alpha_max"] == 0.0


def test_before_the_first_observation_a_record_knows_only_the_uniform_weight():
    record = coba().record()
    nothing = dict.fromkeys(["valid_loss", "ratio", "slope", "rcs", "acs", "slot"])
    assert record == {"tasks": {name: {**nothing, "weight": 1 / 3} for name in TASKS}, "df": None, "alpha_max": None}


def test_a_caller_that_changes_its_weights_or_record_does_not_change_the_balancer():
    balancer = coba()
    balancer.weights(np.ones(3))[:] = 9.0
    balancer.record()["tasks"]["math"]["weight"] = 9.0
    assert balancer.weights(np.ones(3)).tolist() == [1 / 3] * 3
    assert balancer.record()["tasks"]["math"]["weight"] == 1 / 3


@pytest.mark.parametrize("loss", [0.0, -1.0, np.nan, np.inf])
def test_a_loss_before_training_that_cannot_divide_is_refused_by_the_tasks_name(loss):
    with pytest.raises(UserError, match="task code"):
        coba().start(np.array([1.0, loss, 2.0]))


OTHER_ORDER, OTHER_SLOPE = coba(["math", "chat", "code"]).state_dict(), coba(slope="paired").state_dict()
OTHER_VARIANT = coba(variant="mftcoder").state_dict()


@pytest.mark.parametrize(
    ("state", "named"),
    [(OTHER_ORDER, "chat, code"), (OTHER_SLOPE, "paired"), (OTHER_VARIANT, "mftcoder"), ({}, "another balancer")],
    ids=["order", "slope", "variant", "balancer"],
)
def test_a_state_that_does_not_fit_is_refused(state, named):
    with pytest.raises(UserError, match=named):
        coba().load_state_dict(state)


def test_steps_must_increase_and_observations_must_have_the_shape_of_the_tasks():
    balancer = coba(slope="paired")
    with pytest.raises(ValueError, match="start"):
        balancer.observe(observation(1, np.ones(3), np.zeros(3, int)))
    balancer.start(np.ones(3))
    with pytest.raises(ValueError, match="shape"):
        balancer.observe(observation(1, np.ones(2), np.zeros(3, int)))
    with pytest.raises(ValueError, match="slot"):
        balancer.observe(observation(1, np.ones(3)))
    balancer.observe(observation(2, np.ones(3), np.zeros(3, int)))
    with pytest.raises(ValueError, match="step 2"):
        balancer.observe(observation(2, np.ones(3), np.zeros(3, int)))


@pytest.mark.parametrize(("coverage", "window", "warmup"), [(1, 2, 1), (12, 24, 12), (700, 1400, 700)])
def test_auto_becomes_two_covers_of_window_and_one_of_warmup(coverage, window, warmup):
    resolved = resolve(CobaConfig(kind="coba"), coverage)
    assert (resolved.window, resolved.warmup) == (window, warmup)


def test_given_numbers_are_kept():
    config = CobaConfig(kind="coba", window=30, warmup=3)
    assert resolve(config, 12) == config


def test_coba_without_validation_data_is_refused():
    with pytest.raises(UserError, match="validation data"):
        coba(coverage=0)


def test_paired_slopes_with_a_window_in_which_no_slot_returns_are_refused():
    with pytest.raises(UserError, match="window") as refused:
        coba(coverage=12, slope="paired", window=12)
    assert refused.value.where == "balancer.window"
    coba(coverage=12, slope="paired", window=13)
