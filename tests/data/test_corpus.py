import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mftcoder_coba.config import DataConfig
from mftcoder_coba.data import corpus as corpus_module
from mftcoder_coba.data.corpus import prepare
from mftcoder_coba.data.formats import choose_format, parse_line
from mftcoder_coba.data.templates import choose, load_tokenizer
from mftcoder_coba.data.tokenising import kept_window
from mftcoder_coba.errors import RunFailure, UserError

ROOT = Path(__file__).resolve().parents[2]


def sample(number: int, answer="the end") -> str:
    return json.dumps({"id": number, "chat_rounds": [{"role": "human", "content": f"say {number}"}, {"role": "bot", "content": answer}]})


@pytest.fixture
def tokenizer_path(shared) -> str:
    return str(shared / "models" / "stories260k")


@pytest.fixture
def build(tmp_path, tokenizer_path):
    """Writes lines as a task's training file and prepares it; keys override `data` and the task."""

    def run(lines, task=None, name="train.jsonl", **data):
        file = tmp_path / name
        file.write_text("\n".join(lines), encoding="utf-8")
        tree = {"tasks": [{"name": "math", "train": [str(file)]} | (task or {})], "valid_fraction": 0.0, "sequence_length": 64}
        config = DataConfig.model_validate(tree | {"cache_dir": str(tmp_path / "cache")} | data)
        return prepare(config, tokenizer_path, workers=1, progress=False)

    return run


def entries(tmp_path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "corpus").iterdir() if path.is_dir()}


def test_samples_in_the_map_are_what_the_template_gives(build, tokenizer_path):
    corpus = build([sample(n, "x" * n) for n in range(20)])
    template = choose("auto", load_tokenizer(tokenizer_path))
    assert corpus.tasks == ("math",) and corpus.template_name == "mftcoder" and corpus.pad_token_id == 0
    data = corpus.splits["train"][0]
    assert len(data) == 20 and len(corpus.splits["valid"][0]) == len(corpus.splits["test"][0]) == 0
    for n in range(20):
        ids, mask = template.encode(parse_line(sample(n, "x" * n).encode(), choose_format("mftcoder", {})))
        found_ids, found_mask = data.sample(n)
        assert np.array_equal(ids, found_ids) and np.array_equal(mask, found_mask)
        assert data.lengths[n] == len(ids) and data.supervised[n] == mask[1:].sum()
        assert data.source(n).endswith(f"train.jsonl:{n + 1}")


def test_processes_give_what_one_process_gives(tmp_path, shared, tokenizer_path):
    file = shared / "data" / "mdqa" / "mdqa_instruct" / "train.jsonl"

    def run(workers):
        tree = {"tasks": [{"name": "a", "train": [str(file)]}], "sequence_length": 512, "cache_dir": str(tmp_path / str(workers))}
        return prepare(DataConfig.model_validate(tree), tokenizer_path, workers=workers, progress=False)

    one, two = run(1), run(2)
    assert one.accounting == two.accounting
    for split in ("train", "valid"):
        a, b = one.splits[split][0], two.splits[split][0]
        assert np.array_equal(a.lengths, b.lengths) and np.array_equal(a.supervised, b.supervised)
        assert all(np.array_equal(a.sample(n)[0], b.sample(n)[0]) for n in range(0, len(a), 7))


def test_the_line_of_a_broken_sample_is_named(build, tmp_path):
    with pytest.raises(UserError, match="not JSON") as error:
        build([sample(0), "", sample(1), '{"chat_rounds": [', "[]"])
    assert error.value.where == f"{tmp_path / 'train.jsonl'}:4" and "(2 in the files" in error.value.fix
    assert entries(tmp_path) == set()


