"""What a signal does to a process that trains: noted, repeated by launchers, a second one, and everything put back."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mftcoder_coba.training.interruption import REPEAT_SECONDS, SIGNALS, Interruption

# Says "ready", then waits: in the loop, or as in a collective, in a call that handlers in Python cannot interrupt. Then tells what was requested.
# The module is loaded by its file: its package brings torch with it.
PROGRAM = f"""
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("interruption", {sys.modules[Interruption.__module__].__file__!r})
interruption = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interruption)
interruption.REPEAT_SECONDS = float(sys.argv[1])
with interruption.Interruption(quiet=False) as it:
    print("ready", flush=True)
    if sys.argv[2] == "collective":
        import ctypes
        while True:
            ctypes.CDLL(None).usleep(10**8)
    while it.requested is None:
        time.sleep(0.01)
    print("requested", it.requested, flush=True)
    time.sleep(float(sys.argv[3]))
print("left in good order", flush=True)
"""


def started(repeat_seconds: float, where: str = "loop", stay_seconds: float = 60.0, ignored: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(repeat_seconds), where, str(stay_seconds)]
    if ignored:
        command = ["bash", "-c", "trap '' USR1; exec \"$@\"", "bash", *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come in 60 seconds"
        time.sleep(0.005)


def forked_worker() -> int:
    """Its process id; it waits for signals."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b".")
        while True:
            signal.pause()
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return child


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_is_noted_by_its_name_and_told_in_one_line(number, capfd):
    with Interruption() as interruption:
        assert interruption.requested is None
        os.kill(os.getpid(), number)
        wait_for(lambda: interruption.requested)
        assert interruption.requested == number.name
    line = capfd.readouterr().err
    assert line.startswith(f"{number.name}: the run ends after this step") and line.count("\n") == 1


def test_told_to_be_quiet_it_writes_nothing(capfd):
    with Interruption(quiet=True) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: interruption.requested)
    assert capfd.readouterr() == ("", "")


def test_the_earlier_handlers_are_put_back():
    heard = []
    earlier = [signal.signal(number, lambda number, frame: heard.append(number)) for number in SIGNALS]
    try:
        with Interruption(quiet=True) as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: interruption.requested)
        assert heard == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        for number, handler in zip(SIGNALS, earlier, strict=True):
            signal.signal(number, handler)


def test_a_signal_that_comes_before_leaving_is_not_lost():
    with Interruption(quiet=True) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.requested == "SIGTERM"


def test_it_leaves_no_thread_and_no_open_file():
    def count() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        with Interruption(quiet=True):
            pass
    assert count() == before


def test_outside_the_main_thread_it_cannot_be_entered():
    raised = []

    def enter() -> None:
        try:
            with Interruption():
                pass
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(raised) == 1


def test_a_forked_worker_dies_of_the_signal_and_its_parent_does_not_hear_it():
    with Interruption(quiet=True) as interruption:
        child = forked_worker()
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        assert interruption.requested is None


def test_it_is_left_while_a_forked_worker_lives_on():
    with Interruption(quiet=True):
        child = forked_worker()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_signals_that_a_launcher_repeats_count_as_one():
    assert REPEAT_SECONDS >= 5
    process = started(repeat_seconds=60, stay_seconds=0.5)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (0, 1)
    assert out.endswith("left in good order\n")


@pytest.mark.parametrize("where", ["loop", "collective"])
def test_a_second_signal_ends_the_process_at_once_by_that_signal(where):
    process = started(repeat_seconds=0.2, where=where)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: the run ends after this step")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "left in good order" not in out


def test_a_signal_is_heard_that_the_parent_had_ignored():
    process = started(repeat_seconds=60, stay_seconds=0, ignored=True)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert out == "requested SIGUSR1\nleft in good order\n"


def test_a_terminal_that_is_gone_does_not_disturb():
    process = started(repeat_seconds=60, stay_seconds=0)
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == "requested SIGTERM\nleft in good order\n"
    process.stdout.close()
    assert process.wait(60) == 0
