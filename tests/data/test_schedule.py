from collections import Counter

import numpy as np
import pytest

from mftcoder_coba.data.schedule import BalancerStream, TrainSchedule, shares_of, validation_rows

LENGTH = 256
SIZES = (700, 40, 260)


def lengths(sizes=SIZES, longest=200) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(5, longest, size).astype(np.int32) for size in sizes]


def schedule(sizes=SIZES, shares=None, seed=3, packing="best_fit") -> TrainSchedule:
    return TrainSchedule(lengths(sizes), shares, seed, LENGTH, packing)


def documents(rows) -> list[tuple[int, int]]:
    return [document for row in rows for document in row]


def everything(sizes=SIZES) -> set[tuple[int, int]]:
    return {(task, sample) for task, size in enumerate(sizes) for sample in range(size)}


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_without_shares_every_epoch_holds_every_sample_once(packing):
    order = schedule(packing=packing)
    start = 0
    for epoch in range(3):
        rows = order.rows(start, start + order.rows_in_epoch(epoch))
        start += len(rows)
        assert Counter(documents(rows)) == Counter(everything())


def test_no_row_is_longer_than_the_sequence_length():
    of = lengths()
    assert all(sum(of[task][sample] for task, sample in row) <= LENGTH for row in schedule().rows(0, 600))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_any_number_of_ranks_consumes_the_same_sequence_of_rows(ranks):
    whole = schedule().rows(0, 960)
    per_rank = 16 // ranks
    orders = [schedule() for _ in range(ranks)]
    taken = []
    for step in range(60):
        for rank, order in enumerate(orders):
            start = step * 16 + rank * per_rank
            taken += order.rows(start, start + per_rank)
    assert taken == whole


def test_going_on_after_any_row_repeats_none_and_loses_none():
    whole = schedule().rows(0, 1000)
    for stop in (0, 1, 17, 399, 400, 401, 777, 999):
        assert whole[:stop] + schedule().rows(stop, 1000) == whole


def test_epochs_asked_for_backwards_are_the_same():
    order = schedule()
    late = order.rows(900, 950)
    assert order.rows(0, 10) == schedule().rows(0, 10) and order.rows(900, 950) == late


def test_another_seed_or_epoch_is_another_order_of_the_same_samples():
    order = schedule()
    first, second = (documents(order.rows(order.rows_until(epoch), order.rows_until(epoch + 1))) for epoch in (0, 1))
    other = documents(schedule(seed=4).rows(0, schedule(seed=4).rows_in_epoch(0)))
    assert first != second and first != other and set(first) == set(second) == set(other)


