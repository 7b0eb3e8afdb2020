import json
import math

import pytest

from mftcoder_coba.config import EarlyStoppingConfig
from mftcoder_coba.training.stopping import BestStep

RATIOS = [{"a": 0.9, "b": 0.5}, {"a": 0.8, "b": 0.7}, {"a": 0.85, "b": 0.6}]


@pytest.mark.parametrize("criterion, best", [("mean_ratio", 1), ("worst_ratio", 2), ("task:a", 2), ("task:b", 1)])
def test_each_criterion_has_its_own_best_step(criterion, best):
    found = BestStep(EarlyStoppingConfig(criterion=criterion))
    for step, ratios in enumerate(RATIOS, start=1):
        found.update(step, ratios)
    assert found.step == best


def test_patience_counts_validations_without_a_new_best():
    found = BestStep(EarlyStoppingConfig(patience=2))
    assert found.update(1, {"a": 0.5}) and not found.exhausted
    assert not found.update(2, {"a": 0.5}) and not found.exhausted
    assert not found.update(3, {"a": 0.6}) and found.exhausted
    assert found.update(4, {"a": 0.4}) and not found.exhausted


def test_without_patience_it_never_stops():
    found = BestStep(EarlyStoppingConfig(patience=None))
    for step in range(1, 100):
        found.update(step, {"a": 1.0 + step})
    assert not found.exhausted


def test_a_ratio_that_is_not_finite_is_never_the_best():
    found = BestStep(EarlyStoppingConfig())
    assert not found.update(1, {"a": math.nan}) and not found.update(2, {"a": -math.inf}) and found.step is None
    assert found.update(3, {"a": 5.0})


def test_state_goes_through_json():
    found = BestStep(EarlyStoppingConfig(patience=3))
    for state in (found.state_dict(), (found.update(1, {"a": 1 / 3}), found.update(2, {"a": 2.0}), found.state_dict())[-1]):
        other = BestStep(EarlyStoppingConfig(patience=3))
        other.load_state_dict(json.loads(json.dumps(state)))
        assert other.state_dict() == state and (other.step, other.value) in [(None, math.inf), (1, 1 / 3)]
