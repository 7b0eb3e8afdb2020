"""Ranks that take themselves for machines of their own: each has a folder, which it finds under a path that is the same for all."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from unittest import mock

import torch

from mftcoder_coba import cli
from mftcoder_coba.engine import Processes
from mftcoder_coba.preflight import bandwidth, facts

HERE = "/proc/self/cwd"  # the same path in every process, another folder in each


def check(folder: str, config: str, *options: str) -> None:
    """`check-nodes` on the machine `node-RANK`, which is `folder`/node-RANK; its program is in `program` there, if that exists."""
    host = f"node-{os.environ['RANK']}"
    os.chdir(Path(folder) / host)
    program = Path("program") if Path("program").is_dir() else facts.PACKAGE
    sys.argv = ["mftcoder_coba", "check-nodes", "--config", config, *options]
    with mock.patch.object(socket, "gethostname", return_value=host), mock.patch.object(facts, "PACKAGE", program.absolute()):
        cli.main()


def check_alone_on_a_port_that_is_taken(config: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        sys.argv = ["mftcoder_coba", "check-nodes", "--config", config]
        cli.main()


def a_rank_that_adds_up_wrongly() -> None:
    processes = Processes()
    if processes.rank == 1:
        right = processes.all_reduce_sum

        def wrong(values: torch.Tensor) -> torch.Tensor:
            right(values)
            if values.numel() > 1:
                values[5] += 1
            return values

        processes.all_reduce_sum = wrong
    try:
        bandwidth.measure(processes, 0)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    processes.close()
