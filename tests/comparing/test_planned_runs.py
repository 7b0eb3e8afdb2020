"""Base config, methods and seeds -> runs. The corpus has 40 rows of task a and 8 of b, in steps of 4 rows."""

import numpy as np
import pytest

from mftcoder_coba.comparing import Method, built_in, choose_methods, plan_runs
from mftcoder_coba.comparing.runs import check_methods
from mftcoder_coba.config import validate
from mftcoder_coba.data import Corpus, TaskData
from mftcoder_coba.errors import UserError

METHODS = {"coba": Method({"kind": "coba"}), "lbtw*": Method({"kind": "lbtw", "signal": "validation"})}
SINGLE = {"single_task": Method(None)}
LORA, CGC, MOE = {"kind": "lora", "rank": 8}, {"kind": "cgc_lora", "clusters": {"all": ["a", "b"]}}, {"kind": "moe_lora", "experts": 3}


def plan(base, corpus, methods=METHODS, seeds=(1,), tmp_path="/out"):
    return plan_runs(base, methods, seeds, tmp_path, corpus, alone=True)


def test_all_methods_of_a_seed_come_before_the_next_seed(make_experiment, corpus):
    runs = plan(make_experiment(), corpus, METHODS | SINGLE, seeds=(1, 2))
    one = ["coba-seed1", "lbtw-star-seed1", "single_task-a-seed1", "single_task-b-seed1"]
    assert [run.name for run in runs] == one + [name.replace("seed1", "seed2") for name in one]


def test_runs_of_a_seed_differ_in_name_and_balancer_alone(make_experiment, corpus):
    base = make_experiment()
    first, second = (run.config.model_dump() for run in plan(base, corpus))
    assert first.pop("balancer")["kind"] == "coba" and second.pop("balancer")["signal"] == "validation"
    assert first["run"].pop("name") != second["run"].pop("name")
    assert first == second
    assert first["run"] == {**base.run.model_dump(exclude={"name"}), "dir": "/out", "seed": 1}
    assert first["training"] == base.model_dump()["training"] and first["data"] == base.model_dump()["data"]


def test_orders_differ_in_the_order_alone(make_experiment, corpus):
    methods = {f"order-{number}": Method({"kind": "coba"}, {"data_order_seed": number}) for number in (1, 2)}
    first, second = (run.config.model_dump() for run in plan(make_experiment(), corpus, methods))
    assert [tree["run"].pop("data_order_seed") for tree in (first, second)] == [1, 2]
    assert first["run"].pop("name") != second["run"].pop("name")
    assert first == second


def test_the_steps_of_an_order_are_those_of_its_own_packing(make_experiment):
    lengths = np.random.default_rng(0).integers(2, 17, 60)
    parts = [TaskData.from_samples([(np.zeros(length, np.int32), np.ones(length, bool)) for length in lengths]) for _ in "ab"]
    corpus = Corpus(("a", "b"), {"train": parts, "valid": parts, "test": parts}, {}, "mftcoder", 0)
    methods = {f"order-{number}": Method({"kind": "coba"}, {"data_order_seed": number}) for number in range(12)}
    changes = {"data__packing": "best_fit", "training__global_batch_rows": 1, "training__micro_batch_rows": 1, "training__epochs": 1}
    base = make_experiment(**changes)
    steps = {run.method: run.total_steps for run in plan(base, corpus, methods)}
    alone = [make_experiment(**changes, run__data_order_seed=number) for number in range(12)]
    assert list(steps.values()) == [plan(of, corpus, {"coba": METHODS["coba"]})[0].total_steps for of in alone] and len(set(steps.values())) > 1


@pytest.mark.parametrize(
    ("order", "message"), [(-1, "run.data_order_seed is -1"), ("one", 'run.data_order_seed is "one"'), (True, "run.data_order_seed is true")]
)
def test_an_order_that_is_no_seed_is_told(make_experiment, order, message):
    with pytest.raises(UserError, match=message) as error:
        check_methods(make_experiment(), {"mine": Method({"kind": "coba"}, {"data_order_seed": order})})
    assert error.value.where == "method mine"


def test_nobody_stops_early_and_killed_runs_resume(make_experiment, corpus):
    base = make_experiment(
        validation={"every_steps": 10, "early_stopping": {"criterion": "worst_ratio", "patience": 2}}, checkpoint={"resume": "never"}
    )
    config = plan(base, corpus)[0].config
    assert config.validation.early_stopping.patience is None
    assert config.validation.early_stopping.criterion == "worst_ratio"
    assert config.checkpoint.resume == "auto"