def test_a_broken_task_costs_the_others_nothing(build, tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text("\n".join(sample(n) for n in range(9)))
    tasks = [{"name": "bad", "train": [str(tmp_path / "train.jsonl")]}, {"name": "good", "train": [str(good)]}]
    with pytest.raises(UserError, match="not JSON") as error:
        build([sample(0), "{"], tasks=tasks)
    assert error.value.where == f"{tmp_path / 'train.jsonl'}:2" and len(entries(tmp_path)) == 1
    mended = build([sample(0), sample(1)], tasks=tasks)
    assert [len(task) for task in mended.splits["train"]] == [2, 9] and len(entries(tmp_path)) == 2


def test_two_tasks_of_the_same_content_share_an_entry(build, tmp_path):
    file = str(tmp_path / "train.jsonl")
    corpus = build([sample(n) for n in range(5)], tasks=[{"name": name, "train": [file]} for name in ("a", "b")])
    assert [len(task) for task in corpus.splits["train"]] == [5, 5] and len(entries(tmp_path)) == 1


def test_skipped_lines_are_exactly_the_broken_ones_and_listed(build, tmp_path):
    corpus = build([sample(0), "{", sample(1), "[]", sample(2)], on_error="skip")
    found = corpus.accounting["math"]["train"]
    assert [(line.file, line.line) for line in found.skipped] == [(str(tmp_path / "train.jsonl"), 2), (str(tmp_path / "train.jsonl"), 4)]
    assert "not JSON" in found.skipped[0].reason and found.used.samples == 3 and found.read.samples == 5


@pytest.mark.parametrize(
    "prompt, answer, start",
    [
        (3, 20, 0),  # the first tokens hold a part of the answer: it is cut at its end
        (30, 4, 24),  # they do not: the end of the prompt, and the answer whole
        (30, 40, 25),  # the answer is too long as well: its beginning, behind as much of the prompt
        (30, 0, 0),  # nothing to learn anywhere
    ],
)
def test_a_truncated_sample_keeps_something_to_learn(prompt, answer, start):
    mask = np.array([False] * prompt + [True] * answer)
    assert kept_window(mask, 10) == start
    assert mask[start : start + 10].any() == (answer > 0)


def test_a_long_prompt_is_cut_in_front_of_its_answer(build):
    line = json.dumps({"chat_rounds": [{"role": "human", "content": "long " * 80}, {"role": "bot", "content": "x"}]})
    corpus = build([line], too_long="truncate", valid_fraction=0.0, sequence_length=48)
    data, found = corpus.splits["train"][0], corpus.accounting["math"]["train"]
    assert data.lengths.tolist() == [48] and found.truncated.samples == found.used.samples == 1
    ids, mask = data.sample(0)
    assert mask[-1] and mask.sum() == data.supervised[0] < 10


def test_a_long_sample_is_split_into_documents_without_losing_a_token(build, tokenizer_path):
    line = sample(0, "word " * 60)
    ids, mask = choose("auto", load_tokenizer(tokenizer_path)).encode(parse_line(line.encode(), choose_format("mftcoder", {})))
    corpus = build([sample(1), line, sample(2)], too_long="split", sequence_length=48)
    data, found = corpus.splits["train"][0], corpus.accounting["math"]["train"]
    pieces = -(-len(ids) // 48)
    assert pieces > 3 and len(data) == 2 + pieces and (found.split_samples, found.added_documents) == (1, pieces - 1)
    parts = [data.sample(n) for n in range(1, 1 + pieces)]
    assert np.array_equal(np.concatenate([part for part, _ in parts]), ids) and np.array_equal(np.concatenate([part for _, part in parts]), mask)
    assert {data.source(n).rsplit(":")[-1] for n in range(1, 1 + pieces)} == {"2"}
    assert found.read.samples == 3 and found.read.tokens == data.lengths.sum() and found.supervised_tokens == data.supervised.sum()


def test_a_part_of_a_split_sample_without_an_answer_is_counted_and_not_used(build):
    line = json.dumps({"chat_rounds": [{"role": "human", "content": "long " * 80}, {"role": "bot", "content": "x"}]})
    corpus = build([line], too_long="split", sequence_length=48)
    found = corpus.accounting["math"]["train"]
    assert found.used.samples == 1 and found.without_supervision.samples == found.added_documents > 2
    assert corpus.splits["train"][0].sample(0)[1].any()


def test_the_histogram_holds_every_sample_by_its_own_length(build):
    corpus = build([sample(n, "word " * (n % 40)) for n in range(200)], too_long="split", sequence_length=32)
    found = corpus.accounting["math"]["train"]
    whole = build([sample(n, "word " * (n % 40)) for n in range(200)], sequence_length=4096).splits["train"][0].lengths
    expected = [(up_to, int(((whole > (up_to // 2 if up_to > 16 else 0)) & (whole <= up_to)).sum())) for up_to, _ in found.lengths]
    assert list(found.lengths) == expected and sum(count for _, count in found.lengths) == 200


@pytest.mark.parametrize("too_long", ["drop", "truncate", "split"])
def test_the_sums_of_the_accounting_add_up_on_mixed_data(build, too_long):
    lines = [sample(n, "word " * (n % 40)) for n in range(200)] + ["{}", sample(3, "word " * 3), json.dumps({"chat_rounds": 1})]
    lines += [json.dumps({"chat_rounds": [{"role": "human", "content": "long " * 80}, {"role": "bot", "content": "x"}]})]
    corpus = build(lines, on_error="skip", too_long=too_long, valid_fraction=0.2, sequence_length=48)
    for split, found in corpus.accounting["math"].items():
        found.check()
        data = corpus.splits[split][0]
        assert found.read.samples == 204 and len(found.skipped) == 2 and found.other_split.samples > 0
        assert (len(data), data.lengths.sum(), data.supervised.sum()) == (found.used.samples, found.used.tokens, found.supervised_tokens)
        assert data.lengths.max() <= 48 and data.supervised.min() >= 1
    train, valid = (corpus.accounting["math"][split] for split in ("train", "valid"))
    assert train.other_split.samples + valid.other_split.samples == 202
    assert train.duplicates + valid.duplicates == 1
    cut = train.truncated.samples + valid.truncated.samples
    dropped = train.too_long.samples + valid.too_long.samples
    split = train.split_samples + valid.split_samples
    assert (cut > 0, dropped > 0, split > 0) == (too_long == "truncate", too_long == "drop", too_long == "split")
    assert (train.without_supervision.samples + valid.without_supervision.samples > 0) == (too_long == "split")
    assert build(lines, on_error="skip", too_long=too_long, valid_fraction=0.2, sequence_length=48).accounting == corpus.accounting


def test_equal_samples_land_on_one_side_of_the_split(build):
    lines = [sample(n % 150).replace('"id": ', f'"id": {copy}') for copy in (1, 2) for n in range(150)]
    corpus = build(lines, valid_fraction=0.3)
    sides = [{tuple(data.sample(n)[0].tolist()) for n in range(len(data))} for data in (corpus.splits["train"][0], corpus.splits["valid"][0])]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 150
    assert 20 < len(sides[1]) < 70


def test_files_of_its_own_are_a_tasks_validation(build, tmp_path):
    valid = tmp_path / "valid.jsonl.gz"
    valid.write_bytes(gzip.compress(sample(7).encode()))
    corpus = build([sample(n) for n in range(5)], task={"valid": [str(valid)], "test": [str(valid)]}, valid_fraction=0.5)
    assert [len(corpus.splits[split][0]) for split in ("train", "valid", "test")] == [5, 1, 1]


def test_a_cache_hit_gives_the_same_and_knows_the_files_by_their_new_names(build, tmp_path):
    lines = [sample(0), "{", sample(1)]
    first = build(lines, on_error="skip")
    found = entries(tmp_path)
    again = build(lines, on_error="skip", name="renamed.jsonl", task={"name": "other"})
    assert entries(tmp_path) == found and len(found) == 1
    assert np.array_equal(first.splits["train"][0].sample(1)[0], again.splits["train"][0].sample(1)[0])
    assert again.accounting["other"]["train"].skipped[0].file == str(tmp_path / "renamed.jsonl")


def test_whatever_changes_the_tokens_makes_a_new_entry(build, tmp_path):
    lines = [sample(n) for n in range(30)]
    for number, change in enumerate([{}, {"sequence_length": 63}, {"too_long": "truncate"}, {"on_error": "skip"}], start=1):
        build(lines, **change)
        assert len(entries(tmp_path)) == number
    build([*lines, sample(31)])
    assert len(entries(tmp_path)) == 5
    build(lines, valid_fraction=0.5)
    assert len(entries(tmp_path)) == 7


@pytest.mark.parametrize(
    ("lines", "options", "reason"),
    [
        (["", "  "], {}, "the task is empty"),
        ([sample(0, "word " * 90)], {}, "1 read, of which 1 are longer than sequence_length"),
        (["{", "{"], {"on_error": "skip"}, "2 could not be read"),
        ([sample(0)], {"valid_fraction": 0.999999}, "1 fell to validation"),
    ],
)
def test_a_task_without_usable_samples_says_why(build, lines, options, reason):
    with pytest.raises(UserError, match=reason) as error:
        build(lines, **options)
    assert error.value.where == "data.tasks[0].train (math)"


def test_a_missing_file_is_found_before_anything_is_built(build, tmp_path):
    with pytest.raises(UserError, match="no such file") as error:
        build([sample(0)], task={"valid": [str(tmp_path / "nowhere.jsonl")]})
    assert error.value.where == "data.tasks[0].valid (math)" and not (tmp_path / "cache").exists()


# Another process that prepares the same data. `{before}` changes what happens at the end of a build, or before it.
SCRIPT = """
import json, os, pathlib, sys, time
from mftcoder_coba.config import DataConfig
from mftcoder_coba.data import corpus
{before}
corpus.prepare(DataConfig.model_validate(json.loads(sys.argv[1])), sys.argv[2], workers=1, progress=False)
"""
KILLED = "pathlib.Path.rename = lambda *paths: os.kill(os.getpid(), 9)"
COUNTED = """
flags, real, lock = pathlib.Path(sys.argv[3]), corpus.build_entries, corpus.FileLock
def at_the_lock(path):
    (flags / f"ready-{os.getpid()}").touch()
    return lock(path)
def build(*arguments):
    (flags / f"built-{os.getpid()}").touch()
    while len(list(flags.glob("ready-*"))) < 2:
        time.sleep(0.05)
    return real(*arguments)
corpus.build_entries, corpus.FileLock = build, at_the_lock
"""


def start(before: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT.format(before=before), *arguments]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def tree(tmp_path) -> dict:
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(sample(n) for n in range(50)))
    return {"tasks": [{"name": "math", "train": [str(file)]}], "valid_fraction": 0.0, "cache_dir": str(tmp_path / "cache")}


def test_a_file_that_grows_while_it_is_read_makes_no_entry(build, tmp_path, monkeypatch):
    real = corpus_module.build_entries

    def growing(*arguments):
        with open(tmp_path / "train.jsonl", "a") as file:
            file.write("\n" + sample(99))
        return real(*arguments)

    monkeypatch.setattr(corpus_module, "build_entries", growing)
    with pytest.raises(UserError, match="changed while it was read"):
        build([sample(n) for n in range(3)])
    assert entries(tmp_path) == set()


def test_who_asks_for_the_data_does_not_tokenise(build, monkeypatch):
    """The memory and the threads of a build stay out of a training rank."""
    seen = []
    monkeypatch.setattr(corpus_module, "build_entries", lambda *arguments: seen.append(os.getpid()) or sys.exit(7))
    with pytest.raises(RunFailure, match="failed, see above"):
        build([sample(0)])
    assert not seen


def test_a_killed_build_leaves_no_entry_and_the_next_one_clears_up(tree, tmp_path, tokenizer_path):
    process = start(KILLED, json.dumps(tree), tokenizer_path)
    errors = process.communicate()[1]
    assert process.returncode == 1 and "was killed by signal 9" in errors
    left = entries(tmp_path)
    assert left and all(".building-" in name for name in left)
    corpus = prepare(DataConfig.model_validate(tree), tokenizer_path, workers=1, progress=False)
    assert len(corpus.splits["train"][0]) == 50
    assert len(entries(tmp_path)) == 1 and not any(".building-" in name for name in entries(tmp_path))


def test_two_processes_at_once_build_an_entry_once(tree, tmp_path, tokenizer_path):
    processes = [start(COUNTED, json.dumps(tree), tokenizer_path, str(tmp_path)) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert len(list(tmp_path.glob("ready-*"))) == 2 and len(list(tmp_path.glob("built-*"))) == 1
    assert len(entries(tmp_path)) == 1
