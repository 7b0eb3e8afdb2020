"""Records of gates: read, put into words, and refused where they are broken. The figures are in test_gate_figures.py."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting import MetricsWriter, Progress, read_metrics, read_run
from mftcoder_coba.reporting.gates import Gates
from mftcoder_coba.reporting.summary import gates_at_best, sentences

PAIR = {"code": ["completion", "comment"]}


def put(folder, *records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def validation(step, mean_ratio=1.0, tasks=("completion", "comment")):
    return {"kind": "validation", "step": step, "mean_ratio": mean_ratio, "tasks": {task: {"loss": 1.0, "ratio": mean_ratio} for task in tasks}}


def one_task(names, *rows, task="math") -> Gates:
    return Gates(0, [f"layers.{number}.q_proj" for number in range(len(rows))], {task: names}, {task: np.array(rows, dtype=float)})


def test_gates_are_read_as_they_were_written(tmp_path, make_gates):
    record = make_gates(PAIR, 40)
    record["tasks"]["comment"]["values"][1][2] = None
    put(tmp_path, make_gates(PAIR, 0), record)
    first, second = read_metrics(tmp_path).gates
    assert (first.step, second.step, second.layers) == (0, 40, record["layers"])
    assert second.experts == {
        "completion": ["code 1", "code 2", "completion 1", "completion 2"],
        "comment": ["code 1", "code 2", "comment 1", "comment 2"],
    }
    np.testing.assert_array_equal(first.values["completion"], np.full((4, 4), 0.25))
    np.testing.assert_array_equal(second.values["completion"], record["tasks"]["completion"]["values"])
    assert np.isnan(second.values["comment"][1, 2]) and np.isfinite(second.values["comment"]).sum() == 15


def test_a_run_without_gates_has_none(make_run):
    assert read_metrics(make_run(steps=2)).gates == []


@pytest.mark.parametrize(
    "names, common, cluster",
    [
        (["qa 1", "qa 2", "math 1"], 2, "qa"),
        (["all 1", "all 2", "all 3"], 3, "all"),
        (["math 1", "math 2"], 0, ""),
        (["math 1", "math 2", "math 1"], 2, "math"),  # a cluster of the task's name
        (["math of all 1", "math 1"], 1, "math of all"),
    ],
)
def test_common_experts_are_told_from_the_tasks_own_by_their_names(names, common, cluster):
    gates = one_task(names, [1 / len(names)] * len(names))
    assert (gates.common("math"), gates.cluster("math"), gates.has_both_kinds("math")) == (common, cluster, 0 < common < len(names))
    assert gates.even_common_share("math") == common / len(names)


def test_the_share_of_common_experts_is_the_mean_over_layers_with_a_whole_gate():
    names = ["qa 1", "qa 2", "math 1"]
    gates = one_task(names, [0.5, 0.25, 0.25], [0.25, 0.0, 0.75], [np.nan, 0.5, 0.5])
    assert gates.common_share("math") == 0.5
    assert np.isnan(one_task(names, [np.nan, 0.5, 0.5]).common_share("math"))


def broken(make_gates, change) -> dict:
    record = make_gates(PAIR, 5)
    change(record)
    return record


BREAKS = {
    "no layers": lambda record: record.pop("layers"),
    "empty layers": lambda record: record.update(layers=[]),
    "layers that are no names": lambda record: record.update(layers=[1, 2, 3, 4]),
    "no tasks": lambda record: record.pop("tasks"),
    "a task that is a list": lambda record: record["tasks"].update(comment=[[0.5, 0.5]]),
    "no experts": lambda record: record["tasks"]["comment"].pop("experts"),
    "too few experts": lambda record: record["tasks"]["comment"]["experts"].pop(),
    "no values": lambda record: record["tasks"]["comment"].pop("values"),
    "too few layers": lambda record: record["tasks"]["comment"]["values"].pop(),
    "a short row": lambda record: record["tasks"]["comment"]["values"][1].pop(),
    "a row that is a number": lambda record: record["tasks"]["comment"]["values"].__setitem__(1, 0.25),
    "a gate that is a text": lambda record: record["tasks"]["comment"]["values"][1].__setitem__(0, "0.25"),
    "a gate that is a truth value": lambda record: record["tasks"]["comment"]["values"][1].__setitem__(0, True),
    "a gate below 0": lambda record: record["tasks"]["comment"]["values"][1].__setitem__(0, -0.5),
    "a gate above 1": lambda record: record["tasks"]["comment"]["values"][1].__setitem__(0, 10**400),
}


@pytest.mark.parametrize("change", BREAKS.values(), ids=BREAKS)
def test_gates_that_no_run_writes_are_named(tmp_path, make_gates, change):
    put(tmp_path, make_gates(PAIR, 0), broken(make_gates, change), validation(5))
    with pytest.raises(UserError) as error:
        read_run(tmp_path)
    assert error.value.where == f"{tmp_path / 'metrics.jsonl'}:2"


def test_a_torn_last_record_of_gates_is_not_read(tmp_path, make_gates):
    put(tmp_path, make_gates(PAIR, 0), make_gates(PAIR, 5))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert [gates.step for gates in read_metrics(tmp_path).gates] == [0]


@pytest.mark.parametrize("first", ["validation", "gates"])
def test_gates_of_a_validation_that_the_resumed_run_does_again_are_cut_with_it(tmp_path, make_gates, first):
    of_step_2 = [validation(2), make_gates(PAIR, 2)]
    train = {"kind": "train", "step": 2, "tasks": {}}
    before = [validation(0), make_gates(PAIR, 0), train]
    put(tmp_path, *before, *(of_step_2 if first == "validation" else reversed(of_step_2)))
    MetricsWriter(tmp_path, False, None, resume_step=2, pending=True).close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == before


def test_gates_are_in_the_file_but_in_no_chart_and_no_line_of_the_log(tmp_path, make_gates, capsys):
    with MetricsWriter(tmp_path, True, None, None, also=[Progress(10, ["completion", "comment"], terminal=False)]) as writer:
        writer.write(make_gates(PAIR, 5))
    assert len(read_metrics(tmp_path).gates) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == [] and capsys.readouterr().out == ""


def test_the_gates_shown_are_those_of_the_best_step_and_else_the_newest(tmp_path, make_gates):
    records = [record for step in (0, 5, 10) for record in (validation(step, mean_ratio=0.5 if step == 5 else 1.0), make_gates(PAIR, step))]
    put(tmp_path, *records)
    assert gates_at_best(read_run(tmp_path)).step == 5
    put(tmp_path, *(record for record in records if record["kind"] == "validation" or record["step"] != 5))
    assert gates_at_best(read_run(tmp_path)).step == 10
    put(tmp_path, validation(0))
    assert gates_at_best(read_run(tmp_path)) is None


def of_gates(folder) -> list[str]:
    return [text for text in sentences(read_run(folder)) if "gates" in text]


def named(task, own):
    return {"experts": ["code 1", f"{task} 1"], "values": [[1 - own, own]]}


def test_the_summary_names_the_tasks_that_use_their_own_experts_most_and_least(tmp_path):
    tasks = {"completion": named("completion", 0.25), "comment": named("comment", 0.75)}
    put(tmp_path, validation(4, 0.5), {"kind": "gates", "step": 4, "layers": ["q"], "tasks": tasks})
    assert of_gates(tmp_path) == [
        "At step 4, the gates give, on average over the layers, 75% to the own experts of comment (most of all tasks) and 25% to those of "
        "completion (least); even gates would give 50%."
    ]


def test_of_a_single_task_the_summary_makes_no_comparison(tmp_path):
    put(tmp_path, validation(4, 0.5), {"kind": "gates", "step": 4, "layers": ["q"], "tasks": {"comment": named("comment", 0.75)}})
    (text,) = of_gates(tmp_path)
    assert text == "At step 4, the gates give, on average over the layers, 75% to the own experts of comment; even gates would give 50%."


def test_the_summary_is_silent_where_the_gates_have_hardly_moved_or_there_is_one_kind_of_experts(tmp_path, make_gates):
    put(tmp_path, validation(4, 0.5), {"kind": "gates", "step": 4, "layers": ["q"], "tasks": {"comment": named("comment", 0.519)}})
    assert of_gates(tmp_path) == []
    for common, own in ((4, 0), (0, 4)):
        record = make_gates(PAIR, 4, common, own)
        record["tasks"]["comment"]["values"] = [[0.7, 0.1, 0.1, 0.1]] * 4
        put(tmp_path, validation(4, 0.5), record)
        assert of_gates(tmp_path) == []


@pytest.mark.parametrize("kind, written", [("cgc_lora", "by CGC-LoRA of rank 8"), ("moe_lora", "by MOELoRA of rank 8")])
def test_the_summary_writes_the_adapters_as_people_do(tmp_path, kind, written):
    put(tmp_path, validation(0))
    (tmp_path / "config.json").write_text(json.dumps({"model": {"path": "a/b"}, "adapter": {"kind": kind, "rank": 8}}))
    assert written in sentences(read_run(tmp_path))[0]
