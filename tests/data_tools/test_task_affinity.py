"""data_tools.task_affinity: gradients as autograd has them, clusters as the config takes them, a figure that can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from data_tools import task_affinity
from data_tools.common import run
from data_tools.task_clusters import propose
from data_tools.task_gradients import adapter_of, batches_of, chosen_samples, half_gradients, load_objective
from mftcoder_coba.config import load_config
from mftcoder_coba.data import prepare
from mftcoder_coba.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def twins(toy, tmp_path_factory) -> Path:
    """The toy experiment with a fourth task, which has the data of the first under another name."""
    tree = json.loads((toy / "toy.json").read_text(encoding="utf-8"))
    tree["data"]["tasks"].append(tree["data"]["tasks"][0] | {"name": "again"})
    tree["run"]["dir"] = str(tmp_path_factory.mktemp("twins"))
    (toy / "twins.json").write_text(json.dumps(tree), encoding="utf-8")
    return toy / "twins.json"


@pytest.fixture(scope="module")
def measured(twins):
    """(config, corpus, samples in halves, objective, parameters, gradients [K, 2, n])"""
    config = load_config(twins, ["training.micro_batch_rows=4"])
    corpus = prepare(config.data, config.model.path)
    objective, parameters = load_objective(config, corpus, CPU)
    samples = chosen_samples(corpus, 9, config.run.seed)
    gradients = [
        half_gradients(objective, parameters, [batches_of(config, corpus, task, half) for half in halves], task, CPU)
        for task, halves in enumerate(samples)
    ]
    return config, corpus, samples, objective, parameters, torch.stack(gradients)


def plain_gradient(measured, task: int, samples: list[int]) -> torch.Tensor:
    """Of the summed loss of the samples, one by one through the model's own logits."""
    _, corpus, _, objective, parameters, _ = measured
    loss = torch.zeros(())
    for sample in samples:
        ids, supervised = (torch.from_numpy(np.array(part)) for part in corpus.splits["train"][task].sample(sample))
        losses = torch.nn.functional.cross_entropy(objective.model(ids[None].long()).logits[0, :-1], ids[1:].long(), reduction="none")
        loss = loss + losses[supervised[1:]].sum()
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def test_the_halves_add_up_to_the_gradient_of_the_mean_token_loss(measured):
    _, corpus, samples, _, _, gradients = measured
    for task, halves in enumerate(samples):
        tokens = sum(int(corpus.splits["train"][task].sample(sample)[1][1:].sum()) for half in halves for sample in half)
        for half in range(2):
            expected = plain_gradient(measured, task, halves[half]) / tokens
            torch.testing.assert_close(gradients[task, half], expected, rtol=1e-4, atol=1e-7)


def test_only_the_factor_that_is_zero_at_the_start_is_looked_at(measured):
    objective, parameters = measured[3], measured[4]
    looked_at = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert looked_at == {name for name, _ in objective.named_parameters() if "lora_B" in name} and len(looked_at) == len(parameters) == 2 * 7
    assert not any(parameter.any() for parameter in parameters)


def test_the_other_factor_has_no_gradient(measured):
    config, corpus, samples, objective, _, _ = measured
    others = [parameter for name, parameter in objective.named_parameters() if "lora_A" in name]
    [batch, *_] = batches_of(config, corpus, 0, samples[0][0])
    try:
        for parameter in others:
            parameter.requires_grad_(True)
        loss, _ = objective(batch.input_ids, batch.position_ids, batch.labels, batch.task_ids, batch.loss_weights, torch.ones(4).double())
        gradients = torch.autograd.grad(loss, others)
    finally:
        for parameter in others:
            parameter.requires_grad_(False)
    assert len(gradients) == 2 * 7 and not any(gradient.any() for gradient in gradients)


def test_halves_share_no_sample_and_are_equal_in_number(measured):
    for first, second in measured[2]:
        assert (len(first), len(second)) == (5, 4) and len({*first, *second}) == 9


def test_samples_of_a_task_follow_from_its_name_and_the_seed(measured, toy):
    corpus, samples, seed = measured[1], measured[2], measured[0].run.seed
    assert set(samples[0][0] + samples[0][1]) != set(samples[3][0] + samples[3][1])  # the same data under two names
    toy_config = load_config(toy / "toy.json")
    other_way = toy_config.data.model_copy(update={"tasks": toy_config.data.tasks[::-1]})
    assert chosen_samples(prepare(other_way, toy_config.model.path), 9, seed) == samples[2::-1]
    assert chosen_samples(corpus, 9, seed + 1) != samples
    everything = chosen_samples(corpus, 1000, seed)[2]
    assert sorted(everything[0] + everything[1]) == list(range(24))


