"""QLoRA: a 4-bit base model, compared with an ordinary model that holds the same (dequantised) weights."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mftcoder_coba.config import LoraConfig, ModelConfig
from mftcoder_coba.errors import UserError
from mftcoder_coba.models import adapter_names, add_adapter, check_adapter, count_parameters, load_model

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes")
CPU = torch.device("cpu")
QLORA = LoraConfig(kind="qlora", rank=4, alpha=8.0, dropout=0.0)
IDS = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["llama_tied", "llama", "qwen2", "gpt_neox"])
def folder(request, tmp_path_factory) -> Path:
    """A model folder; qwen2 and gpt_neox have biases, llama and gpt_neox an output layer of their own."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    return folder


def load(folder: Path, quantise: bool = True, dtype: str = "float32", checkpointing: bool = False) -> nn.Module:
    config = ModelConfig(path=str(folder), dtype=dtype, gradient_checkpointing=checkpointing)
    return load_model(config, "sdpa", CPU if quantise else None)


def with_adapter(model: nn.Module) -> nn.Module:
    """With LoRA matrices of which none is zero, the same at each call."""
    torch.manual_seed(1)
    model = add_adapter(model, QLORA).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def four_bit_layers(model: nn.Module) -> dict[str, nn.Module]:
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def dequantised(layer: nn.Module) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def reference(folder: Path) -> nn.Module:
    """An ordinary model whose linear layers hold the dequantised weights."""
    model, quantised = load(folder, quantise=False), four_bit_layers(load(folder))
    with torch.no_grad():
        for name, layer in quantised.items():
            model.get_submodule(name).weight.copy_(dequantised(layer))
    return model


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_are_nf4_with_double_quantisation_and_all_else_keeps_the_dtype(folder, dtype):
    model, plain = load(folder, dtype=dtype), load(folder, quantise=False, dtype=dtype)
    layers = four_bit_layers(model)
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and module is not plain.get_output_embeddings()}
    assert set(layers) == linear
    for layer in layers.values():
        assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == ("nf4", True)
        assert layer.weight.nbytes * 2 == layer.in_features * layer.out_features
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    others = {name for name, _ in plain.named_parameters()} - {f"{name}.weight" for name in layers}
    assert all(torch.equal(model.get_parameter(name), plain.get_parameter(name)) for name in others)


@needs_bitsandbytes
def test_a_weight_is_off_by_at_most_half_the_widest_gap_of_nf4(folder):
    plain = load(folder, quantise=False)
    for name, layer in four_bit_layers(load(folder)).items():
        blocks = plain.get_submodule(name).weight.detach().reshape(-1, 64)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        # NF4 has no value between -1 and -0.6962; double quantisation moves the largest value itself by a little.
        assert ((dequantised(layer).reshape(-1, 64) - blocks).abs() <= (0.1519 + 0.01) * largest).all()


@needs_bitsandbytes
def test_logits_are_those_of_the_dequantised_weights_and_near_the_full_ones_also_after_a_validation(folder):
    model, same, full = (with_adapter(made) for made in (load(folder), reference(folder), load(folder, quantise=False)))
    with torch.no_grad():
        expected, unquantised = same(input_ids=IDS).logits, full(input_ids=IDS).logits
        validating = model.eval()(input_ids=IDS).logits
    training = model.train()(input_ids=IDS).logits
    torch.testing.assert_close(validating, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(training, expected, rtol=0, atol=1e-5)
    distance = (training - unquantised).norm() / unquantised.norm()
    assert 1e-4 < distance < 0.15


@needs_bitsandbytes
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_dequantised_weights_and_reach_the_adapter_only(folder, checkpointing):
    loss, gradients = loss_and_gradients(with_adapter(load(folder, checkpointing=checkpointing)))
    expected_loss, expected = loss_and_gradients(with_adapter(reference(folder)))
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-5)
    assert gradients.keys() == expected.keys() and all("lora_" in name for name in gradients)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


@needs_bitsandbytes
def test_a_packed_parameter_counts_as_all_its_numbers(folder):
    assert count_parameters(with_adapter(load(folder))) == count_parameters(with_adapter(load(folder, quantise=False)))


