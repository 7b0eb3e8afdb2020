"""Gradient signals of real DeepSpeed steps on two processes, against plain PyTorch on one."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

WORKERS = str(Path(__file__).with_name("gradient_workers.py"))
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.3}
EXPERTS = {"kind": "cgc_lora", "clusters": {"one": ["a", "b"], "two": ["c"]}, "common_experts": 1, "task_experts": 1, "rank": 6, "dropout": 0.1}
VARIANTS = {
    **{f"stage {stage}": {"stage": stage} for stage in range(4)},
    "stage 2, sample means": {"stage": 2, "reduction": "sample"},
    "stage 2, checkpointing": {"stage": 2, "gradient_checkpointing": True},
    "stage 3, checkpointing": {"stage": 3, "gradient_checkpointing": True},
    "stage 2, lora with dropout": {"stage": 2, "adapter": LORA},
    "stage 3, lora with dropout": {"stage": 3, "adapter": LORA},
    "stage 2, experts with dropout": {"stage": 2, "adapter": EXPERTS},
    "stage 3, experts with dropout": {"stage": 3, "adapter": EXPERTS},
    "stage 2, bfloat16": {"stage": 2, "dtype": "bfloat16"},
    "stage 3, bfloat16": {"stage": 3, "dtype": "bfloat16"},
}
FLOAT32_WHOLE = [name for name, variant in VARIANTS.items() if "adapter" not in variant and "dtype" not in variant]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("signals") / "out.pt"
    run_ranks(WORKERS, "observe", 2, list(VARIANTS.values()), str(out))
    return dict(zip(VARIANTS, torch.load(out), strict=True))


def explicit(state, rows, reduction):
    """([K, n] gradients of the tasks' mean losses at the output layer, [K, m] with respect to all parameters), by 2 K backward passes."""
    from workers import TASKS, collate, data, tiny_model

    model = tiny_model("llama_tied")
    model.load_state_dict(state, strict=False)
    batch = collate(rows, data()[0], len(TASKS), 0, reduction)
    weight = model.lm_head.weight.detach().clone().requires_grad_()

    def gradients(hidden, layer, parameters):
        losses = F.cross_entropy((hidden @ layer.T).transpose(1, 2), batch.labels, reduction="none") * batch.loss_weights
        means = [losses[batch.task_ids == task].sum() / batch.denominators[task] for task in range(len(TASKS))]
        found = [torch.autograd.grad(mean, parameters, retain_graph=True) for mean in means]
        return np.stack([torch.cat([gradient.flatten() for gradient in one]).double().numpy() for one in found])

    hidden = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids).last_hidden_state
    return gradients(hidden.detach(), weight, [weight]), gradients(hidden, model.lm_head.weight, list(model.parameters()))


@pytest.mark.parametrize("name", FLOAT32_WHOLE)
def test_norms_and_products_equal_explicit_backward_passes_on_one_process(results, name):
    from gradient_workers import Stream
    from workers import data

    for number, signals in enumerate(results[name]["signals"]):
        before, after = results[name]["states"][number : number + 2]
        output, full = explicit(before, data()[1], VARIANTS[name].get("reduction", "token"))
        valid_output, valid_full = explicit(after, Stream().mini_batch(number)[0], "token")
        expected = {
            "output_gradient_norms": np.linalg.norm(output, axis=1),
            "validation_output_gradient_norms": np.linalg.norm(valid_output, axis=1),
            "output_gradient_products": output @ valid_output.sum(0),
        }
        if VARIANTS[name]["stage"] < 3:
            expected["full_gradient_products"] = full @ valid_full.sum(0)
        assert signals["slots"] == [number] * 3
        for signal, values in expected.items():
            np.testing.assert_allclose(signals[signal], values, rtol=1e-5, err_msg=signal)
        assert ("full_gradient_products" in signals) == (VARIANTS[name]["stage"] < 3)


@pytest.mark.parametrize("name", VARIANTS)
def test_measuring_changes_no_bit_of_what_is_trained(results, name):
    assert results[name]["unchanged_by_measuring"]
    first, *_, last = results[name]["states"]
    assert any(not torch.equal(first[key], last[key]) for key in first)


@pytest.mark.parametrize("name", VARIANTS)
def test_signals_are_the_same_bits_on_all_ranks(results, name):
    assert results[name]["same_on_all_ranks"] and results[name]["bad_same_on_all_ranks"]


@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_states_cost_no_forward_pass_of_their_own(results, name):
    """A step has two micro-batches and the validation mini-batch two passes; the exact option makes passes past the engine's module call."""
    assert results[name]["forward_passes"] == 2 * (2 + 2)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant["stage"] < 3])
def test_gradients_of_the_exact_option_add_up_to_that_of_the_step_with_the_same_dropout(results, name):
    ours, theirs = results[name]["gradient"], results[name]["step_gradient"]
    ours, padding = ours[: len(theirs)], ours[len(theirs) :]
    assert not padding.any() and len(padding) < 2
    assert (ours - theirs).norm() <= (0.02 if "bfloat16" in name else 1e-5) * theirs.norm()


def test_stages_agree_where_dropout_and_precision_leave_no_other_reference(results):
    for kind, tolerance in (("lora with dropout", 1e-5), ("bfloat16", 0.02)):
        for two, three in zip(results[f"stage 2, {kind}"]["signals"], results[f"stage 3, {kind}"]["signals"], strict=True):
            for signal in ("output_gradient_norms", "validation_output_gradient_norms", "output_gradient_products"):
                np.testing.assert_allclose(three[signal], two[signal], rtol=tolerance, err_msg=signal)


@pytest.mark.parametrize("name", VARIANTS)
def test_numbers_that_are_not_finite_are_missing_and_others_stay(results, name):
    """The last rank's first micro-batch holds tasks a and b, with NaN in their losses."""
    bad = results[name]["bad"]
    for signal in ("train_losses", "output_gradient_norms", "output_gradient_products"):
        assert np.isnan(bad[signal]).tolist() == [True, True, False], signal
    assert np.isfinite(bad["validation_losses"]).all() and np.isfinite(bad["validation_output_gradient_norms"]).all()
