"""data_tools.convert_public: the files as owners publish them become tasks that a config reads; nothing is lost in silence."""

from __future__ import annotations

import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_tools import convert_public
from data_tools.build_stdlib_tasks import split_of
from mftcoder_coba.data.files import read_lines
from mftcoder_coba.data.formats import choose_format, parse_line
from mftcoder_coba.errors import UserError

SPLITS = ("train", "valid", "test")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process -> what it printed."""

    def run(kind, *sources, out, more=()):
        monkeypatch.setattr(sys, "argv", ["convert_public", "--kind", kind, "--source", *map(str, sources), "--out", str(out), *more])
        convert_public.main()
        return capsys.readouterr().out

    return run


def conversations(file):
    """The samples of a written file, read as a task's data is: [[(role, content), ...], ...]."""
    return [[tuple(message) for message in parse_line(line, choose_format("mftcoder", {}))] for _, line in read_lines(file, ())]


def lines(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


def report(out):
    return json.loads((out / "conversion.json").read_text(encoding="utf-8"))


def questions(number):
    return [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}."} for n in range(number)]


def test_orca_math_in_parquet_is_split_by_a_hash_of_its_prompts(command, tmp_path):
    records = questions(200)
    pa.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "train-00000-of-00001.parquet")
    printed = command("orca_math", tmp_path / "train-00000-of-00001.parquet", out=tmp_path / "math")
    found = {split: conversations(tmp_path / "math" / f"{split}.jsonl") for split in SPLITS}
    for split in SPLITS:
        expected = [record for record in records if split_of(record["question"]) == split]
        assert found[split] == [[("user", record["question"]), ("assistant", record["answer"])] for record in expected]
    assert len(found["train"]) > 150 and found["valid"] and found["test"]
    assert report(tmp_path / "math")["tasks"] == {"math": {split: len(found[split]) for split in SPLITS}}
    assert f"train {len(found['train']):>7}" in printed


def test_alpaca_cleaned_is_one_json_array_whose_input_follows_the_instruction(command, tmp_path):
    records = [{"instruction": f"Add {n}.", "input": "1" if n % 2 else "", "output": str(n)} for n in range(60)]
    (tmp_path / "alpaca_data_cleaned.json").write_text(json.dumps(records), encoding="utf-8")
    command("alpaca", tmp_path / "alpaca_data_cleaned.json", out=tmp_path / "instruct")
    found = sorted(turns for split in SPLITS for turns in conversations(tmp_path / "instruct" / f"{split}.jsonl"))
    expected = [[("user", f"Add {n}." + ("\n1" if n % 2 else "")), ("assistant", str(n))] for n in range(60)]
    assert found == sorted(expected)


def test_xtreme_up_keeps_its_owners_splits_and_has_a_task_for_each_language(command, tmp_path):
    record = {"question": "q?", "title": "t", "context": "c", "target": "a"}
    for split in ("train", "validation", "test"):
        for language in ("ar", "bn"):
            lines(tmp_path / "qa_in_lang" / split / f"{language}.jsonl", [record | {"target": f"{language} {split}"}] * 2)
    command("xtreme_up", tmp_path / "qa_in_lang", out=tmp_path / "out")
    for language in ("ar", "bn"):
        for theirs, ours in {"train": "train", "validation": "valid", "test": "test"}.items():
            turns = [("user", "question: q? title: t context: c"), ("assistant", f"{language} {theirs}")]
            assert conversations(tmp_path / "out" / language / f"{ours}.jsonl") == [turns] * 2  # their own repeats stay


def test_xtreme_up_outside_its_folders_is_refused(command, tmp_path):
    file = lines(tmp_path / "elsewhere" / "ar.jsonl", [{"question": "q", "title": "t", "context": "c", "target": "a"}])
    with pytest.raises(UserError, match="names no split") as error:
        command("xtreme_up", file, out=tmp_path / "out")
    assert error.value.where == f"{file}:1" and not (tmp_path / "out").exists()


