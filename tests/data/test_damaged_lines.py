"""Thousands of damaged lines among good ones. Each damage spoils a line by its construction, so that the truth does not come from the parser."""

import copy
import gzip
import json
import random
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from mftcoder_coba.config import FORMAT_FIELDS, DataConfig
from mftcoder_coba.data import prepare
from mftcoder_coba.data.formats import BadSample, choose_format, parse_line
from mftcoder_coba.errors import UserError

BOM = b"\xef\xbb\xbf"
TEXTS = ["", "a", "Was ist 2+2?", "素数を列挙", "🧮🏳️‍🌈 ok", 'say "no" \\ {x: [1]}', "l\n\tl\r\n", "\u2028\u0085\ufeff", "हिन्दी עברית", "x" * 300]
KEYS = {"mftcoder": ("role", "content"), "messages": ("role", "content"), "sharegpt": ("from", "value")}
SPEAKERS = {"mftcoder": ("human", "bot"), "messages": ("user", "assistant"), "sharegpt": ("human", "gpt")}
EXTRA = [{}, {"tags": [[1], {"a": None}]}, {"big": 10**300, "deep": [[[[[[0]]]]]]}, {"raw": "\0 \ud800"}, {"id": "é", "n": -0.5e-7}]


# Good samples: a record and the (role, content) pairs that it means.


def sample(name: str, rng: random.Random) -> tuple[dict, list[tuple[str, str]]]:
    if name == "text":
        content = rng.choice(TEXTS[1:])
        return {"text": content}, [("text", content)]
    chat = [("system", rng.choice(TEXTS))] if rng.random() < 0.3 else []
    chat += [(role, rng.choice(TEXTS)) for _ in range(1 if name == "prompt_answer" else rng.randint(1, 3)) for role in ("user", "assistant")]
    if name in KEYS:
        speaker, said = KEYS[name]
        roles = dict(zip(("user", "assistant"), SPEAKERS[name], strict=True)) | {"system": "system"}
        return {FORMAT_FIELDS[name][0]: [{speaker: roles[role], said: content} for role, content in chat]}, chat
    system, spoken = ({"system": chat[0][1]}, chat[1:]) if len(chat) % 2 else ({}, chat)
    meant = [turn for turn in chat if turn != ("system", "")]
    question, answer = spoken[-2][1], spoken[-1][1]
    if name == "prompt_answer":
        return {"prompt": question, "answer": answer, **system}, meant
    history = {"history": [[spoken[n][1], spoken[n + 1][1]] for n in range(0, len(spoken) - 2, 2)]}
    record = {"instruction": question, "output": answer, **system, **history}
    if rng.random() < 0.5:
        record["input"] = "more"
        meant[-2] = ("user", f"{question}\nmore" if question else "more")
    return record, meant


def written(record: dict, rng: random.Random, ascii_only: bool | None = None) -> bytes:
    """One of the ways to write a record, with fields that no format reads."""
    extra = rng.choice(EXTRA)
    items = list((record | extra).items())
    rng.shuffle(items)
    ascii_only = "raw" in extra or (rng.random() < 0.5 if ascii_only is None else ascii_only)
    return json.dumps(dict(items), ensure_ascii=ascii_only, separators=rng.choice([(",", ":"), (", ", ": "), (" ,\t", " : ")])).encode()


# Places of a record that must be text: (what holds it, its key there).


def needed_texts(record: dict, name: str) -> list[tuple]:
    if name in KEYS:
        return [(turn, KEYS[name][1]) for turn in record[FORMAT_FIELDS[name][0]]]
    pairs = [(pair, side) for pair in record.get("history", []) for side in (0, 1)]
    return pairs + [(record, key) for key in ("text", "prompt", "answer", "instruction", "output") if key in record]


# Damages: (format, record, random numbers) -> the line, and a pattern of the reason to expect.


def truncated(name, record, rng):
    line = written(record, rng)
    return line[: rng.randrange(1, len(line))], "not JSON|not UTF-8"


def broken_in_two(name, record, rng):
    line = written(record, rng)
    place = rng.randrange(1, len(line))
    return line[:place] + rng.choice([b"\n", b"\r\n"]) + line[place:], "not JSON|not UTF-8"


def with_text(value, reason, name, record, rng, ascii_only=None):
    holder, key = rng.choice(needed_texts(record, name))
    holder[key] = value(holder[key], rng) if callable(value) else rng.choice(value)
    return written(record, rng, ascii_only), reason


def inserted(piece: str):
    def insert(text, rng):
        place = rng.randint(0, len(text))
        return text[:place] + piece + text[place:]

    return insert


def marked(pieces, reason, name, record, rng):
    """Bytes that JSON or UTF-8 does not allow in a string."""
    line, _ = with_text(inserted("MARK"), reason, name, record, rng)
    return line.replace(b"MARK", rng.choice(pieces), 1), reason


def wrong_container(name, record, rng):
    record[FORMAT_FIELDS[name][0]] = rng.choice([None, 3, True, {}, {"role": "user"}, [], [None], [3], [[]]])
    return written(record, rng), "must be"


