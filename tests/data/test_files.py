import datetime
import decimal
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from mftcoder_coba.data.files import find_files, read_lines
from mftcoder_coba.data.formats import BadSample, Message, choose_format, parse_line
from mftcoder_coba.errors import UserError

LINE = b'{"n": 1}'


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder, *patterns) -> list[str]:
    return [str(file.relative_to(folder)) for file in find_files([str(folder / pattern) for pattern in patterns], "here")]


def test_files_folders_and_globs_are_found_sorted_and_once(tmp_path):
    touch(tmp_path, "b/two.jsonl", "b/deep/one.jsonl.gz", "b/three.parquet", "b/readme.txt", "b/_SUCCESS", "a.jsonl")
    expected = ["b/deep/one.jsonl.gz", "b/three.parquet", "b/two.jsonl", "a.jsonl"]
    assert found(tmp_path, "b", "*.jsonl", "a.jsonl", "b/../a.jsonl", "b/*.parquet") == expected
    assert found(tmp_path, "**/*.jsonl*") == ["a.jsonl", "b/deep/one.jsonl.gz", "b/two.jsonl"]


def test_hidden_files_and_folders_are_no_data_unless_named(tmp_path):
    touch(tmp_path, "d/a.jsonl", "d/.b.jsonl", "d/.cache/c.jsonl")
    assert found(tmp_path, "d") == found(tmp_path, "d/*.jsonl") == found(tmp_path, "d/**") == ["d/a.jsonl"]
    assert found(tmp_path, "d/.b.jsonl", "d/.cache") == ["d/.b.jsonl", "d/.cache/c.jsonl"]


def test_folders_that_a_glob_matches_are_searched(tmp_path):
    touch(tmp_path, "x1/deep/a.jsonl", "x1/readme.txt", "x2.parquet", "x3/readme.txt")
    assert found(tmp_path, "x*") == ["x1/deep/a.jsonl", "x2.parquet"]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path):
    touch(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert found(tmp_path, "a[1].jsonl") == ["a[1].jsonl"]


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("missing.jsonl", "no such file or folder"),
        ("*.json", "no file matches"),
        ("empty", "the folder holds no .jsonl, .jsonl.gz, .parquet file"),
        ("readmes", "the folder holds no .jsonl"),
        ("other.txt", "none of .jsonl, .jsonl.gz, .parquet"),
        ("*.txt", "none of .jsonl"),
        ("x" * 300, "File name too long"),
        ("a\0.jsonl", "no such file or folder"),
    ],
)
def test_a_path_without_data_names_the_config_key(tmp_path, pattern, what):
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "other.txt", "readmes/readme.md", "readmes/.hidden.jsonl")
    with pytest.raises(UserError, match=what) as error:
        find_files([str(tmp_path / pattern)], "data.tasks[0].train (math)")
    assert error.value.where == "data.tasks[0].train (math)" and pattern.rpartition("*")[2] in error.value.what


def test_only_a_line_feed_ends_a_line_and_blank_lines_are_counted_but_no_samples(tmp_path):
    file = tmp_path / "a.jsonl"
    separators = '{"t": "\u2028\u2029\u0085\x0b\x0c\x1c"}'.encode()
    file.write_bytes(b"\xef\xbb\xbf" + LINE + b"\r\n\r\n \t \n" + separators + b"\n" + LINE + b"\r" + LINE + b"\n\n\x0c\n" + LINE)
    assert list(read_lines(file, [])) == [(1, LINE), (4, separators), (5, LINE + b"\r" + LINE), (7, b"\x0c"), (8, LINE)]


def test_a_byte_order_mark_is_taken_off_at_the_start_of_the_file_only_and_once(tmp_path):
    bom, file = b"\xef\xbb\xbf", tmp_path / "a.jsonl"
    file.write_bytes(bom + bom + LINE + b"\n" + bom + LINE)
    assert list(read_lines(file, [])) == [(1, bom + LINE), (2, bom + LINE)]
    file.write_bytes(bom + b"\n" + LINE)
    assert list(read_lines(file, [])) == [(2, LINE)]


def test_an_empty_file_has_no_samples(tmp_path):
    for name, content in (("a.jsonl", b""), ("a.jsonl.gz", gzip.compress(b"")), ("b.jsonl.gz", b"")):
        (tmp_path / name).write_bytes(content)
        assert list(read_lines(tmp_path / name, [])) == []


def test_gzip_of_several_members_is_read_whole(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(LINE + b"\n" + LINE[:3]) + gzip.compress(LINE[3:] + b"\n"))
    assert list(read_lines(file, [])) == [(1, LINE), (2, LINE)]


