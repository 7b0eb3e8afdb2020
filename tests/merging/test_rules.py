"""Parameter selection and the norm-rescaled average, as functions of tensors."""

from __future__ import annotations

import hashlib
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mftcoder_coba.merging import rules
from mftcoder_coba.merging.rules import NormRescaledAverage, ParameterSelection, uniform_integers

SCALARS = 200_000


def equal_parts(models: int) -> tuple[float, ...]:
    return (1 / models,) * models


def numbered(models: int, count: int = SCALARS) -> list[Tensor]:
    """Model i holds i + 1 everywhere: the result says which was chosen."""
    return [torch.full((count,), float(i + 1)) for i in range(models)]


def updated(models: int, size: float, scale: float = 0.02, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """A base of normal weights and models with normal updates, rounded to the dtype."""
    generator = torch.Generator().manual_seed(0)
    base = (scale * torch.randn(SCALARS, generator=generator)).to(dtype)
    return base, [(base.double() + size * torch.randn(SCALARS, generator=generator)).to(dtype) for _ in range(models)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_model_comes_out_bit_for_bit(dtype):
    base, (model,) = updated(1, 1e-3, dtype=dtype)
    model[:3] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).tiny])
    merged = ParameterSelection((1.0,), resample_rounds=3).merge("w", base, [model])
    assert merged.dtype == dtype and torch.equal(merged.view(torch.uint8), model.view(torch.uint8))


@given(
    models=st.integers(1, 5),
    shape=st.lists(st.integers(0, 7), max_size=3),
    rounds=st.integers(0, 3),
    seed=st.integers(0, 2**70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_each_scalar_is_that_of_a_model_and_what_no_model_changed_stays(models, shape, rounds, seed, dtype, data):
    weights = data.draw(st.lists(st.integers(0, 4), min_size=models, max_size=models).filter(any))
    probabilities = tuple(weight / sum(weights) for weight in weights)
    base = torch.randint(0, 3, shape).to(dtype)
    tensors = [base + torch.randint(0, 2, shape).to(dtype) for _ in range(models)]
    merged = ParameterSelection(probabilities, rounds, seed).merge("w", base, tensors)
    possible = torch.stack([tensor for tensor, weight in zip(tensors, weights, strict=True) if weight])
    assert merged.shape == base.shape and merged.dtype == dtype
    assert (merged == possible).any(0).all()
    untouched = (possible == base).all(0)
    assert torch.equal(merged[untouched], base[untouched])


@pytest.mark.parametrize("probabilities", [equal_parts(5), (0.1, 0.6, 0.0, 0.3)])
def test_models_are_chosen_with_their_probabilities(probabilities):
    """Within 5 standard deviations of the binomial distribution."""
    merged = ParameterSelection(probabilities, seed=3).merge("w", torch.zeros(SCALARS), numbered(len(probabilities)))
    for number, probability in enumerate(probabilities):
        frequency = (merged == number + 1).double().mean().item()
        assert abs(frequency - probability) <= 5 * math.sqrt(probability * (1 - probability) / SCALARS)


def test_a_last_model_of_probability_0_is_never_chosen_though_the_others_sum_to_less_than_1(monkeypatch):
    below_one = (0.25, 0.75 - 9e-7, 0.0)
    monkeypatch.setattr(rules, "uniform_integers", lambda seed, name, number, start, count: torch.full((count,), 2**31 - 1, dtype=torch.int32))
    assert ParameterSelection(below_one).merge("w", torch.zeros(8), numbered(3, 8)).eq(2).all()


def test_choices_are_independent_of_each_other():
    """Of neighbours, of tensors with other names, of seeds: 5 standard deviations of a correlation of independent bits."""
    rule, base, models = ParameterSelection((0.5, 0.5)), torch.zeros(SCALARS), numbered(2)
    bits = rule.merge("w", base, models) - 1.5
    others = [bits.roll(1), bits.roll(8), rule.merge("v", base, models) - 1.5, ParameterSelection((0.5, 0.5), seed=1).merge("w", base, models) - 1.5]
    for other in others:
        assert abs(4 * (bits * other).mean().item()) < 5 / math.sqrt(SCALARS)


def test_the_mean_over_seeds_tends_to_the_average():
    base, models = torch.zeros(2000), list(torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)))
    seeds = 400
    mean = sum(ParameterSelection(equal_parts(4), seed=seed).merge("w", base, models) for seed in range(seeds)) / seeds
    stacked = torch.stack(models)
    error = (mean - stacked.mean(0)) / (stacked.std(0, correction=0) / math.sqrt(seeds))  # in standard errors of each scalar
    assert abs(error.square().mean().item() - 1) < 5 * math.sqrt(2 / 2000)


