"""Code problems: their own solutions pass, broken ones and those that end too early do not, and what is counted is pass@k."""

import gzip
import itertools
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from ranks import ROOT

from data_tools.check_code_tasks import NOT_TESTED, WRONG_IN_THE_DATA, broken_solutions, main, own_solutions
from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation.code import libraries_folder
from mftcoder_coba.evaluation.code.languages import cut_braces, cut_java, cut_python, find_program
from mftcoder_coba.evaluation.code.passing import check_allowed, figures, installed, judge, pass_at_k
from mftcoder_coba.evaluation.code.problems import Problem, read_problems
from mftcoder_coba.evaluation.code.sandbox import check_available

FILES = {"HumanEval": "humaneval", "Python": "humaneval_x_python", "CPP": "humaneval_x_cpp", "Java": "humaneval_x_java"}
FILES |= {"JavaScript": "humaneval_x_js", "Go": "humaneval_x_go", "Rust": "humaneval_x_rust"}
LIBRARIES = libraries_folder(None)


@pytest.fixture(scope="session")
def sandbox():
    try:
        check_available()
    except UserError as error:
        pytest.skip(f"user namespaces are not permitted here: {error.what}")


def some(shared: Path, name: str, count: int) -> list[Problem]:
    """The first problems of a file, of a language that is installed."""
    format = "humaneval" if name == "HumanEval" else "humaneval_x"
    problems = read_problems(shared / "data" / "eval" / f"{FILES[name]}.jsonl.gz", format)
    missing = problems[0].language.missing(LIBRARIES)
    # The first problems of JavaScript use no package.
    if missing and not (name == "JavaScript" and missing == "the package js-md5"):
        pytest.skip(f"not installed: {missing}")
    assert len(problems) == 164
    return problems[:count]


@pytest.mark.parametrize("name", FILES)
def test_own_solutions_pass_and_broken_ones_do_not(shared, sandbox, name):
    problems = some(shared, name, 4)
    assert [verdict for verdict in own_solutions(problems, LIBRARIES) if not verdict.passed] == []
    broken = broken_solutions(problems, LIBRARIES)
    assert not any(verdict.passed for verdict in broken) and all(verdict.why for verdict in broken)


def test_solutions_that_the_data_set_has_wrong_are_those_that_their_tests_refuse(shared, sandbox):
    path = shared / "data" / "eval" / "humaneval_x_js.jsonl.gz"
    wrong = [problem for problem in read_problems(path, "humaneval_x") if problem.name in WRONG_IN_THE_DATA]
    assert len(wrong) == 2
    if not find_program("node"):
        pytest.skip("not installed: node")
    assert ["Assertion failed" in verdict.why for verdict in own_solutions(wrong, LIBRARIES)] == [True, True]


def test_problems_whose_tests_are_a_comment_are_known(shared):
    problems = read_problems(shared / "data" / "eval" / "humaneval_x_rust.jsonl.gz", "humaneval_x")
    without = {problem.name for problem in problems if "#[test]" not in re.sub(r"/\*.*?\*/", "", problem.record["test"], flags=re.DOTALL)}
    assert without == {name for name in NOT_TESTED if name.startswith("Rust")}


def test_a_broken_solution_passes_where_the_tests_call_another_function(shared, sandbox):
    problems = [problem for problem in some(shared, "CPP", 164) if problem.name in NOT_TESTED]
    assert [(verdict.problem, verdict.passed) for verdict in broken_solutions(problems, LIBRARIES)] == [("CPP/23", True)]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("HumanEval", "    import os\n    os._exit(0)\n"),
        ("CPP", "    exit(0);\n}\n"),
        ("Java", "        System.exit(0);\n        return false;\n    }\n}\n"),
        ("JavaScript", "  process.exit(0)\n}\n"),
        ("Go", "    os.Exit(0)\n    return false\n}\n"),
        ("Rust", "    std::process::exit(0);\n}\n"),
    ],
)
def test_a_program_that_ends_with_0_before_its_tests_has_not_passed(shared, sandbox, name, end):
    problems = some(shared, name, 1)
    (verdict,) = judge(problems, {problems[0].name: [end]}, LIBRARIES)
    assert not verdict.passed


def test_several_answers_are_judged_one_by_one(shared, sandbox):
    problems = some(shared, "HumanEval", 2)
    answers = {
        problems[0].name: ["    pass\n", problems[0].solution, "    return ("],
        problems[1].name: ["    while True: pass\n"] * 0 + ["    pass\n"] * 3,
    }
    verdicts = judge(problems, answers, LIBRARIES)
    assert [verdict.passed for verdict in verdicts] == [False, True, False, False, False, False]
    assert "SyntaxError" in verdicts[2].why
    expected = {"problems": 2, "samples": 6, "passed": 1, "pass@1": pytest.approx(1 / 6), "pass@2": pytest.approx(1 / 3)}
    assert figures(problems, verdicts, [2, 1, 9]) == {"Python": expected}