def test_a_damaged_gzip_names_the_file(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    packed = gzip.compress(b"".join(b'{"n": %d}\n' % n for n in range(2000)))
    file.write_bytes(packed)
    assert len(list(read_lines(file, []))) == 2000
    for damaged in (packed[: len(packed) // 2], b"not gzip", packed[:40] + b"\0\0\0\0" + packed[44:], packed[:-8] + b"\1" * 8):
        file.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            list(read_lines(file, []))
        assert error.value.where == str(file)


def write(path, columns, **options):
    parquet.write_table(pa.table(columns), path, **options)
    return path


def records(file, columns) -> list[dict]:
    lines = list(read_lines(file, columns))
    assert [number for number, _ in lines] == list(range(1, len(lines) + 1))
    return [json.loads(line) for _, line in lines]


def test_parquet_rows_come_as_json_with_the_wanted_columns_only(tmp_path):
    rounds = [[{"role": "human", "content": f"{n}\n\u2028 é 🙂"}, {"role": "bot", "content": None}] for n in range(700)]
    file = write(tmp_path / "a.parquet", {"id": range(700), "chat_rounds": rounds, "score": [0.5] * 700}, row_group_size=300)
    assert records(file, ["chat_rounds"]) == [{"chat_rounds": turns} for turns in rounds]
    assert records(file, ["score", "missing", "id"])[699] == {"score": 0.5, "id": 699}


def test_a_parquet_file_gives_the_messages_that_its_json_twin_gives(tmp_path):
    rows = [
        {"instruction": "i", "input": None, "output": "数 🙂", "history": [["u", "a"]]},
        {"instruction": "j", "input": "k", "output": "", "history": []},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    chosen = choose_format("alpaca", {})
    twins = [[parse_line(line, chosen) for _, line in read_lines(tmp_path / name, chosen.names.values())] for name in ("a.parquet", "a.jsonl")]
    assert twins[0] == twins[1]
    assert twins[0][0] == [Message("user", "u"), Message("assistant", "a"), Message("user", "i"), Message("assistant", "数 🙂")]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_text_is_text_however_arrow_stores_it(tmp_path, kind):
    file = write(tmp_path / "a.parquet", {"text": pa.array(["one", "zwei 🙂"]).cast(kind)})
    assert records(file, ["text"]) == [{"text": "one"}, {"text": "zwei 🙂"}]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([b"x"]),
        pa.array([datetime.datetime(2024, 1, 1)]),
        pa.array([1], pa.timestamp("ns")),
        pa.array([2**62], pa.timestamp("us")),
        pa.array([datetime.date(2024, 1, 1)]),
        pa.array([decimal.Decimal("1.5")]),
        pa.array([datetime.timedelta(1)]),
    ],
    ids=lambda values: str(values.type),
)
def test_what_json_cannot_hold_is_an_object_that_no_format_takes_for_text(tmp_path, values):
    file = write(tmp_path / "a.parquet", {"text": values})
    [(_, line)] = read_lines(file, ["text"])
    assert list(json.loads(line)["text"]) == ["parquet"]
    with pytest.raises(BadSample, match='"text" must be text, not an object'):
        parse_line(line, choose_format("text", {}))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (pa.array([1.0, float("nan")]), "NaN is no JSON value"),
        (pa.array(["good", None]), '"text" must be text, not null'),
        (pa.array([b"good", b"caf\xe9"]).view(pa.string()), "not UTF-8 text: byte 0xe9 at position 4"),
        (pa.array(["good", "\0"]), '"text" holds a null character'),
    ],
)
def test_a_bad_value_spoils_its_own_row_only(tmp_path, values, reason):
    file = write(tmp_path / "a.parquet", {"text": values})
    lines = dict(read_lines(file, ["text"]))
    assert set(lines) == {1, 2} and list(json.loads(lines[1])) == ["text"]
    with pytest.raises(BadSample, match=reason):
        parse_line(lines[2], choose_format("text", {}))


def test_a_parquet_file_without_any_needed_column_says_what_it_has(tmp_path):
    file = write(tmp_path / "a.parquet", {"question": ["q"], "solution": ["s"]})
    with pytest.raises(UserError, match="none of the columns 'prompt', 'answer'; it has 'question', 'solution'") as error:
        list(read_lines(file, ["prompt", "answer"]))
    assert error.value.where == str(file) and "fields" in error.value.fix


def test_a_column_with_a_dot_in_its_name_is_not_taken_for_a_nested_one(tmp_path):
    file = write(tmp_path / "a.parquet", {"a": [{"b": 1}], "a.b": ["flat"], "a.c": ["other"]})
    assert records(file, ["a.b"]) == [{"a.b": "flat"}]
    assert records(file, ["a"]) == [{"a": {"b": 1}}]


def test_two_columns_of_one_name_are_refused(tmp_path):
    parquet.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two columns of the name 'text'") as error:
        list(read_lines(tmp_path / "a.parquet", ["text"]))
    assert error.value.where == str(tmp_path / "a.parquet")


def test_a_parquet_file_without_rows_has_no_samples(tmp_path):
    assert records(write(tmp_path / "a.parquet", {"text": pa.array([], pa.string())}), ["text"]) == []


def test_a_damaged_parquet_file_names_the_file(tmp_path):
    file = write(tmp_path / "a.parquet", {"text": [f"some text {n * 7919}" for n in range(5000)]}, compression="zstd", write_page_checksum=True)
    good = file.read_bytes()
    middle = len(good) // 4
    damages = {
        "empty": b"",
        "no Parquet": b'{"text": "x"}\n' * 100,
        "truncated": good[: len(good) // 2],
        "no footer": good[:-8],
        "a page": good[:middle] + bytes(byte ^ 0xFF for byte in good[middle : middle + 64]) + good[middle + 64 :],
        "a footer": good[:-40] + b"\xff" * 30 + good[-10:],
    }
    for name, damaged in damages.items():
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read as Parquet after row") as error:
            list(read_lines(file, ["text"]))
        assert error.value.where == str(file), name
    file.unlink()
    with pytest.raises(UserError):
        list(read_lines(file, ["text"]))
