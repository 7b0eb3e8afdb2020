"""2 x 8 processes on this machine, as two machines have them: two torchrun agents, one rendezvous, a tiny model.

    PYTHONPATH=.:tests:tests/launch python tests/benchmarks/two_nodes.py [--per-node 8] [--steps 5] [--zero 2]

Prints whether all ranks end with the same weights, this program's all-reduces of a step, and how far losses are from those of one process.
Ends with 1 where the weights differ, or the losses by more than 1e-4. Each process takes about 0.6 GiB.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from ranks import ROOT, run_command
from toy import write_toy
from two_agents import float64_all_reduces, largest_difference, losses, train_on_two_nodes


def settings(arguments: argparse.Namespace, name: str, rows_per_rank: int, micro_rows: int) -> list[str]:
    return [
        f"run.name={name}",
        f"training.max_steps={arguments.steps}",
        "training.global_batch_rows=16",
        f"training.micro_batch_rows={micro_rows}",
        f"validation.every_steps={arguments.steps}",
        f"validation.balancer_rows_per_rank={rows_per_rank}",
        f"deepspeed.zero_optimization.stage={arguments.zero}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--zero", type=int, default=2)
    arguments = parser.parse_args()
    ranks = 2 * arguments.per_node
    with tempfile.TemporaryDirectory() as folder:
        toy = Path(folder)
        write_toy(toy)
        started = time.monotonic()
        records = train_on_two_nodes(toy / "toy.json", toy / "out", arguments.per_node, *settings(arguments, "two", 1, 1), timeout=1800)
        seconds = time.monotonic() - started
        words = [word for setting in settings(arguments, "one", ranks, 2) for word in ("--set", setting)]
        done = run_command(1, ("train", "--config", str(toy / "toy.json"), *words), ROOT)
        assert done.returncode == 0, done.stderr
        world_size = json.loads((toy / "runs" / "two" / "environment.json").read_text())["world_size"]
        difference = largest_difference(losses(toy / "runs" / "two"), losses(toy / "runs" / "one"))
    digests = {record["weights"] for record in records}
    sizes = {tuple(by_step[step]) for record in records for by_step in [float64_all_reduces(record)] for step in range(1, arguments.steps)}
    print(f"{world_size} processes, two nodes of {arguments.per_node}, ZeRO-{arguments.zero}, {arguments.steps} steps: {seconds:.0f} s")
    print(f"weights: {len(digests)} different digest(s) on {len(records)} ranks")
    print("float64 elements of each all-reduce of a step, in order, on every rank (counts; sums and proof; validation sums; stop flag):")
    print(f"  {sorted(sizes)}")
    print(f"largest difference of a loss from that of one process: {difference:.2e}")
    return 0 if len(digests) == 1 and difference < 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
