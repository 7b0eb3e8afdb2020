"""data_tools.inspect: what it shows is what is trained on, token by token."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers.convert_slow_tokenizer import bytes_to_unicode

import mftcoder_coba.data
from data_tools import inspect
from data_tools.token_text import TERMINAL, Piece, TokenReader, Writer
from mftcoder_coba.config import load_config
from mftcoder_coba.data import collate, load_tokenizer, prepare
from mftcoder_coba.errors import UserError
from mftcoder_coba.planning import training_schedule

ROOT = Path(__file__).resolve().parents[2]
IDS = re.compile(r"\[([\d ]+)\]")
LEGEND = (
    '"+ " learned, "  " context; ¦ between tokens; «special token»; ↵ line break; ⇥ tab; · blank at an end; ⟨n⟩ n tokens that are text only together'
)


@pytest.fixture
def show(monkeypatch, capsys):
    """Runs the command in this process -> what it printed."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(config: Path, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["inspect", "--config", str(config), *arguments])
        inspect.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def experiment(toy, tmp_path):
    """Writes an experiment of one task with the toy's tokenizer, the markers ? and !, and the given (prompt, answer) pairs."""

    def write(*samples: tuple[str, str]) -> Path:
        lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in samples]
        (tmp_path / "talk.jsonl").write_text("\n".join(lines), encoding="utf-8")
        tree = json.loads((toy / "toy.json").read_text(encoding="utf-8"))
        tree["model"]["path"] = str(toy / "model")
        task = {"name": "talk", "train": ["talk.jsonl"], "format": "prompt_answer"}
        markers = {"system": "", "user": "?", "assistant": "!"}
        tree["data"] |= {"tasks": [task], "valid_fraction": 0.0, "template": markers, "sequence_length": 4096}
        (tmp_path / "talk.json").write_text(json.dumps(tree), encoding="utf-8")
        return tmp_path / "talk.json"

    return write


@pytest.fixture(scope="module")
def tokenizer(toy):
    return load_tokenizer(str(toy / "model"))


@pytest.fixture(scope="module")
def reader(tokenizer) -> TokenReader:
    return TokenReader(tokenizer)


def of_bytes(tokenizer, content: bytes) -> list[int]:
    """One token for each byte: the toy's tokenizer has them all, under the letters of GPT-2's alphabet."""
    letters = bytes_to_unicode()
    return tokenizer.convert_tokens_to_ids([letters[byte] for byte in content])


def written(reader: TokenReader, tokens: list[int], learned: list[bool], **options) -> str:
    console = Console(color_system=None, theme=TERMINAL)
    with console.capture() as capture:
        Writer(console, coloured=False, **options).tokens(reader, np.array(tokens), np.array(learned))
    return capture.get()


def bare(lines: list[str]) -> str:
    return re.sub("[¦«»]", "", "".join(line[2:] for line in lines)).replace("↵", "\n")


def test_learned_lines_of_a_sample_are_its_answer_and_the_end_token(toy, show):
    blocks = show(toy / "toy.json", "--samples", "5").split("\n\n")
    assert blocks[0] == LEGEND and len(blocks) == 1 + 3 * 5
    for block in blocks[1:]:
        head, *lines = block.splitlines()
        file, line = head.split("; ")[1].rsplit(":", 1)
        prompt, answer = json.loads(Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1])["chat_rounds"]
        assert bare([line for line in lines if line.startswith("+ ")]) == answer["content"] + "</s>"
        assert bare([line for line in lines if line.startswith("  ")]) == f"<s>human\n{prompt['content']}\n<s>bot\n"


