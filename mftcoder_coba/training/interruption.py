"""Signals that ask a run to end in good order."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from types import FrameType, TracebackType

# From a scheduler or launcher; from Slurm, some time before the limit; from Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Launchers repeat what they pass on: after Ctrl-C, a rank gets SIGINT from the terminal and SIGTERM from DeepSpeed's launcher.
REPEAT_SECONDS = 5.0
_END = b"\0"  # no signal has this number
_STANDARD_ERROR = 2


class Interruption:
    """Notes, while it is entered, that a signal asks the run to end; whoever trains looks at `requested` between steps.

    Signals within `REPEAT_SECONDS` of the first belong to it. A later one ends the process at once, by that signal.

    Python calls a handler only between two instructions of the main thread, and that one may wait in a collective for a rank that
    never comes. A thread therefore listens, so that a second signal ends the process there, too.

    Args:
        quiet: write nothing to standard error.

    Attributes:
        requested: the name of the first signal; None before it.

    Raises:
        ValueError: entered outside the main thread, where Python cannot set handlers.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.requested: str | None = None
        self._first_at = 0.0  # time.monotonic()
        self._entered = False

    def __enter__(self) -> Interruption:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)  # as `set_wakeup_fd` wants it
        try:
            self._earlier_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        except ValueError:
            os.close(reader)
            os.close(self._writer)
            raise
        self._thread = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        self._thread.start()
        self._earlier_handlers = {number: signal.signal(number, _heard_by_the_thread) for number in SIGNALS}
        self._entered = True
        os.register_at_fork(after_in_child=self._put_back)  # a child has no such thread, and must not write into this one's pipe
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._put_back()
        os.write(self._writer, _END)  # closing it would not end the thread: children may have the pipe, too
        self._thread.join()
        os.close(self._writer)

    def _put_back(self) -> None:
        if not self._entered:
            return
        self._entered = False
        for number, handler in self._earlier_handlers.items():
            # None: it was not set by Python, which cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._earlier_descriptor)

    def _listen(self, reader: int) -> None:
        """Python writes the number of each signal, a byte, into the pipe at the moment when it comes."""
        with open(reader, "rb", buffering=0) as numbers:
            while (number := numbers.read(1)) != _END:
                if number[0] in SIGNALS:
                    self._note(signal.Signals(number[0]))

    def _note(self, number: signal.Signals) -> None:
        if self.requested is None:
            self.requested, self._first_at = number.name, time.monotonic()
            self._say(
                f"{number.name}: the run ends after this step, with a checkpoint; a second signal after {REPEAT_SECONDS:.0f} seconds ends it at once"
            )
        elif time.monotonic() - self._first_at > REPEAT_SECONDS:
            self._say(f"{number.name}: a second signal; the run ends at once")
            _end_by(number)

    def _say(self, line: str) -> None:
        if not self.quiet:
            # A terminal that is gone must not cost the checkpoint. Written past sys.stderr: what stays in its buffer would fail again when
            # Python ends, which then exits with 120 in place of the run's code.
            with contextlib.suppress(OSError):
                os.write(_STANDARD_ERROR, f"{line}\n".encode())


def _heard_by_the_thread(number: int, frame: FrameType | None) -> None:
    """A handler in Python must exist for the signal to be written into the pipe."""


def _end_by(number: signal.Signals) -> None:
    """Ends this process by the signal's default action: an exit code could not tell the parent of it. Any thread may call it."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(number, None)  # SIG_DFL, which is 0; Python's own function works in the main thread only
    os.kill(os.getpid(), number)
