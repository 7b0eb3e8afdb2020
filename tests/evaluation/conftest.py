"""Small trained runs of each kind of model, to be evaluated."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from toy import sample, write_samples, write_toy

CLUSTERS = {"numbers": ["count"], "letters": ["reverse", "upper"]}
ADAPTERS = {
    "full": None,
    "lora": {"kind": "lora", "rank": 4},
    "cgc": {"kind": "cgc_lora", "clusters": CLUSTERS, "common_experts": 1, "task_experts": 1, "rank": 6},
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, command_line) -> Path:
    """A toy experiment with test files of two tasks, and runs/{full,lora,cgc} of one process."""
    folder = tmp_path_factory.mktemp("trained")
    write_toy(folder)
    tree = json.loads((folder / "toy.json").read_text())
    rng = random.Random(1)
    for task in tree["data"]["tasks"][:2]:
        write_samples(folder / "data" / task["name"] / "test.jsonl", [sample(task["name"], rng) for _ in range(5)])
        task["test"] = [f"data/{task['name']}/test.jsonl"]
    tree["training"] |= {"max_steps": 8, "learning_rate": 5e-3, "warmup_steps": 0, "schedule": "constant"}
    tree["validation"]["every_steps"] = 4
    (folder / "toy.json").write_text(json.dumps(tree))
    for name, adapter in ADAPTERS.items():
        settings = ("--set", f"run.name={name}", "--set", f"adapter={json.dumps(adapter)}")
        result = command_line(1, "train", "--config", str(folder / "toy.json"), *settings)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder
