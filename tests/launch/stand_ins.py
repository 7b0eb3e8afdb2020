"""What a test machine has not: Slurm's `srun` and `scontrol`, in small, and a set-up environment.

A stand-in writes down what it is asked, so that a test can look at it, and into the folder named by STAND_INS.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Starts the tasks as Slurm does: children of its own that find their numbers in the environment. It ends with the highest exit code.
SRUN = """
import os, subprocess, sys
from pathlib import Path

words = sys.argv[1:]
options = [word for word in words[: words.index("bash")]]
command = words[len(options) :]
number = int(dict(option.split("=") for option in options)["--ntasks"])
tasks = []
for rank in range(number):
    numbers = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": str(number)}
    tasks.append(subprocess.Popen(command, env=os.environ | numbers))
Path(os.environ["STAND_INS"], "tasks").write_text(" ".join(str(task.pid) for task in tasks) + "\\n")
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import os, sys
from pathlib import Path

if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1")
elif sys.argv[1] == "requeue":
    with Path(os.environ["STAND_INS"], "requeued").open("a") as file:
        file.write(sys.argv[2] + "\\n")
    sys.exit(int(os.environ.get("REQUEUE_ENDS_WITH", 0)))
else:
    sys.exit("unknown: " + " ".join(sys.argv[1:]))
"""
ALWAYS_75 = "raise SystemExit(75)"


def write_command(folder: Path, name: str, program: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{program.strip()}\n", encoding="utf-8")
    path.chmod(0o755)


def write_environment(folder: Path) -> Path:
    """A virtual environment that launch/environment.sh takes for set up: this interpreter's own, by links, and the stamp."""
    folder.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".installed":
            (folder / entry.name).symlink_to(entry)
    (folder / ".installed").touch()
    return folder


def job_environment(folder: Path, root: Path, job: int, ranks: int) -> dict[str, str]:
    """What Slurm tells a batch script on one machine."""
    return os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "STAND_INS": str(folder),
        "MFTCODER_COBA_VENV": str(folder / "venv"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "SLURM_SUBMIT_DIR": str(root),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS_PER_NODE": str(ranks),
        "SLURM_CPUS_PER_TASK": "1",
    }
