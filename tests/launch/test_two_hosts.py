"""launch/hostfile.sh on two hosts, each with a network of its own: it checks them, trains on them, and ends when one of them is gone."""

import json
import os
import re
import subprocess
import time

import pytest
from ranks import ENVIRONMENT, ROOT
from stand_ins import write_environment
from two_hosts import CABLE, two_hosts, why_not

HANG_SECONDS = 12
# Of a host that is gone without a word, the others know nothing before the hang time-out, which is looked at twice a second; then they end.
ENDS_WITHIN_SECONDS = HANG_SECONDS + 30


def start(hosts, folder, toy, *settings: str) -> subprocess.Popen:
    (folder / "hostfile").write_text("a slots=1\nb slots=1\n")
    words = [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "hostfile.sh"), str(folder / "hostfile"), "--config", str(toy / "toy.json"), *words],
        cwd=ROOT,
        env=os.environ
        | ENVIRONMENT
        | {
            "PATH": hosts.path,
            "MFTCODER_COBA_VENV": str(folder / "venv"),
            "MFTCODER_COBA_CHECK_SECONDS": "0.5",
            "GLOO_SOCKET_IFNAME": CABLE,
        },
        stdout=(folder / "log").open("w"),
        stderr=subprocess.STDOUT,
    )


def steps(run) -> int:
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    return max((record["step"] for record in records if record["kind"] == "train"), default=0)


@pytest.fixture(scope="module")
def killed_host(toy, tmp_path_factory):
    """A run on two hosts, of which one is cut off in the middle: (exit code, output, seconds until the end, ranks, processes left on host a)."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    write_environment(folder / "venv")
    settings = ["run.name=hosts", f"run.hang_timeout_minutes={HANG_SECONDS / 60}", "training.max_steps=100000", "checkpoint.every_steps=5"]
    with two_hosts(folder) as hosts:
        job = start(hosts, folder, toy, *settings)
        run = toy / "runs" / "hosts"
        end = time.monotonic() + 300
        while steps(run) < 6:
            assert job.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-4000:]
            time.sleep(0.1)
        hosts.cut_off("b")
        killed = time.monotonic()
        code = job.wait(120)
        seconds = time.monotonic() - killed
        left = hosts.processes("a")
    world_size = json.loads((run / "environment.json").read_text())["world_size"]
    return code, (folder / "log").read_text(), seconds, world_size, left


def test_both_hosts_are_checked_and_trained_on(killed_host):
    _, output, _, world_size, _ = killed_host
    assert world_size == 2
    for expected in ("machines    2, with 2 processes", "a: 1 x cpu", "b: 1 x cpu", "all-reduce  8 MiB in "):
        assert expected in output, output


def test_a_host_that_is_gone_ends_the_job_in_bounded_time_with_a_message_that_names_it(killed_host):
    code, output, seconds, _, left = killed_host
    assert code != 0 and left == []
    assert seconds < ENDS_WITHIN_SECONDS, seconds
    assert re.search(r"error: .*rank 1 .*\bb\b", output), output[-4000:]
    assert output.count("error: ") == 1