def test_epochs_and_rows_count_the_same_way():
    order = schedule()
    per_epoch = [order.rows_in_epoch(epoch) for epoch in range(3)]
    assert [order.rows_until(epochs) for epochs in (0, 1, 2, 3)] == [0, *np.cumsum(per_epoch)]
    assert order.rows_until(1.5) == per_epoch[0] + -(-per_epoch[1] // 2)
    assert order.epoch_of(0) == 0 and order.epoch_of(per_epoch[0]) == 1
    assert order.epoch_of(per_epoch[0] + 10) == pytest.approx(1 + 10 / per_epoch[1])


def test_a_small_task_is_spread_evenly_over_the_epoch_and_its_end():
    sizes = (2671, 43, 636)
    order = TrainSchedule(lengths(sizes), None, 1, LENGTH, "none")
    places = [place for place, (task, _) in enumerate(documents(order.rows(0, 2 * sum(sizes)))) if task == 1]
    gaps = np.diff(places)
    assert len(places) == 86 and gaps.max() - gaps.min() <= 3


def test_after_packing_the_gaps_of_a_small_task_differ_by_less_than_a_step():
    sizes = (26_719, 426, 6_361)
    order = TrainSchedule(lengths(sizes, longest=300), None, 1, 1024, "best_fit")
    rows = order.rows(0, order.rows_in_epoch(0))
    holding = [number for number, row in enumerate(rows) for task, _ in row if task == 1]
    gaps = np.diff(holding)
    assert len(holding) == 426 and gaps.max() - gaps.min() <= 128


def test_shares_decide_how_many_samples_of_a_task_are_in_an_epoch():
    order = schedule(shares=[1, 1, 2])
    assert order.samples_per_epoch == [250, 250, 500]
    assert order.passes_per_epoch == [250 / 700, 250 / 40, 500 / 260]
    counted = Counter(task for task, _ in documents(order.rows(0, order.rows_in_epoch(0))))
    assert counted == {0: 250, 1: 250, 2: 500}


def test_with_shares_a_task_walks_through_all_its_samples_before_it_repeats_one():
    order = schedule(shares=[1, 1, 2], packing="none")
    walk = {task: [] for task in range(3)}
    for task, sample in documents(order.rows(0, 6000)):
        walk[task].append(sample)
    for task, size in enumerate(SIZES):
        passes = [walk[task][start : start + size] for start in range(0, len(walk[task]) - size + 1, size)]
        assert passes and all(sorted(one) == list(range(size)) for one in passes)


def test_a_tiny_share_still_gives_the_task_a_sample():
    assert schedule(shares=[1e-9, 1, 1]).samples_per_epoch == [1, 500, 500]


def test_a_task_without_samples_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        schedule(sizes=(5, 0))
    with pytest.raises(ValueError, match="at least one"):
        BalancerStream(lengths((5, 0)), 0, LENGTH, "best_fit", 2)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_every_balancer_mini_batch_holds_every_task(packing):
    stream = BalancerStream(lengths(), 1, LENGTH, packing, rows=4)
    for observation in range(2 * stream.coverage):
        rows, _ = stream.mini_batch(observation)
        assert {task for task, _ in documents(rows)} == {0, 1, 2}


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_slots_have_a_fixed_content_return_every_m_k_and_cover_the_set(packing):
    stream = BalancerStream(lengths(), 1, LENGTH, packing, rows=4)
    assert stream.coverage == max(stream.slots_per_task)
    content: dict[tuple[int, int], list[int]] = {}
    for observation in range(2 * stream.coverage):
        rows, slots = stream.mini_batch(observation)
        assert slots.tolist() == [observation % count for count in stream.slots_per_task]
        for task, slot in enumerate(slots.tolist()):
            now = sorted(sample for of, sample in documents(rows) if of == task)
            assert content.setdefault((task, slot), now) == now
    for task, size in enumerate(SIZES):
        assert sorted(sum((samples for (of, _), samples in content.items() if of == task), [])) == list(range(size))


def test_mini_batches_of_short_documents_keep_to_their_rows():
    stream = BalancerStream(lengths(longest=40), 1, LENGTH, "best_fit", rows=4)
    needed = [len(stream.mini_batch(observation)[0]) for observation in range(100)]
    assert np.mean(np.array(needed) <= 4) >= 0.9 and max(needed) <= 5


def test_slots_of_a_task_are_of_about_equal_size():
    of = lengths(longest=40)
    stream = BalancerStream(of, 1, LENGTH, "best_fit", rows=8)
    totals: dict[int, int] = {}
    for observation in range(stream.slots_per_task[0]):
        rows, slots = stream.mini_batch(observation)
        totals[slots[0]] = sum(int(of[0][sample]) for task, sample in documents(rows) if task == 0)
    assert max(totals.values()) - min(totals.values()) <= 2 * 40


def test_a_mini_batch_without_packing_takes_rows_over_tasks_samples_of_each():
    rows, _ = BalancerStream(lengths(), 1, LENGTH, "none", rows=13).mini_batch(0)
    assert Counter(task for task, _ in documents(rows)) == {0: 4, 1: 4, 2: 4} and all(len(row) == 1 for row in rows)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_full_validation_sees_every_sample_once(packing):
    rows = validation_rows(lengths((30, 0, 7)), LENGTH, packing)
    assert Counter(documents(rows)) == Counter(everything((30, 0, 7)))
    assert rows == validation_rows(lengths((30, 0, 7)), LENGTH, packing)


def test_rows_of_a_mini_batch_are_nearly_equally_long_and_hold_each_document_once():
    generator = np.random.default_rng(3)
    lengths = [generator.integers(20, 200, count) for count in (60, 40, 15)]
    stream = BalancerStream(lengths, seed=1, sequence_length=256, packing="best_fit", rows=4)
    for observation in range(stream.coverage):
        rows, slots = stream.mini_batch(observation)
        documents = sorted(document for row in rows for document in row)
        expected = sorted((task, int(sample)) for task, slot in enumerate(slots) for sample in stream._slots[task][slot])
        assert documents == expected
        filled = [sum(lengths[task][sample] for task, sample in row) for row in rows]
        longest = max(lengths[task][sample] for task, sample in documents)
        assert max(filled) <= 256 and max(filled) - min(filled) <= longest


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_small_task_is_spread_evenly_over_the_steps(packing):
    sizes, rows_a_step = (26_719, 426, 6_361), 128
    rng = np.random.default_rng(1)
    of = [np.clip(rng.lognormal(5.2, 0.7, size), 16, 1024).astype(np.int32) for size in sizes]
    epoch = TrainSchedule(of, None, 5, 1024, packing).epoch(0)
    row = np.repeat(np.arange(len(epoch)), np.diff(epoch.starts))[epoch.tasks == 1]
    gaps = np.diff(row)
    assert len(row) == 426 and gaps.max() - gaps.min() <= rows_a_step
    per_step = np.bincount(row // rows_a_step)[: len(epoch) // rows_a_step]
    assert per_step.min() >= 1


def test_temperature_evens_out_the_shares():
    sizes = [26_719, 426, 6_361]
    assert shares_of([None] * 3, sizes, 2.0) is None
    assert shares_of([1, 2.5, 3], sizes, 2.0) == [1.0, 2.5, 3.0]
    assert shares_of(["temperature"] * 3, sizes, 1.0) == sizes
    assert shares_of(["temperature"] * 3, sizes, 2.0) == pytest.approx(np.sqrt(sizes))
    order = TrainSchedule(lengths(), shares_of(["temperature"] * 3, list(SIZES), 2.0), 3, LENGTH, "best_fit")
    expected = np.sqrt(SIZES) / np.sqrt(SIZES).sum() * sum(SIZES)
    assert np.abs(np.array(order.samples_per_epoch) - expected).max() < 1


def test_the_order_seed_changes_the_order_and_nothing_else():
    first, second = schedule(seed=3), schedule(seed=4)
    of = lengths()

    def counts(order):
        return Counter(documents(order.rows(0, order.rows_in_epoch(0))))

    assert counts(first) == counts(second) and first.rows(0, 20) != second.rows(0, 20)
    streams = [BalancerStream(of, 3, LENGTH, "best_fit", 4) for _ in range(2)]
    assert streams[0].mini_batch(5)[0] == streams[1].mini_batch(5)[0]
