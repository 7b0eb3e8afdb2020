"""Bad numbers and ranks that disagree, on real processes."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

WORKERS = str(Path(__file__).with_name("workers.py"))
VARIANTS = [{"stage": stage, "dtype": dtype} for stage in range(4) for dtype in ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "out.pt"
    run_ranks(WORKERS, "bad_numbers", 2, VARIANTS, str(out))
    return torch.load(out)


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=lambda number: "stage {stage} {dtype}".format(**VARIANTS[number]))
def test_a_loss_that_is_not_finite_on_one_rank_never_reaches_the_optimizer(outcomes, number):
    assert outcomes[number] == {"skipped": [False, True, False], "unchanged": True, "then_changed": True, "finite": True}


def test_a_rank_whose_weights_differ_by_one_bit_stops_the_run_and_is_named(tmp_path):
    results = run_ranks(WORKERS, "disturbed_weights", 4, 2, str(tmp_path / "unchanged"), check=False)
    assert all(result.returncode != 0 for result in results)
    for result in results:
        assert "WeightMismatchError: the task weights of rank 2 differ" in result.stdout
    assert torch.load(tmp_path / "unchanged") is True