@pytest.mark.parametrize(("samples", "passed"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_is_the_part_of_all_choices_that_hold_one_that_passed(samples, passed):
    outcomes = [True] * passed + [False] * (samples - passed)
    for k in range(1, samples + 1):
        choices = list(itertools.combinations(outcomes, k))
        assert pass_at_k(samples, passed, k) == pytest.approx(float(Fraction(sum(map(any, choices)), len(choices))), abs=1e-12)
    with pytest.raises(ValueError):
        pass_at_k(samples, passed, samples + 1)


def test_what_follows_the_function_is_cut_off():
    assert cut_python("    return 1\n\n\ndef other():\n    pass\n") == "    return 1\n\n"
    assert cut_python("    x = 1\n    # inside\n    return x") == "    x = 1\n    # inside\n    return x"
    assert cut_braces("  if (a) {\n  }\n  return a;\n}\n\nint other() {\n}\n") == "  if (a) {\n  }\n  return a;\n}\n"
    assert cut_java("        if (a) {\n        }\n        return a;\n    }\n\n    int other() {\n    }\n}\n") == (
        "        if (a) {\n        }\n        return a;\n    }\n}\n"
    )


def test_cut_solutions_still_pass(shared, sandbox):
    for name, more in (("HumanEval", "\n\nprint(broken\n"), ("CPP", "\n\nbroken {\n"), ("JavaScript", "\nbroken (\n")):
        problems = some(shared, name, 3)
        answers = {problem.name: [problem.language.cut(problem.solution.rstrip() + "\n" + more)] for problem in problems}
        assert all(verdict.passed for verdict in judge(problems, answers, LIBRARIES))


def test_nothing_runs_unless_it_is_allowed():
    with pytest.raises(UserError, match="programs that a model has written") as error:
        check_allowed(False, namespaces=True)
    assert "--allow-code-execution" in error.value.fix


def test_a_language_that_is_not_installed_is_named_and_left_out(shared, tmp_path, monkeypatch):
    python, rust = (read_problems(shared / "data" / "eval" / f"{FILES[name]}.jsonl.gz", "humaneval_x") for name in ("Python", "Rust"))
    monkeypatch.setattr("mftcoder_coba.evaluation.code.languages.find_program", lambda name: "" if name == "rustc" else "/usr/bin/true")
    kept, notes = installed([*python, *rust], tmp_path)
    assert kept == python and notes == ["Rust is left out: not installed: rustc, the crates rand, regex and md5"]
    with pytest.raises(UserError, match="Rust is left out"):
        installed(rust, tmp_path)


@pytest.mark.parametrize(
    ("lines", "format", "message"),
    [
        (['{"task_id": "a"}'], "humaneval", "no text in prompt, entry_point, test"),
        (["{"], "humaneval", "not JSON"),
        ([], "humaneval", "holds no problems"),
        ([json.dumps({"task_id": "Jav/1", "prompt": "", "declaration": "", "test": ""})], "humaneval_x", 'did you mean "Java"'),
        ([json.dumps({"task_id": "Go/1", "prompt": "", "declaration": "", "test": ""})], "humaneval_x", "import, test_setup"),
        ([json.dumps({"task_id": "CPP/1", "prompt": "", "declaration": "", "test": ""})] * 2, "humaneval_x", "there twice"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path, lines, format, message):
    path = tmp_path / "tasks.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines))
    with pytest.raises(UserError) as error:
        read_problems(path, format)
    assert message in error.value.what and str(path) in error.value.where


def test_the_check_of_a_file_is_a_command(shared, sandbox, monkeypatch, capsys):
    arguments = ["check_code_tasks", str(shared / "data/eval/humaneval.jsonl.gz"), "--format", "humaneval", "--limit", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(UserError, match="programs that a model has written"):
        main()
    monkeypatch.setattr("sys.argv", [*arguments, "--allow-code-execution"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "own solutions: Python 2 of 2 passed, pass@1 1.0000" in printed and "broken solutions: Python 0 of 2" in printed


def test_a_mistake_ends_the_tools_with_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "data_tools.check_code_tasks", str(tmp_path / "no.jsonl"), "--format", "humaneval"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: pass@k runs programs"), result.stderr