def missing_key(name, record, rng):
    holders = [(record, FORMAT_FIELDS[name][0])] + [(holder, key) for holder, key in needed_texts(record, name) if isinstance(holder, dict)]
    if name in KEYS:
        holders += [(holder, KEYS[name][0]) for holder, _ in needed_texts(record, name)]
    holder, key = rng.choice(holders)
    del holder[key]
    return written(record, rng), f'has no key "{key}"'


def extra_field(values, reason, name, record, rng):
    return written(record, rng)[:-1] + b', "damage": ' + rng.choice(values) + b"}", reason


def key_twice(name, record, rng):
    key = FORMAT_FIELDS[name][0]
    return written(record, rng)[:-1] + b', "%b": %b}' % (key.encode(), json.dumps(record[key]).encode()), f"'{key}' is twice"


def wrapped(pieces, reason, name, record, rng):
    before, after = rng.choice(pieces)
    return before + written(record, rng) + after, reason


def bytes_inserted(pieces, reason, name, record, rng):
    line = written(record, rng)
    place = rng.randint(0, len(line))
    return line[:place] + rng.choice(pieces) + line[place:], reason


def deep(name, record, rng):
    depth = 20_000
    line, _ = with_text(["MARK"], "", name, record, rng)
    value = rng.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth])
    return rng.choice([line.replace(b'"MARK"', value), b"[" * depth]), "nested too deeply|must be|not JSON"


def not_quite_json(name, record, rng):
    line = written(record, rng)
    forms = [line[:-1] + b",}", line[:-1] + b"]", line[1:], line + line, line + b", " + line, repr(record).encode()]
    return rng.choice(forms), "not JSON"


def out_of_order(name, record, rng):
    """The rules that go beyond types."""
    if name == "text":
        record["text"] = ""
        return written(record, rng), "is empty text"
    if name in KEYS:
        (speaker, said), turns = KEYS[name], record[FORMAT_FIELDS[name][0]]
        bad_turns = [{speaker: role, said: "x"} for role in ("robot", "tool", "", "User")]
        changes = [turns[:-1], turns + turns[-1:], turns[::-1], turns + [turns[0]], turns + [rng.choice(bad_turns)]]
        record[FORMAT_FIELDS[name][0]] = rng.choice(changes)
        return written(record, rng), "is due|must end with|must be a list of turns|tool turns|allowed:|did you mean"
    record["system"] = rng.choice([3, [], {}, False])
    return written(record, rng), '"system" must be text'


DAMAGES = {
    "truncated": truncated,
    "broken in two": broken_in_two,
    "wrong type": partial(with_text, [None, 3, -0.5, True, {}, {"text": "x"}, [], ["x"], [None]], "must be"),
    "wrong container": wrong_container,
    "NaN as text": partial(with_text, [float("nan"), float("inf"), -float("inf")], "is no JSON value"),
    "NaN elsewhere": partial(extra_field, [b"NaN", b"-Infinity", b"[[Infinity]]"], "is no JSON value"),
    "nested list as text": partial(with_text, [[[[1]]], [["x"]], [[]]], "must be"),
    "inside a list": partial(wrapped, [(b"[", b"]"), (b"[[", b"]]"), (b"[1, ", b"]")], "a line must be a JSON object"),
    "lone surrogate": partial(with_text, inserted("\udbff"), "lone surrogate", ascii_only=True),
    "other lone surrogate": partial(with_text, inserted("\udc00"), "lone surrogate", ascii_only=True),
    "escaped null": partial(with_text, inserted("\0"), "null character"),
    "control character": partial(marked, [b"\0", b"\r", b"\x0b", b"\x1f", b"\t"], "not JSON: Invalid control character"),
    "null byte": partial(bytes_inserted, [b"\0", b"\0\0\0\0"], "not JSON|not UTF-8"),
    "huge number as text": partial(with_text, [10**400, -(10**4000), 1e308], "must be text"),
    "huge number": partial(extra_field, [b"9" * 5000, b"-" + b"1" * 20_000, b"[" + b"7" * 5000 + b"]"], "thousands of digits"),
    "missing key": missing_key,
    "key twice": key_twice,
    "byte order mark": partial(wrapped, [(BOM, b"")], "byte order mark"),
    "invalid UTF-8": partial(bytes_inserted, [b"\xff", b"\xfe\xff", b"\xc0\xaf", b"\xf5"], "not UTF-8"),
    "another encoding": partial(marked, [b"caf\xe9 ", b"\xed\xa0\x80", b"\x93q\x94"], "not UTF-8"),
    "no object": lambda name, record, rng: (rng.choice([b"null", b"true", b"42", b"1e400", b'"text"', b"[[[]]]"]), "a line must be a JSON object"),
    "deep nesting": deep,
    "not quite JSON": not_quite_json,
    "more than JSON": partial(wrapped, [(b"// ", b""), (b"", b" # end"), (b"", b"\0"), (b"", b"\x0c"), (b"", b","), (b"(", b")")], "not JSON"),
    "out of order": out_of_order,
}


# Files of good lines, damaged lines and blank ones.


