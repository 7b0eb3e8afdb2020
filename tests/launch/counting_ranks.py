"""A rank of a run that writes down, into OUT/rank-N.json, each all-reduce and a digest of its weights at the end. In place of `-m mftcoder_coba`:

python tests/launch/counting_ranks.py OUT train --config ...
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from mftcoder_coba.cli import main
from mftcoder_coba.training import trainer


def weights_digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode() + parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def watch_the_run(out: Path) -> None:
    """Notes [step, elements, dtype] of each all-reduce, DeepSpeed's own with them, from the first step on."""
    loops: list[trainer.Loop] = []
    calls: list[tuple[int, int, str]] = []
    all_reduce, run_to_end = torch.distributed.all_reduce, trainer.Loop.run_to_end

    def counted(tensor, *arguments, **options):
        if loops:
            calls.append((loops[0].step, tensor.numel(), str(tensor.dtype).removeprefix("torch.")))
        return all_reduce(tensor, *arguments, **options)

    def noted(loop, interruption):
        loops.append(loop)
        run_to_end(loop, interruption)
        record = {"all_reduces": calls, "weights": weights_digest(loop.run.engine.module), "node": os.environ["GROUP_RANK"]}
        (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(record), encoding="utf-8")

    torch.distributed.all_reduce, trainer.Loop.run_to_end = counted, noted


if __name__ == "__main__":
    watch_the_run(Path(sys.argv[1]))
    del sys.argv[1]
    main()
