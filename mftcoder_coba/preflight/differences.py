"""What differs between machines, in words. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mftcoder_coba.preflight.facts import NodeFacts, ProcessFacts

LINES_TOLD = 4  # of one section
HOSTS_TOLD = 4
# What need not be known everywhere: a copy of the repository without git has the same sources all the same.
WHERE_KNOWN = {("program", "commit")}
FIXES = {
    "program": "bring every machine to the same commit (git pull), without changes of its own",
    "packages": "bash launch/setup.sh on every machine, or one virtual environment on a file system that all share",
    "config": "copy the same config files to every machine",
    "data": "copy the same data files to every machine, under the same paths",
    "model": "copy the same model folder to every machine, under the same path",
    "GPUs": "start as many processes on each machine as it has GPUs, and take machines of one kind",
}


def differences(nodes: Sequence[NodeFacts]) -> dict[str, list[str]]:
    """Section -> lines that say which machines differ in what; sections without any are left out."""
    found: dict[str, list[str]] = {}
    for section in nodes[0].values:
        names = sorted({name for node in nodes for name in node.values[section]})
        lines = [line for name in names if (line := _difference(section, name, nodes))]
        if lines:
            found[section] = _shortened(lines)
    return found


def gpu_differences(processes: Sequence[ProcessFacts]) -> list[str]:
    """Lines about machines with other GPUs than the others, or with more processes than GPUs."""
    by_machine: dict[str, list[ProcessFacts]] = {}
    for process in processes:
        by_machine.setdefault(process.machine, []).append(process)
    hosts = [found[0].host for found in by_machine.values()]
    kinds = [
        ", ".join(f"{number} x {name}" for name, number in Counter(process.device for process in found).items()) for found in by_machine.values()
    ]
    lines = [f"processes: {_grouped(kinds, hosts)}"] if len(set(kinds)) > 1 else []
    mixed = [f"{host} has different GPUs: {kind}" for host, kind in zip(hosts, kinds, strict=True) if ", " in kind]
    idle = [f"{host} has {found[0].gpus} GPUs, of which {len(found)} are used" for host, found in zip(hosts, by_machine.values(), strict=True)]
    unused = [line for line, found in zip(idle, by_machine.values(), strict=True) if found[0].gpus > len(found)]
    # One machine of which a part is used is somebody's decision; among several machines it is a wrong hostfile.
    return lines + mixed + (unused if len(by_machine) > 1 else [])


def _difference(section: str, name: str, nodes: Sequence[NodeFacts]) -> str | None:
    known = [node for node in nodes if name in node.values[section] or (section, name) not in WHERE_KNOWN]
    values = [node.values[section].get(name, "none") for node in known]
    return f"{name}: {_grouped(values, [node.host for node in known])}" if len(set(values)) > 1 else None


def _grouped(values: Sequence[str], hosts: Sequence[str]) -> str:
    """The values with their machines, the one that most have first."""
    parts = []
    for value, _ in Counter(values).most_common():
        its = [host for host, one in zip(hosts, values, strict=True) if one == value]
        more = f" and {len(its) - HOSTS_TOLD} more" if len(its) > HOSTS_TOLD else ""
        parts.append(f"{value} on {', '.join(its[:HOSTS_TOLD])}{more}")
    return "; ".join(parts)


def _shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= LINES_TOLD else [*lines[:LINES_TOLD], f"and {len(lines) - LINES_TOLD} more"]
