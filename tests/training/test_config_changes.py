"""Which changes of the config a resumed run takes, and how it names the others."""

import copy
import json
from pathlib import Path

import pytest

from mftcoder_coba.config import Config, DataConfig
from mftcoder_coba.config.section import Section
from mftcoder_coba.data import prepare
from mftcoder_coba.training.config_changes import FREE, FREE_WITH_ALL_DATA, FREE_WITH_THE_TASKS_DATA, changes

TREE = {
    "run": {"name": "a", "dir": "/runs"},
    "model": {"path": "/m"},
    "data": {"tasks": [{"name": "math", "train": ["/math.jsonl"]}, {"name": "code", "train": ["/code.jsonl"]}]},
    "training": {"global_batch_rows": 8, "micro_batch_rows": 2, "learning_rate": 5e-6, "max_steps": 100},
}
DATA = {name: {"train": {"key": f"{name}-t", "samples": 1200}, "valid": {"key": f"{name}-v", "samples": 60}} for name in ("math", "code")}


def changed(**values) -> dict:
    """The experiment with other values, each at `section__key`."""
    tree = copy.deepcopy(TREE)
    for path, value in values.items():
        *parents, last = path.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def saved(tree: dict) -> dict:
    """As a checkpoint's state.json holds it."""
    return json.loads(json.dumps(Config.model_validate(tree).model_dump()))


def compare(now: dict, before: dict = TREE, data: dict = DATA, saved_data: dict = DATA):
    return changes(saved(before), Config.model_validate(now), saved_data, data)


def test_the_same_config_has_no_changes():
    everything = changed(
        adapter={"kind": "lora", "alpha": 8},
        data__template={"system": "s", "user": "u", "assistant": "a"},
        balancer={"kind": "fixed", "weights": {"math": 1, "code": 2}},
        training__epochs=2,
    )
    for tree in (TREE, everything):
        found = compare(tree, before=tree)
        assert (found.refused, found.free) == ([], [])


