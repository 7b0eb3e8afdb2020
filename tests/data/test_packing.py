import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftcoder_coba.data.packing import PACKERS, pack

CAPACITY = 64


def rows_of(plan) -> list[list[int]]:
    order, starts = plan
    return [order[a:b].tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]


@given(lengths=st.lists(st.integers(1, CAPACITY)), window=st.integers(1, 40), packing=st.sampled_from(sorted(PACKERS)))
@settings(max_examples=300, deadline=None)
def test_no_document_is_lost_or_doubled_and_no_row_overflows(lengths, window, packing):
    rows = rows_of(PACKERS[packing](lengths, CAPACITY, window))
    assert sorted(sum(rows, [])) == list(range(len(lengths)))
    assert all(row and sum(lengths[index] for index in row) <= CAPACITY for row in rows)


@given(lengths=st.lists(st.integers(1, CAPACITY), min_size=1), window=st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_a_row_starts_with_the_oldest_document_and_looks_no_further_than_the_window(lengths, window):
    left = set(range(len(lengths)))
    for row in rows_of(pack(lengths, CAPACITY, window)):
        assert row[0] == min(left)
        for index in row:
            assert index < min(left) + window
            left.remove(index)


@given(lengths=st.lists(st.integers(1, CAPACITY), min_size=1))
@settings(max_examples=200, deadline=None)
def test_no_two_rows_in_a_full_window_could_have_been_one(lengths):
    totals = [sum(lengths[index] for index in row) for row in rows_of(pack(lengths, CAPACITY, len(lengths)))]
    assert all(a + b > CAPACITY for a, b in zip(totals[:-1], totals[1:], strict=True))


def test_rows_of_1024_tokens_are_at_least_99_percent_full():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.8, 0.7, 20_000), 16, 1024).astype(int)
    _, starts = pack(lengths, 1024)
    assert lengths.sum() / ((len(starts) - 1) * 1024) >= 0.99


def test_no_packing_is_one_document_a_row_in_order():
    assert rows_of(PACKERS["none"]([5, 3, 9], CAPACITY)) == [[0], [1], [2]]


@pytest.mark.parametrize("lengths", [[1, CAPACITY + 1], [0, 1]])
def test_a_length_that_is_no_document_is_refused(lengths):
    with pytest.raises(ValueError, match="lengths go from"):
        pack(lengths, CAPACITY)


def test_nothing_packs_to_no_rows():
    assert rows_of(pack([], CAPACITY)) == []