@needs_bitsandbytes
@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_under_zero_3_the_base_is_partitioned_and_no_bit_of_it_changes_while_the_loss_falls(folder, tmp_path):
    """Two ranks, bfloat16, checkpointing, three steps with a validation between them."""
    run_ranks(__file__, "train_partitioned", 2, str(folder), str(tmp_path / "out.pt"))
    result = torch.load(tmp_path / "out.pt")
    expected = {name: layer.weight.data for name, layer in four_bit_layers(load(folder, dtype="bfloat16")).items()}
    for when in ("before", "after"):
        assert result[when].keys() == expected.keys()
        assert all(torch.equal(result[when][name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)
    assert result["held"] == sum(weight.numel() for weight in expected.values()) // 2
    assert result["losses"][-1] < result["losses"][0]
    assert all("lora_" in name for name in result["trained"])


def train_partitioned(folder: str, out: str) -> None:
    """One rank of the test above."""
    import deepspeed
    from engine.workers import TASKS, configured, micro_batches

    from mftcoder_coba.balancing import create
    from mftcoder_coba.engine import Engine, Processes, build_deepspeed_config
    from mftcoder_coba.objective import MultiTaskObjective
    from mftcoder_coba.training.step import train_step

    processes = Processes()
    config = configured(3, 2, dtype="bfloat16", adapter=QLORA.model_dump())
    model = with_adapter(load(Path(folder), dtype="bfloat16", checkpointing=True))
    layers = {name.removeprefix("base_model.model.").removesuffix(".base_layer"): layer for name, layer in four_bit_layers(model).items()}
    objective = MultiTaskObjective(model, len(TASKS))
    external = [(objective.output_loss, objective.output_loss.external_parameters)]
    engine = Engine(objective, build_deepspeed_config(config, processes.world_size), config.training, processes, external)

    def gathered() -> dict[str, torch.Tensor]:
        result = {}
        for name, layer in layers.items():
            with deepspeed.zero.GatheredParameters([layer.weight]):
                result[name] = layer.weight.detach().clone().as_subclass(torch.Tensor)
        return result

    before = gathered()
    held = sum(layer.weight.ds_tensor.numel() for layer in layers.values())
    batches, losses = micro_batches(config, engine), []
    for _ in range(3):
        losses.append(train_step(engine, create(config.balancer, TASKS, 1), batches, 1e-2).loss)
        with engine.evaluating():
            objective.check_output_layer(IDS[:1], torch.arange(IDS.shape[1])[None])
    if processes.is_main:
        trained = list(engine.gather_state(model, adapter_names(model)))
        torch.save({"before": before, "after": gathered(), "held": held, "losses": losses, "trained": trained}, out)
    else:
        engine.gather_state(model, adapter_names(model)), gathered()
    engine.close()
    processes.barrier()
    processes.close()


@pytest.fixture(scope="module")
def wide_model(toy) -> Path:
    """The toy's model with layers of width 64: 4-bit weights come in blocks of 64."""
    config = AutoConfig.from_pretrained(toy / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(toy / "wide")
    AutoTokenizer.from_pretrained(toy / "model").save_pretrained(toy / "wide")
    return toy / "wide"


@pytest.fixture(scope="module")
def runs(toy, wide_model, command_line) -> list[Path]:
    """The same run on one process without ZeRO, and on two with ZeRO-3 and checkpointing of activations."""
    folders = []
    for processes, stage, checkpointing in ((1, 0, "false"), (2, 3, "true")):
        name = f"qlora{processes}"
        changes = [
            f"run.name={name}",
            f"model.path={wide_model}",
            "adapter=" + json.dumps({"kind": "qlora", "rank": 8, "dropout": 0.0}),
            "deepspeed=" + json.dumps({"zero_optimization": {"stage": stage}}),
            f"model.gradient_checkpointing={checkpointing}",
            "training.max_steps=4",
        ]
        result = command_line(processes, "train", "--config", str(toy / "toy.json"), *(part for change in changes for part in ("--set", change)))
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        folders.append(toy / "runs" / name)
    return folders


@needs_bitsandbytes
def test_one_process_and_two_with_zero_3_train_the_same_adapter_and_every_task_learns(runs):
    first, second = (load_file(run / "export" / "adapter_model.safetensors") for run in runs)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-4)
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        last = [line for line in lines if line["kind"] == "validation"][-1]
        assert all(task["ratio"] < 1.0 for task in last["tasks"].values()), last


@needs_bitsandbytes
def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_four_bit_layers(runs):
    for run in runs:
        for file in run.glob("checkpoints/*/engine/*model_states.pt"):
            saved = torch.load(file, weights_only=False)["module"]
            assert any("lora_" in name for name in saved)
            assert not any("base_layer" in name for name in saved)


@needs_bitsandbytes
def test_the_exported_adapter_is_an_ordinary_one_for_the_unquantised_model(runs, wide_model):
    for run in runs:
        assert "bnb" not in (run / "export" / "adapter_config.json").read_text(encoding="utf-8")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(wide_model), run / "export")
        assert not four_bit_layers(model)
        saved = load_file(run / "export" / "adapter_model.safetensors")
        loaded = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items() if "lora_" in name}
        assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
        with torch.no_grad():
            adapted = model(input_ids=IDS).logits
            with model.disable_adapter():
                assert (model(input_ids=IDS).logits - adapted).abs().max() > 1e-3


def test_a_missing_package_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError) as raised:
        check_adapter(QLORA, [], {"zero_optimization": {"stage": 2}})
    assert (raised.value.where, raised.value.fix) == ('adapter.kind = "qlora"', "pip install bitsandbytes")
    check_adapter(None, [], {})
    check_adapter(QLORA.model_copy(update={"kind": "lora"}), [], {})


@needs_bitsandbytes
@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_nontrainable_weights", "stage3_use_all_reduce_for_fetch_params"])
def test_zero_3_may_not_compute_with_packed_weights_on_their_way(key):
    with pytest.raises(UserError, match="packed bits") as raised:
        check_adapter(QLORA, [], {"zero_optimization": {"stage": 3, key: True}})
    assert raised.value.where == f"deepspeed.zero_optimization.{key}"
    check_adapter(QLORA, [], {"zero_optimization": {"stage": 3, key: False}})
    check_adapter(QLORA.model_copy(update={"kind": "lora"}), [], {"zero_optimization": {"stage": 3, key: True}})


@needs_bitsandbytes
def test_a_layer_that_the_library_gets_wrong_on_this_machine_is_refused(tmp_path):
    """Width 32 is wrong on CPUs with AVX-512 in some releases: refused, or as near to the full weights as any other."""
    tiny_model("llama", hidden_size=32, intermediate_size=96).save_pretrained(tmp_path)
    try:
        layers = four_bit_layers(load(tmp_path))
    except UserError as error:
        assert "wrong 4-bit weights" in error.what and "lora" in error.fix
        return
    plain = load(tmp_path, quantise=False)
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight
        assert (dequantised(layer) - weight).norm() < 0.12 * weight.norm()


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
@pytest.mark.parametrize("quantise", [False, True])
def test_a_model_that_is_quantised_already_is_refused(folder, tmp_path, quantise):
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tree["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(UserError, match=r"quantised already \(method: gptq\)"):
        load(tmp_path, quantise=quantise)
