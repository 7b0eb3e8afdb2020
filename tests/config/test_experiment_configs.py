"""The experiments in configs/: each loads, has the paper's numbers, and takes every balancer of the comparison plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftcoder_coba.balancing import create, resolve
from mftcoder_coba.comparing.methods import choose_methods
from mftcoder_coba.comparing.runs import check_methods
from mftcoder_coba.config import BALANCERS, load_config, validate
from mftcoder_coba.planning import accumulation_steps
from mftcoder_coba.training.assembly import check_signals

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Files that are no experiments by themselves: parts to extend, DeepSpeed's keys, plans for `compare`.
PARTS = ("base", "deepspeed", "balancers")
FILES = {path.relative_to(CONFIGS).as_posix(): path for path in sorted(CONFIGS.rglob("*.json"))}
EXPERIMENTS = {name: path for name, path in FILES.items() if name.split("/")[0] not in PARTS}
PLANS = [CONFIGS / "balancers" / name for name in ("paper.json", "xtreme_up.json")]

CODE = ["python", "java", "cpp", "javascript", "go"]
RELATED = ["completion", "translation", "text2code", "unittest", "comment"]
LANGUAGES = ["ar", "bn", "en", "fi", "ru", "te", "id", "ko", "sw"]
DOMAINS = ["text2code", "math", "instruct"]
PHI, LLAMA, QWEN = "microsoft/phi-1_5", "codellama/CodeLlama-13b-Python-hf", "Qwen/Qwen1.5-1.8B"
# The experiments of arXiv 2410.06741: model, A100s, learning rate, rows of a step, packing, tasks. In the place of Qwen-1.8B, whose own code and
# tokenizer are for older versions of transformers, stands the model of the same size that transformers has itself.
PAPER = {
    "cc-phi-1.5": (PHI, 16, 5e-6, 160, "none", CODE),
    "cc-codellama-13b-python": (LLAMA, 16, 1e-6, 128, "none", CODE),
    "crt-phi-1.5": (PHI, 16, 5e-6, 160, "best_fit", RELATED),
    "xtreme_up-3-qwen1.5-1.8b": (QWEN, 8, 5e-7, 128, "none", LANGUAGES[:3]),
    "xtreme_up-6-qwen1.5-1.8b": (QWEN, 8, 5e-7, 128, "none", LANGUAGES[:6]),
    "xtreme_up-9-qwen1.5-1.8b": (QWEN, 8, 5e-7, 128, "none", LANGUAGES),
    "mdqa-phi-1.5": (PHI, 8, 1e-5, 80, "best_fit", DOMAINS),
}
# Positions that each model was made for, from its config.json; Llama 3.1's are scaled ones.
POSITIONS = {
    PHI: 2048,
    LLAMA: 16384,
    QWEN: 32768,
    "Qwen/Qwen3-8B": 40960,
    "Qwen/Qwen3-30B-A3B": 40960,
    "meta-llama/Llama-3.1-8B": 131072,
    "allenai/OLMoE-1B-7B-0924": 4096,
}


def experiments_of(folder: str) -> list[str]:
    return [name for name in EXPERIMENTS if name.startswith(f"{folder}/")]


def plan_of(name: str) -> Path:
    """The plan file whose learning rates are those of the experiment's suite."""
    return CONFIGS / "balancers" / ("xtreme_up.json" if "/xtreme_up-" in name else "paper.json")


