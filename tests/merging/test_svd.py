"""The nearest matrix of a rank, beside torch's SVD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mftcoder_coba.merging.svd import factorise, squared_norm


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), true_rank=st.integers(0, 8), rank=st.integers(1, 32), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_the_error_is_that_of_the_singular_values_left_out(rows, columns, true_rank, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, true_rank, generator=generator), torch.randn(true_rank, columns, generator=generator)
    matrix = left @ right
    down, up = factorise(matrix, rank)
    assert down.shape == (rank, columns) and up.shape == (rows, rank)
    assert down.dtype == up.dtype == torch.float32
    left_out = torch.linalg.svdvals(matrix.double())[rank:].norm().item()
    error = (matrix.double() - up.double() @ down.double()).norm().item()
    assert error == pytest.approx(left_out, abs=1e-5 * (1 + matrix.norm().item()))


def test_both_factors_have_the_same_share_of_the_singular_values():
    down, up = factorise(torch.randn(20, 12, generator=torch.Generator().manual_seed(0)), 5)
    values = torch.linalg.svdvals(torch.randn(20, 12, generator=torch.Generator().manual_seed(0)))[:5]
    assert torch.allclose(down.norm(dim=1).square(), values, rtol=1e-5) and torch.allclose(up.norm(dim=0).square(), values, rtol=1e-5)


def test_the_squared_norm_is_summed_in_float64():
    tensor = torch.full((1 << 22,), 0.1)
    assert squared_norm(tensor) == pytest.approx((1 << 22) * float(tensor[0]) ** 2, rel=1e-8)
    assert tensor.norm().item() ** 2 != pytest.approx((1 << 22) * float(tensor[0]) ** 2, rel=1e-6)  # torch's own sum