def test_plain_output_is_as_documented(experiment, show, tmp_path):
    config = experiment(("hi\tii", "yo\n  y | y "), ("i", "y"))
    assert show(config) == (
        f"{LEGEND}\n"
        "\n"
        f"talk/train sample 0: 20 tokens, 12 supervised (60.0 %); {tmp_path}/talk.jsonl:1\n"
        "  ?¦h¦i¦⇥¦i¦i¦↵¦\n"
        "  !\n"
        "+ y¦o¦↵¦\n"
        "+ ·¦·¦y¦ ¦|¦ ¦y¦·¦«</s>»\n"
        "\n"
        f"talk/train sample 1: 6 tokens, 2 supervised (33.3 %); {tmp_path}/talk.jsonl:2\n"
        "  ?¦i¦↵¦\n"
        "  !\n"
        "+ y¦«</s>»\n"
    )


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_row_shows_the_tokens_and_labels_of_the_batch_that_training_makes_of_it(toy, show, packing):
    override = f"data.packing={packing}"
    text = show(toy / "toy.json", "--row", "7", "--ids", "--set", override)
    config = load_config(toy / "toy.json", [override])
    corpus = prepare(config.data, config.model.path)
    [row] = training_schedule(config, corpus.splits["train"]).rows(7, 8)
    batch = collate([row], corpus.splits["train"], 3, corpus.pad_token_id, "token", max_length=96, isolate=packing != "none")
    lines = [line for line in text.splitlines() if line[:2] in ("+ ", "  ")]
    shown = [(int(number), line[0] == "+") for line in lines for ids in IDS.findall(line) for number in ids.split()]
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    assert [number for number, _ in shown] == ids[: batch.total_tokens]
    assert [learned for _, learned in shown[1:]] == [label != -100 for label in labels[: batch.total_tokens - 1]]
    assert f"{batch.total_tokens} tokens, {batch.tokens.sum()} supervised" in text
    assert f"{len(ids) - batch.total_tokens} of padding; {len(row)} document" in text


def test_borders_of_a_row_stand_where_documents_meet(toy, show):
    lines = show(toy / "toy.json", "--row", "0", "--samples", "4", "--ids").splitlines()
    config = load_config(toy / "toy.json")
    corpus = prepare(config.data, config.model.path)
    rows = training_schedule(config, corpus.splits["train"]).rows(0, 4)
    assert any(len({task for task, _ in row}) > 1 for row in rows) and max(map(len, rows)) > 1
    pattern = re.compile(r"── (\d+)/(\d+) (\w+) sample (\d+): (\d+) tokens.*; at (\d+)-(\d+), positions (\d+)-(\d+); (.*)")
    borders = [(place, match.groups()) for place, line in enumerate(lines) if (match := pattern.fullmatch(line))]
    documents = [(number, len(row), task, sample) for row in rows for number, (task, sample) in enumerate(row, 1)]
    assert len(borders) == len(documents)
    end = 0
    for (place, found), (number, count, task, sample) in zip(borders, documents, strict=True):
        data = corpus.splits["train"][task]
        start = 0 if number == 1 else end
        end = start + len(data.sample(sample)[0])
        numbers = [number, count, corpus.tasks[task], sample, end - start, start, end - 1, 0, end - start - 1, data.source(sample)]
        assert list(found) == list(map(str, numbers))
        below = next(index for index, line in enumerate([*lines[place + 1 :], ""], place + 1) if line[:2] not in ("+ ", "  "))
        assert sum(len(ids.split()) for line in lines[place:below] for ids in IDS.findall(line)) == end - start


def test_a_batch_that_is_not_what_the_samples_say_is_a_defect(toy, monkeypatch):
    def shifted(*arguments, **options):
        batch = collate(*arguments, **options)
        batch.labels[0] = batch.labels[0].roll(1)
        return batch

    config = load_config(toy / "toy.json")
    corpus = prepare(config.data, config.model.path)
    assert inspect.laid_down([(0, 3), (2, 1)], corpus, "train", config)
    monkeypatch.setattr(mftcoder_coba.data, "collate", shifted)
    with pytest.raises(RuntimeError, match="is not in the batch as it is stored"):
        inspect.laid_down([(0, 3), (2, 1)], corpus, "train", config)


def test_a_character_of_several_tokens_is_shown_once_with_their_number(tokenizer, reader):
    ids = of_bytes(tokenizer, "a🙂é".encode())
    assert reader.pieces(ids) == [Piece("a", (ids[0],)), Piece("🙂", tuple(ids[1:5])), Piece("é", tuple(ids[5:7]))]
    assert written(reader, ids, [False] + [True] * 6, ids=True) == (
        f"  a[{ids[0]}]\n+ 🙂⟨4⟩[{' '.join(map(str, ids[1:5]))}]¦é⟨2⟩[{ids[5]} {ids[6]}]\n"
    )


def test_broken_bytes_do_not_spoil_the_text_behind_them(tokenizer, reader):
    ids = of_bytes(tokenizer, b"\xf0\x9fab\xe4\xbd")
    assert [(piece.text, len(piece.ids)) for piece in reader.pieces(ids)] == [("\ufffd", 2), ("a", 1), ("b", 1), ("\ufffd", 2)]


def test_a_replacement_character_of_the_text_itself_is_a_character(tokenizer, reader):
    ids = of_bytes(tokenizer, "\ufffdx\ufffd".encode())
    assert [(piece.text, len(piece.ids)) for piece in reader.pieces(ids)] == [("\ufffd", 3), ("x", 1), ("\ufffd", 3)]


