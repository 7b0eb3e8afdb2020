"""One run is killed at random moments, again and again, and must end as a run that nobody disturbed.

    python tests/benchmarks/random_kills.py [--kills 30] [--seed 0] [--stage 2] [--lora]

Two CPU ranks of the tests' toy experiment, a checkpoint every other step; every second kill waits for a save to begin. Some kills hit
one rank, the others all. Prints what was hit and what differs at the end.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from killing import differences, kill_at_random, records
from ranks import run_command
from toy import write_toy

LORA = 'adapter={"kind": "lora", "rank": 8, "alpha": 32, "dropout": 0.1}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_toy(folder)
        changes = [
            f"training.max_steps={options.steps}",
            "validation.early_stopping.patience=null",
            "checkpoint.every_steps=2",
            f"deepspeed.zero_optimization.stage={options.stage}",
        ]
        changes += [LORA] if options.lora else []

        def command(run: str) -> tuple[str, ...]:
            return ("train", "--config", str(folder / "toy.json"), *(part for change in [f"run.name={run}", *changes] for part in ("--set", change)))

        straight = run_command(2, command("straight"), folder)
        assert straight.returncode == 0, straight.stderr[-3000:]
        tally = kill_at_random(folder / "runs" / "killed", 2, command("killed"), options.kills, random.Random(options.seed))
        run = folder / "runs" / "killed"
        steps = [record["step"] for record in records(run, "train")]
        found = differences(run, folder / "runs" / "straight")
        events = [record["name"] for record in records(run, "event")]
        print(f"{tally.kills} kills, {tally.while_saving} of them left half a checkpoint, {tally.of_one_rank} hit one rank only")
        print(f"at steps {tally.at_steps}")
        print(f"{events.count('resume')} resumes in the records that stayed, {events.count('damaged_checkpoint')} damaged checkpoints")
        print(f"training records: {f'{len(steps)} steps, each once' if steps == list(range(1, len(steps) + 1)) else steps}")
        print(f"differences from the undisturbed run: {', '.join(found) or 'none'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
