"""data_tools.scratch_model: a tokenizer that keeps code as it is, and a model that depends on its inputs alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_tools import scratch_model
from mftcoder_coba.errors import UserError

SOURCES = [Path(scratch_model.__file__), Path(json.__file__), Path(json.decoder.__file__)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real code as chat samples."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "code").mkdir()
    with (folder / "code" / "train.jsonl").open("w", encoding="utf-8") as file:
        for source in SOURCES:
            for part in source.read_text(encoding="utf-8").split("\n\n\n"):
                rounds = [{"role": "human", "content": "Write Python."}, {"role": "bot", "content": part}]
                file.write(json.dumps({"chat_rounds": rounds}) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "scratch"
    scratch_model.make(data, out, vocabulary=768, seed=3)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def test_python_code_comes_back_exactly(tokenizer):
    for source in SOURCES:
        text = source.read_text(encoding="utf-8").replace(scratch_model.SPACE_MARK, " ")
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8", exclude_characters=scratch_model.SPACE_MARK), max_size=40))
def test_any_text_comes_back_exactly_unless_it_spells_a_special_token(tokenizer, text):
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("text", ["    x = 1\n\n\n\ty  \n", " a", "  ", "\n", "\r\n", "", "é 你好 🙂"])
def test_spaces_and_newlines_are_kept(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_fast_tokenizer_agrees_with_sentencepiece(folder, tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for source in SOURCES:
        for line in source.read_text(encoding="utf-8").splitlines(keepends=True):
            if any(token in line for token in tokenizer.all_special_tokens):
                continue  # SentencePiece reads those as plain text
            assert tokenizer(line).input_ids == reference.encode(line)


def test_a_saved_tokenizer_loads_as_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    text = SOURCES[0].read_text(encoding="utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids


def test_special_tokens_are_defined_and_fit_the_model(folder, tokenizer):
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [1, 2, 3]
    assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == [1, 2, 3]
    assert len(tokenizer) == config.vocab_size == 768


def test_same_seed_same_folder_other_seed_other_weights(data, folder, tmp_path):
    scratch_model.make(data, tmp_path / "same", 768, seed=3)
    for file in folder.iterdir():
        assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes()
    scratch_model.make(data, tmp_path / "other", 768, seed=4)
    first, other = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "other"))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_the_folder_is_made_again_only_when_something_changed(data, tmp_path):
    out = tmp_path / "model"
    scratch_model.make(data, out, 768, seed=1)
    (out / "witness").touch()
    scratch_model.make(data, out, 768, seed=1)
    assert (out / "witness").exists()
    scratch_model.make(data, out, 768, seed=2)
    assert not (out / "witness").exists()


def test_a_folder_without_data_is_explained(tmp_path):
    with pytest.raises(UserError, match="no TASK/train.jsonl"):
        scratch_model.make(tmp_path, tmp_path / "out", 768, seed=0)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "train.jsonl").write_text('{"chat_rounds": []}\n{"other": 1}\n')
    with pytest.raises(UserError) as raised:
        scratch_model.make(tmp_path, tmp_path / "out", 768, seed=0)
    assert raised.value.where.endswith("train.jsonl:2")


def test_too_large_a_vocabulary_is_explained(data, tmp_path):
    with pytest.raises(UserError, match="cannot train"):
        scratch_model.make(data, tmp_path / "out", 30000, seed=0)
    assert not (tmp_path / "out").exists()