def test_no_character_crosses_from_context_to_what_is_learned(tokenizer, reader):
    ids = of_bytes(tokenizer, "🙂".encode())
    assert written(reader, ids, [False, False, True, True]).count("\ufffd") >= 2


@settings(deadline=None, max_examples=150)
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_pieces_are_all_tokens_and_all_text(tokenizer, reader, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = reader.pieces(ids)
    assert [number for piece in pieces for number in piece.ids] == ids
    assert "".join(piece.text for piece in pieces) == text


@pytest.mark.parametrize("text", ["Once upon a time", "two  blanks", "é 🙂🙂 你好 \ufffdx", "a\n\tb"])
def test_pieces_of_a_sentencepiece_tokenizer_are_its_text_behind_the_mark_of_the_first_word(shared, text):
    tokenizer = load_tokenizer(str(shared / "models" / "stories260k"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = TokenReader(tokenizer).pieces(ids)
    assert "".join(piece.text for piece in pieces) == f" {text}"
    assert tuple(number for piece in pieces for number in piece.ids) == tuple(ids)


def test_a_special_token_and_its_spelling_are_told_apart(tokenizer, reader):
    spelled = of_bytes(tokenizer, b"</s>")
    assert written(reader, [*spelled, tokenizer.eos_token_id], [True] * 5) == "+ <¦/¦s¦>¦«</s>»\n"


def test_nothing_of_a_text_commands_the_terminal(tokenizer, reader):
    text = written(reader, of_bytes(tokenizer, "\x1b[2J\x07\r\x00\u202e".encode()), [True] * 10, max_tokens=0)
    assert text == "+ \\x1b¦[¦2¦J¦\\x07¦\\r¦\\x00¦\\u202e⟨3⟩\n"


@pytest.mark.parametrize(("limit", "expected"), [
    (4, "+ 0¦1\n+ ... 5 more tokens ...\n+ 7¦8\n"),
    (5, "+ 0¦1¦2\n+ ... 4 more tokens ...\n+ 7¦8\n"),
    (8, "+ 0¦1¦2¦3\n+ ... 1 more token ...\n+ 5¦6¦7¦8\n"),
    (1, "+ 0\n+ ... 8 more tokens ...\n"),
    (9, "+ 0¦1¦2¦3¦4¦5¦6¦7¦8\n"),
    (0, "+ 0¦1¦2¦3¦4¦5¦6¦7¦8\n"),
])  # fmt: skip
def test_of_a_long_stretch_head_and_tail_are_shown(tokenizer, reader, limit, expected):
    assert written(reader, of_bytes(tokenizer, b"012345678"), [True] * 9, max_tokens=limit) == expected


def test_no_character_is_cut_to_shorten(tokenizer, reader):
    assert written(reader, of_bytes(tokenizer, "🙂a".encode()), [True] * 5, max_tokens=4) == "+ 🙂⟨4⟩¦a\n"
    assert written(reader, of_bytes(tokenizer, "🙂abc🙂".encode()), [True] * 11, max_tokens=8) == "+ 🙂⟨4⟩\n+ ... 3 more tokens ...\n+ 🙂⟨4⟩\n"


def test_a_very_long_sample_does_not_flood(experiment, show):
    text = show(experiment(("h", "i" * 4000)))
    assert "4,005 tokens, 4,001 supervised" in text
    assert "\n+ ... 3,401 more tokens ...\n" in text and text.count("i¦") == 299 + 299  # nothing stands behind the head's last one
    assert "more tokens" not in show(experiment(("h", "i" * 4000)), "--max-tokens", "0")


def test_colour_says_what_the_marks_say(experiment, show):
    config = experiment(("hi", "yo"))
    text = show(config, "--color", "always").split("\n\n")[1]
    grey, other_grey, green, other_green = "\x1b[38;5;246m", "\x1b[38;5;242m", "\x1b[1;38;5;28m", "\x1b[1;38;5;34m"
    off = "\x1b[0m"
    assert text.split("\n", 1)[1] == (
        f"{grey}?{off}{other_grey}h{off}{grey}i{off}{other_grey}↵{off}\n{grey}!{off}{green}y{off}{other_green}o{off}\x1b[1;7;38;5;28m</s>{off}\n"
    )


def test_no_color_and_never_and_a_pipe_are_plain(experiment, show, monkeypatch):
    monkeypatch.delenv("COLORTERM", raising=False)
    config = experiment(("hi", "yo"))
    piped = show(config)
    assert "\x1b" not in piped and show(config, "--color", "never") == piped
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich: as in a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;38;5;28my" in show(config)
    monkeypatch.setenv("TERM", "linux")  # 16 colours
    assert show(config) == piped
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    assert show(config) == piped


def test_the_page_holds_the_same_and_needs_nothing_else(experiment, show, tmp_path):
    config = experiment(("<b>hi</b>", "yo & o"))
    assert show(config, "--html", str(tmp_path / "page.html")) == f"page: {tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'name="viewport"' in page and "pre-wrap" in page and not re.search("<script|<link|src=|url\\(|https?:", page)
    styles = dict(re.findall(r"\.(r\d+) \{(.*?)\}", page))
    parts = [(styles[name], content) for name, content in re.findall(r'<span class="(r\d+)">(.*?)</span>', page.split("sample 0")[1])]
    assert "".join(content for style, content in parts if "#0b4a1b" in style or "#1c7a37" in style) == "yo &amp; o&lt;/s&gt;"
    assert "".join(content for style, content in parts if "#5a5a5a" in style) == "?&lt;b&gt;hi&lt;/b&gt;↵!"


def test_search_shows_the_first_samples_that_contain_the_text(experiment, show):
    config = experiment(("one", "x"), ("two 🙂", "y"), ("three", "z 🙂"), ("four", "🙂"))
    assert re.findall(r"talk/train sample (\d+)", show(config, "--search", "🙂")) == ["1", "2"]
    assert re.findall(r"talk/train sample (\d+)", show(config, "--search", "🙂", "--samples", "9")) == ["1", "2", "3"]


def test_a_sample_of_a_split_is_found_by_task_and_number(toy, show):
    text = show(toy / "toy.json", "--task", "upper", "--sample", "14", "--samples", "5", "--split", "valid")
    assert re.findall(r"(\S+) sample (\d+): .*?(\S+):(\d+)\n", text) == [
        ("upper/valid", number, str(toy / "data" / "upper" / "valid.jsonl"), str(int(number) + 1)) for number in ("14", "15")
    ]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--task", "uper"], 'no task uper: did you mean "upper"?'),
    (["--task", "upper", "--sample", "24"], "upper/train has 24 samples: 0 to 23"),
    (["--sample", "30"], "upper/train has 24 samples: 0 to 23"),
    (["--split", "test"], "the experiment has no samples in the split test"),
    (["--task", "count", "--split", "test"], "count has no samples in the split test"),
    (["--search", "nowhere"], "not found in the first 20,000 samples of count/train, reverse/train, upper/train"),
    (["--row", "400", "--set", "training.max_steps=50"], "there are 400 rows: 0 to 399"),
    (["--html", "missing/page.html"], "cannot be written: No such file or directory"),
])  # fmt: skip
def test_mistakes_are_explained(toy, show, arguments, message):
    with pytest.raises(UserError) as error:
        show(toy / "toy.json", *arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--samples", "0"], "0 is not a whole number from 1 on"),
    (["--sample", "-1"], "-1 is not a whole number from 0 on"),
    (["--sample", "two"], "two is not a whole number from 0 on"),
    (["--row", "1", "--sample", "1"], "not allowed with argument"),
    (["--row", "1", "--task", "count"], "without --task and --split"),
])  # fmt: skip
def test_wrong_options_are_explained(toy, show, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        show(toy / "toy.json", *arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command_prints_without_colour_into_a_pipe_and_exits_with_2_on_a_mistake(toy):
    done = run_python("-m", "data_tools.inspect", "--config", str(toy / "toy.json"), "--task", "count", "--sample", "1")
    assert done.returncode == 0 and done.stdout.startswith(LEGEND) and "\x1b" not in done.stdout
    wrong = run_python("-m", "data_tools.inspect", "--config", "missing.json")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: no such file") and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("tool", ["inspect", "common", "convert_mftcoder"])
def test_a_tool_run_as_a_file_says_how_to_run_it(tool):
    # The folder of the file comes first in sys.path, so `inspect` is found here instead of in the standard library.
    done = run_python(f"data_tools/{tool}.py")
    assert done.returncode == 2 and "python -m data_tools." in done.stderr and "Traceback" not in done.stderr


def test_looking_at_data_does_not_load_the_engine():
    done = run_python("-c", "import sys, data_tools.inspect, mftcoder_coba.data, mftcoder_coba.planning; print('deepspeed' in sys.modules)")
    assert done.stdout == "False\n"
    quick = run_python("-c", "import sys, data_tools.inspect; print('torch' in sys.modules)")
    assert quick.stdout == "False\n"
