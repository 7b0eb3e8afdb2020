import numpy as np
import pytest

from mftcoder_coba.config import validate
from mftcoder_coba.data import Corpus, TaskData, TrainSchedule
from mftcoder_coba.planning import mixture, plan_steps, training_schedule


def plan(training, samples=50):
    tree = {
        "run": {"name": "x"},
        "model": {"path": "m"},
        "data": {"tasks": [{"name": "a", "train": ["a"]}]},
        "training": {"global_batch_rows": 8, "micro_batch_rows": 4, "learning_rate": 1e-5} | training,
    }
    schedule = TrainSchedule([np.full(samples, 10)], None, 0, 16, "best_fit")
    return plan_steps(validate(tree, "x"), schedule, 2)


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


def test_the_mixture_counts_the_first_epoch():
    def task(samples, length, supervised):
        mask = np.arange(length) >= length - supervised
        return TaskData.from_samples([(np.zeros(length, np.int32), mask)] * samples)

    tree = {
        "run": {"name": "x"},
        "model": {"path": "m"},
        "data": {"tasks": [{"name": "a", "train": ["a"]}, {"name": "b", "train": ["b"]}], "sequence_length": 16, "packing": "none"},
        "training": {"global_batch_rows": 11, "micro_batch_rows": 11, "learning_rate": 1e-5},
    }
    config = validate(tree, "x")
    train = [task(40, 10, 5), task(4, 16, 4)]
    corpus = Corpus(("a", "b"), {"train": train, "valid": [], "test": []}, {}, "mftcoder", 0)
    found = mixture(config, corpus, training_schedule(config, train))
    assert (found.documents, found.tokens, found.rows, found.steps_per_epoch) == (44, 464, 44, 4.0)
    a, b = found.tasks["a"], found.tasks["b"]
    assert (a.documents, a.passes, a.tokens, a.supervised_tokens) == (40, 1.0, 400, 200)
    assert (b.token_share, b.supervised_share) == (64 / 464, 16 / 216)
    # Four of 44 at even distances: one in each of the four steps.
    assert (b.documents_per_step, b.fewest, b.most, b.steps_without) == (1.0, 1, 1, 0)
    # A row of 10 tokens is 16 places wide, as wide as the longest beside it.
    assert found.fill == 464 / (44 * 16)


def test_plan_shows_data_steps_and_balancer_of_a_run_on_more_processes(toy, command_line):
    shown = command_line(1, "plan", "--config", str(toy / "toy.json"), "--gpus", "2", "--set", "training.epochs=3")
    assert shown.returncode == 0, shown.stderr
    assert "Samples" in shown.stdout and "Lengths" in shown.stdout and "The first epoch" in shown.stdout
    assert "8 rows = 2 in a micro-batch x 2 ranks x 2 micro-batches" in shown.stdout and "steps       12 = " in shown.stdout
    assert "slopes over N = 6 observations, weights from observation W = 3 on" in shown.stdout
    refused = command_line(1, "plan", "--config", str(toy / "toy.json"), "--gpus", "3")
    assert refused.returncode == 2 and "not a multiple of micro_batch_rows x ranks" in refused.stderr
