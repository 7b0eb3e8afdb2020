import numpy as np
import pytest

from mftcoder_coba.config import validate
from mftcoder_coba.data import TrainSchedule
from mftcoder_coba.planning import plan_steps


def plan(training, samples=50):
    tree = {
        "run": {"name": "x"},
        "model": {"path": "m"},
        "data": {"tasks": [{"name": "a", "train": ["a"]}]},
        "training": {"global_batch_rows": 8, "micro_batch_rows": 4, "learning_rate": 1e-5} | training,
    }
    schedule = TrainSchedule([np.full(samples, 10)], None, 0, 16, "best_fit")
    return plan_steps(validate(tree, "x"), schedule, 2, 1)


def test_epochs_become_steps_and_the_last_step_may_be_short():
    found = plan({"epochs": 1})
    assert (found.rows_per_epoch, found.total_steps, found.end_row, found.epochs) == (50, 7, 50, 1.0)


def test_max_steps_is_an_upper_bound():
    assert plan({"epochs": 3, "max_steps": 5}).total_steps == 5 and plan({"epochs": 3, "max_steps": 5}).end_row is None
    assert plan({"epochs": 1, "max_steps": 500}).total_steps == 7
    assert plan({"epochs": None, "max_steps": 500}).total_steps == 500 and plan({"epochs": None, "max_steps": 500}).epochs == 80.0


@pytest.mark.parametrize("given, steps", [(0.1, 10), (0.0, 0), (25, 25), (1, 1)])
def test_warm_up_below_one_is_a_part_of_all_steps(given, steps):
    assert plan({"epochs": None, "max_steps": 100, "warmup_steps": given}).warmup_steps == steps
