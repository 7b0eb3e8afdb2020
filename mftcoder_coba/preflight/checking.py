"""The checks, in their order, and what is told of them."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

from mftcoder_coba.config import Config
from mftcoder_coba.engine import Processes
from mftcoder_coba.errors import UserError
from mftcoder_coba.preflight.bandwidth import Bandwidth, measure
from mftcoder_coba.preflight.differences import FIXES, differences, gpu_differences
from mftcoder_coba.preflight.facts import NodeFacts, ProcessFacts, node_facts, process_facts

HANG_SECONDS = 120.0  # beyond the all-reduce's own time
GIB = 1 << 30


def check_nodes(config: Config, seconds: float, min_bandwidth_gb: float, free_disk_gib: float | None) -> list[str]:
    """Looks at every machine of a run and lets them add up. To be started by the launcher that starts the run, with as many processes.

    Args:
        seconds: of the all-reduce; 0: only its sums are checked.
        min_bandwidth_gb: bus bandwidth in GB/s below which the run is not to start.
        free_disk_gib: what must be free where checkpoints go; None: what `disk.needed_bytes` says.

    Returns:
        what was found, for people.

    Raises:
        UserError: what must be mended before a run can start, all of it in one message, the same on every rank.
        RunFailure: a process died or hangs.
    """
    processes = _joined(HANG_SECONDS + seconds)
    processes.watch.start(HANG_SECONDS + seconds)
    try:
        processes.watch.mark("looking at the machines")
        found = processes.gather_objects(process_facts(processes.rank, processes.local_rank, processes.device))
        firsts = {process.machine: process.rank for process in reversed(found)}
        is_first = processes.rank in firsts.values()
        nodes = [node for node in processes.gather_objects(node_facts(config) if is_first else None) if node]
        run_folder = _run_folder_problems(processes, Path(config.run.dir), is_first)
        _refuse(found, nodes, run_folder, free_disk_gib, config.run.dir)
        processes.watch.mark("all-reduce")
        bandwidth = measure(processes, seconds)
        if bandwidth.gb_per_second < min_bandwidth_gb:
            raise UserError(
                f"all-reduce runs at {bandwidth.gb_per_second:.2f} GB/s, {min_bandwidth_gb:g} are asked for",
                "the network",
                "NCCL_DEBUG=INFO shows which network NCCL takes; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose it",
            )
        processes.barrier()
    except RuntimeError as error:
        raise processes.watch.explain(error) or error from error
    finally:
        processes.watch.stop()
    processes.close()
    return _lines(found, nodes, bandwidth, config.run.dir)


def _joined(hang_seconds: float) -> Processes:
    try:
        return Processes(hang_seconds)
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        problem = UserError(
            f"the {os.environ.get('WORLD_SIZE')} processes did not all find each other: {str(error).splitlines()[0]}",
            place,
            "start as many on every machine as the launcher was told, and let the machines reach each other on all TCP ports "
            "(NCCL_SOCKET_IFNAME, or GLOO_SOCKET_IFNAME without GPUs, names the network)",
        )
        # Who cannot be reached cannot tell rank 0: the first process of each machine speaks.
        problem.told_by = int(os.environ.get("RANK", 0)) if os.environ.get("LOCAL_RANK", "0") == "0" else -1
        raise problem from error


def _run_folder_problems(processes: Processes, folder: Path, is_first: bool) -> list[str]:
    """All ranks write their parts of a checkpoint into one folder: every machine must see what rank 0 writes there."""
    probe = folder / f".seen-{processes.gather_objects(secrets.token_hex(8))[0]}"
    problem = ""
    if processes.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
        except OSError as error:
            problem = f"run.dir: cannot be written: {error.strerror}: {folder}"
    written = not processes.any(bool(problem))
    if written and is_first and not probe.exists():
        problem = f"run.dir: {folder} is not the folder that rank 0 writes to; it must be on a file system that all machines share"
    problems = processes.gather_objects(problem and f"{socket.gethostname()}: {problem}")
    if processes.is_main:
        probe.unlink(missing_ok=True)
    return [one for one in problems if one]


def _refuse(processes: Sequence[ProcessFacts], nodes: Sequence[NodeFacts], run_folder: list[str], free_disk_gib: float | None, run_dir: str) -> None:
    """Raises UserError with everything that is wrong."""
    lines = [f"{node.host}: {problem}" for node in nodes for problem in node.problems] + run_folder
    needed = max(node.needed_disk_bytes for node in nodes) if free_disk_gib is None else free_disk_gib * GIB
    full = [node for node in nodes if node.free_disk_bytes < needed]
    lines += [f"{node.host}: {node.free_disk_bytes / GIB:.1f} GiB are free in {run_dir}, {needed / GIB:.1f} are needed" for node in full]
    fixes = []
    sections = differences(nodes)
    if gpus := gpu_differences(processes):
        sections["GPUs"] = gpus
    for section, differing in sections.items():
        lines += [f"{section}, {line}" for line in differing]
        fixes.append(FIXES[section])
    if full:
        fixes.append("make room, choose another run.dir, or a smaller checkpoint.keep")
    if lines:
        hosts = ", ".join(node.host for node in nodes)
        what = "\n".join(["the run cannot start on these machines:", *(f"  {line}" for line in lines)])
        raise UserError(what, hosts, "; ".join(fixes) or "mend it on the machine that is named")


def _lines(processes: Sequence[ProcessFacts], nodes: Sequence[NodeFacts], bandwidth: Bandwidth, run_dir: str) -> list[str]:
    lines = [f"machines    {len(nodes)}, with {len(processes)} processes"]
    for node in nodes:
        its = [process for process in processes if process.machine == node.machine]
        room = f"{node.free_disk_bytes / GIB:.0f} GiB free in {run_dir}, {node.needed_disk_bytes / GIB:.2f} needed"
        lines.append(f"            {node.host}: {len(its)} x {its[0].device}; {room}")
    values = nodes[0].values
    size = sum(int(text.split()[0]) for text in values["data"].values())
    lines.append(f"the same    sources {values['program']['sources']} (commit {values['program'].get('commit', 'unknown')}), packages, config,")
    lines.append(f"            {len(values['data'])} data files ({size / GIB:.2f} GiB), {len(values['model'])} files of the model")
    if len(processes) > 1:
        lines.append(
            f"all-reduce  {bandwidth.size_bytes >> 20} MiB in {bandwidth.seconds * 1e3:.1f} ms: {bandwidth.gb_per_second:.2f} GB/s bus bandwidth, "
            f"mean of {bandwidth.repetitions}"
        )
    return lines
