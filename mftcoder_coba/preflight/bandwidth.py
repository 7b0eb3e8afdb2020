"""How fast the machines add up."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from mftcoder_coba.engine import Processes
from mftcoder_coba.errors import UserError

GPU_BYTES = 256 << 20
CPU_BYTES = 8 << 20
WARM_UPS = 3


@dataclass(frozen=True)
class Bandwidth:
    """size_bytes of one all-reduce; its mean seconds; the bus bandwidth in 10^9 bytes per second.

    Bus bandwidth is 2 (n - 1) / n x size / time for n ranks (as nccl-tests define it): what each link carries in a ring, so that it can be held
    against the hardware's number for any n.
    """

    size_bytes: int
    repetitions: int
    seconds: float
    gb_per_second: float


def measure(processes: Processes, seconds: float) -> Bandwidth:
    """All-reduces float32 for about `seconds`. Collective, and the same on every rank.

    Raises:
        UserError: the sums are wrong.
    """
    size, world = (CPU_BYTES if processes.device.type == "cpu" else GPU_BYTES), processes.world_size
    values = torch.full([size // 4], float(processes.rank + 1), dtype=torch.float32, device=processes.device)
    processes.all_reduce_sum(values)
    wrong = int((values != world * (world + 1) / 2).sum())
    if processes.any(wrong > 0):
        raise UserError(
            "an all-reduce gave wrong sums", f"rank {processes.rank} found {wrong} of {len(values)}", "look for a faulty machine, link or driver"
        )
    values.zero_()  # a sum of sums would leave float32's range
    _timed(processes, values, WARM_UPS)
    once = _timed(processes, values, WARM_UPS)
    repetitions = max(1, round(seconds / once))
    mean = _timed(processes, values, repetitions)
    return Bandwidth(size, repetitions, mean, 2 * (world - 1) / world * size / mean / 1e9)


def _timed(processes: Processes, values: torch.Tensor, repetitions: int) -> float:
    """Seconds of one repetition, the mean over the ranks."""
    started = time.perf_counter()
    for _ in range(repetitions):
        processes.all_reduce_sum(values)
    if values.device.type != "cpu":
        torch.get_device_module(values.device).synchronize()
    own = torch.tensor([(time.perf_counter() - started) / repetitions], dtype=torch.float64, device=values.device)
    return processes.all_reduce_sum(own).item() / processes.world_size
