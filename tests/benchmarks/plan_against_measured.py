"""What `plan` says beside what DeepSpeed holds, keeps and sends, for five configurations on this machine's processors.

    PYTHONPATH=.:tests:tests/planning python tests/benchmarks/plan_against_measured.py [--only NUMBER ...]

States: bytes of all tensors of a rank when the optimizer begins its step (weights, gradients with their float32 copy, float32 parameters,
moments). Kept: bytes of the storages that torch keeps for the backward pass of one micro-batch, without parameters; checkpointing's
recomputation of a layer is not in it. Gradients and weights: bytes that a rank sends in a step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import plan_workers
from ranks import run_ranks

LORA = {"kind": "lora", "rank": 16}
# name, architecture, dtype, stage, ranks, checkpointing, adapter, tokens of a row, packing
CASES: list[tuple[str, dict[str, Any], str, int, int, bool, dict[str, Any] | None, int, str]] = [
    ("stories260k full", plan_workers.STORIES, "float32", 1, 2, False, None, 256, "best_fit"),
    ("stories260k LoRA", plan_workers.STORIES, "bfloat16", 3, 2, True, LORA, 256, "none"),
    ("SmolLM2-135M LoRA", plan_workers.SMOLLM2, "bfloat16", 2, 2, False, LORA, 256, "best_fit"),
    ("SmolLM2-135M full", plan_workers.SMOLLM2, "bfloat16", 3, 2, True, None, 256, "best_fit"),
    ("SmolLM2-135M full", plan_workers.SMOLLM2, "float32", 0, 1, False, None, 256, "none"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", choices=range(1, len(CASES) + 1), default=range(1, len(CASES) + 1))
    print("MB, planned / measured\n")
    print(f"{'model':18} {'dtype':8} ZeRO ranks checkpointing {'states':>26} {'kept':>26} {'gradients sent':>24} {'weights sent':>24}")
    for number in parser.parse_args().only:
        name, architecture, dtype, stage, ranks, checkpointing, adapter, length, packing = CASES[number - 1]
        with tempfile.TemporaryDirectory() as folder:
            file, out = Path(folder) / "config.json", Path(folder) / "measured.json"
            file.write_text(json.dumps(architecture))
            tree = plan_workers.experiment(dtype, stage, ranks, checkpointing, adapter, length, packing)
            run_ranks(plan_workers.__file__, "measure", ranks, tree, str(file), str(out))
            plan, found = plan_workers.planned(tree, str(file), ranks), json.loads(out.read_text())
        cells = [_cell(plan[key], found[key]) for key in ("states", "kept", "gradients", "weights")]
        print(
            f"{name:18} {dtype:8} {stage:4} {ranks:5} {'yes' if checkpointing else 'no':13} " + " ".join(f"{cell:>25}" for cell in cells), flush=True
        )


def _cell(planned: float, measured: float) -> str:
    difference = f" ({planned / measured - 1:+.1%})" if measured else ""
    return f"{planned / 1e6:.2f} / {measured / 1e6:.2f}{difference}"


if __name__ == "__main__":
    main()
