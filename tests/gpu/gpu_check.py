"""Runs all checks on this machine's GPUs, shows what passed, and ends with 0 (nothing failed), 1, or 2 (there is no GPU)."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import checks
import runs

Check = Callable[[torch.device], str]
CHECKS: dict[str, Check] = {
    "bfloat16 against float32 on the CPU": checks.bfloat16_training,
    "flash-attn on packed rows against SDPA": checks.flash_attention,
    "Liger's loss against torch": checks.liger_loss,
    "4-bit base (bitsandbytes)": checks.four_bit_base,
    "experts and the router's loss": checks.experts,
    "all-reduce over all GPUs (NCCL)": runs.all_reduce,
    "two GPUs against one, ZeRO-0 to 3": runs.two_ranks_are_one,
    "training, and going on from a checkpoint": runs.training_resumes,
}


@dataclass(frozen=True)
class Outcome:
    """result: "passed", "failed" or "skipped"; figure: what was measured, or why."""

    check: str
    result: str
    figure: str
    seconds: float


def run_checks(device: torch.device, wanted: dict[str, Check] = CHECKS) -> list[Outcome]:
    """Each check by itself: one that fails, in whatever way, does not keep the others from running."""
    outcomes = []
    for name, check in wanted.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        begun = time.monotonic()
        try:
            result, figure = "passed", check(device)
        except checks.Skipped as reason:
            result, figure = "skipped", str(reason)
        except checks.CheckFailed as failure:
            result, figure = "failed", str(failure)
        except Exception as error:  # of a library on this machine: that is what is to be found out
            traceback.print_exc()
            result, figure = "failed", f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        outcomes.append(Outcome(name, result, figure, time.monotonic() - begun))
    return outcomes


def show(outcomes: list[Outcome], console: Console) -> None:
    table = Table("check", "result", "figure", "seconds")
    for outcome in outcomes:
        table.add_row(outcome.check, outcome.result, outcome.figure, f"{outcome.seconds:.0f}")
    console.print(table)
    counts = {result: sum(outcome.result == result for outcome in outcomes) for result in ("passed", "failed", "skipped")}
    console.print(", ".join(f"{count} {result}" for result, count in counts.items()))


def main() -> int:
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else f"; the installed torch {torch.__version__} is built without CUDA"
        print(f"error: there is no GPU here to check{built}\n  what to do: run this on a machine with one", file=sys.stderr)
        return 2
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name(0)
    print(f"{count} x {name}, torch {torch.__version__}", flush=True)
    outcomes = run_checks(torch.device("cuda", 0))
    show(outcomes, Console(width=150))
    return 1 if any(outcome.result == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
