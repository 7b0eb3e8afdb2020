"""Numbers that are not finite, on their way through a run: skipped, told, never the best, never divided by."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftcoder_coba.config import EarlyStoppingConfig
from mftcoder_coba.errors import UserError
from mftcoder_coba.objective import MultiTaskObjective
from mftcoder_coba.reporting.report import build_report
from mftcoder_coba.training.step import TaskLosses
from mftcoder_coba.training.stopping import BestStep
from mftcoder_coba.training.validation import check_initial_losses, ratios_of

TASKS = ("count", "reverse", "upper")


def measured(losses, tokens=(5, 5, 5)):
    return TaskLosses(np.array(losses), np.array(tokens, np.float64), np.array(tokens))


@pytest.mark.parametrize(("loss", "hint"), [(0.0, "certain"), (math.nan, "finite"), (math.inf, "finite")])
def test_a_task_whose_loss_before_training_cannot_be_divided_by_is_named_and_refused(loss, hint):
    with pytest.raises(UserError) as refused:
        check_initial_losses(TASKS, measured([1.0, loss, 2.0]))
    message = str(refused.value)
    assert f"task reverse: the validation loss before training is {loss:g}" in message and hint in message
    assert "count" not in message and "upper" not in message


def test_every_such_task_is_named_in_one_message():
    with pytest.raises(UserError, match=r"(?s)task count.*task upper"):
        check_initial_losses(TASKS, measured([math.nan, 1.0, 0.0]))


def test_a_task_without_validation_data_has_no_loss_and_is_no_mistake():
    check_initial_losses(TASKS, measured([5e-324, math.nan, 1e308], tokens=(5, 0, 5)))


def test_ratios_leave_out_what_has_no_data_and_keep_what_is_not_finite():
    ratios = ratios_of(TASKS, np.array([math.inf, math.nan, 1.0]), np.array([2.0, math.nan, 4.0]))
    assert list(ratios) == ["count", "upper"] and math.isnan(ratios["count"]) and ratios["upper"] == 0.25


@pytest.mark.parametrize("criterion", ["mean_ratio", "worst_ratio", "task:a", "task:b"])
@pytest.mark.parametrize("bad", [{"a": math.nan, "b": 0.1}, {"a": 0.1, "b": math.nan}, {"a": 0.1, "b": -math.inf}])
def test_a_validation_with_one_task_that_is_not_finite_is_never_the_best_and_counts_as_without_a_new_one(criterion, bad):
    found = BestStep(EarlyStoppingConfig(criterion=criterion, patience=2))
    found.update(1, {"a": 0.5, "b": 0.5})
    assert not found.update(2, bad) and not found.update(3, bad)
    assert (found.step, found.value, found.exhausted) == (1, 0.5, True)


# Steps on two ranks: what is wrong with the first and the third step; the second is good.
VARIANTS = [{"kind": "nan on one rank", "stage": stage, "dtype": dtype} for stage in range(4) for dtype in ("float32", "bfloat16")]
VARIANTS += [{"kind": "gradient too large for its norm", "stage": stage, "dtype": "float32"} for stage in range(4)]


def steps_of_a_rank(variants, out):
    """Called on each rank."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
    from workers import TASKS, Processes, build, configured, create, micro_batches, train_step

    processes, results = Processes(), []
    for variant in variants:
        config = configured(micro_batch_rows=2, gradient_clipping=1.0, **variant)
        engine, balancer = build(config, processes), create(config.balancer, TASKS, 1)
        good, bad = micro_batches(config, engine), micro_batches(config, engine)
        if variant["kind"] == "nan on one rank" and processes.rank == 1:
            bad[0].loss_weights.mul_(torch.nan)
        if variant["kind"] == "gradient too large for its norm":
            for batch in bad:
                batch.loss_weights.mul_(1e30)
        states, outcomes = [engine.gather_state(engine.module.model)], []
        for batches in (bad, good, bad):
            outcomes.append(train_step(engine, balancer, batches, 1e-3))
            states.append(engine.gather_state(engine.module.model))
        results.append(
            {
                "skipped": [outcome.skipped for outcome in outcomes],
                "norms": [outcome.grad_norm for outcome in outcomes],
                "changed": [any(not torch.equal(before[n], after[n]) for n in before) for before, after in zip(states, states[1:], strict=False)],
                "finite": all(bool(tensor.isfinite().all()) for tensor in states[-1].values()),
            }
        )
        engine.close()
    if processes.is_main:
        torch.save(results, out)
    processes.barrier()
    processes.close()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    out = tmp_path_factory.mktemp("steps") / "out.pt"
    run_ranks(__file__, "steps_of_a_rank", 2, VARIANTS, str(out))
    return torch.load(out)


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=lambda number: " ".join(map(str, VARIANTS[number].values())))
def test_a_bad_first_step_is_skipped_where_gradients_are_clipped_and_a_good_one_after_it_is_not(outcomes, number):
    found, variant = outcomes[number], VARIANTS[number]
    assert found["finite"] and not found["skipped"][1] and 2.5 < found["norms"][1] < 3.5
    if variant["kind"] == "nan on one rank":
        assert found["skipped"] == [True, False, True] and found["changed"] == [False, True, False]
    else:  # ZeRO-3 adds the squares up in float64, where the norm is a number: it is clipped
        assert found["skipped"][0] == (variant["stage"] < 3)
    assert all(math.isfinite(norm) != skipped for norm, skipped in zip(found["norms"], found["skipped"], strict=True))


