"""What a hostile program can do in the sandbox: nothing to what is outside, and it fails. The tests themselves are bounded."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation.code.languages import find_program
from mftcoder_coba.evaluation.code.sandbox import MIB, Command, Limits, Outcome, check_available, run

PYTHON = find_program("python")
USUAL = Limits()


@pytest.fixture(autouse=True)
def needs_namespaces():
    try:
        check_available()
    except UserError as error:
        pytest.skip(f"user namespaces are not permitted here: {error.what}")


def python(code: str, cpu_seconds: int = 10, wall_seconds: float = 20, limits: Limits = USUAL, namespaces: bool = True) -> Outcome:
    command = Command([PYTHON, "-I", "program.py"], cpu_seconds, wall_seconds)
    (outcome,) = run([command], {"program.py": code}, [sys.base_prefix], limits, namespaces)
    return outcome


def shell(code: str, cpu_seconds: int = 10, wall_seconds: float = 20, limits: Limits = USUAL, namespaces: bool = True) -> Outcome:
    (outcome,) = run([Command(["sh", "-c", code], cpu_seconds, wall_seconds)], {}, (), limits, namespaces)
    return outcome


def test_a_program_runs_and_is_told_from_one_that_fails():
    outcome = python("print(sum(range(10)))")
    assert (outcome.status, outcome.reason, outcome.output) == (0, "", "45\n")
    assert python("raise SystemExit(3)").status == 3
    assert "ZeroDivisionError" in python("1 / 0").output


def test_commands_follow_one_another_up_to_the_first_that_fails():
    commands = [Command(["cp", "a", "b"]), Command(["cat", "b"]), Command(["false"]), Command(["cat", "a"])]
    outcomes = run(commands, {"a": "text"})
    assert [(outcome.status, outcome.output) for outcome in outcomes] == [(0, ""), (0, "text"), (1, "")]


def test_forking_beyond_the_limit_fails_and_nothing_of_it_is_left():
    outcome = python(
        "import os, time\n"
        "for count in range(200):\n"
        "    try:\n"
        "        child = os.fork()\n"
        "    except OSError:\n"
        "        print(count)\n"
        "        raise SystemExit(1)\n"
        "    if child == 0:\n"
        "        time.sleep(60)\n"
        "        os._exit(0)\n"
    )
    assert outcome.status == 1 and 80 <= int(outcome.output) < 96 and outcome.seconds < 15


@pytest.mark.parametrize(
    "code",
    [
        "kept = bytearray(1 << 30)",
        "import mmap\nkept = mmap.mmap(-1, 1 << 30)\nwhile True:\n    kept.write(b'x' * (1 << 16))",
        "import os\nfor _ in range(4):\n    if os.fork() == 0:\n        kept = b'x' * (100 << 20)\n        break\nimport time\ntime.sleep(30)",
    ],
    ids=["its own", "shared", "of several processes"],
)
def test_memory_beyond_the_limit_ends_it(code):
    outcome = python(code, limits=Limits(memory_bytes=256 * MIB), wall_seconds=15)
    assert outcome.status and (outcome.reason == "memory" or "MemoryError" in outcome.output)


def test_an_endless_loop_and_endless_sleep_end():
    outcome = python("while True: pass", cpu_seconds=1)
    assert outcome.status == -signal.SIGXCPU and outcome.reason == "CPU time"
    outcome = python("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", cpu_seconds=1)
    assert outcome.status == -signal.SIGKILL
    outcome = python("import time\ntime.sleep(100)", wall_seconds=1)
    assert (outcome.status, outcome.reason) == (-signal.SIGKILL, "wall clock") and outcome.seconds < 5


def test_it_writes_nowhere_but_in_its_own_folder(tmp_path):
    (tmp_path / "kept").write_text("as it was")
    folders = [tmp_path, Path.home(), "/usr", "/etc", "/", "/dev/shm"]
    outside = [tmp_path / "kept", *(Path(folder) / "sandbox-new" for folder in folders)]
    for path in outside:
        outcome = python(f"open({str(path)!r}, 'w').write('touched')")
        assert outcome.status == 1 and ("Read-only" in outcome.output or "No such file" in outcome.output or "Permission" in outcome.output)
    assert (tmp_path / "kept").read_text() == "as it was" and not any(Path(path).exists() for path in outside[1:])
    assert python("for name in ('here', '/tmp/there'):\n    open(name, 'w').write('x')\nprint(open('here').read())").output == "x\n"
    assert not Path("/tmp/there").exists()


def test_the_limits_of_files_hold():
    one = python("file = open('big', 'wb')\nfor _ in range(40):\n    file.write(b'x' * (1 << 20))", limits=Limits(file_bytes=8 * MIB))
    assert one.status and "File too large" in one.output
    many = "for name in range(40):\n    open(str(name), 'wb').write(b'x' * (1 << 20))"
    assert "No space" in python(many, limits=Limits(disk_bytes=16 * MIB)).output
    assert "Too many open files" in python("kept = [open('/dev/null') for _ in range(1000)]").output


def test_files_outside_cannot_be_read(tmp_path):
    (tmp_path / "secret").write_text("secret")
    for path in (tmp_path / "secret", Path(__file__), "/etc/shadow", "/etc/passwd"):
        assert python(f"open({str(path)!r})").status == 1
    home = python(f"import os\nprint(sorted(os.listdir({str(Path.home())!r})))")
    inside = Path(sys.base_prefix)
    shown = [inside.relative_to(Path.home()).parts[0]] if inside.is_relative_to(Path.home()) else None
    assert home.status == 1 if shown is None else home.output.strip() == str(shown)


def test_there_is_no_network():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.2)
        outcome = python(f"import socket\nsocket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 5)")
        with pytest.raises(TimeoutError):
            listener.accept()
    assert outcome.status == 1 and "unreachable" in outcome.output
    assert python("import socket\nsocket.create_connection(('192.0.2.1', 80), 5)").status == 1


def test_it_sees_and_signals_no_process_outside():
    target = subprocess.Popen(["sleep", "60"])
    try:
        killing = "import os, signal\nfor process in (os.getppid(), 1, {}):\n    try:\n        os.kill(process, 9)\n    except OSError as error:\n"
        outcome = python((killing + "        print(error.strerror)\nraise SystemExit(1)").format(target.pid))
        assert outcome.status == 1 and outcome.reason == ""
        python("import os, signal\nos.kill(-1, signal.SIGKILL)")
        assert target.poll() is None
        assert int(python("import os\nprint(len([name for name in os.listdir('/proc') if name.isdigit()]))").output) == 2
    finally:
        target.kill()
        target.wait()


def test_it_has_no_capability_and_cannot_get_one():
    status = python("print(open('/proc/self/status').read())").output
    fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert all(int(fields[name], 16) == 0 for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")) and fields["NoNewPrivs"] == "1"
    assert fields["Uid"].split() == ["1000"] * 4
    (outcome,) = run([Command(["unshare", "--user", "true"])], {})
    assert outcome.status


@pytest.mark.parametrize("namespaces", [True, False])
def test_a_daemon_does_not_outlive_it(namespaces):
    marker = f"60.{os.getpid()}{time.time_ns()}"
    outcome = shell(f"setsid sleep {marker} & sleep 0.3; echo started", namespaces=namespaces)
    assert (outcome.status, outcome.output) == (0, "started\n")
    running = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()]
    assert not any(marker.encode() in line for line in running)


def test_much_output_is_kept_in_part_with_its_end():
    outcome = python("print('x' * 10_000_000)\nprint('end')", limits=Limits(output_bytes=1000))
    assert outcome.status == 0 and len(outcome.output) == 1000 and outcome.output.endswith("end\n")


def test_limits_alone_hold_without_namespaces():
    assert shell("while :; do :; done", cpu_seconds=1, namespaces=False).reason == "CPU time"
    assert shell("sleep 100", wall_seconds=1, namespaces=False).reason == "wall clock"
    assert shell("head -c 1G /dev/zero | tail", limits=Limits(memory_bytes=64 * MIB), namespaces=False).status
    folder = shell("pwd", namespaces=False).output.strip()
    assert folder and not Path(folder).exists()


def test_a_program_that_is_not_there_is_a_mistake_and_no_failed_program():
    with pytest.raises(UserError, match="cannot be started.*no-such-program"):
        run([Command(["no-such-program"])], {})


def test_where_namespaces_are_refused_nothing_runs(tmp_path):
    """Inside a namespace that permits no further ones, as in many containers."""
    code = (
        "from mftcoder_coba.evaluation.code.sandbox import Command, run\n"
        "from mftcoder_coba.errors import UserError\n"
        "try:\n"
        f"    run([Command(['touch', {str(tmp_path / 'ran')!r}])], {{}})\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    closed = f'echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -c "$CODE"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", closed]
    root = str(Path(__file__).parents[3])
    finished = subprocess.run(command, env=os.environ | {"CODE": code, "PYTHONPATH": root}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "no sandbox can be built" in finished.stdout and "--without-namespaces" in finished.stdout
    assert not (tmp_path / "ran").exists()
