"""Which merges are made, and mistakes in what is asked for."""

import numpy as np
import pytest

from mftcoder_coba.comparing import Value
from mftcoder_coba.comparing.results import ALL, MEAN
from mftcoder_coba.errors import UserError
from mftcoder_coba.orders import orders
from mftcoder_coba.orders.imbalance import Imbalance
from mftcoder_coba.orders.merges import plan_merges
from mftcoder_coba.orders.tables import build_tables, correlation_values, mean_row, merge_values


def test_by_default_two_averages_and_selection_with_and_without_resampling():
    found = plan_merges([], 5, 10, 2)
    assert [(merge.row, merge.name, merge.options) for merge in found] == [
        ("average", "linear-of-5", {}),
        ("norm_rescaled_average", "norm_rescaled_average-of-5", {}),
        ("selection", "parameter_selection-of-5-seed0", {"seed": 0}),
        ("selection", "parameter_selection-of-5-seed1", {"seed": 1}),
        ("selection, resampled", "parameter_selection-resampled10-of-5-seed0", {"resample_rounds": 10, "seed": 0}),
        ("selection, resampled", "parameter_selection-resampled10-of-5-seed1", {"resample_rounds": 10, "seed": 1}),
    ]


def test_any_method_may_be_chosen_and_those_that_draw_have_seeds():
    found = plan_merges(["dare_ties", "ties", "ties", "parameter_selection"], 3, 0, 3)
    assert [merge.name for merge in found] == [
        *(f"dare_ties-of-3-seed{seed}" for seed in range(3)),
        "ties-of-3",
        *(f"parameter_selection-of-3-seed{seed}" for seed in range(3)),
    ]


@pytest.mark.parametrize(
    ("arguments", "message", "where"),
    [
        ({"count": 0}, "at least one order, not 0", "--count"),
        ({"positions": -1}, "not negative, not -1", "--positions"),
        ({"methods": ["linaer"]}, 'no method "linaer"', "--method"),
        ({"methods": ["model_stock"], "count": 1}, "needs at least 2 models", "--models"),
        ({"selection_seeds": 0}, "at least one seed", "--selection-seeds"),
        ({"resample_rounds": -1}, "a number of rounds is not negative", "--resample-rounds"),
        ({"overrides": ['adapter={"kind": "moe_lora"}']}, "a gate for each task", "adapter.kind"),
        (
            {"overrides": ['adapter={"kind": "cgc_lora", "clusters": {"a": ["count", "reverse", "upper"]}}']},
            "the adapter cgc_lora has a gate for each task",
            "adapter.kind",
        ),
        ({"overrides": ['adapter={"kind": "qlora"}']}, "weights in 4 bits cannot be merged", "adapter"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(toy, tmp_path, arguments, message, where):
    with pytest.raises(UserError, match=message) as error:
        orders(toy / "toy.json", tmp_path / "out", **arguments)
    assert error.value.where.startswith(where)
    assert not (tmp_path / "out").exists()


def single(order, ratio, step=10.0):
    metrics = {"ratio": ratio, "loss": 2 * ratio, "perplexity": 10 * ratio}
    found = [Value(f"order-{order}", 7, task, metric, value) for task in ("a", MEAN) for metric, value in metrics.items()]
    return [*found, Value(f"order-{order}", 7, ALL, "selected_step", step)]


def rows_of(table):
    return {row.method: {column.title: cell for column, cell in zip(table.columns, row.cells, strict=True)} for row in table.rows}


def test_tables_have_the_mean_of_the_single_models_their_best_and_the_merges():
    merges = plan_merges(["linear", "parameter_selection"], 2, 0, 2)
    merged = [
        value
        for merge, loss in zip(merges, (1.0, 0.8, 1.2), strict=True)
        for value in merge_values(merge, {"a": {"loss": loss, "perplexity": 3.0}}, {"a": 2.0})
    ]
    ratio, loss, perplexity, models = build_tables([*single(1, 0.5), *single(2, 0.4)], merged, [], ["a"])
    assert [(row.method, row.note) for row in ratio.rows] == [
        (mean_row(2), ""),
        ("best single model", "order-2"),
        ("average", ""),
        ("selection", "2 seeds"),
    ]
    rows = rows_of(ratio)
    assert (rows[mean_row(2)]["a"].text, rows[mean_row(2)]["a"].deviation) == ("0.4500", "0.0707")
    assert (rows["selection"]["mean ratio"].text, rows["selection"]["mean ratio"].deviation) == ("0.5000", "0.1414")
    # A mean over models is not a model; the best of them is.
    assert [row.cells[0].best for row in ratio.rows] == [False, True, False, False]
    assert rows_of(loss)["average"]["mean"].text == "1.0000" and rows_of(perplexity)["average"]["a"].text == "3.000"
    assert [(row.method, row.cells[0].text) for row in models.rows] == [("order-1", "10"), ("order-2", "10")]


def test_the_correlation_is_the_mean_over_orders_and_absent_where_there_is_none():
    nothing = np.full(20, np.nan)
    found = Imbalance(nothing, nothing, np.array([-0.1, -0.3]), np.array([np.nan, np.nan]))
    tables = {table.name: table for table in build_tables(single(1, 0.5), [], correlation_values("average", found, [1, 2]), ["a"])}
    cells = rows_of(tables["imbalance"])["average"]
    assert (cells["with the loss"].text, cells["with the loss"].deviation, cells["with the excess"].text) == ("-0.2000", "0.1414", "–")