@pytest.mark.parametrize(("overrides", "kind", "rank", "modules"), [
    ([], "lora", 16, "all-linear"),
    (['adapter={"kind": "lora", "rank": 4, "dropout": 0.5, "target_modules": ["q_proj"]}'], "lora", 4, ["q_proj"]),
    (['adapter={"kind": "cgc_lora", "rank": 8, "clusters": {"all": ["count", "reverse", "upper"]}}'], "lora", 8, "all-linear"),
    (['adapter={"kind": "moe_lora", "rank": 8, "quantised": true}'], "qlora", 8, "all-linear"),
])  # fmt: skip
def test_the_adapter_is_a_plain_one_of_the_experiments_rank_and_layers(toy, overrides, kind, rank, modules):
    adapter = adapter_of(load_config(toy / "toy.json", overrides))
    assert (adapter.kind, adapter.rank, adapter.target_modules, adapter.dropout) == (kind, rank, modules, 0.0)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process -> what it printed; a mistake ends in SystemExit, as in a terminal."""

    def call(config: Path, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["task_affinity", "--config", str(config), *arguments])
        run(task_affinity.main)
        return capsys.readouterr().out

    return call


def test_the_same_data_under_two_names_ends_in_one_cluster_that_the_config_takes(twins, command, tmp_path):
    text = command(twins, "--samples", "24", "--clusters", "3", "--out", str(tmp_path))
    [line] = [line for line in text.splitlines() if line.startswith('"clusters"')]
    clusters = json.loads("{" + line + "}")["clusters"]
    assert clusters == {"cluster1": ["count", "again"], "cluster2": ["reverse"], "cluster3": ["upper"]}
    written = json.loads((tmp_path / "affinity.json").read_text(encoding="utf-8"))
    assert written["clusters"] == clusters and written["samples"] == [24] * 4
    affinity = np.array(written["affinity"])
    assert affinity[0, 3] == affinity[~np.eye(4, dtype=bool)].max() > 0.95
    load_config(twins, [f'adapter={{"kind": "cgc_lora", {line}}}'])
    assert (tmp_path / "affinity.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_gives_the_same_file_and_its_folder_is_beside_the_runs(twins, command):
    folder = Path(load_config(twins).run.dir) / "toy-affinity"
    command(twins, "--samples", "4")
    first = (folder / "affinity.json").read_bytes()
    command(twins, "--samples", "4")
    assert (folder / "affinity.json").read_bytes() == first


@pytest.mark.parametrize(("arguments", "message"), [
    (["--clusters", "5"], "the experiment has 4 tasks: 1 to 4 clusters"),
    (["--clusters", "0"], "0 is not a whole number from 1 on"),
    (["--clusters", "many"], "many is not a whole number from 1 on"),
    (["--samples", "1"], "1 is not a whole number from 2 on"),
    (["--samples", "2", "--out", "/proc/affinity"], "cannot be written"),
])  # fmt: skip
def test_mistakes_end_with_exit_code_2_and_a_message(twins, command, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        command(twins, *arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_task_of_one_sample_is_refused(toy, tmp_path):
    (tmp_path / "one.jsonl").write_text((toy / "data" / "count" / "train.jsonl").read_text(encoding="utf-8").split("\n")[0], encoding="utf-8")
    tree = json.loads((toy / "toy.json").read_text(encoding="utf-8"))
    tree["model"]["path"] = str(toy / "model")
    tree["data"] |= {"tasks": [{"name": "count", "train": ["one.jsonl"]}], "valid_fraction": 0.0}
    (tmp_path / "one.json").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(UserError, match="count has one training sample"):
        task_affinity.measure(load_config(tmp_path / "one.json"), 64, None, print)


def made_up(tasks: int, own: float = 0.9, exhausted: bool = False) -> task_affinity.Affinity:
    names = tuple(f"a-task-with-a-name-{task}" for task in range(tasks))
    cosine = np.where(np.subtract.outer(range(tasks), range(tasks)) % 3 == 0, 0.8, -0.15)
    np.fill_diagonal(cosine, 1.0)
    selves = np.full(tasks, own)
    counts, ends = (8,) * tasks, (exhausted,) * tasks
    return task_affinity.Affinity(names, counts, counts, ends, cosine, selves, cosine, propose(cosine))


def test_tasks_whose_halves_disagree_are_named():
    clear, unclear, exhausted = ("\n".join(task_affinity.lines_of(made_up(6, *how))) for how in ((0.9,), (0.1,), (0.1, True)))
    assert "too little agreement" not in clear
    assert "a-task-with-a-name-0, a-task-with-a-name-1" in unclear and "raise --samples" in unclear
    assert "have no more samples" in exhausted and "raise" not in exhausted


def test_the_printed_matrix_has_the_tasks_by_cluster():
    rows = [line.split() for line in list(task_affinity.lines_of(made_up(6)))[2:8]]
    assert [row[1] for row in rows] == [f"a-task-with-a-name-{task}" for task in (0, 3, 1, 4, 2, 5)]
    assert rows[0][2:] == ["1.00", "0.80", "-0.15", "-0.15", "-0.15", "-0.15", "0.90"]


@pytest.mark.parametrize("tasks", [1, 2, 6, 20])
def test_each_value_of_the_figure_fits_into_its_cell(tasks):
    affinity = made_up(tasks)
    figure = task_affinity.draw(affinity)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    whole, own = figure.axes
    assert len(whole.texts) == tasks**2 and len(own.texts) == tasks
    assert [label.get_text() for label in whole.get_yticklabels()] == [affinity.tasks[task] for task in affinity.order]
    cell = whole.transData.transform([(0, 0), (1, 1)])
    width, height = np.abs(cell[1] - cell[0])
    boxes = [text.get_window_extent(canvas.get_renderer()) for axes in figure.axes for text in axes.texts]
    assert all(box.width < 0.9 * width and box.height < 0.9 * height for box in boxes)
    sheet = figure.get_window_extent()
    names = [label.get_window_extent() for label in (*whole.get_xticklabels(), *whole.get_yticklabels())]
    assert all(box.x0 >= sheet.x0 and box.y0 >= sheet.y0 and box.x1 <= sheet.x1 for box in names)