def test_a_balancer_with_random_numbers_draws_by_the_seed_of_the_run_unless_told_otherwise(make_experiment, corpus):
    methods = {"random": Method({"kind": "random"}), "own": Method({"kind": "random", "seed": 7})}
    assert [run.config.balancer.seed for run in plan(make_experiment(), corpus, methods, seeds=(3, 4))] == [3, 7, 4, 7]


def test_steps_of_the_mixture_are_those_of_its_config(make_experiment, corpus):
    # 3 epochs of 48 rows in steps of 4, or the bound.
    assert {run.total_steps for run in plan(make_experiment(), corpus)} == {36}
    assert {run.total_steps for run in plan(make_experiment(training__max_steps=7), corpus)} == {7}


def single(base, corpus):
    return {run.task: run for run in plan(base, corpus, SINGLE)}


def test_a_single_task_makes_the_passes_of_the_mixture(make_experiment, corpus):
    runs = single(make_experiment(), corpus)
    # 3 passes: 120 rows of a in 30 steps, 24 of b in 6.
    assert {task: (run.config.training.epochs, run.total_steps) for task, run in runs.items()} == {"a": (3.0, 30), "b": (3.0, 6)}
    assert {run.config.training.global_batch_rows for run in runs.values()} == {4}
    assert all([task] == run.config.data.task_names and run.config.balancer.kind == "uniform" for task, run in runs.items())


def test_a_bound_on_steps_is_a_part_of_the_passes(make_experiment, corpus):
    # 18 steps of 4 rows are 72 of 48 rows in an epoch: 1.5 passes, 60 rows of a and 12 of b.
    runs = single(make_experiment(training__max_steps=18), corpus)
    assert {task: (run.config.training.epochs, run.total_steps) for task, run in runs.items()} == {"a": (1.5, 15), "b": (1.5, 3)}
    # A third of an epoch must not become a row more by rounding: 4 steps are 16 rows, 13.33 of a (14) and 2.67 of b (3).
    runs = single(make_experiment(training__max_steps=4), corpus)
    assert {task: run.total_steps for task, run in runs.items()} == {"a": 4, "b": 1}


def test_shares_change_the_passes_of_each_task(make_experiment, corpus):
    tasks = [{"name": "a", "train": ["none"], "share": 1.0}, {"name": "b", "train": ["none"], "share": 1.0}]
    base = make_experiment(data={"tasks": tasks, "sequence_length": 16, "packing": "none"})
    # An epoch has 24 rows of each: 0.6 passes over a and 3 over b; three epochs are 72 rows, 18 steps, of each.
    assert {task: (run.config.training.epochs, run.total_steps) for task, run in single(base, corpus).items()} == {"a": (1.8, 18), "b": (9.0, 18)}


def test_a_single_task_is_validated_as_often_and_warms_up_over_the_same_part(make_experiment, corpus):
    runs = single(make_experiment(training__warmup_steps=9.0), corpus)
    # The mixture: 36 steps, validated every 10, rising over 9 of them.
    assert {task: run.config.validation.every_steps for task, run in runs.items()} == {"a": 8, "b": 2}
    assert {run.config.training.warmup_steps for run in runs.values()} == {0.25}
    assert {run.config.training.warmup_steps for run in single(make_experiment(), corpus).values()} == {0.03}


def test_a_criterion_of_another_task_does_not_hinder_a_single_task(make_experiment, corpus):
    runs = single(make_experiment(validation={"early_stopping": {"criterion": "task:b"}}), corpus)
    assert {run.config.validation.early_stopping.criterion for run in runs.values()} == {"mean_ratio"}


def test_written_configs_read_back_as_they_are(make_experiment, corpus):
    for run in plan(make_experiment(), corpus, built_in()):
        assert validate(run.config.model_dump(mode="json"), "test") == run.config


def test_every_method_is_validated_before_anything_else(make_experiment):
    with pytest.raises(UserError, match="unknown key balancer.tua") as error:
        check_methods(make_experiment(), METHODS | {"typo": Method({"kind": "coba", "tua": 2.0})})
    assert error.value.where == "method typo"


def test_a_window_that_does_not_fit_the_data_is_found_before_the_first_run(make_experiment, corpus):
    with pytest.raises(UserError, match="paired slopes need a window above"):
        plan(make_experiment(), corpus, {"paired": Method({"kind": "coba", "slope": "paired", "window": 2})})