# A learning rate with which the first step throws the parameters so far that every loss after it is not finite.
RUINOUS = [
    "--set=run.name=ruined",
    "--set=training.learning_rate=1e15",
    "--set=training.schedule=constant",
    "--set=training.warmup_steps=0",
    "--set=training.max_steps=40",
    "--set=validation.every_steps=2",
    "--set=validation.early_stopping.patience=null",
    "--set=balancer.warmup=1",
    "--set=checkpoint.keep=9",
]


@pytest.fixture(scope="module")
def ruined(toy, command_line, tmp_path_factory):
    """A run that three bad steps stopped, started again, and stopped by three more: its folder, both results, the records before and after."""
    runs = tmp_path_factory.mktemp("runs")
    folder, results, records = runs / "ruined", [], []
    for _ in range(2):
        results.append(command_line(1, "train", "--config", str(toy / "toy.json"), f"--set=run.dir={runs}", *RUINOUS))
        records.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()])
    return folder, results, records


def of_kind(records, kind):
    return [record for record in records if record["kind"] == kind]


def test_three_bad_steps_in_a_row_stop_the_run_with_a_checkpoint_that_the_message_names(ruined):
    folder, results, records = ruined
    assert results[0].returncode == 1 and "Traceback" not in results[0].stderr
    assert str(folder / "checkpoints" / "step-000004") in results[0].stderr and (folder / "checkpoints" / "step-000004").is_dir()
    assert [event["step"] for event in of_kind(records[0], "event") if event["name"] == "skipped_step"] == [2, 3, 4]


def test_a_run_that_was_stopped_by_bad_steps_goes_on_from_there_and_counts_anew(ruined):
    folder, results, records = ruined
    assert results[1].returncode == 1 and "up to step 7" in results[1].stderr
    assert records[1][: len(records[0])] == records[0]
    assert [record["step"] for record in of_kind(records[1], "train")] == [1, 2, 3, 4, 5, 6, 7]


def test_records_of_bad_steps_hold_null_and_weights_that_are_numbers(ruined):
    records = ruined[2][1]
    for train in of_kind(records, "train")[1:]:
        assert train["loss"] is None and train["grad_norm"] is None
    for record in of_kind(records, "train") + of_kind(records, "balancer"):
        assert sum(values["weight"] for values in record["tasks"].values()) == pytest.approx(1)
        assert min(values["weight"] for values in record["tasks"].values()) > 0
    assert of_kind(records, "balancer")[0]["tasks"]["count"]["valid_loss"] is None


def test_a_validation_that_is_not_finite_is_null_never_the_best_and_told_once_for_each_task(ruined):
    folder, _, (_, records) = ruined
    before, *later = of_kind(records, "validation")
    assert before["mean_ratio"] == 1 and [record["step"] for record in later] == [2, 4, 6]
    for record in later:
        assert record["mean_ratio"] is None and record["loss"] is None
        assert all(values["loss"] is None and values["ratio"] is None and values["perplexity"] is None for values in record["tasks"].values())
    assert not (folder / "best.json").exists() and not (folder / "export").exists()
    told = [event["task"] for event in of_kind(records, "event") if event["name"] == "validation_not_finite"]
    assert sorted(told) == sorted(TASKS)


def test_the_report_of_such_a_run_can_be_built(ruined, tmp_path):
    assert build_report(ruined[0], out=tmp_path).is_file()


def test_a_model_that_is_broken_for_one_task_is_met_before_training_whatever_the_balancer(toy, command_line, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy / "model"), AutoTokenizer.from_pretrained(toy / "model")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    capitals = tokenizer("ABCDE", add_special_tokens=False).input_ids  # only the answers of `upper` hold one
    model.get_input_embeddings().weight.data[capitals] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    changes = ["--set=data.packing=none", '--set=balancer={"kind":"uniform"}', "--set=model.dtype=bfloat16", f"--set=model.path={tmp_path / 'model'}"]
    result = command_line(1, "train", "--config", str(toy / "toy.json"), f"--set=run.dir={tmp_path}", *changes)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "task upper: the validation loss before training is nan" in result.stderr and "damaged weights" in result.stderr
    assert "task count" not in result.stderr and "task reverse" not in result.stderr
    assert not list((tmp_path / "toy").glob("checkpoints/*"))


def test_a_model_that_is_broken_for_every_token_is_met_before_anything_is_measured():
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = torch.nan
    ids = torch.arange(8)[None]
    with pytest.raises(UserError, match="damaged weights"):
        MultiTaskObjective(model, 1).check_output_layer(ids, ids)
