import numpy as np
import pytest
import torch

from mftcoder_coba.data.batches import collate
from mftcoder_coba.data.samples import TaskData

F, T = False, True
MATH = TaskData.from_samples([([10, 11, 12, 13], [F, F, T, T]), ([20, 21], [T, T])])
CODE = TaskData.from_samples([([30, 31, 32], [F, T, F])])
ROWS = [[(0, 0), (1, 0)], [(0, 1)]]


def batch(rows=ROWS, reduction="token", **options):
    return collate(rows, [MATH, CODE], 2, 0, reduction, **options)


def test_labels_are_the_next_supervised_token_of_the_same_document():
    assert batch().input_ids.tolist() == [[10, 11, 12, 13, 30, 31, 32, 0], [20, 21, 0, 0, 0, 0, 0, 0]]
    # 30 is not a label of 13: it opens another document. 20 is supervised, but nothing stands before it.
    assert batch().labels.tolist() == [[-100, 12, 13, -100, 31, -100, -100, -100], [21] + [-100] * 7]


def test_positions_restart_in_each_document_and_in_padding():
    assert batch().position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5]]


def test_rows_of_one_document_need_no_block_mask():
    found = batch([[(0, 0)], [(0, 1)]], isolate=False)
    assert found.position_ids.tolist() == [list(range(8))] * 2
    with pytest.raises(ValueError, match="must be isolated"):
        batch(isolate=False)


def test_task_ids_name_the_task_of_each_token_and_leave_padding_out():
    assert batch().task_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1], [0, 0, -1, -1, -1, -1, -1, -1]]
    assert batch().total_tokens == 9


def test_token_weights_are_one_and_the_denominators_count_tokens():
    found = batch()
    assert torch.equal(found.loss_weights, (found.labels != -100).float())
    assert found.denominators.tolist() == [3.0, 1.0] and found.tokens.tolist() == [3, 1]
    assert found.denominators.dtype == np.float64 and found.tokens.dtype == np.int64


def test_sample_weights_are_one_over_the_samples_tokens_and_the_denominators_count_samples():
    found = batch(reduction="sample")
    assert found.loss_weights.tolist() == [[0, 0.5, 0.5, 0, 1, 0, 0, 0], [1] + [0] * 7]
    assert found.denominators.tolist() == [2.0, 1.0] and found.tokens.tolist() == [3, 1]


def test_missing_rows_are_padding_and_a_batch_may_hold_nothing():
    found = batch([], rows_per_batch=3)
    assert found.input_ids.shape == (3, 8)
    assert (found.labels == -100).all() and (found.task_ids == -1).all() and found.total_tokens == 0
    assert found.position_ids.tolist() == [list(range(8))] * 3 and found.denominators.tolist() == [0, 0]
    assert torch.equal(batch(rows_per_batch=3).labels[:2], batch().labels)
    with pytest.raises(ValueError, match="do not fit"):
        batch(rows_per_batch=1)


@pytest.mark.parametrize(
    ("options", "length"),
    [({"length_multiple": 1}, 7), ({"length_multiple": 5}, 10), ({"length_multiple": 5, "max_length": 9}, 9)],
)
def test_the_length_is_the_longest_row_rounded_up_within_the_maximum(options, length):
    assert batch(**options).input_ids.shape == (2, length)


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="7 tokens does not fit into 6"):
        batch(max_length=6)


def test_counts_of_a_corpus_are_those_of_its_batches():
    rng = np.random.default_rng(0)
    data = TaskData.from_samples([(rng.integers(0, 9, n), rng.random(n) < 0.5) for n in rng.integers(1, 30, 50)])
    found = collate([[(0, sample) for sample in range(50)]], [data], 1, 0, "token")
    assert found.tokens.tolist() == [data.supervised.sum()] and found.total_tokens == data.lengths.sum()
    by_sample = collate([[(0, sample) for sample in range(50)]], [data], 1, 0, "sample")
    assert by_sample.denominators.tolist() == [np.count_nonzero(data.supervised)]
    assert by_sample.loss_weights.double().sum().item() == pytest.approx(by_sample.denominators[0])


def test_samples_come_back_as_they_went_in_for_any_mask():
    masks = [[F], [T], [T, F, T], [F, T, T, F, F, T], [T, T]]
    data = TaskData.from_samples([(np.arange(len(mask)) + 5, mask) for mask in masks])
    assert data.lengths.tolist() == [1, 1, 3, 6, 2] and data.supervised.tolist() == [0, 0, 1, 3, 1]
    for index, mask in enumerate(masks):
        ids, found = data.sample(index)
        assert found.tolist() == mask and ids.tolist() == [5 + place for place in range(len(mask))] and ids.dtype == np.int32
    with pytest.raises(IndexError):
        data.sample(5)
