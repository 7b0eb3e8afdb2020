"""Programs -> passed or not -> pass@k."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation.code.sandbox import check_available, run

if TYPE_CHECKING:
    from mftcoder_coba.evaluation.code.problems import Problem  # which reads files as `data` does, and that imports torch

SHOWN_CHARACTERS = 1500  # of the output of a program that failed


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    why: of one that has not passed, for people.
    """

    problem: str
    sample: int
    passed: bool
    why: str = ""


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The probability that of k samples, drawn from these without replacement, one has passed: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1).

    Raises:
        ValueError: k is not in 1..samples, or passed not in 0..samples.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ValueError(f"pass@{k} of {passed} passed in {samples} samples")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def installed(problems: Sequence[Problem], libraries: Path) -> tuple[list[Problem], list[str]]:
    """The problems of languages that can run here, and for each other language a line that says what is missing.

    Raises:
        UserError: none can run.
    """
    missing = {problem.language.name: what for problem in problems if (what := problem.language.missing(libraries))}
    notes = [f"{name} is left out: not installed: {what}" for name, what in missing.items()]
    kept = [problem for problem in problems if problem.language.name not in missing]
    if not kept:
        fix = "install it (for libraries: python -m data_tools.code_libraries), or give problems of other languages"
        raise UserError("; ".join(notes), "--code-tasks", fix)
    return kept, notes


def check_allowed(allowed: bool, namespaces: bool) -> None:
    """Raises UserError where nobody has said that such code may run, or where it could not be kept in."""
    if not allowed:
        what = "pass@k runs programs that a model has written"
        raise UserError(what, "--code-tasks", "add --allow-code-execution; they run in a sandbox without network and without your files")
    if namespaces:
        check_available()


def judge(
    problems: Sequence[Problem],
    completions: Mapping[str, Sequence[str]],
    libraries: Path,
    namespaces: bool = True,
    workers: int | None = None,
) -> list[Verdict]:
    """Runs each completion with its problem's tests; nothing but `check_allowed` asks for permission.

    Args:
        completions: name of a problem -> its samples.
        libraries: folder of `libraries_folder`.
        workers: programs at a time; None: one for each core.
    """

    def one(problem: Problem, sample: int) -> Verdict:
        program = problem.language.build(problem.record, completions[problem.name][sample], f"passed-{os.urandom(8).hex()}", libraries)
        outcomes = run(program.commands, program.files, problem.language.visible(libraries), namespaces=namespaces)
        last = outcomes[-1]
        if len(outcomes) == len(program.commands) and last.status == 0 and program.mark in last.output:
            return Verdict(problem.name, sample, True)
        ended = last.reason and f"over the limit of {last.reason}" or (f"ended with {last.status}" if last.status else "ended before its tests")
        return Verdict(problem.name, sample, False, f"{ended}: {last.output.strip()[-SHOWN_CHARACTERS:]}")

    def all_of() -> Iterator[tuple[Problem, int]]:
        return ((problem, sample) for problem in problems for sample in range(len(completions[problem.name])))

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda pair: one(*pair), all_of()))


def figures(problems: Sequence[Problem], verdicts: Sequence[Verdict], ks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Language -> {"problems", "samples" (all), "passed", "pass@K" for each k that no problem has fewer samples than}."""
    results: dict[str, dict[str, Any]] = {}
    for language in dict.fromkeys(problem.language.name for problem in problems):
        names = [problem.name for problem in problems if problem.language.name == language]
        counts = [(len(of), sum(of)) for name in names if (of := [verdict.passed for verdict in verdicts if verdict.problem == name])]
        usable = [k for k in sorted(set(ks)) if k <= min(samples for samples, _ in counts)]
        results[language] = {"problems": len(names), "samples": sum(n for n, _ in counts), "passed": sum(c for _, c in counts)} | {
            f"pass@{k}": sum(pass_at_k(n, c, k) for n, c in counts) / len(counts) for k in usable
        }
    return results
