"""The processes of a run: who is who, and the few collectives that are not DeepSpeed's own."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import torch

from mftcoder_coba.engine.watch import Watch
from mftcoder_coba.errors import UserError

# That a collective waits longer than the watch: it is the watch that knows which rank hangs.
WATCH_FIRST_SECONDS = 300.0


def launched_world_size() -> int:
    """Processes that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched_local_rank() -> int:
    """This process's number among those on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


class Processes:
    """This process among the run's processes. Starts the process group, also for a single process without a launcher.

    Args:
        hang_timeout_seconds: what `watch.start` will be given; collectives wait longer.
    """

    def __init__(self, hang_timeout_seconds: float = 1800.0) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = launched_local_rank()
        self.world_size = launched_world_size()
        if "RANK" not in os.environ:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self._quieten()
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        self.device = torch.device(get_accelerator().device_name(self.local_rank))
        if self.device.type != "cpu":
            if self.local_rank >= get_accelerator().device_count():
                raise UserError(
                    f"process {self.local_rank} of this machine has no GPU: there are {get_accelerator().device_count()}",
                    "the launcher",
                    "start one process per GPU",
                )
            get_accelerator().set_device(self.local_rank)
        else:
            # DeepSpeed's collectives in shared memory are compiled at first use, which takes a compiler and a minute, and leave
            # 66 MiB of each process in /dev/shm. Gloo does their work. Nothing else looks here, and finding out which
            # operators could be compiled takes longer than the rest of the start.
            deepspeed.ops.__compatible_ops__ = {}
        timeout = timedelta(seconds=hang_timeout_seconds + WATCH_FIRST_SECONDS)
        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), timeout=timeout, verbose=False)
        self.watch = Watch(self.rank, self.world_size, self.gather_objects)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place: the same bits on every rank. Give float64, so that rounding stays far from what is measured."""
        torch.distributed.all_reduce(values)
        return values

    def reduce_scatter_sum(self, values: torch.Tensor) -> torch.Tensor:
        """[world size x n, ...] -> [n, ...]: this rank's part, in order of ranks, of the sum over ranks."""
        part = torch.empty_like(values[: len(values) // self.world_size])
        torch.distributed.reduce_scatter_single(part, values)
        return part

    def barrier(self) -> None:
        torch.distributed.barrier()

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        return self.all_reduce_sum(torch.tensor([float(flag)], dtype=torch.float64, device=self.device)).item() > 0

    def gather_objects(self, value: Any) -> list[Any]:
        """Each rank's value, in order of ranks, on every rank. For small plain values, at rare moments."""
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def close(self) -> None:
        self.watch.stop()
        torch.distributed.destroy_process_group()

    def _quieten(self) -> None:
        """Libraries tell each of their decisions on every rank, and draw bars of their own; warnings stay."""
        from deepspeed.utils import logger
        from transformers.utils.logging import disable_progress_bar

        logger.setLevel(logging.WARNING)
        disable_progress_bar()
        warnings.filterwarnings("ignore", message=".*is deprecated", module="torch.distributed")