class Line(NamedTuple):
    text: bytes
    reason: str = ""  # of a damaged line
    meant: tuple = ()  # of a good one


def made_lines(name: str, rng: random.Random, damages: list[str]) -> list[Line]:
    """In random order behind a good line: a line for each of `damages` (two for one that is broken in two), good lines, blank lines."""
    groups = [[Line(rng.choice([b"", b" \t ", b"\r", b"\t\r"]))] for _ in range(len(damages) // 8)]
    for damage in damages:
        text, reason = DAMAGES[damage](name, copy.deepcopy(sample(name, rng)[0]), rng)
        groups.append([Line(part, f"^(?:.*(?:{reason}))") for part in text.split(b"\n")])
    first = []
    for _ in range(len(damages) // 2 + 3):
        record, meant = sample(name, rng)
        good = [Line(rng.choice([b"", b" ", b"\t"]) + written(record, rng) + rng.choice([b"", b" ", b"\r"]), "", tuple(meant))]
        groups.append(good) if first else first.append(good)
    rng.shuffle(groups)
    return [line for group in first + groups for line in group]


def write(file: Path, lines: list[Line], rng: random.Random) -> None:
    content = rng.choice([b"", BOM]) + b"\n".join(line.text for line in lines) + rng.choice([b"", b"\n", b"\r\n\r\n"])
    file.write_bytes(gzip.compress(content) if file.name.endswith(".gz") else content)


class TaskFiles(NamedTuple):
    name: str
    files: dict[Path, list[Line]]  # the first one without damage; every second one packed

    def numbers(self, damaged: bool) -> list[tuple[str, int]]:
        lines = [(file, number, line) for file, lines in self.files.items() for number, line in enumerate(lines, start=1)]
        return [(str(file), number) for file, number, line in lines if (line.reason if damaged else line.meant)]


DAMAGED_LINES = 5000
ROUNDS = 34  # of all damages, for each format


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, TaskFiles]:
    folder, rng, tasks = tmp_path_factory.mktemp("damaged"), random.Random(20240918), {}
    for name in FORMAT_FIELDS:
        damages = list(DAMAGES) * ROUNDS
        rng.shuffle(damages)
        parts = [[], *(damages[start::5] for start in range(5))]
        files = {folder / f"{name}-{number}.jsonl{'.gz' * (number % 2)}": made_lines(name, rng, part) for number, part in enumerate(parts)}
        for file, lines in files.items():
            write(file, lines, rng)
        tasks[name] = TaskFiles(name, files)
    assert sum(len(task.numbers(damaged=True)) for task in tasks.values()) >= DAMAGED_LINES
    return tasks


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> str:
    from toy import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return str(folder)


@pytest.mark.parametrize("name", FORMAT_FIELDS)
def test_each_damaged_line_has_its_reason_and_each_good_one_its_messages(tasks, name):
    chosen = choose_format(name, {})
    for line in (line for lines in tasks[name].files.values() for line in lines):
        if line.meant:
            assert parse_line(line.text.strip(b" \t\r"), chosen) == list(line.meant)
        elif line.reason:
            with pytest.raises(BadSample, match=line.reason):
                parse_line(line.text.strip(b" \t\r"), chosen)


def config(cache: Path, on_error: str, files: dict[str, list[Path]]) -> DataConfig:
    tree = [{"name": name, "format": name, "train": list(map(str, paths))} for name, paths in files.items()]
    common = {"valid_fraction": 0.0, "sequence_length": 4096, "on_error": on_error, "cache_dir": str(cache)}
    return DataConfig.model_validate({"tasks": tree} | common)


def test_skip_leaves_out_and_lists_exactly_the_damaged_lines(tasks, tokenizer_path, tmp_path):
    files = {name: list(task.files) for name, task in tasks.items()}
    corpus = prepare(config(tmp_path, "skip", files), tokenizer_path, workers=1, progress=False)
    for name, task in tasks.items():
        found, data = corpus.accounting[name]["train"], corpus.splits["train"][corpus.tasks.index(name)]
        assert [(line.file, line.line) for line in found.skipped] == task.numbers(damaged=True)
        for line in found.skipped:
            assert re.match(task.files[Path(line.file)][line.line - 1].reason, line.reason), line
        good = task.numbers(damaged=False)
        assert [data.source(index) for index in range(len(data))] == [f"{file}:{number}" for file, number in good]
        assert found.used.samples == len(good) and found.read.samples == len(good) + len(found.skipped)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", FORMAT_FIELDS)
def test_stop_names_the_first_damaged_line(tasks, tokenizer_path, tmp_path, name, number):
    clean, damaged = list(tasks[name].files)[0], list(tasks[name].files)[number]
    with pytest.raises(UserError) as error:
        prepare(config(tmp_path, "stop", {name: [clean, damaged]}), tokenizer_path, workers=1, progress=False)
    first = next(index for index, line in enumerate(tasks[name].files[damaged], start=1) if line.reason)
    assert error.value.where == f"{damaged}:{first}"
    assert re.match(tasks[name].files[damaged][first - 1].reason, error.value.what) and '"skip"' in error.value.fix
