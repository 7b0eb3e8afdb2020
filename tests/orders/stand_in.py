"""Stands for `train` where only what `orders` does around it is tested: the model of a run is the base model, a little moved by its order."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
steps, base = int(sys.argv[2]), Path(config["model"]["path"])
print(f"started {config['run']['name']}")
folder = Path(config["run"]["dir"]) / config["run"]["name"]
shutil.copytree(base, folder / "export")
random = np.random.default_rng(config["run"]["data_order_seed"])
tensors = {name: tensor + 0.02 * random.standard_normal(tensor.shape, np.float32) for name, tensor in load_file(base / "model.safetensors").items()}
save_file(tensors, folder / "export" / "model.safetensors", {"format": "pt"})
tasks = [task["name"] for task in config["data"]["tasks"]]
ratios = {0: 1.0, steps // 2: 0.5 + config["run"]["data_order_seed"] / 100, steps: 0.9}
records = []
for step, ratio in ratios.items():
    values = {task: {"loss": 5.0 * ratio, "ratio": ratio, "perplexity": 7.0} for task in tasks}
    records.append({"kind": "validation", "step": step, "mean_ratio": ratio, "tasks": values})
records.append({"kind": "train", "step": steps, "seconds": 0.5, "tasks": {task: {"loss": 1.0, "weight": 0.5} for task in tasks}})
(folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
best = {"step": steps // 2, "criterion": "mean_ratio", "value": ratios[steps // 2], "values": {}}
(folder / "best.json").write_text(json.dumps(best), encoding="utf-8")