def test_codefuse_reads_chat_rounds_and_pairs_and_makes_tasks_by_a_field(command, tmp_path):
    rounds = [{"role": "human", "content": "write", "chat_round_id": 0}, {"role": "bot", "content": "code", "chat_round_id": 1}]
    records = [
        {"id": 1, "data_name": "unit test", "chat_rounds": rounds},
        {"data_name": "text2code", "instruction": "write this", "output": "some code"},
    ]
    command("codefuse", lines(tmp_path / "crt.jsonl", records), out=tmp_path / "crt", more=["--by", "data_name"])
    found = {task: [turns for file in (tmp_path / "crt" / task).iterdir() for turns in conversations(file)] for task in ("unit-test", "text2code")}
    assert found == {
        "unit-test": [[("user", "write"), ("assistant", "code")]],
        "text2code": [[("user", "write this"), ("assistant", "some code")]],
    }


def test_code_sets_have_a_task_for_each_language_and_a_problem_is_in_one_split(command, tmp_path):
    names = ("Python", "CPP", "JavaScript")
    files = [
        lines(tmp_path / f"{name}.jsonl", [{"task_id": f"{name}/{n}", "prompt": f"f{n}(", "canonical_solution": f"{name} {n}"} for n in range(80)])
        for name in names
    ]
    command("code_completion", *files, out=tmp_path / "cc")
    for split in SPLITS:
        expected = [f"f{n}(" for n in range(80) if split_of(str(n)) == split]
        for language in ("python", "cpp", "javascript"):
            assert [turns[0][1] for turns in conversations(tmp_path / "cc" / language / f"{split}.jsonl")] == expected


def test_humaneval_x_becomes_test_data_only(command, shared, tmp_path):
    files = [shared / "data" / "eval" / f"humaneval_x_{language}.jsonl.gz" for language in ("python", "cpp", "java", "js", "go")]
    command("humaneval_x", *files, out=tmp_path / "eval")
    assert sorted(path.relative_to(tmp_path / "eval").as_posix() for path in (tmp_path / "eval").rglob("*.jsonl")) == [
        f"{language}/test.jsonl" for language in ("cpp", "go", "java", "javascript", "python")
    ]
    with gzip.open(files[-1], "rt", encoding="utf-8") as stream:
        theirs = [json.loads(line) for line in stream]
    expected = [[("user", record["prompt"]), ("assistant", record["canonical_solution"])] for record in theirs]
    assert conversations(tmp_path / "eval" / "go" / "test.jsonl") == expected and len(expected) == 164


def test_the_report_counts_every_record(command, tmp_path):
    records = [*questions(20), *questions(3), {"question": "Nothing?", "answer": "  "}, {"question": "half"}]
    file = lines(tmp_path / "math.jsonl", records)
    with file.open("a", encoding="utf-8") as stream:
        stream.write("{broken\n[1]\n")
    command("orca_math", file, out=tmp_path / "out", more=["--on-error", "skip"])
    found = report(tmp_path / "out")
    assert found["left_out"] == {"duplicate": 3, "empty answer": 1, "could not be read": 3}
    assert [skipped.split(": ")[0] for skipped in found["skipped"]] == [f"{file}:{number}" for number in (25, 26, 27)]
    assert sum(found["tasks"]["out"].values()) + sum(found["left_out"].values()) == len(records) + 2
    assert found["sources"][0]["bytes"] == file.stat().st_size


def test_a_record_that_cannot_be_read_stops_with_its_place_and_leaves_an_earlier_result(command, tmp_path):
    out = tmp_path / "out"
    command("orca_math", lines(tmp_path / "good.jsonl", questions(5)), out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    bad = lines(tmp_path / "bad.jsonl", [*questions(2), {"question": "q", "solution": "a"}])
    with pytest.raises(UserError, match='no key "answer"') as error:
        command("orca_math", bad, out=out)
    assert error.value.where == f"{bad}:3" and {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_other_content_is_not_overwritten(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not overwritten"):
        command("orca_math", lines(tmp_path / "a.jsonl", questions(2)), out=tmp_path / "out")


def test_files_of_no_usable_sample_are_refused(command, tmp_path):
    with pytest.raises(UserError, match="no sample is left"):
        command("orca_math", lines(tmp_path / "a.jsonl", [{"question": "q", "answer": ""}]), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_array_that_is_cut_off_is_told(command, tmp_path):
    (tmp_path / "a.json").write_text('[{"instruction": "a", "output": "b"}', encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read as a JSON array"):
        command("alpaca", tmp_path / "a.json", out=tmp_path / "out")
