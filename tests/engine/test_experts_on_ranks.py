"""The router's loss in a step on real processes: the same for the same micro-batches, however they are spread over ranks and ZeRO stages."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

WORKERS = str(Path(__file__).with_name("router_workers.py"))
COEFFICIENT = 0.5


def steps(folder, world_size, architecture, stages, coefficient=COEFFICIENT):
    out = str(folder / f"{world_size}-{architecture}-{coefficient}.pt")
    run_ranks(WORKERS, "step", world_size, architecture, stages, coefficient, out)
    return torch.load(out, weights_only=False)


# DeepSpeed treats Mixtral's blocks as leaves under ZeRO-3, and OLMoE's not.
@pytest.mark.parametrize("architecture", ["mixtral", "olmoe"])
def test_ranks_and_zero_stages_do_not_change_it(tmp_path, architecture):
    (alone,) = steps(tmp_path, 1, architecture, [0])
    expected = alone["outcome"]
    assert expected.router_loss > 1.0  # 1: perfect balance
    assert expected.losses == pytest.approx(alone["before"], rel=1e-6)  # the tasks' losses stay without it
    for found in steps(tmp_path, 2, architecture, [0, 2, 3]):
        outcome = found["outcome"]
        assert outcome.router_loss == pytest.approx(expected.router_loss, rel=1e-6)
        assert outcome.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        for name, values in alone["parameters"].items():
            torch.testing.assert_close(found["parameters"][name], values, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_it_is_trained_on_and_can_be_switched_off(tmp_path):
    (with_it,), (without,) = (steps(tmp_path, 1, "mixtral", [0], coefficient) for coefficient in (COEFFICIENT, 0.0))
    assert without["outcome"].router_loss is None
    assert with_it["outcome"].grad_norm != pytest.approx(without["outcome"].grad_norm, rel=1e-3)
    assert with_it["outcome"].loss == without["outcome"].loss