def test_every_task_needs_validation_data(make_experiment, corpus):
    empty = TaskData.from_samples([])
    without = Corpus(corpus.tasks, corpus.splits | {"valid": [corpus.splits["valid"][0], empty]}, {}, "mftcoder", 0)
    with pytest.raises(UserError, match="there is no validation data of b"):
        plan(make_experiment(), without)


def test_two_runs_of_one_folder_are_refused(make_experiment, corpus):
    with pytest.raises(UserError, match="would both write to lbtw-star-seed1"):
        plan(make_experiment(), corpus, {"lbtw*": Method({"kind": "lbtw"}), "lbtw-star": Method({"kind": "lbtw"})})


@pytest.fixture
def adapters(make_experiment, corpus, tmp_path):
    """The runs of a plan file of adapters over an experiment with LoRA of rank 8: name -> run."""
    plan_file = tmp_path / "methods.json"
    plan_file.write_text(
        """{"lora": {}, "small": {"adapter": {"rank": 2}}, "full": {"adapter": null, "training": {"learning_rate": 1e-5}},
            "cgc": {"adapter": {"kind": "cgc_lora", "clusters": {"all": ["a", "b"]}}, "balancer": {"kind": "uniform"}},
            "moe": {"adapter": {"kind": "moe_lora", "experts": 3}}, "each": {"per_task": true, "adapter": {"rank": 4}}}"""
    )
    base = make_experiment(adapter=LORA)
    return {run.name: run for run in plan(base, corpus, choose_methods(base, [], plan_file))}


def test_adapters_have_runs_of_the_same_names_as_balancers(adapters):
    assert list(adapters) == [*(f"{name}-seed1" for name in ("lora", "small", "full", "cgc", "moe")), "each-a-seed1", "each-b-seed1"]


def test_each_method_trains_its_adapter(adapters):
    found = {name: run.config.adapter for name, run in adapters.items()}
    assert (found["small-seed1"].kind, found["small-seed1"].rank) == ("lora", 2)
    assert found["full-seed1"] is None
    assert found["cgc-seed1"].clusters == {"all": ["a", "b"]} and found["moe-seed1"].experts == 3
    assert found["cgc-seed1"].rank == 16  # another kind has its own defaults
    assert {found[f"each-{task}-seed1"].rank for task in "ab"} == {4}
    assert {name: run.config.balancer.kind for name, run in adapters.items() if run.config.balancer.kind != "coba"} == dict.fromkeys(
        ["cgc-seed1", "each-a-seed1", "each-b-seed1"], "uniform"
    )


def test_runs_of_adapters_differ_in_nothing_else(adapters):
    def rest(run):
        tree = run.config.model_dump(exclude={"adapter": True, "balancer": True, "run": {"name"}, "training": {"learning_rate"}})
        return tree, run.total_steps

    assert all(rest(run) == rest(adapters["lora-seed1"]) for run in adapters.values() if run.task is None)
    rates = {run.method: run.config.training.learning_rate for run in adapters.values()}
    assert rates.pop("full") == 1e-5 and set(rates.values()) == {1e-3}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Method({"kind": "coba"}, {"adapter": {"rang": 2}}), 'unknown key adapter.rang: did you mean "rank"'),
        (Method({"kind": "coba"}, {"adapter": {"kind": "cgc_lora"}}), "adapter.clusters is missing"),
        (Method({"kind": "coba"}, {"adapter": 3}), "adapter is 3"),
        (Method(None, {"adapter": {"rank": 0}}), "adapter.rank is 0"),
        (Method({"kind": "coba"}, {"training": {"learning_rate": -1.0}}), "training.learning_rate is -1"),
    ],
)
def test_a_section_that_does_not_fit_is_told_with_its_method(make_experiment, method, message):
    with pytest.raises(UserError, match=message) as error:
        check_methods(make_experiment(adapter=LORA), METHODS | {"mine": method})
    assert error.value.where == "method mine"


def test_clusters_of_tasks_are_not_for_models_of_one_task(make_experiment):
    with pytest.raises(UserError, match="a model per task") as error:
        check_methods(make_experiment(adapter=CGC), SINGLE)
    assert error.value.where == "method single_task" and "an adapter of its own" in error.value.fix
    check_methods(make_experiment(adapter=CGC), {"single_task": Method(None, {"adapter": LORA}), "gated": Method(None, {"adapter": MOE})})