def ancestors(path: Path) -> set[Path]:
    """The files that a config is layered over, and the DeepSpeed file that any layer names."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    found = {(path.parent / tree[key]).resolve() for key in ("extends", "deepspeed") if isinstance(tree.get(key), str)}
    return found.union(*(ancestors(file) for file in found))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_loads_and_its_resolved_form_does(name, tmp_path):
    config = load_config(EXPERIMENTS[name])
    resolved = tmp_path / "resolved.json"
    resolved.write_text(json.dumps(config.model_dump()), encoding="utf-8")
    assert load_config(resolved) == config
    assert config.run.dir == str(CONFIGS.parent / "runs") and config.run.name == EXPERIMENTS[name].stem


def test_every_part_is_used_by_an_experiment():
    used = set().union(*(ancestors(path) for path in EXPERIMENTS.values()))
    unused = {name for name, path in FILES.items() if name.startswith("base/") and path.resolve() not in used}
    assert not unused


def test_the_table_names_every_experiment_of_the_paper():
    assert sorted(f"paper/{name}.json" for name in PAPER) == experiments_of("paper")


@pytest.mark.parametrize("name", PAPER)
def test_an_experiment_has_the_papers_numbers(name):
    model, gpus, rate, rows, packing, tasks = PAPER[name]
    config = load_config(CONFIGS / "paper" / f"{name}.json")
    training, balancer = config.training, config.balancer
    found = (config.model.path, training.learning_rate, training.global_batch_rows, config.data.packing, config.data.task_names)
    assert found == (model, rate, rows, packing, tasks)
    assert accumulation_steps(config, gpus) * training.micro_batch_rows * gpus == rows
    assert config.adapter is None and training.min_learning_rate == pytest.approx(rate / 10)
    assert (config.validation.early_stopping.criterion, balancer.kind, balancer.tau) == ("mean_ratio", "coba", 5.0)
    resolved = resolve(balancer, coverage=60)
    assert (resolved.window, resolved.warmup) == (120, 60)  # N = 2M, W = M


@pytest.mark.parametrize("name", [*experiments_of("paper"), *experiments_of("modern")])
def test_an_experiment_fits_its_model_and_eight_or_sixteen_gpus(name):
    config = load_config(EXPERIMENTS[name])
    assert config.data.sequence_length <= POSITIONS[config.model.path]
    for gpus in (8, 16):
        assert accumulation_steps(config, gpus) >= 1


@pytest.mark.parametrize("name", [*experiments_of("paper"), *experiments_of("modern")])
def test_every_task_has_three_files_of_its_own(name):
    tasks = load_config(EXPERIMENTS[name]).data.tasks
    files = [file for task in tasks for file in (*task.train, *task.valid, *task.test)]
    suite = {"cc": "cc", "crt": "crt", "mdqa": "mdqa", "xtreme_up": "xtreme_up"}[EXPERIMENTS[name].stem.split("-")[0]]
    expected = [CONFIGS.parent / "data" / suite / task.name / f"{split}.jsonl" for task in tasks for split in ("train", "valid", "test")]
    assert files == [str(file) for file in expected]


def test_there_are_modern_bases_dense_and_moe_full_lora_and_qlora():
    configs = [load_config(EXPERIMENTS[name]) for name in experiments_of("modern")]
    kinds = {(config.model.path, config.adapter and config.adapter.kind) for config in configs}
    dense = {(model, kind) for model in ("Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B") for kind in ("lora", "qlora")}
    moe = {(model, "lora") for model in ("Qwen/Qwen3-30B-A3B", "allenai/OLMoE-1B-7B-0924")}
    assert kinds == dense | moe | {("Qwen/Qwen3-8B", None)}


@pytest.mark.parametrize("name", [*experiments_of("paper"), *experiments_of("modern")])
def test_every_balancer_of_its_plan_is_valid_for_an_experiment(name):
    base = load_config(EXPERIMENTS[name])
    methods = choose_methods(base, [], plan_of(name))
    check_methods(base, methods)
    for method in methods.values():
        config = validate(method.over(base.model_dump()), name)
        check_signals(config)
        assert create(config.balancer, config.data.task_names, coverage=60).weights([1.0] * len(config.data.tasks)).sum() == pytest.approx(1)


def test_the_plans_have_the_papers_balancers_and_settings():
    base = load_config(CONFIGS / "paper" / "xtreme_up-3-qwen1.5-1.8b.json")
    paper, xtreme_up = (choose_methods(base, [], plan) for plan in PLANS)
    starred = {"gradnorm*", "lbtw*", "famo*"}
    assert set(paper) == {"uniform", "gradnorm", "lbtw", "famo", "metaweighting", "coba", "single_task"} | starred
    sections = {name: validate(method.over(base.model_dump()), name).balancer for name, method in paper.items() if not method.per_task}
    assert all(type(section) is BALANCERS[name.removesuffix("*")] for name, section in sections.items())
    assert {name for name, section in sections.items() if getattr(section, "signal", "train") == "validation"} == starred
    for star in ("", "*"):
        famo = sections[f"famo{star}"]
        assert (sections[f"lbtw{star}"].exponent, sections[f"gradnorm{star}"].alpha, famo.learning_rate, famo.decay) == (0.5, 1.5, 0.025, 0.01)
    assert (sections["coba"].tau, sections["coba"].window, sections["coba"].warmup) == (5.0, "auto", "auto")

    changed = {name for name in paper if paper[name] != xtreme_up[name]}
    assert set(xtreme_up) == set(paper) and changed == {"famo"}
    rates = {name: validate(method.over(base.model_dump()), name).training.learning_rate for name, method in xtreme_up.items()}
    assert rates.pop("famo") == 5e-6 and set(rates.values()) == {5e-7}
    assert xtreme_up["famo"].balancer == paper["famo"].balancer


def test_every_file_is_an_experiment_or_a_part_that_is_known():
    assert {name.split("/")[0] for name in FILES if "/" in name} == {*PARTS, "paper", "modern"}
    assert {path for path in FILES.values() if path.parent.name == "balancers"} == set(PLANS)