REFUSED = {
    "training.learning_rate: 5e-06 -> 1e-05": changed(training__learning_rate=1e-5),
    'model.path: "/m" -> "/n"': changed(model__path="/n"),
    'model.dtype: "bfloat16" -> "float32"': changed(model__dtype="float32"),
    "adapter: null -> lora": changed(adapter={"kind": "lora"}),
    "balancer: coba -> famo": changed(balancer={"kind": "famo"}),
    "balancer.tau: 5.0 -> 4.0": changed(balancer__tau=4.0),
    "run.seed: 1234 -> 5": changed(run__seed=5),
    "run.data_order_seed: null -> 5": changed(run__data_order_seed=5),
    "training.global_batch_rows: 8 -> 16": changed(training__global_batch_rows=16),
    "training.betas: [0.9, 0.95] -> [0.9, 0.99]": changed(training__betas=[0.9, 0.99]),
    "data.sequence_length: 2048 -> 1024": changed(data__sequence_length=1024),
    'data.packing: "best_fit" -> "none"': changed(data__packing="none"),
    "data.temperature: 2.0 -> 3.0": changed(data__temperature=3.0),
    'validation.early_stopping.criterion: "mean_ratio" -> "worst_ratio"': changed(validation__early_stopping__criterion="worst_ratio"),
    "validation.balancer_rows_per_rank: 1 -> 2": changed(validation__balancer_rows_per_rank=2),
    'data.tasks, names in their order: ["math", "code"] -> ["code", "math"]': changed(data__tasks=TREE["data"]["tasks"][::-1]),
    'data.tasks, names in their order: ["math", "code"] -> ["math"]': changed(data__tasks=TREE["data"]["tasks"][:1]),
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_changes_the_run_is_refused_in_one_line(line):
    found = compare(REFUSED[line])
    assert (found.refused, found.free) == ([line], [])


FREE_CHANGES = {
    "run.name": changed(run__name="b"),
    "run.dir": changed(run__dir="/other"),
    "run.hang_timeout_minutes": changed(run__hang_timeout_minutes=5.0),
    "tracking.tensorboard": changed(tracking__tensorboard=False),
    "checkpoint.keep": changed(checkpoint__keep=5),
    "validation.every_steps": changed(validation__every_steps=7),
    "validation.early_stopping.patience": changed(validation__early_stopping__patience=None),
    "training.micro_batch_rows": changed(training__micro_batch_rows=4),
    "model.gradient_checkpointing": changed(model__gradient_checkpointing=True),
    "model.attention": changed(model__attention="eager"),
    "data.cache_dir": changed(data__cache_dir="/cache"),
    "deepspeed.zero_optimization.stage": changed(deepspeed={"zero_optimization": {"stage": 3}}),
    "deepspeed.wall_clock_breakdown": changed(deepspeed={"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True}),
    "data.tasks[math].test": changed(data__tasks=[{"name": "math", "train": ["/math.jsonl"], "test": ["/t.jsonl"]}, TREE["data"]["tasks"][1]]),
    # The same samples under another name of the file, or by a setting that nothing comes of.
    "data.tasks[math].train": changed(data__tasks=[{"name": "math", "train": ["/moved.jsonl"]}, TREE["data"]["tasks"][1]]),
    "data.template": changed(data__template="mftcoder"),
    "data.on_error": changed(data__on_error="skip"),
    "data.too_long": changed(data__too_long="split"),
    "data.valid_fraction": changed(data__valid_fraction=0.1),
}


@pytest.mark.parametrize("path", FREE_CHANGES)
def test_what_does_not_change_the_run_is_free_and_told(path):
    found = compare(FREE_CHANGES[path])
    assert found.refused == []
    (line,) = found.free
    assert line.startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({}, {"training__max_steps": 200}, True),
        ({}, {"training__epochs": 5}, True),
        ({"training__schedule": "constant"}, {"training__schedule": "constant", "training__max_steps": 200}, True),  # 3 % of the steps are warm-up
        (
            {"training__schedule": "constant", "training__warmup_steps": 10},
            {"training__schedule": "constant", "training__warmup_steps": 10, "training__max_steps": 200},
            False,
        ),
    ],
)
def test_another_end_is_free_and_tells_where_it_moves_the_learning_rate(before, now, told):
    found = compare(changed(**now), before=changed(**before))
    assert found.refused == [] and len(found.free) == 1
    assert ("the learning rate from here on follows the schedule that ends there" in found.free[0]) == told
    if "training__max_steps" in now:
        assert found.free[0].startswith("training.max_steps: 100 -> 200")


def test_other_content_is_refused_with_the_settings_that_may_have_made_it():
    data = copy.deepcopy(DATA)
    data["math"]["train"] = {"key": "other", "samples": 1300}
    now = changed(data__tasks=[{"name": "math", "train": ["/new.jsonl"]}, {"name": "code", "train": ["/moved.jsonl"]}], data__template="mftcoder")
    found = compare(now, data=data)
    assert found.refused == [
        'data.tasks[math].train: ["/math.jsonl"] -> ["/new.jsonl"]',
        'data.template: "auto" -> "mftcoder"',
        "data.tasks math/train: other content (1,200 samples before, 1,300 now)",
    ]
    assert found.free == ['data.tasks[code].train: ["/code.jsonl"] -> ["/moved.jsonl"]']


@pytest.mark.parametrize(("before", "now", "told"), [(60, None, "60 samples before, none now"), (None, 60, "none before, 60 now")])
def test_a_split_that_comes_or_goes_is_other_content(before, now, told):
    def data(samples):
        return DATA | {"math": DATA["math"] | {"valid": {"key": "v", "samples": samples}} if samples else {"train": DATA["math"]["train"]}}

    found = compare(TREE, data=data(now), saved_data=data(before))
    assert found.refused == [f"data.tasks math/valid: other content ({told})"]


def test_a_key_that_an_older_version_did_not_have_counts_as_its_default():
    def without(tree, *path):
        old = saved(tree)
        node = old
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]
        return old

    def found(old, tree):
        return changes(old, Config.model_validate(tree), DATA, DATA)

    for path in [("training", "gradient_clipping"), ("validation",), ("balancer", "slope"), ("data", "tasks", 0, "share"), ("adapter",)]:
        same = found(without(TREE, *path), TREE)
        assert (same.refused, same.free) == ([], []), path
    other = found(without(TREE, "training", "gradient_clipping"), changed(training__gradient_clipping=0.5))
    assert other.refused == ["training.gradient_clipping: 1.0 -> 0.5"]


