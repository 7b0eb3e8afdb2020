"""Run folders as the trainer writes them, made from the worked case of DESIGN section 5 (more tasks: variants of it) with noise."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mftcoder_coba.reporting import MetricsWriter, comparison_figures, run_figures
from mftcoder_coba.reporting.report import build_report

WARMUP, WINDOW, VALID_EVERY = 100, 200, 50


def curve(number: int, step: int) -> float:
    """Noise-free validation loss ratio: the three tasks of the worked case, then slower and shallower ones."""
    if number == 0:
        return 0.5 + 0.5 * math.exp(-step / 400)
    if number == 1:
        return 0.4 + 0.6 * math.exp(-step / 120) + 0.0004 * max(0, step - 300)
    if number == 2:
        return 0.3 + 0.7 * math.exp(-step / 900)
    floor = 0.3 + 0.05 * number
    return floor + (1 - floor) * math.exp(-step / (100 * number))


def accounting(tasks: tuple[str, ...]) -> dict:
    """As `planning.accounting` gives it."""

    def count(samples: int, tokens: int = 0) -> dict:
        return {"samples": samples, "tokens": tokens}

    def part(task: str, split: str, k: int) -> dict:
        return {
            "task": task,
            "split": split,
            "read": count(1200 + 7 * k, 912_345),
            "skipped": [{"file": "a.jsonl", "line": 3, "reason": "not JSON"}],
            "other_split": count(0),
            "too_long": count(2, 25_344),
            "truncated": count(0),
            "split_samples": 0,
            "added_documents": 0,
            "without_supervision": count(0),
            "used": count(1197 + 7 * k, 887_001),
            "supervised_tokens": 443_500,
            "duplicates": 0,
            "lengths": [[64, 1000], [128, 199 + 7 * k]],
        }

    mixed = {"documents": 1197, "passes": 1.0, "tokens": 887_001, "token_share": 0.25, "supervised_tokens": 443_500, "supervised_share": 0.25}
    mixed |= {"documents_per_step": 21.5, "fewest": 20, "most": 23, "steps_without": 0}
    epoch = {"documents": 4788, "tokens": 3_548_004, "rows": 3480, "fill": 0.9957, "global_batch_rows": 64, "steps_per_epoch": 54.4}
    return {
        "tasks": {task: {split: part(task, split, k) for split in ("train", "valid")} for k, task in enumerate(tasks)},
        "mixture": epoch | {"tasks": dict.fromkeys(tasks, mixed)},
    }


@pytest.fixture
def make_accounting():
    return accounting


def softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def records(tasks: list[str], steps: int, balancer: str) -> Iterator[dict]:
    random = np.random.default_rng(0)
    starts = {task: 1.2 + 0.35 * number for number, task in enumerate(tasks)}
    weight = np.full(len(tasks), 1 / len(tasks))
    slopes: list[np.ndarray] = []
    yield validation(tasks, starts, 0)
    for step in range(1, steps + 1):
        losses = {task: starts[task] * curve(number, step) * 0.95 * float(random.normal(1, 0.08)) for number, task in enumerate(tasks)}
        tokens = {task: int(random.integers(200, 900)) if number != 2 or step % 4 else 0 for number, task in enumerate(tasks)}
        yield {
            "kind": "train",
            "step": step,
            "epoch": step / 200,
            "loss": float(sum(w * losses[task] for w, task in zip(weight, tasks, strict=True))),
            "learning_rate": 5e-6 * min(step / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
            "grad_norm": float(random.lognormal(0, 0.2)),
            "tokens": sum(tokens.values()),
            "tokens_per_second": float(random.normal(812, 20)),
            "seconds": 0.5 if step > 1 else 60.0,
            "tasks": {
                task: {"loss": losses[task] if tokens[task] else math.nan, "tokens": tokens[task], "weight": float(weight[number])}
                for number, task in enumerate(tasks)
            },
        }
        ratio = np.array([curve(number, step) * random.normal(1, 0.05) for number in range(len(tasks))])
        slope = np.array([(curve(number, step) - curve(number, max(step - WINDOW, 0))) / min(step, WINDOW) for number in range(len(tasks))])
        if balancer == "coba":
            slopes.append(slope)
            rcs = softmax(len(tasks) * slope / np.abs(slope).sum())
            recent = np.abs(slopes[-WINDOW:])
            acs = softmax(-len(recent) * slope / recent.sum(axis=0))
            df = math.nan
            if step >= WARMUP:
                steepest = np.array(slopes[WARMUP - 1 :]).max(axis=1)
                df = min(1.0, len(steepest) * softmax(-5.0 * len(steepest) * steepest / np.abs(steepest).sum())[-1])
                weight = df * rcs + (1 - df) * acs
        yield {
            "kind": "balancer",
            "step": step,
            "seconds": 0.25,
            "tasks": {
                task: {"weight": float(weight[k])}
                | (
                    {"valid_loss": starts[task] * ratio[k], "ratio": ratio[k], "slope": slope[k], "rcs": rcs[k], "acs": acs[k], "slot": step % 12}
                    if balancer == "coba"
                    else {"logit": 0.01 * step * k, "a_new_value": losses[task]}
                    if balancer == "famo"
                    else {}
                )
                for k, task in enumerate(tasks)
            },
        } | ({"df": df, "alpha_max": float(slope.max())} if balancer == "coba" else {})
        if step % VALID_EVERY == 0 or step == steps:
            yield validation(tasks, starts, step)


def validation(tasks: list[str], starts: dict[str, float], step: int) -> dict:
    ratios = {task: curve(number, step) for number, task in enumerate(tasks)}
    losses = {task: starts[task] * ratios[task] for task in tasks}
    return {
        "kind": "validation",
        "step": step,
        "mean_ratio": sum(ratios.values()) / len(tasks),
        "loss": sum(losses.values()) / len(tasks),
        "tasks": {task: {"loss": losses[task], "ratio": ratios[task], "perplexity": math.exp(losses[task]), "tokens": 4096} for task in tasks},
    }


def gates(clusters: dict[str, list[str]], step: int, common: int = 2, own: int = 2, depths: int = 2, strength: float = 0.01) -> dict:
    """Even at step 0; then each task moves to its own experts or away from them, the first tasks of a cluster furthest."""
    layers = [f"layers.{depth}.{kind}" for depth in range(depths) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    found = {}
    for cluster, tasks in clusters.items():
        for number, task in enumerate(tasks):
            rows = []
            for layer in range(len(layers)):
                tilt = strength * step * (1 - number) * (1 + 0.1 * layer)
                rows.append(softmax(np.array([0.0] * common + [tilt] * own)).tolist())
            names = [f"{cluster} {k + 1}" for k in range(common)] + [f"{task} {k + 1}" for k in range(own)]
            found[task] = {"experts": names, "values": rows}
    return {"kind": "gates", "step": step, "layers": layers, "tasks": found}


@pytest.fixture
def make_gates():
    return gates


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a whole run folder below `tmp_path` and returns it."""

    def make(
        name: str = "demo",
        tasks: tuple[str, ...] = ("completion", "comment", "unit_test"),
        steps: int = 600,
        balancer: str = "coba",
        adapter: str = "lora",
    ) -> Path:
        return write_run(tmp_path / name, list(tasks), steps, balancer, adapter)

    return make


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A run of CoBa and CGC-LoRA with its report, drawn once for all tests. Not to be changed."""
    folder = write_run(tmp_path_factory.mktemp("report") / "demo", ["completion", "comment", "unit_test"], 120, "coba", "cgc_lora")
    build_report(folder)
    return folder


@pytest.fixture(scope="session")
def compared(tmp_path_factory) -> Path:
    """The folder of a report of three runs, of which one has tasks of its own and one has only begun; drawn once for all tests.
    Of a run's own figures it has two, the others are in `demo`."""
    root = tmp_path_factory.mktemp("compared")
    write_run(root / "alpha", ["completion", "comment"], 100, "coba")
    write_run(root / "beta", ["comment", "translate"], 60, "famo")
    (root / "gamma").mkdir()
    (root / "gamma" / "metrics.jsonl").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_figures, "CHARTS", tuple(chart for chart in run_figures.CHARTS if chart.name in ("coba_scores", "balancer_values")))
        build_report(root / "alpha", root / "beta", root / "gamma", out=root / "out")
    return root / "out"


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Reports without their figures, for tests of the rest of the page: most of a report's time is drawing."""
    for module in (run_figures, comparison_figures):
        monkeypatch.setattr(module, "CHARTS", tuple(dataclasses.replace(chart, draw=lambda *_, **__: None) for chart in module.CHARTS))


