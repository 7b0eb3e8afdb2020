"""One rank of `runs.on_ranks`: FUNCTION and a JSON list of its arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))


def bandwidth(seconds: float) -> None:
    from mftcoder_coba.engine import Processes
    from mftcoder_coba.preflight.bandwidth import measure

    processes = Processes()
    found = measure(processes, seconds)
    if processes.is_main:
        print("bandwidth", found.gb_per_second, flush=True)
    processes.barrier()
    processes.close()


def gradients(*arguments) -> None:
    import workers

    workers.gradients(*arguments)


if __name__ == "__main__":
    globals()[sys.argv[1]](*json.loads(sys.argv[2]))
