"""Liger's fused loss: what its function is given, and that the objective's numbers are the reference's."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model

from mftcoder_coba.errors import UserError
from mftcoder_coba.objective import MultiTaskObjective, check_liger, liger

FUNCTIONAL = "liger_kernel.transformers.functional"
FACTORS = torch.tensor([0.3, 0.02], dtype=torch.float64)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def calls(monkeypatch):
    """A stand-in with the parameters of liger-kernel 0.8.5: token losses in float32 of logits that are capped in float32."""
    seen = []

    def liger_fused_linear_cross_entropy(
        input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
        reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False, return_token_accuracy=False,
        return_predicted_tokens=False, chunk_mem_const=1,
    ):  # fmt: skip
        assert input.dim() == 2 and target.shape == input.shape[:1] and len(input) > 0 and reduction == "none" and accum_dtype == torch.float32
        assert (target != ignore_index).all() and ce_weight is None and lse_square_scale == label_smoothing == 0.0 and not use_token_scaling
        seen.append(len(input))
        logits = F.linear(input, weight, bias).float()
        return F.cross_entropy(logits if softcap is None else softcap * torch.tanh(logits / softcap), target, reduction="none")

    module = ModuleType(FUNCTIONAL)
    module.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, FUNCTIONAL, module)
    return seen


def batch(reduction="token", supervised=True):
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1) if supervised else torch.full_like(ids, -100)
    labels[:, :3] = -100
    weights = (labels >= 0).float()
    if reduction == "sample":
        weights[1] /= 9
    return ids, torch.arange(12).repeat(2, 1), labels, torch.arange(2)[:, None].repeat(1, 12), weights


def measured(model, kernel, given):
    objective = MultiTaskObjective(model, 2, kernel)
    objective.zero_grad()
    loss, sums = objective(*given, FACTORS)
    loss.backward()
    return loss.detach(), sums, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reduction", ["token", "sample"])
@pytest.mark.parametrize("changes", [{}, {"logit_scale": 0.25}, {"final_logit_softcapping": 1.5}], ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("name", ["phi", "llama_tied"])  # with a bias; tied to the input
def test_losses_and_gradients_are_those_of_the_reference(calls, name, changes, reduction):
    model = tiny_model(name, **changes)
    given = batch(reduction)
    reference, found = measured(model, "torch", given), measured(model, "liger", given)
    assert calls == [18]
    for ours, theirs in zip((*found[:2], *found[2]), (*reference[:2], *reference[2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_batch_without_supervised_tokens_does_not_reach_it(calls):
    loss, sums, gradients = measured(tiny_model("llama"), "liger", batch(supervised=False))
    assert loss == 0 and not sums.any() and not calls and all(not gradient.any() for gradient in gradients)


def test_what_is_only_measured_comes_from_the_reference(calls):
    """Validation, and the passes whose normalisers the balancers' gradient norms need."""
    objective = MultiTaskObjective(tiny_model("llama"), 2, "liger")
    with torch.no_grad():
        objective(*batch(), FACTORS)
    objective(*batch(), None)
    with objective.output_loss.collecting() as passes:
        objective(*batch(), FACTORS)[0].backward()
    assert not calls and passes[0].normalisers.isfinite().all()


def test_where_it_cannot_run_it_is_refused(monkeypatch):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        check_liger(CUDA)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object())
    for version in ("0.5.10", "0.8.4", "0.7"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        with pytest.raises(UserError, match=rf"{version} does not weigh single tokens"):
            check_liger(CUDA)
    for version in ("0.8.5", "0.9.0.dev3", "1.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        check_liger(CUDA)
        with pytest.raises(UserError, match="need a GPU"):
            check_liger(CPU)


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("liger_kernel", "triton"))), reason="needs the packages liger-kernel and triton")
def test_its_kernels_give_the_numbers_of_the_reference():
    program = Path(__file__).with_name("liger_kernels.py")
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    differences = [float(line) for line in result.stdout.splitlines()]
    assert len(differences) == 8 and max(differences) < 2e-6
