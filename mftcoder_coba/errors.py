"""Messages for people.

A `UserError` is a mistake that the person at the keyboard can mend: exit code 2. A `RunFailure` is a run that cannot go on
through no fault of its config: exit code 1. `Interrupted` is a run that stopped when it was told to: exit code 75. The command line
prints them without a traceback. Everything else that is raised is a
defect of this program and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave.

    Args:
        what: what was found and what is allowed, as one sentence.
        where: the place: `file`, `file:line`, or a config path such as `data.tasks[1].train`.
        fix: what to do next. Empty where `what` says it already.
    """

    exit_code = 2

    def __init__(self, what: str, where: str = "", fix: str = ""):
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  what to do: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self):  # it crosses process borders when data is tokenised in parallel
        return type(self), (self.what, self.where, self.fix)


class Interrupted(Exception):
    """A run that was asked to stop by a signal, and has saved what a later start goes on from."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: "try again later"; launch/slurm.sbatch requeues on it


class RunFailure(RuntimeError):
    """A run that cannot go on. The message says what happened, what is saved where, and what to look at."""

    exit_code = 1
    told_by = 0  # the rank that prints it


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: the nearest allowed one, or all of them."""
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"?' if near else "allowed: " + ", ".join(names)