def test_a_key_that_this_version_does_not_know_is_refused():
    old = saved(TREE)
    old["training"]["momentum"] = 0.9
    assert changes(old, Config.model_validate(TREE), DATA, DATA).refused == ["training.momentum: 0.9 -> (not there)"]


def test_long_lists_show_where_they_differ():
    files = [f"/{number}.jsonl" for number in range(20)]
    before, now = ({"name": "math", "train": train} for train in (files, files[:5] + ["/x.jsonl"] + files[6:]))
    found = compare(changed(data__tasks=[now, TREE["data"]["tasks"][1]]), before=changed(data__tasks=[before, TREE["data"]["tasks"][1]]))
    assert found.free == ['data.tasks[math].train: [..., "/5.jsonl", ...] -> [..., "/x.jsonl", ...]']


def test_the_error_lists_what_is_refused_and_the_ways_out():
    error = compare(changed(training__learning_rate=1e-5, run__seed=3, run__name="b")).error(Path("/runs/a/checkpoints/step-000100"))
    assert str(error) == (
        "the config differs from the checkpoint's in ways that change the run:\n"
        "  - run.seed: 1234 -> 3\n"
        "  - training.learning_rate: 5e-06 -> 1e-05\n"
        "  where: /runs/a/checkpoints/step-000100\n"
        "  what to do: restore these settings, start a new run (another run.name), or insist with --allow-config-change"
    )


def test_what_is_free_is_what_the_config_knows():
    """A key that is renamed must be renamed in the list, or it is refused."""

    def paths(model: type[Section], prefix: str = ""):
        for name, field in model.model_fields.items():
            yield prefix + name
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from paths(inner, f"{prefix}{name}.")
            elif name == "tasks":
                yield from paths(inner.__args__[0], f"{prefix}tasks[].")

    assert FREE | FREE_WITH_ALL_DATA | FREE_WITH_THE_TASKS_DATA <= set(paths(Config))


@pytest.fixture(scope="module")
def fingerprints(toy, tmp_path_factory):
    """(settings of `data`, contents of the task's files) -> fingerprints."""
    folder = tmp_path_factory.mktemp("data")

    def run(train: list[str], task: dict | None = None, valid: list[str] | None = None, name: str = "train", **settings):
        (folder / f"{name}.jsonl").write_text("\n".join(train), encoding="utf-8")
        files = {"train": [str(folder / f"{name}.jsonl")]}
        if valid:
            (folder / "valid.jsonl").write_text("\n".join(valid), encoding="utf-8")
            files["valid"] = [str(folder / "valid.jsonl")]
        tree = {"tasks": [{"name": "math", **files} | (task or {})], "sequence_length": 64, "cache_dir": str(folder / "cache")} | settings
        return prepare(DataConfig.model_validate(tree), str(toy / "model"), workers=1, progress=False).fingerprints

    return run


def line(text: str) -> str:
    return json.dumps({"chat_rounds": [{"role": "human", "content": text}, {"role": "bot", "content": "yes"}]})


SHORT = [line(f"word {number}") for number in range(40)]


def test_equal_fingerprints_mean_equal_samples(fingerprints):
    first = fingerprints(SHORT, valid=SHORT[:3])
    assert json.loads(json.dumps(first)) == first
    assert {split: entry["samples"] for split, entry in first["math"].items()} == {"train": 40, "valid": 3}
    # None of these is felt by these samples.
    for settings in ({"name": "moved"}, {"on_error": "skip"}, {"too_long": "split"}, {"valid_fraction": 0.5}, {"task": {"test": []}}):
        assert fingerprints(SHORT, valid=SHORT[:3], **settings) == first, settings


def test_other_samples_have_other_fingerprints(fingerprints):
    first = fingerprints(SHORT, valid_fraction=0.5)
    long = [*SHORT, line("long " * 40)]
    assert fingerprints(SHORT, valid_fraction=0.4)["math"]["train"] != first["math"]["train"]
    assert fingerprints(SHORT[::-1], valid_fraction=0.5) != first
    assert fingerprints(SHORT, valid_fraction=0.5, template={"system": "", "user": "u", "assistant": "a"}) != first
    assert fingerprints(long, too_long="truncate") != fingerprints(long, too_long="split")
    assert fingerprints([*SHORT, "no sample"], on_error="skip") != fingerprints(SHORT)
