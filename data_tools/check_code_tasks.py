"""Checks a file of code problems on this machine: do its own solutions pass, and do broken ones fail?

    python -m data_tools.check_code_tasks FILE --format humaneval_x --allow-code-execution [--limit 20]

Ends with 0 if every own solution passes and no broken one does, but for those that the data set itself has wrong; else with 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.common import run
from mftcoder_coba.evaluation.code import libraries_folder
from mftcoder_coba.evaluation.code.passing import Verdict, check_allowed, figures, installed, judge
from mftcoder_coba.evaluation.code.problems import Problem, read_problems

# Own solutions that their own tests refuse, by the rule of HumanEval-X's authors too: `return (z, true)` is one value, and 0 has a digit.
WRONG_IN_THE_DATA = {"JavaScript/112", "JavaScript/155"}
# Whatever compiles passes: their tests do not call the function.
NOT_TESTED = {"Rust/32": "its tests are a comment in the data set", "CPP/23": "its tests call the C library's function of the same name"}
BROKEN = {"Python": "    raise NotImplementedError\n", "Java": "        throw new RuntimeException();\n    }\n}\n", "Go": '    panic("broken")\n}\n'}
BROKEN |= {"CPP": "    throw 1;\n}\n", "JavaScript": "  throw new Error('broken')\n}\n", "Rust": '    panic!("broken");\n}\n'}


def own_solutions(problems: Sequence[Problem], libraries: Path, namespaces: bool = True) -> list[Verdict]:
    """Of each problem's own solution."""
    return judge(problems, {problem.name: [problem.solution] for problem in problems}, libraries, namespaces)


def broken_solutions(problems: Sequence[Problem], libraries: Path, namespaces: bool = True) -> list[Verdict]:
    """Of a function that compiles and gives no result."""
    return judge(problems, {problem.name: [BROKEN[problem.language.name]] for problem in problems}, libraries, namespaces)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--format", choices=("humaneval", "humaneval_x"), required=True)
    parser.add_argument("--allow-code-execution", action="store_true")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--libraries", type=Path, default=libraries_folder(None), help="folder of data_tools.code_libraries")
    given = parser.parse_args()
    check_allowed(given.allow_code_execution, namespaces=True)
    problems, notes = installed(read_problems(given.file, given.format), given.libraries)
    problems = problems[: given.limit]
    own, broken = own_solutions(problems, given.libraries), broken_solutions(problems, given.libraries)
    for note in notes:
        print(note)
    for title, verdicts in (("own solutions", own), ("broken solutions", broken)):
        for language, of in figures(problems, verdicts, [1]).items():
            print(f"{title}: {language} {of['passed']} of {of['samples']} passed, pass@1 {of['pass@1']:.4f}")
    failed = [verdict for verdict in own if not verdict.passed]
    for verdict in failed:
        known = " (wrong in the data set itself)" if verdict.problem in WRONG_IN_THE_DATA else ""
        print(f"{verdict.problem} failed{known}: {verdict.why}")
    passed = [verdict.problem for verdict in broken if verdict.passed]
    for problem in passed:
        print(f"{problem} passed although broken{f' ({NOT_TESTED[problem]})' if problem in NOT_TESTED else ''}")
    return int(any(problem not in NOT_TESTED for problem in passed) or any(verdict.problem not in WRONG_IN_THE_DATA for verdict in failed))


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