def test_0_rounds_are_plain_selection_and_more_rounds_change_only_what_had_stayed():
    base, models = updated(3, 1e-5, dtype=torch.bfloat16)
    plain = ParameterSelection(equal_parts(3)).merge("w", base, models)
    again = ParameterSelection(equal_parts(3), resample_rounds=2).merge("w", base, models)
    moved = plain != base
    assert torch.equal(again[moved], plain[moved])
    assert (again != base).sum() > 1.3 * moved.sum()


def test_after_n_rounds_a_scalar_stays_with_the_chance_of_n_plus_1_draws_that_all_miss():
    base, models, rounds = torch.zeros(SCALARS), [torch.zeros(SCALARS), torch.zeros(SCALARS), torch.ones(SCALARS)], 3
    stays = (ParameterSelection((0.3, 0.5, 0.2), resample_rounds=rounds).merge("w", base, models) == 0).double().mean().item()
    expected = 0.8 ** (rounds + 1)
    assert abs(stays - expected) <= 5 * math.sqrt(expected * (1 - expected) / SCALARS)


def test_with_many_rounds_only_what_no_model_changed_stays():
    base, models = updated(5, 1e-5, dtype=torch.bfloat16)
    merged = ParameterSelection(equal_parts(5), resample_rounds=200).merge("w", base, models)
    assert torch.equal(merged == base, (torch.stack(models) == base).all(0))


def test_resampling_does_next_to_nothing_in_float32():
    base, models = updated(5, 1e-5)
    plain, again = (ParameterSelection(equal_parts(5), resample_rounds=rounds).merge("w", base, models) for rounds in (0, 10))
    assert (plain != again).double().mean() < 1e-4


def test_most_scalars_stay_in_bfloat16_at_an_update_of_1e_5():
    """Weights of standard deviation 0.02, updates of 1e-5: bfloat16 steps are 2**-8 of the weight, so 9 of 10 updates are rounded away.

    Expected: the chance that |update| is more than half a step, averaged over the weights (a normal integral, by midpoints).
    """
    base, models = updated(5, 1e-5, dtype=torch.bfloat16)
    stays = [(model == base).double().mean().item() for model in models]
    values = base.abs().double().clamp_min(1e-12)
    half_step = torch.exp2(torch.floor(torch.log2(values)) - 8)  # bfloat16 has 8 significant bits
    expected = torch.erf(half_step / 1e-5 / math.sqrt(2)).mean().item()
    assert all(abs(each - expected) < 0.005 for each in stays)
    assert 0.85 < expected < 0.95
    plain, again = (ParameterSelection(equal_parts(5), resample_rounds=rounds).merge("w", base, models) for rounds in (0, 50))
    all_stay = (torch.stack(models) == base).all(0).double().mean().item()
    assert (plain == base).double().mean().item() == pytest.approx(expected, abs=0.005)
    assert (again == base).double().mean().item() == pytest.approx(all_stay, abs=0.001)
    assert all_stay < expected - 0.1


@pytest.mark.parametrize("chunk", [8, 1000, 65536])
@pytest.mark.parametrize("rounds", [0, 4])
def test_the_size_of_the_chunks_changes_no_bit(monkeypatch, chunk, rounds):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(37, 61, generator=generator).bfloat16()
    models = [base + (torch.rand(37, 61, generator=generator) < 0.2) for _ in range(3)]
    rule = ParameterSelection(equal_parts(3), rounds, seed=5)
    whole = rule.merge("w", base, models)
    monkeypatch.setattr(rules, "CHUNK_SCALARS", chunk)
    assert torch.equal(rule.merge("w", base, models), whole)


