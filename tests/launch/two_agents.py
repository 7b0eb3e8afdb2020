"""Two machines in small: two torchrun agents of different node ranks on this one, started by the command that launch/torchrun.sh shows."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from ranks import ENVIRONMENT, ROOT, free_port

COUNTING = Path(__file__).parent / "counting_ranks.py"


def shown_commands(script: str, *arguments: str, variables: dict[str, str] | None = None) -> list[str]:
    """What `bash launch/SCRIPT --dry-run ARGUMENTS` shows, without the notes."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / script), "--dry-run", *arguments],
        cwd=ROOT,
        env=os.environ | (variables or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("#")]


def train_on_two_nodes(config: Path, out: Path, per_node: int, *settings: str, timeout: float = 600) -> list[dict]:
    """Trains on two nodes of `per_node` processes each, with one rendezvous.

    Returns:
        what each rank wrote down (see `counting_ranks`), in their order.
    """
    out.mkdir()
    port = str(free_port())
    agents = []
    for node in range(2):
        rendezvous = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", port]
        options = [*rendezvous, "--nproc-per-node", str(per_node), "--no-check", "--config", str(config)]
        (command,) = shown_commands("torchrun.sh", *options, *(word for setting in settings for word in ("--set", setting)))
        assert command.count(" -m mftcoder_coba train ") == 1
        counted = command.replace(" -m mftcoder_coba train ", f" {COUNTING} {out} train ")
        log = (out / f"node-{node}.log").open("w")
        agents.append(subprocess.Popen(["bash", "-c", f"exec {counted}"], cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=log))
    try:
        codes = [agent.wait(timeout) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # an agent ends its ranks
            agent.wait()
    logs = "\n".join((out / f"node-{node}.log").read_text()[-3000:] for node in range(2))
    assert codes == [0, 0], f"{codes}\n{logs}"
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2 * per_node)]


def float64_all_reduces(record: dict) -> dict[int, list[int]]:
    """Step -> elements of each all-reduce in float64, in order: those are this program's; DeepSpeed adds up gradients in the model's own dtypes."""
    by_step: dict[int, list[int]] = {}
    for step, elements, dtype in record["all_reduces"]:
        if dtype == "float64":
            by_step.setdefault(step, []).append(elements)
    return by_step


def losses(run: Path) -> list[tuple[float, ...]]:
    """(loss, each task's loss) of each train record, and (each task's validation loss) of each balancer record."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [(r["loss"], *(task["loss"] for task in r["tasks"].values() if task["loss"] is not None)) for r in records if r["kind"] == "train"]
    observed = [tuple(task["valid_loss"] for task in r["tasks"].values()) for r in records if r["kind"] == "balancer"]
    return trained + observed


def largest_difference(one: list[tuple[float, ...]], other: list[tuple[float, ...]]) -> float:
    assert len(one) == len(other) > 0
    return max(abs(a - b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True))
