"""Folders of small models and adapters that were fine-tuned, as it were, from one base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

UPDATE = 1e-3


@pytest.fixture(scope="session")
def write_models(toy, tmp_path_factory) -> Callable[..., Path]:
    """(architecture, models, dtype, update) -> a folder with base, model0, model1, ..., all with the toy's tokenizer."""

    def write(architecture: str = "llama", models: int = 3, dtype: torch.dtype = torch.float32, update: float = UPDATE) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        generator = torch.Generator().manual_seed(1)
        for number in range(models + 1):
            model = tiny_model(architecture, dtype=dtype)
            if number:
                for parameter in model.parameters():
                    parameter.data = (parameter.double() + update * torch.randn(parameter.shape, generator=generator)).to(dtype)
            path = folder / (f"model{number - 1}" if number else "base")
            model.config.use_cache = True  # as in models that people have
            model.save_pretrained(path)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(toy / "model" / name, path / name)
        return folder

    return write


@pytest.fixture(scope="session")
def llamas(write_models) -> Path:
    """Three models in float32. Not to be changed."""
    return write_models()


@pytest.fixture
def damaged(llamas, tmp_path) -> Path:
    """A copy of `llamas`, to be damaged."""
    return Path(shutil.copytree(llamas, tmp_path / "damaged"))


@pytest.fixture(scope="session")
def write_adapter() -> Callable[..., Path]:
    """(base, folder, seed, LoRA settings) -> the folder, with an adapter on the base of which nothing is zero."""

    def write(base: Path, folder: Path, seed: int = 0, **settings) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        for path in base.glob("tokenizer*"):
            shutil.copyfile(path, folder / path.name)
        return folder

    return write


@pytest.fixture(scope="session")
def adapters(llamas, write_adapter, tmp_path_factory) -> list[Path]:
    """Three adapters on the base of `llamas`. Not to be changed."""
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(llamas / "base", folder / f"adapter{number}", number) for number in range(3)]
