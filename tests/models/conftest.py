"""Runs with adapters of which none is zero."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from experts import experts_config, experts_model
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftcoder_coba.models import write_export


@pytest.fixture(scope="session")
def make_export(toy, tmp_path_factory):
    """(architecture, dtype, ...) -> a folder with the base model, and a run whose export is an adapter with random experts on it."""

    def make(architecture: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        base = tiny_model(architecture, dtype=dtype)
        base.config.use_cache = True  # as in models that people have
        base.save_pretrained(folder / "base")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(toy / "model" / name, folder / "base" / name)
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
        model = experts_model(experts_config(**changes), base=base)
        state = {name: model.get_parameter(name) for name in model.adapter_names()}
        write_export(model, state, AutoTokenizer.from_pretrained(folder / "base"), folder / "run" / "export")
        return folder

    return make


@pytest.fixture(scope="session")
def llama_export(make_export) -> Path:
    return make_export("llama")


@pytest.fixture(scope="session")
def plain_export(llama_export) -> Path:
    """A run with a plain LoRA adapter."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama_export / "base"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(llama_export / "plain" / "export")
    return llama_export / "plain"
