"""2 x 2 ranks, as two machines have them: what goes over the network in a step, and that all of them train one model. 2 x 8:
tests/benchmarks/two_nodes.py."""

import json

import pytest
from two_agents import float64_all_reduces, largest_difference, losses, train_on_two_nodes

TASKS, RANKS, STEPS, VALIDATED = 3, 4, 6, (3, 6)


@pytest.fixture(scope="module")
def four_ranks(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("two_nodes") / "out"
    settings = ["run.name=two-nodes", f"training.max_steps={STEPS}", "validation.every_steps=3", "training.micro_batch_rows=1"]
    return train_on_two_nodes(toy / "toy.json", out, RANKS // 2, *settings)


def test_the_ranks_are_dealt_out_to_two_nodes(four_ranks):
    assert [record["node"] for record in four_ranks] == ["0", "0", "1", "1"]


def test_all_ranks_end_with_the_same_weights(four_ranks):
    assert len({record["weights"] for record in four_ranks}) == 1


def test_a_step_has_one_all_reduce_of_counts_one_of_sums_one_of_validation_sums_and_a_flag(four_ranks):
    counts, sums, validation, stop = 2 * TASKS + 1, TASKS + RANKS, 3 * TASKS, 1
    for record in four_ranks:
        by_step = float64_all_reduces(record)
        plain = {step: sizes for step, sizes in by_step.items() if step not in VALIDATED}
        assert plain == {step: [counts, sums, validation, stop] for step in range(1, STEPS + 1) if step not in VALIDATED}
        for step in VALIDATED:  # the full validation has one of its own
            assert by_step[step][:4] == [counts, sums, validation, stop] and by_step[step].count(validation) == 2


def test_losses_are_those_of_one_process(four_ranks, toy, command_line):
    settings = {"run.name": "one-node", "training.max_steps": STEPS, "validation.every_steps": 3, "validation.balancer_rows_per_rank": RANKS}
    done = command_line(1, "train", "--config", str(toy / "toy.json"), *(w for key, value in settings.items() for w in ("--set", f"{key}={value}")))
    assert done.returncode == 0, done.stderr
    environments = [json.loads((toy / "runs" / name / "environment.json").read_text()) for name in ("two-nodes", "one-node")]
    assert [environment["world_size"] for environment in environments] == [RANKS, 1]
    assert largest_difference(losses(toy / "runs" / "two-nodes"), losses(toy / "runs" / "one-node")) < 1e-4
