import gzip
import json
import random

import pytest

from mftcoder_coba.data.formats import FORMATS, BadSample, Message, find_files, parse_line, read_lines
from mftcoder_coba.errors import UserError

GOOD = {"chat_rounds": [{"role": "system", "content": "s"}, {"role": "human", "content": "h"}, {"role": "bot", "content": "b"}]}


def line(record) -> bytes:
    return json.dumps(record).encode()


def rounds(*roles, key="chat_rounds") -> bytes:
    return line({key: [{"role": role, "content": "x"} for role in roles]})


def test_mftcoder_roles_become_system_user_assistant():
    assert parse_line(line(GOOD), "mftcoder") == [Message("system", "s"), Message("user", "h"), Message("assistant", "b")]
    assert [m.role for m in parse_line(rounds("user", "assistant", "human", "bot"), "mftcoder")] == ["user", "assistant"] * 2


def test_messages_knows_the_three_roles_only():
    assert [m.role for m in parse_line(rounds("system", "user", "assistant", key="messages"), "messages")] == ["system", "user", "assistant"]
    with pytest.raises(BadSample, match=r"messages\[0\]\.role is 'human'"):
        parse_line(rounds("human", "assistant", key="messages"), "messages")


@pytest.mark.parametrize(
    "roles",
    [(), ("human",), ("bot",), ("human", "human", "bot"), ("human", "system", "bot"), ("human", "bot", "human"), ("system",), ("system", "bot")],
)
def test_turns_that_do_not_alternate_from_user_to_assistant_are_refused(roles):
    with pytest.raises(BadSample):
        parse_line(rounds(*roles), "mftcoder")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"chat_rounds": [', "not JSON"),
        (b'{"chat_rounds": NaN}', "NaN is no JSON value"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not usable JSON"),
        (b"[1]", "not a list"),
        (b"null", "not null"),
        (b"\xff\xfe", "not UTF-8 text: byte 0xff at position 1"),
        (b"{}", 'no key "chat_rounds"'),
        (b'{"\\ud800": 1}', 'no key "chat_rounds"'),
        (b'{"chat_rounds": {}}', "not an empty object"),
        (b'{"chat_rounds": [[[1]]]}', r"chat_rounds\[0\] must be an object"),
        (b'{"chat_rounds": [{"role": "human"}]}', r'chat_rounds\[0\] has no key "content"'),
        (b'{"chat_rounds": [{"role": 1, "content": "x"}]}', r"chat_rounds\[0\]\.role must be text, not a number"),
        (b'{"chat_rounds": [{"role": "human", "content": ["x"]}]}', r"content must be text, not a list"),
        (b'{"chat_rounds": [{"role": "humann", "content": "x"}]}', 'did you mean "human"'),
        (b'{"chat_rounds": [{"role": "human", "content": "\\ud800"}]}', "lone surrogate"),
        (b'{"chat_rounds": [{"role": "human", "content": "a\\u0000"}]}', "null character"),
        (b'{"chat_rounds": [{"role": "human", "content": "a\0"}]}', "not JSON"),
    ],
)
def test_a_bad_line_says_what_is_wrong(text, reason):
    with pytest.raises(BadSample, match=reason):
        parse_line(text, "mftcoder")


def test_randomly_damaged_lines_never_raise_anything_else():
    rng, good = random.Random(0), line(GOOD)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(damaged))
            damaged[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        for name in FORMATS:
            try:
                parse_line(bytes(damaged), name)
            except BadSample:
                refused += 1
    assert refused > 3000


def test_bom_carriage_returns_and_blank_lines_are_no_samples_and_no_errors(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line(GOOD) + b"\r\n\r\n  \n" + line(GOOD))
    assert list(read_lines(file)) == [(1, line(GOOD)), (4, line(GOOD))]


def test_gzip_is_read_and_a_damaged_one_names_the_file(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    packed = gzip.compress(b"".join(line({"n": n}) + b"\n" for n in range(2000)))
    file.write_bytes(packed)
    assert len(list(read_lines(file))) == 2000
    for damaged in (packed[: len(packed) // 2], b"not gzip", packed[:40] + b"\0\0\0\0" + packed[44:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            list(read_lines(file))
        assert error.value.where == str(file)


def test_files_folders_and_globs_are_found_sorted_and_once(tmp_path):
    for name in ("b/two.jsonl", "b/deep/one.jsonl.gz", "b/readme.txt", "a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([str(tmp_path / "b"), str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl")], "here")
    assert [str(file.relative_to(tmp_path)) for file in found] == ["b/deep/one.jsonl.gz", "b/two.jsonl", "a.jsonl"]


@pytest.mark.parametrize("pattern", ["missing.jsonl", "*.jsonl", "empty", "other.txt"])
def test_a_path_without_jsonl_names_the_config_key(tmp_path, pattern):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.txt").touch()
    with pytest.raises(UserError) as error:
        find_files([str(tmp_path / pattern)], "data.tasks[0].train (math)")
    assert error.value.where == "data.tasks[0].train (math)" and pattern in error.value.what
