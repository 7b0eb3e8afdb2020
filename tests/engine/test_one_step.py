"""The gradient of one optimizer step on 1, 2 and 4 real processes, for every ZeRO stage."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

WORKERS = str(Path(__file__).with_name("workers.py"))
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.0}
CGC = {"kind": "cgc_lora", "clusters": {"one": ["a", "b"], "two": ["c"]}, "common_experts": 1, "task_experts": 1, "rank": 6, "dropout": 0.0}
VARIANTS = [
    *({"stage": stage} for stage in range(4)),
    {"stage": 3, "adapter": LORA},
    {"stage": 2, "adapter": LORA},
    *({"stage": stage, "adapter": CGC} for stage in range(4)),
    {"stage": 3, "adapter": CGC, "gradient_checkpointing": True},
    {"stage": 3, "adapter": CGC, "dtype": "bfloat16"},
    {"stage": 2, "reduction": "sample"},
    {"stage": 3, "gradient_checkpointing": True},
    {"stage": 0, "gradient_clipping": 0.01},
    {"stage": 2, "gradient_clipping": 0.01},
    {"stage": 3, "gradient_clipping": 0.01},
    *({"stage": stage, "dtype": "bfloat16"} for stage in range(4) if stage != 0),
    {"stage": 0, "dtype": "bfloat16"},
]
LAYOUTS = {"1 x 8": (1, 8), "2 x (2 of 2)": (2, 2), "4 x 2": (4, 2)}  # processes, rows of a micro-batch


def name(variant):
    return " ".join(f"{key}={value['kind'] if key == 'adapter' else value}" for key, value in variant.items())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    found = {}
    for layout, (world_size, rows) in LAYOUTS.items():
        out = folder / f"{world_size}.pt"
        run_ranks(WORKERS, "gradients", world_size, rows, VARIANTS, str(out))
        found[layout] = dict(zip(map(name, VARIANTS), torch.load(out), strict=True))
    return found


def largest_relative_difference(ours, theirs):
    return max(((ours[key] - theirs[key]).norm() / theirs[key].norm().clamp_min(1e-12)).item() for key in theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", range(4))
def test_gradients_equal_those_of_one_process_without_zero(results, layout, stage):
    reference, ours = results["1 x 8"]["stage=0"], results[layout][f"stage={stage}"]
    assert set(ours["gradients"]) == set(reference["gradients"])
    assert largest_relative_difference(ours["gradients"], reference["gradients"]) <= 1e-5
    assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    assert ours["losses"] == pytest.approx(reference["losses"], rel=1e-6)


def test_the_one_process_gradient_is_that_of_the_written_out_objective(results):
    """L = sum_k w_k S_k / N_k by plain PyTorch on one big batch."""
    import workers

    config = workers.configured(0, 8)
    torch.manual_seed(0)
    model = workers.tiny_model("llama_tied")
    task_data, rows = workers.data()
    batch = workers.collate(rows, task_data, 3, 0, "token")
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    weights = [config.balancer.weights[task] / 8 for task in workers.TASKS]
    loss = sum(weight * losses[(batch.task_ids == task) & (batch.labels >= 0)].mean() for task, weight in enumerate(weights))
    loss.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert largest_relative_difference(results["4 x 2"]["stage=3"]["gradients"], expected) <= 1e-5
    assert results["4 x 2"]["stage=3"]["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_the_data_is_as_uneven_as_it_should_be():
    """One task is on one rank only, and ranks have different numbers of supervised tokens."""
    import workers

    task_data, rows = workers.data()
    per_rank = [workers.collate(rows[start : start + 2], task_data, 3, 0, "token").tokens for start in range(0, 8, 2)]
    assert sum(tokens[2] > 0 for tokens in per_rank) == 1
    assert len({int(tokens.sum()) for tokens in per_rank}) > 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "variant",
    [
        "stage=3 adapter=lora",
        "stage=2 adapter=lora",
        *(f"stage={stage} adapter=cgc_lora" for stage in range(4)),
        "stage=2 reduction=sample",
        "stage=3 gradient_checkpointing=True",
    ],
)
def test_adapters_sample_means_and_checkpointing_do_not_depend_on_the_layout(results, layout, variant):
    reference, ours = results["1 x 8"][variant], results[layout][variant]
    assert largest_relative_difference(ours["gradients"], reference["gradients"]) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["stage=1", "stage=2", "stage=3", "stage=3 gradient_checkpointing=True"])
def test_experts_get_the_same_gradients_in_every_stage(results, layout, variant):
    stage, _, more = variant.partition(" ")
    ours = results[layout][f"{stage} adapter=cgc_lora {more}".strip()]
    reference = results["1 x 8"]["stage=0 adapter=cgc_lora"]
    assert set(ours["gradients"]) == set(reference["gradients"])
    assert largest_relative_difference(ours["gradients"], reference["gradients"]) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_in_bfloat16_agree_within_its_precision(results, layout):
    ours, reference = results[layout]["stage=3 adapter=cgc_lora dtype=bfloat16"], results["1 x 8"]["stage=0 adapter=cgc_lora"]
    assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=0.05)
    assert ours["losses"] == pytest.approx(reference["losses"], rel=0.01)


def test_only_adapter_parameters_are_trained_and_saved(results):
    assert all("lora_" in key for key in results["2 x (2 of 2)"]["stage=3 adapter=lora"]["parameters"])


def test_checkpointing_changes_no_gradient(results):
    ours = results["4 x 2"]["stage=3 gradient_checkpointing=True"]
    assert largest_relative_difference(ours["gradients"], results["1 x 8"]["stage=0"]["gradients"]) <= 1e-5


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_clipping_uses_the_norm_of_the_whole_gradient(results, stage):
    unclipped = results["1 x 8"]["stage=0"]
    norm = torch.cat([gradient.flatten() for gradient in unclipped["gradients"].values()]).norm().item()
    for layout in LAYOUTS:
        assert results[layout][f"stage={stage} gradient_clipping=0.01"]["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("stage", range(4))
def test_bfloat16_steps_agree_between_stages_within_its_precision(results, stage):
    reference = results["1 x 8"]["stage=0"]
    for layout in LAYOUTS:
        ours = results[layout][f"stage={stage} dtype=bfloat16"]
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=0.02)
        # One AdamW step moves nearly every parameter by the learning rate: the first step's bias correction is right.
        moved = [
            (ours["parameters"][key].float() - reference["parameters"][key]).abs().mean().item()
            for key in reference["parameters"]
            if "norm" not in key
        ]
        assert max(moved) < 5e-4
