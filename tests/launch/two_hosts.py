"""Two hosts on one machine: network namespaces with host names of their own, joined by a cable, and an `ssh` between them. Needs root and `ip`.

They share file systems and processes' numbers, and nothing of the network but the cable. `ssh` gives a command nothing of the caller's environment,
as the real one does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stand_ins import write_command

CABLE = "cable0"  # each host's end
# ssh [OPTIONS] HOST COMMAND ...
SSH = """
import os, sys

words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[2 if words[0] in ("-o", "-p", "-l") else 1 :]
host, *command = words
entering = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec ip netns exec "$@"', host, f"{PREFIX}-{host}"]
environment = {name: os.environ[name] for name in ("PATH", "HOME")}
os.execvpe("unshare", [*entering, "sh", "-c", " ".join(command)], environment)
"""
# pdsh -S -f N -w HOST,HOST COMMAND ...: for machines without it. As the real one: %n is a host's number, each line has the host before it, and the
# exit code is the largest one.
PDSH = """
import subprocess, sys, threading

words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = " ".join(words[words.index("-w") + 2 :])

def pass_on(host, lines):
    for line in lines:
        print(f"{host}: {line}", end="", flush=True)

started = [
    subprocess.Popen(["ssh", host, command.replace("%n", str(number))], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for number, host in enumerate(hosts)
]
threads = [threading.Thread(target=pass_on, args=(host, one.stdout)) for host, one in zip(hosts, started)]
for thread in threads:
    thread.start()
codes = [one.wait() for one in started]
for thread in threads:
    thread.join()
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


def why_not() -> str:
    """Why there can be no such hosts here; empty where they can be."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return "needs root, ip (iproute2) and unshare"
    probe = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "delete", probe], check=True)
    return "" if made.returncode == 0 else f"no network namespace can be made: {made.stderr.strip()}"


class Hosts:
    """The hosts `a` and `b`.

    Args:
        bin: the folder of `ssh`, and of `pdsh` where there is none.
    """

    def __init__(self, prefix: str, bin: Path):
        self.prefix, self.bin = prefix, bin

    @property
    def path(self) -> str:
        return f"{self.bin}{os.pathsep}{os.environ['PATH']}"

    def processes(self, host: str) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", f"{self.prefix}-{host}"], capture_output=True, text=True)
        return [int(word) for word in found.stdout.split()]

    def cut_off(self, host: str) -> None:
        """As by a power failure: the cable is dead before the processes are, so that nobody hears of their end."""
        subprocess.run(["ip", "-n", f"{self.prefix}-{host}", "link", "set", CABLE, "down"], check=True)
        self.kill(host)

    def kill(self, host: str) -> None:
        """All processes of the host; its system closes their connections."""
        while pids := self.processes(host):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """10.77.0.1 and 10.77.0.2; nothing of them is left afterwards."""
    prefix = f"coba{os.getpid()}"
    write_command(folder / "bin", "ssh", f"PREFIX = {prefix!r}\n{SSH}")
    if not shutil.which("pdsh"):
        write_command(folder / "bin", "pdsh", PDSH)
    hosts = Hosts(prefix, folder / "bin")
    try:
        for host in "ab":
            subprocess.run(["ip", "netns", "add", f"{prefix}-{host}"], check=True)
        ends = ["name", CABLE, "netns", f"{prefix}-a", "type", "veth", "peer", "name", CABLE, "netns", f"{prefix}-b"]
        subprocess.run(["ip", "link", "add", *ends], check=True)
        for number, host in enumerate("ab", start=1):
            within = ["ip", "-n", f"{prefix}-{host}"]
            subprocess.run([*within, "address", "add", f"10.77.0.{number}/24", "dev", CABLE], check=True)
            for device in (CABLE, "lo"):
                subprocess.run([*within, "link", "set", device, "up"], check=True)
        yield hosts
    finally:
        for host in "ab":
            hosts.kill(host)
            subprocess.run(["ip", "netns", "delete", f"{prefix}-{host}"], capture_output=True)
