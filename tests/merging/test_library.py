"""The methods of mergekit, beside mergekit's own program on the same folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from mergekit.sparsify import sparsify
from ranks import run_ranks
from safetensors.torch import load_file

from mftcoder_coba.merging import METHODS, library, merge
from mftcoder_coba.merging.library import LIBRARY_METHODS, LibraryRule

WEIGHTS = (0.5, 0.2, 0.3)


def merged_by_mergekit(models: Path, out: Path, method: str, weights: tuple[float, ...] | None, **parameters) -> dict[str, torch.Tensor]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    sources = [{"model": str(models / f"model{number}")} for number in range(3)]
    for source, weight in zip(sources, weights or [], strict=False):
        source["parameters"] = {"weight": weight} | parameters
    tree = {"merge_method": method, "models": sources, "dtype": "float32"}
    if method != "linear":
        tree["base_model"] = str(models / "base")
    run_merge(MergeConfiguration.model_validate(tree), str(out), MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False))
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
@pytest.mark.parametrize(
    ("method", "weights", "options"),
    [
        ("linear", WEIGHTS, {}),
        ("task_arithmetic", WEIGHTS, {}),
        ("ties", WEIGHTS, {"density": 0.3}),
        ("model_stock", None, {}),
    ],
)
def test_a_method_gives_what_mergekit_gives(write_models, tmp_path, architecture, method, weights, options):
    models = write_models(architecture)
    expected = merged_by_mergekit(models, tmp_path / "theirs", method, weights, **options)
    given = options | ({"weight": weights} if weights else {})
    merge(str(models / "base"), [models / f"model{number}" for number in range(3)], method, tmp_path / "ours", **given)
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-6), name
        assert not torch.equal(tensor, load_file(models / "base" / "model.safetensors")[name])


def random_tensors(count: int = 3, shape: tuple[int, ...] = (40, 50)) -> list[torch.Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_a_large_tensor_is_merged_in_parts_as_mergekit_merges_it_whole(monkeypatch, method):
    """To the bit, though only one model is read at a time; DARE with the same state of torch's generator."""
    monkeypatch.setattr(library, "CHUNK_SCALARS", 96)
    base, *models = random_tensors(4)
    parameters = {"weight": WEIGHTS} | ({"density": 0.4} if "density" in METHODS[method].options else {})
    states = []
    monkeypatch.setattr(library, "sparsify", lambda *args, **more: states.append(torch.random.get_rng_state()) or sparsify(*args, **more))
    found = LibraryRule(method, parameters).merge("w", base, models)
    with torch.random.fork_rng(devices=[]):
        if states:
            torch.random.set_rng_state(states[0])
        tensors, base_index = (models, None) if method == "linear" else ([base, *models], 0)
        expected = merge_tensors(tensors, method, parameters=parameters, base_index=base_index, dtype=torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cosine", [-0.25, 0.0, 0.4, 1.0])
def test_model_stock_of_a_large_tensor_is_that_of_the_whole_tensor(monkeypatch, cosine):
    """Also where the updates have nothing in common, are the same, or point away from each other."""
    monkeypatch.setattr(library, "CHUNK_SCALARS", 96)
    base, common, *others = (tensor.double() for tensor in random_tensors(5))
    away = [other - 0.3 * sum(others) / 3 for other in others]  # with pairwise cosines near -1/4
    own = away if cosine < 0 else others
    models = [base + max(cosine, 0) ** 0.5 * common + (1 - max(cosine, 0)) ** 0.5 * each for each in own]
    found = LibraryRule("model_stock", {}).merge("w", base, models)
    expected = merge_tensors([base, *models], "model_stock", base_index=0)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(LibraryRule("model_stock", {}).merge("w", base, [base, base]), base)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dares_masks_follow_the_seed_and_the_name_and_leave_the_global_generator_alone(method):
    base, *models = random_tensors(4)
    rules = [LibraryRule(method, {"weight": WEIGHTS, "density": 0.5}, seed) for seed in (0, 0, 1)]
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, same, other = (rule.merge("w", base, models) for rule in rules)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, rules[0].merge("v", base, models))


def test_dare_keeps_that_share_of_an_update_scaled_so_that_it_stays_in_the_mean():
    base, model = torch.zeros(100_000), torch.ones(100_000)
    merged = LibraryRule("dare_linear", {"weight": (1.0,), "density": 0.25}).merge("w", base, [model])
    kept = merged != 0
    assert kept.double().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 100_000) ** 0.5)
    assert merged[kept].double().mean().item() == pytest.approx(4, rel=0.03)


@pytest.mark.parametrize("method", [name for name in LIBRARY_METHODS if name != "model_stock"])
def test_results_have_the_dtype_of_the_models_and_are_computed_in_float32(method):
    base, *models = random_tensors(4)
    parameters = {"weight": WEIGHTS} | ({"density": 1.0} if "density" in METHODS[method].options else {})
    rounded = [tensor.bfloat16() for tensor in (base, *models)]
    merged = LibraryRule(method, parameters).merge("w", rounded[0], rounded[1:])
    exact = LibraryRule(method, parameters).merge("w", rounded[0].float(), [tensor.float() for tensor in rounded[1:]])
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.bfloat16())


def test_mergekit_is_imported_for_its_own_methods_only(llamas, tmp_path):
    worker = str(Path(__file__).with_name("import_workers.py"))
    (result,) = run_ranks(worker, "merge_with_each", 1, str(llamas), str(tmp_path), ["parameter_selection", "norm_rescaled_average", "linear"])
    assert result.stdout.split()[-3:] == ["False", "False", "True"]
