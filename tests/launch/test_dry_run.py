"""--dry-run of each launcher shows what it would start, to the word, and starts nothing; mistakes are told before anything starts."""

import os
import subprocess
from pathlib import Path

import pytest
from ranks import ROOT
from stand_ins import write_command
from two_agents import shown_commands

# In place of what a launcher starts: writes down its words, a line for each call.
RECORDER = """
import json, os, sys
from pathlib import Path

if "-c" in sys.argv[:2]:  # environment.sh asks the interpreter for GPUs
    print(0)
else:
    with Path(os.environ["STAND_INS"], "calls").open("a") as file:
        file.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
"""
EXPERIMENT = ["--config", "configs/quickstart.json", "--set", "run.name=with a blank", "--set", 'data.template="$x"']
HOSTFILES = ROOT / "launch" / "hostfiles"
LAUNCHERS = {
    "one machine": ["hostfile.sh", str(HOSTFILES / "one_machine")],
    "two machines": ["hostfile.sh", str(HOSTFILES / "two_machines")],
    "torchrun": ["torchrun.sh", "--nproc-per-node", "8"],
    "torchrun on two": ["torchrun.sh", "--nnodes", "2", "--node-rank", "1", "--master-addr", "node-0", "--nproc-per-node", "8"],
    "slurm": ["slurm.sbatch"],
}
SLURM_JOB = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "x", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "8"}


@pytest.fixture
def stand_ins(tmp_path) -> dict[str, str]:
    """Variables under which the launchers find recorders in place of the programs that they start."""
    for name in ("deepspeed", "python", "srun", "pdsh"):
        write_command(tmp_path / "venv" / "bin", name, RECORDER)
    write_command(tmp_path / "venv" / "bin", "scontrol", 'print("NODE-0\\nNODE-1")')
    (tmp_path / "venv" / ".installed").touch()
    return {"MFTCODER_COBA_VENV": str(tmp_path / "venv"), "STAND_INS": str(tmp_path)}


def calls(folder: str) -> list[str]:
    path = Path(folder) / "calls"
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def run(command: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("check", [True, False])
def test_what_is_shown_is_what_is_started(stand_ins, launcher, check):
    script, *options = LAUNCHERS[launcher]
    options += [*([] if check else ["--no-check"]), *EXPERIMENT]
    shown = shown_commands(script, *options, variables=stand_ins)
    assert calls(stand_ins["STAND_INS"]) == []  # nothing was started
    path = {"PATH": f"{stand_ins['MFTCODER_COBA_VENV']}/bin{os.pathsep}{os.environ['PATH']}"}
    for line in shown:
        assert run(["bash", "-c", line], stand_ins | path).returncode == 0
    expected = calls(stand_ins["STAND_INS"])
    job = SLURM_JOB if script == "slurm.sbatch" else {}
    started = run(["bash", f"launch/{script}", *options], stand_ins | path | job)
    assert started.returncode == 0, started.stderr
    assert len(expected) == 1 + check and calls(stand_ins["STAND_INS"]) == expected
    assert all('"run.name=with a blank"' in line for line in expected)
    assert ("check-nodes" in expected[0]) == check and '"train"' in expected[-1]


def test_the_layouts_have_8_and_16_ranks(stand_ins):
    slots = {name: (HOSTFILES / name).read_text().count("slots=8") for name in ("one_machine", "two_machines")}
    assert slots == {"one_machine": 1, "two_machines": 2}
    for line in shown_commands("slurm.sbatch", *EXPERIMENT):
        assert "--ntasks=16 --ntasks-per-node=8" in line


def test_the_dry_run_shows_what_other_machines_are_given(tmp_path):
    words = ["bash", "launch/hostfile.sh", "--dry-run", str(HOSTFILES / "two_machines"), *EXPERIMENT]
    shown = run(words, {"NCCL_IB_HCA": "mlx5", "GLOO_SOCKET_IFNAME": "eth1", "MASTER_ADDR": "10.0.0.1"}).stdout
    assert "# NCCL_IB_HCA=mlx5\n" in shown and "# GLOO_SOCKET_IFNAME=eth1\n" in shown and " --master_addr 10.0.0.1 " in shown


@pytest.mark.parametrize(
    "words, told",
    [
        (["hostfile.sh"], "usage: "),
        (["hostfile.sh", "--config", "x.json"], "usage: "),
        (["hostfile.sh", "nowhere"], "no hostfile nowhere"),
        (["hostfile.sh", "pyproject.toml"], 'a line is to be "HOST slots=NUMBER"; found 1:[build-system]'),
        (["torchrun.sh", "--nnodes", "2", "--config", "x.json"], "--master-addr names the machine"),
        (["torchrun.sh", "--nnodes", "2", "--node-rank", "2", "--master-addr", "h"], "it is 0 to 1"),
        (["torchrun.sh", "--nnodes", "two"], "two is no whole number"),
        (["torchrun.sh", "--master-addr"], "--master-addr needs a value"),
        (["slurm.sbatch", "--config", "x.json"], "sbatch launch/slurm.sbatch"),
    ],
)
def test_mistakes_end_with_2_and_start_nothing(stand_ins, words, told):
    done = run(["bash", f"launch/{words[0]}", *words[1:]], stand_ins)
    assert done.returncode == 2 and told in done.stderr, done.stderr
    assert calls(stand_ins["STAND_INS"]) == []


def test_without_gpus_torchrun_wants_a_number(stand_ins):
    done = run(["bash", "launch/torchrun.sh", *EXPERIMENT], stand_ins)
    assert done.returncode == 2 and "--nproc-per-node" in done.stderr
