"""Stands for `train` where only what `compare` does around it is tested: writes records after a second's fraction, or fails."""

import json
import sys
from pathlib import Path

config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
steps, name = int(sys.argv[2]), config["run"]["name"]
print(f"started {name}")
if name in sys.argv[3:]:
    print("error: out of luck\n  what to do: try again")
    print("[launcher] a process has ended with 1")
    sys.exit(1)
folder = Path(config["run"]["dir"]) / name
for part in ("checkpoints", "export"):
    (folder / part).mkdir(parents=True)
tasks = [task["name"] for task in config["data"]["tasks"]]
records = []
for step in (0, steps):
    values = {task: {"loss": 2.0 - step / 10, "ratio": 1 - step / 20, "perplexity": 7.0} for task in tasks}
    records.append({"kind": "validation", "step": step, "mean_ratio": 1 - step / 20, "tasks": values})
records.append({"kind": "train", "step": steps, "seconds": 0.5, "tasks": {task: {"loss": 1.0, "weight": 0.5} for task in tasks}})
(folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
