import pytest

from mftcoder_coba.config import TrainingConfig
from mftcoder_coba.training.learning_rate import learning_rate


def rates(schedule, warmup=4, total=20, minimum=0.1):
    config = TrainingConfig(global_batch_rows=1, micro_batch_rows=1, learning_rate=1.0, min_learning_rate=minimum, schedule=schedule)
    return [learning_rate(config, step, warmup, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_ends_at_the_full_rate(schedule):
    assert rates(schedule)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_last_step_has_the_smallest_rate_and_half_way_is_half_way(schedule):
    found = rates(schedule)
    assert found[-1] == pytest.approx(0.1) and found[11] == pytest.approx(0.55)
    assert all(later < earlier for earlier, later in zip(found[3:], found[4:], strict=False))


def test_constant_stays():
    assert set(rates("constant")[4:]) == {1.0}


def test_without_warm_up_the_first_step_is_already_on_the_way_down():
    assert rates("linear", warmup=0, total=10, minimum=0.0)[0] == pytest.approx(0.9)