def test_tensors_that_are_not_contiguous_are_merged_as_their_copies():
    base, models = torch.zeros(30, 40), [torch.randn(40, 30).T for _ in range(3)]
    rule = ParameterSelection(equal_parts(3))
    assert torch.equal(rule.merge("w", base, models), rule.merge("w", base, [model.contiguous() for model in models]))


def philox(key: int, counter: int) -> list[int]:
    """A block of Philox4x64-10 (Salmon et al., 2011) as the paper's equations have it: four words of 64 bits."""
    mask, keys, words = 2**64 - 1, [key & (2**64 - 1), key >> 64], [counter, 0, 0, 0]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [(second >> 64) ^ words[1] ^ keys[0], second & mask, (first >> 64) ^ words[3] ^ keys[1], first & mask]
        keys = [(keys[0] + 0x9E3779B97F4A7C15) & mask, (keys[1] + 0xBB67AE8584CAA73B) & mask]
    return words


def test_the_draws_are_those_of_the_format():
    """No new version of a library may change merged models unnoticed."""
    key = int.from_bytes(hashlib.sha256(b'[7, "model.norm.weight", 2]').digest()[:16], "little")
    blocks = b"".join(word.to_bytes(8, "little") for counter in (1, 2, 3) for word in philox(key, counter))
    expected = list(struct.unpack("<24i", blocks))
    assert uniform_integers(7, "model.norm.weight", 2, 0, 24).tolist() == expected
    assert uniform_integers(7, "model.norm.weight", 2, 16, 5).tolist() == expected[16:21]


def test_selection_keeps_the_length_of_the_update_and_the_average_shrinks_it():
    """K updates of equal length and pairwise cosine rho: the average has the length sqrt(rho + (1 - rho) / K) of each."""
    generator = torch.Generator().manual_seed(0)
    count, models_count, rho = SCALARS, 5, 0.3
    shared = torch.randn(count, generator=generator)
    updates = [math.sqrt(rho) * shared + math.sqrt(1 - rho) * torch.randn(count, generator=generator) for _ in range(models_count)]
    base = torch.zeros(count)
    length = sum(update.norm().item() for update in updates) / models_count
    selected = ParameterSelection(equal_parts(models_count)).merge("w", base, updates).norm().item()
    average = torch.stack(updates).mean(0).norm().item()
    rescaled = NormRescaledAverage().merge("w", base, updates)
    assert selected / length == pytest.approx(1, abs=0.01)
    assert average / length == pytest.approx(math.sqrt(rho + (1 - rho) / models_count), abs=0.01)
    assert rescaled.double().norm().item() == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("chunk", [100, 1 << 20])
def test_the_rescaled_average_has_the_direction_of_the_average_and_the_mean_length(monkeypatch, chunk):
    monkeypatch.setattr(rules, "CHUNK_SCALARS", chunk)
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    updates = [torch.randn(20, 30, generator=generator, dtype=torch.float64) * (i + 1) for i in range(3)]
    merged = NormRescaledAverage().merge("w", base, [base + update for update in updates])
    mean = sum(updates) / 3
    expected = base + mean / mean.norm() * sum(update.norm() for update in updates) / 3
    assert torch.allclose(merged, expected, rtol=0, atol=1e-12)


def test_the_rescaled_average_stays_at_the_base_where_updates_cancel_or_are_none():
    base, update = torch.ones(5), torch.full((5,), 0.5)
    assert torch.equal(NormRescaledAverage().merge("w", base, [base + update, base - update]), base)
    assert torch.equal(NormRescaledAverage().merge("w", base, [base, base]), base)
    assert NormRescaledAverage().merge("w", torch.zeros(0, 3), [torch.zeros(0, 3)]).shape == (0, 3)


@pytest.mark.parametrize("bad", [(), (0.5, 0.6), (-0.1, 1.1), (math.nan, 1.0)])
def test_what_is_no_distribution_is_refused(bad):
    with pytest.raises(ValueError, match="sum to 1"):
        ParameterSelection(bad)
    with pytest.raises(ValueError, match="2 models and 1 probabilities"):
        ParameterSelection((1.0,)).merge("w", torch.zeros(2), [torch.zeros(2)] * 2)
