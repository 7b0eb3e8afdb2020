"""data_tools.build_stdlib_tasks on the standard library of the Python that runs the tests."""

from __future__ import annotations

import ast
import json
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from data_tools import build_stdlib_tasks
from data_tools.stdlib_source import Function, Material, TestMethod, functions_of, meaning_key, read_stdlib
from mftcoder_coba.errors import UserError

TestMethod.__test__ = False  # its name is not a test's
CODE_TASKS = ("completion", "comment", "text2code")


@pytest.fixture(scope="module")
def material() -> Material:
    return read_stdlib(Path(sysconfig.get_path("stdlib")))


@pytest.fixture(scope="module")
def table(material: Material) -> dict:
    return build_stdlib_tasks.collect(material, max_chars=4000)[0]


@pytest.fixture(scope="module")
def built(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stdlib") / "tasks"
    build_stdlib_tasks.build(material, out, 700, {"completion": 60, "comment": 20}, held_out_limit=7)
    return out


def shown_function(task: str, prompt: str, answer: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """The function that a sample is about, as the parser sees it."""
    given = prompt.split("\n\n", 1)[1]
    code = {"completion": f"{given}\n{answer}", "comment": given, "text2code": answer, "unittest": given}[task]
    return ast.parse(code).body[0]


def functions(source: str) -> list[Function]:
    source = textwrap.dedent(source)
    return list(functions_of("module", ast.parse(source), source.split("\n")))


def test_there_are_thousands_of_samples_and_every_task_has_all_splits(table):
    for task in CODE_TASKS:
        assert len(table[task]["train"]) > 1000
        assert table[task]["valid"] and table[task]["test"]


def test_a_function_is_in_one_split_only_over_all_tasks(table):
    place: dict[str, set[str]] = {}
    for task, splits in table.items():
        for split, samples in splits.items():
            for sample in samples:
                place.setdefault(meaning_key(shown_function(task, sample.prompt, sample.answer)), set()).add(split)
    assert len(place) > 1000
    assert all(len(splits) == 1 for splits in place.values())


def test_splits_are_near_90_5_5(table):
    for task in CODE_TASKS:
        sizes = {split: len(samples) for split, samples in table[task].items()}
        total = sum(sizes.values())
        assert 0.87 < sizes["train"] / total < 0.93
        assert 0.03 < sizes["valid"] / total < 0.07


def test_no_answer_and_no_prompt_occurs_twice_in_a_task(table):
    for task, splits in table.items():
        samples = [sample for split in splits.values() for sample in split]
        assert max(Counter(" ".join(sample.answer.split()) for sample in samples).values()) == 1
        if task != "unittest":
            assert max(Counter(" ".join(sample.prompt.split("\n\n", 1)[1].split()) for sample in samples).values()) == 1
        assert len({sample.id for sample in samples}) == len(samples)


def test_a_completion_and_its_prompt_are_the_whole_function(table, material):
    whole = {function.key: function for function in material.functions}
    for sample in table["completion"]["valid"]:
        node = shown_function("completion", sample.prompt, sample.answer)
        assert whole[meaning_key(node)].name == node.name
        assert ast.get_docstring(node)


def test_a_comment_prompt_does_not_hold_its_answer(table):
    for sample in table["comment"]["train"][:500]:
        assert ast.get_docstring(shown_function("comment", sample.prompt, sample.answer)) is None


def test_unit_tests_call_the_function_they_are_paired_with(table):
    if "unittest" not in table:
        pytest.skip("this Python comes without the library's tests")
    calls = 0
    for sample in table["unittest"]["train"]:
        name = sample.source.rsplit(":", 1)[1]
        method = ast.parse(sample.answer).body[0]
        assert method.name.startswith("test")
        calls += name in {ast.unparse(node.func).rsplit(".", 1)[-1] for node in ast.walk(method) if isinstance(node, ast.Call)}
        assert shown_function("unittest", sample.prompt, sample.answer).name == name
    # The others import the function under another name.
    assert calls > 0.95 * len(table["unittest"]["train"])


def test_two_builds_are_equal_byte_for_byte(built, tmp_path):
    material = read_stdlib(Path(sysconfig.get_path("stdlib")))
    build_stdlib_tasks.build(material, tmp_path / "again", 700, {"completion": 60, "comment": 20}, held_out_limit=7)
    files = sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert all((built / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_limits_keep_the_first_lines(material, built, tmp_path):
    build_stdlib_tasks.build(material, tmp_path / "more", 700, {"completion": 90}, held_out_limit=None)
    few, more = ((folder / "completion/train.jsonl").read_text().splitlines() for folder in (built, tmp_path / "more"))
    assert len(few) == 60
    assert more[:60] == few
    assert all(len((built / task / "valid.jsonl").read_text().splitlines()) == 7 for task in CODE_TASKS)


def test_lines_are_mftcoder_chat_samples_within_the_limit(built):
    for file in built.glob("*/*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            assert list(sample) == ["id", "data_name", "source", "chat_rounds"]
            assert sample["data_name"] == file.parent.name
            human, bot = sample["chat_rounds"]
            assert (human["role"], bot["role"]) == ("human", "bot")
            assert len(human["content"]) + len(bot["content"]) <= 700


def test_the_summary_counts_the_lines(built):
    counts = json.loads((built / "summary.json").read_text())["tasks"]
    for task, splits in counts.items():
        assert splits == {split: len((built / task / f"{split}.jsonl").read_text().splitlines()) for split in splits}


def test_a_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        build_stdlib_tasks.build(Material(), tmp_path, 700, {}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("text, word", [("complexion=3", 'did you mean "completion"'), ("comment=many", "TASK=N"), ("comment=0", "TASK=N")])
def test_a_wrong_limit_is_explained(text, word):
    with pytest.raises(UserError, match=word):
        build_stdlib_tasks.parse_limits(text)


def test_a_method_is_taken_apart_at_its_docstring():
    (function,) = functions('''
        class A:
            @property
            def f(self):
                """Say what

                it does."""

                # why
                return self.x + 1
        ''')
    assert function.qualified_name == "A.f"
    assert function.docstring == "Say what\n\nit does."
    assert function.code == "@property\ndef f(self):\n    # why\n    return self.x + 1"
    assert function.head == '@property\ndef f(self):\n    """Say what\n\n    it does."""'
    assert function.body == "    # why\n    return self.x + 1"


def test_functions_that_do_nothing_or_share_a_line_with_their_docstring_are_left_out():
    assert not functions('''
        def a():
            """Only words."""
        def b():
            """Later."""
            raise NotImplementedError
        def c(): "On one line."; return f(1)
        ''')


def test_comments_docstrings_and_layout_do_not_change_the_key():
    first, second, third = functions('''
        def f(x):
            """One."""
            return x+1
        class A:
            @staticmethod
            def f(x):
                # two
                return (x + 1)
        class B:
            def f(x):
                return x + 2
        ''')
    assert first.key == second.key != third.key
