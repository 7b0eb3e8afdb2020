"""Small random models of real architectures."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
ROUTED = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON, num_key_value_heads=2, tie_word_embeddings=False),
    "llama_tied": lambda: LlamaConfig(**COMMON, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**COMMON, num_key_value_heads=2),
    "phi": lambda: PhiConfig(**COMMON),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    # With experts behind a router.
    "mixtral": lambda: MixtralConfig(**COMMON, **ROUTED, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(**COMMON, **ROUTED, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24),
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, **ROUTED, num_experts=4, moe_intermediate_size=24, head_dim=8),
    "olmoe": lambda: OlmoeConfig(**COMMON, **ROUTED, num_experts=4),
    "granitemoe": lambda: GraniteMoeConfig(**COMMON, **ROUTED, num_local_experts=4),
}
ROUTED_NAMES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe")


def tiny_model(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model.config.use_cache = False
    return model