def write_run(folder: Path, tasks: list[str], steps: int, balancer: str, adapter: str = "lora", tensorboard: bool = False) -> Path:
    clusters = {"code": tasks[:2], "other": tasks[2:]}
    with MetricsWriter(folder, tensorboard=tensorboard, wandb=None, resume_step=None) as writer:
        best = (0, 1.0)
        for record in records(tasks, steps, balancer):
            writer.write(record)
            if record["kind"] == "validation" and adapter == "cgc_lora":
                writer.write(gates(clusters, record["step"]))
            if record["kind"] == "validation" and record["step"] and record["mean_ratio"] < best[1]:
                best = (record["step"], record["mean_ratio"])
                writer.write({"kind": "event", "step": best[0], "name": "best", "why": f"mean_ratio {best[1]:.4f} is the lowest so far"})
    options = {"kind": "coba", "tau": 5.0, "window": WINDOW, "warmup": WARMUP, "update_interval": 1} if balancer == "coba" else {"kind": balancer}
    config = {
        "run": {"name": folder.name, "dir": "runs", "seed": 1234},
        "model": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct", "dtype": "bfloat16"},
        "adapter": {"kind": adapter, "rank": 16, "alpha": 32.0} | ({"clusters": clusters} if adapter == "cgc_lora" else {}),
        "data": {"tasks": [{"name": task, "train": [f"{task}/train.jsonl"]} for task in tasks], "sequence_length": 2048},
        "balancer": options,
    }
    files = {
        "config": config,
        "environment": {
            "versions": {"python": "3.11.2", "torch": "2.13.0", "deepspeed": "0.19.8"},
            "world_size": 2,
            "command": ["train", "--config", "demo.json"],
            "started": "2025-03-01T10:00:00+00:00",
        },
        "accounting": accounting(tasks),
        "best": {"step": best[0], "criterion": "mean_ratio", "value": best[1], "values": {task: curve(k, best[0]) for k, task in enumerate(tasks)}},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
