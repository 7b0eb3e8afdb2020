"""launch/torchrun.py: the exit code of the rank that ended first, and signals that reach the ranks."""

import os
import signal
import subprocess
import sys
import time

import pytest
from ranks import ROOT, free_port


def start(folder, program: str, signals: str = "SIGTERM") -> subprocess.Popen:
    """Two ranks that run a bash program in place of training."""
    options = ["--nproc-per-node", "2", "--master-port", str(free_port()), "--signals-to-handle", signals, "--no-python"]
    command = [sys.executable, str(ROOT / "launch" / "torchrun.py"), *options, "bash", "-c", program]
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("program, code", [("exit 0", 0), ("exit 75", 75), ("[[ $RANK == 1 ]] && exit 2; sleep 600", 2), ("kill -KILL $$", 1)])
def test_it_ends_as_the_first_rank_did(tmp_path, program, code):
    job = start(tmp_path, program)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == code, output
    assert "Traceback" not in output


def test_a_signal_reaches_the_ranks_and_they_have_time_to_end(tmp_path):
    job = start(tmp_path, 'trap "sleep 2; touch saved$RANK; exit 75" USR1; touch ready$RANK; while true; do sleep 0.1; done', "SIGTERM,SIGUSR1")
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saved0", "saved1"], output
    assert job.returncode == 128 + signal.SIGUSR1
