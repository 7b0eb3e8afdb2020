"""launch/slurm.sbatch, with stand-ins for Slurm's own commands: what it does with a signal and with exit codes."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ranks import ROOT
from stand_ins import ALWAYS_75, SCONTROL, SRUN, job_environment, write_command, write_environment

from mftcoder_coba.training.manifest import problem, read_manifest

STEPS = 60
JOB = 4711


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    write_environment(folder / "venv")
    write_command(folder / "bin", "srun", SRUN)
    write_command(folder / "bin", "scontrol", SCONTROL)
    return folder


def submit(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    (folder / "tasks").unlink(missing_ok=True)
    (folder / "requeued").unlink(missing_ok=True)
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "slurm.sbatch"), *arguments],
        cwd=folder,
        env=job_environment(folder, ROOT, JOB, ranks=2) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def submit_toy(cluster: Path, toy: Path) -> subprocess.Popen:
    settings = {"run.name": "slurm", "training.max_steps": STEPS, "validation.every_steps": 30, "checkpoint.every_steps": 1000}
    return submit(
        cluster, "--no-check", "--config", str(toy / "toy.json"), *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))
    )


def requeued(cluster: Path) -> list[str]:
    path = cluster / "requeued"
    return path.read_text().split() if path.exists() else []


def wait_for(condition, job: subprocess.Popen):
    """The first true value of `condition()`."""
    end = time.monotonic() + 300
    while not (value := condition()):
        assert job.poll() is None, job.stdout.read()[-4000:]
        assert time.monotonic() < end, "it did not come in 300 seconds"
        time.sleep(0.02)
    return value


def tasks(cluster: Path, job: subprocess.Popen) -> list[int]:
    """Process ids of the tasks that Slurm started, which are those that it signals."""
    path = cluster / "tasks"
    return [int(word) for word in wait_for(lambda: path.exists() and path.read_text().endswith("\n") and path.read_text(), job).split()]


def ignores_usr1(process: int) -> bool:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    ignored = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:"))
    return bool(ignored >> (signal.SIGUSR1 - 1) & 1)


def records(toy: Path) -> list[dict]:
    path = toy / "runs" / "slurm" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def steps(toy: Path) -> list[int]:
    return [record["step"] for record in records(toy) if record["kind"] == "train"]


@pytest.fixture(scope="module")
def interrupted(cluster, toy):
    """A job that Slurm signals once while its ranks start, and once at a random moment.

    Returns:
        (exit code, output, requeued jobs), and of its only checkpoint (step, the last trained step, what is wrong with its files).
    """
    job = submit_toy(cluster, toy)
    ranks = tasks(cluster, job)
    wait_for(lambda: all(ignores_usr1(rank) for rank in ranks), job)
    for rank in ranks:
        os.kill(rank, signal.SIGUSR1)
    moment = random.randint(1, 20)
    wait_for(lambda: len(steps(toy)) >= moment, job)
    for rank in ranks:
        os.kill(rank, signal.SIGUSR1)
    output, _ = job.communicate(timeout=300)
    (checkpoint,) = (toy / "runs" / "slurm" / "checkpoints").glob("step-*")
    manifest = read_manifest(checkpoint)
    damage = [problem(checkpoint, name, digest) for name, digest in manifest.files.items()]
    return (job.returncode, output, requeued(cluster)), (manifest.step, steps(toy)[-1], [found for found in damage if found])


@pytest.fixture(scope="module")
def second_start(interrupted, cluster, toy):
    """(exit code, output, requeued jobs) of the same job, started again."""
    job = submit_toy(cluster, toy)
    output, _ = job.communicate(timeout=300)
    return job.returncode, output, requeued(cluster)


def test_on_a_signal_the_job_saves_ends_with_75_and_is_queued_again(interrupted):
    (code, output, jobs), _ = interrupted
    assert (code, jobs) == (75, [str(JOB)]), output[-4000:]
    assert output.count("SIGUSR1: the run ends after this step") == 1


def test_the_checkpoint_is_whole_and_of_the_last_step(interrupted):
    _, (step, last_step, damage) = interrupted
    assert damage == []
    assert step == last_step < STEPS


def test_started_again_it_goes_on_to_the_end_and_is_not_queued_again(second_start, toy):
    code, output, jobs = second_start
    assert (code, jobs) == (0, []), output[-4000:]
    assert steps(toy) == list(range(1, STEPS + 1))
    assert [record["name"] for record in records(toy) if record.get("name") in ("interrupted", "resume")] == ["interrupted", "resume"]


def test_another_exit_code_is_passed_on_and_the_job_is_not_queued_again(cluster, tmp_path):
    job = submit(cluster, "--config", str(tmp_path / "nowhere.json"))
    output, _ = job.communicate(timeout=300)
    assert (job.returncode, requeued(cluster)) == (2, []), output
    assert output.count("error: ") == 1  # one rank tells it


def test_machines_that_fail_the_check_are_not_trained_on(cluster, toy):
    job = submit(cluster, "--config", str(toy / "toy.json"), "--set", "run.name=unchecked", MFTCODER_COBA_CHECK_SECONDS="-1")
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 2 and "'--seconds'" in output and requeued(cluster) == []
    assert not (toy / "runs" / "unchecked").exists()


def test_where_the_job_cannot_be_queued_again_it_is_said_and_the_code_stays(cluster, tmp_path):
    write_command(tmp_path / "bin", "srun", ALWAYS_75)
    path = os.pathsep.join([str(tmp_path / "bin"), str(cluster / "bin"), os.environ["PATH"]])
    job = submit(cluster, PATH=path, REQUEUE_ENDS_WITH="1")
    output, _ = job.communicate(timeout=60)
    assert (job.returncode, requeued(cluster)) == (75, [str(JOB)]), output
    assert "could not be queued again" in output


def test_a_job_without_an_environment_says_how_to_make_one(cluster, tmp_path):
    job = submit(cluster, MFTCODER_COBA_VENV=str(tmp_path))
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and "bash launch/setup.sh" in output
