"""Which layers get experts, and what else of the base model changes: nothing."""

import re

import pytest
import torch
from experts import TASKS, assert_near, experts_config, experts_model, plain_lora, randomise, token_ids
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from mftcoder_coba.errors import UserError
from mftcoder_coba.models import add_adapter
from mftcoder_coba.models.cgc_lora.layer import ExpertsLinear
from mftcoder_coba.objective import MultiTaskObjective

ARCHITECTURES = ["llama", "llama_tied", "qwen2", "phi", "gpt_neox"]
IDS = token_ids()
PATTERN = r".*\.1\..*(proj|fc1|fc2|dense|query_key_value)"
GROUPS_WITH_DOTS = ["a", "a:b/c", "a:b", "a/b", "a/b:c"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "up_proj", "dense", "query_key_value"], r".*\.1\..*(proj|fc1|fc2|dense|query_key_value)"]
)
def test_the_same_layers_are_adapted_as_by_pefts_lora(architecture, targets):
    model = add_adapter(tiny_model(architecture), experts_config(target_modules=targets), TASKS)
    plain = get_peft_model(tiny_model(architecture), LoraConfig(r=1, target_modules=targets, task_type="CAUSAL_LM")).get_base_model()
    expected = [name for name, module in plain.named_modules() if isinstance(module, BaseTunerLayer)]
    assert model.layer_names == expected and expected
    assert {name for name, module in model.base_model.named_modules() if isinstance(module, ExpertsLinear)} == set(expected)
    if targets == PATTERN:
        assert all(re.fullmatch(PATTERN, name) for name in expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_base_model_keeps_nothing_of_peft(architecture):
    base, untouched = tiny_model(architecture), tiny_model(architecture)
    model = add_adapter(base, experts_config(), TASKS)
    assert model.get_base_model() is base
    assert set(vars(base)) == set(vars(untouched)) and not hasattr(base, "peft_config")
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    own = set(model.adapter_names())
    rest = {name.removeprefix("base_model.").replace(".base_layer", ""): value for name, value in model.state_dict().items() if name not in own}
    assert rest.keys() == untouched.state_dict().keys()
    assert all(torch.equal(value, rest[name]) for name, value in untouched.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in own), name
        assert not re.search("lora_|default", name)


def test_names_with_dots_stay_apart():
    clusters = {"a": ["b.c", "b"], "a.b": ["c"]}
    model = experts_model(experts_config(clusters), ["b.c", "b", "c"])
    layer = model.base_model.get_submodule(model.layer_names[0])
    assert {name for name, _ in layer.named_parameters(recurse=False)} == {f"{kind}:{group}" for kind in "AB" for group in GROUPS_WITH_DOTS}
    assert len(set(model.adapter_names())) == len(model.adapter_names()) == 14 * 2 * 5 + 3 * 2
    parts = [model.own_parameters(task) for task in model.structure.tasks]
    assert len({id(parameter) for part in parts for parameter in part}) == sum(map(len, parts)) == 3 * (14 * 2 + 2)
    for task in model.structure.tasks:
        assert_near(model(IDS, task=task).logits, plain_lora(model, task)(IDS).logits, 5e-6)


@pytest.mark.parametrize(
    "targets, words",
    [
        (["q_proj", "embed_tokens"], ["model.embed_tokens is Embedding", "experts are for linear layers"]),
        (["q_proj", "kernel"], ["model.layers.0.mlp.kernel is Conv1d", "experts are for linear layers"]),
        (["nothing"], ["not found", "linear layers of this model:", "q_proj"]),
        (r".*\.1\.mlp\..*", ["SiLUActivation() is not supported", "linear layers of this model: down_proj, gate_proj, k_proj"]),
        ("nothing", ["not found", "q_proj"]),
        (["self_attn"], ["LlamaAttention is not supported", "q_proj"]),
        ("(q_proj", ["no regular expression", "q_proj"]),
        ("*", ["no regular expression"]),
        ("", ["target_modules"]),
    ],
)
def test_what_cannot_be_adapted_is_told(targets, words):
    base = tiny_model("llama")
    base.model.layers[0].mlp.kernel = nn.Conv1d(32, 32, 3)
    with pytest.raises(UserError) as error:
        add_adapter(base, experts_config(target_modules=targets), TASKS)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert error.value.where == f"adapter.target_modules = {targets!r}"


@pytest.mark.parametrize("architecture, layer", [("llama", "lm_head"), ("gpt_neox", "embed_out")])
def test_experts_on_the_output_layer_are_refused(architecture, layer):
    if not hasattr(tiny_model(architecture), layer):
        layer = "lm_head"
    with pytest.raises(UserError, match="output layer") as error:
        MultiTaskObjective(add_adapter(tiny_model(architecture), experts_config(target_modules=[layer]), TASKS), 3)
    assert "adapter.target_modules" in error.value.fix


def test_layers_that_hold_their_weight_transposed_are_adapted_too():
    """GPT-2 has no nn.Linear but its output layer."""
    base = gpt2()
    expected = base(IDS).logits
    model = add_adapter(base, experts_config({"all": ["t"]}, common_experts=1, task_experts=0, alpha=32.0), ["t"])
    assert [name.partition(".h.0.")[2] for name in model.layer_names] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert torch.equal(model(IDS, task="t").logits, expected)
    randomise(model)
    plain = get_peft_model(gpt2(), LoraConfig(r=16, lora_alpha=32.0, target_modules=model.layer_names, fan_in_fan_out=True, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name in model.layer_names:
            layer = plain.get_base_model().get_submodule(name)
            for part, kind in ((layer.lora_A, "A"), (layer.lora_B, "B")):
                part["default"].weight.copy_(model.get_parameter(f"base_model.{name}.{kind}:all"))
    assert_near(model(IDS, task="t").logits, plain(IDS).logits)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_layers_weight_and_bias_are_those_of_its_base_layer():
    """Some architectures ask a linear layer for its dtype."""
    layer = experts_model(architecture="qwen2").base_model.model.layers[0].self_attn.q_proj
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    assert not {"weight", "bias"} & {name for name, _ in layer.named_parameters(recurse=False)}
