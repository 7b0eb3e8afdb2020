"""A quantised base whose weights are mostly experts is refused: bitsandbytes leaves them whole."""

import importlib.util

import pytest
import torch
from tiny_models import tiny_model

from mftcoder_coba.config import ModelConfig
from mftcoder_coba.errors import UserError
from mftcoder_coba.models import load_model


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_would_stay_whole_are_refused(tmp_path, name):
    sizes = {"moe_intermediate_size": 128} if name == "qwen3_moe" else {}
    tiny_model(name, hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=2, **sizes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="experts"):
        load_model(ModelConfig(path=str(tmp_path), dtype="float32"), "sdpa", torch.device("cpu"))
