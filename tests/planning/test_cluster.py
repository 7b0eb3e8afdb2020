import json

import plan_workers
import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from tiny_models import CONFIGS
from transformers import AutoConfig, AutoModelForCausalLM, OlmoeConfig

from mftcoder_coba.config import load_config, validate
from mftcoder_coba.errors import UserError
from mftcoder_coba.planning.cluster import Cluster, plan_cluster, write_suggestion
from mftcoder_coba.planning.memory import Sharing, states_of, suggested_zero

CLUSTER = Cluster(2, 8, 80.0, 312.0, 0.4, 200.0)
CGC = {"kind": "cgc_lora", "rank": 8, "clusters": {"one": ["a", "b"]}, "common_experts": 1, "task_experts": 1}


@pytest.fixture
def architecture(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(plan_workers.STORIES))
    return file


def tree(**changes):
    adapter = changes.pop("adapter", None)
    base = plan_workers.experiment("bfloat16", 2, 2, False, adapter, 64, "best_fit")
    for path, value in changes.items():
        section, key = path.split("__")
        base[section] = {**base.get(section, {}), key: value}
    return base


def planned(architecture, cluster=CLUSTER, **changes):
    return plan_cluster(validate(tree(**changes), "plan"), cluster, architecture)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "phi", "gpt_neox", "gpt2", "olmoe"])
def test_parameters_and_flops_of_an_architecture_are_those_of_the_real_model(name, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OlmoeConfig(**sizes, num_experts=4, num_experts_per_tok=2) if name == "olmoe" else CONFIGS[name]()
    config.save_pretrained(tmp_path)
    plan, model = planned(tmp_path / "config.json"), AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert plan.size.total == plan.size.trainable == model.num_parameters()
    # Two products of each matrix but the look-up tables forward, four backward; and the fused attention's two, and five.
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    output = model.get_output_embeddings().weight
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tables and p is not output) + output.numel()
    if name == "olmoe":  # two of four experts, of three matrices, work on a token in each of two layers
        matrices += 2 * 2 * 3 * 32 * 48
    assert plan.row.training_flops == 6 * 64 * matrices + 2 * 3.5 * 4 * 64 * 64 * 32
    assert plan.row.output_flops == 2 * 64 * output.numel()


@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 4}, CGC])
def test_an_adapter_alone_is_trained(adapter, architecture):
    plan = planned(architecture, adapter=adapter)
    assert 0 < plan.size.trainable < 0.2 * plan.size.total
    full = planned(architecture)
    assert plan.memory.states.optimizer < 0.2 * full.memory.states.optimizer
    # Frozen weights have no gradients to compute.
    assert plan.step_flops < 0.9 * full.step_flops


def test_4_bit_weights_take_a_quarter_and_their_scales(architecture):
    lora, qlora = (planned(architecture, adapter={"kind": kind, "rank": 4}) for kind in ("lora", "qlora"))
    assert qlora.size.total == lora.size.total
    saved = lora.size.frozen_bytes - qlora.size.frozen_bytes
    assert saved == pytest.approx(qlora.size.quantised * (2 - 0.5 - 1 / 64 - 1 / 4096), abs=1)
    assert qlora.size.quantised == 5 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 172)


@pytest.mark.parametrize("gpus", [8, 16])
def test_states_are_those_of_deepspeeds_own_estimators(gpus, architecture):
    size = planned(architecture).size
    second = states_of(size, Sharing.of({"stage": 2}, gpus, 2))
    assert second.at_step == pytest.approx(estimate_zero2_model_states_mem_needs(size.total, gpus, 1, cpu_offload=False)[1], abs=2)
    third = states_of(size, Sharing.of({"stage": 3}, gpus, 2))
    theirs = estimate_zero3_model_states_mem_needs(size.total, size.largest, gpus, 1, cpu_offload=False)[1] - 4 * size.largest
    # It leaves out the weights themselves: 18 P / n are gradients in both dtypes, master and moments. A run holds 20 (test_against_runs).
    assert third.at_step == pytest.approx(theirs + 2 * size.total / gpus, abs=2)


def test_checkpointing_keeps_less_and_computes_a_forward_pass_more(architecture):
    without, with_it = planned(architecture), planned(architecture, model__gradient_checkpointing=True)
    assert with_it.memory.activations < 0.4 * without.memory.activations
    assert with_it.other_activations == without.memory.activations and without.other_activations == with_it.memory.activations
    more = with_it.row.training_flops - without.row.training_flops
    # torch stops as soon as it has what the backward pass wants, which the last product of a layer is not.
    assert 0.7 * without.row.forward_flops < more < without.row.forward_flops


@pytest.mark.parametrize(
    "balancer, passes, reductions",
    [
        ({"kind": "uniform"}, 0, 0),
        ({"kind": "coba"}, 1, 1),
        ({"kind": "coba", "update_interval": 5}, 1, 1),
        ({"kind": "famo"}, 2, 1),
        ({"kind": "famo", "signal": "validation"}, 2, 2),
        ({"kind": "gradnorm"}, 0, 0),
        ({"kind": "metaweighting", "gradients": "all"}, 4, 1),
    ],
)
def test_a_balancer_costs_what_it_declares(balancer, passes, reductions, architecture):
    base = tree()
    plan = plan_cluster(validate(base | {"balancer": balancer}, "plan"), CLUSTER, architecture)
    assert (plan.cost.forward_passes, plan.cost.loss_reductions) == (passes, reductions)
    assert (plan.cost.scattered_numbers > 0) == (balancer["kind"] in ("gradnorm", "metaweighting"))
    if balancer["kind"] == "coba":  # one row forward beside four rows forward and backward
        forward = plan.row.forward_flops + plan.row.output_flops
        assert plan.balancer_share == pytest.approx(forward / (4 * plan.row.training_flops) / balancer.get("update_interval", 1))


def test_traffic_grows_as_the_rings_do(architecture):
    plan = planned(architecture, training__global_batch_rows=4096)
    weights = 2 * plan.size.trainable
    assert plan.traffic[8].gradients == pytest.approx(2 * 7 / 8 * weights * 4096 / (2 * 8))
    assert plan.traffic[1024].counts == pytest.approx(1023 / 1024 * 2 * 8 * (2 * 2 + 1))
    assert plan.traffic[1024].sums == pytest.approx(1023 / 1024 * 2 * 8 * (2 + 1024))


def test_the_smallest_stage_and_the_largest_micro_batch_that_fit(architecture, tmp_path):
    roomy = planned(architecture)
    assert roomy.fit[0]["stage"] == 0 and roomy.micro_rows == 4
    gib = (roomy.memory.activations + roomy.memory.loss + 10 * roomy.size.total) / 2**30 / 0.92
    tight = planned(architecture, Cluster(2, 8, gib, 312.0, 0.4, 200.0))
    assert tight.fit[0]["stage"] > 0 and tight.fit[1].peak <= gib * 0.92 * 2**30 < roomy.fit[1].peak
    nothing = planned(architecture, Cluster(2, 8, 1e-6, 312.0, 0.4, 200.0))
    assert nothing.fit is None and nothing.micro_rows is None
    with pytest.raises(UserError, match="no ZeRO stage fits"):
        write_suggestion(nothing, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(
    "rung", [{"stage": 0}, {"stage": 2}, {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}]
)
def test_what_is_suggested_is_a_deepspeed_file_that_a_config_names(rung, architecture, tmp_path):
    plan, file, config = planned(architecture), tmp_path / "suggested.json", tmp_path / "experiment.json"
    object.__setattr__(plan, "fit", (suggested_zero(rung, plan.size), plan.memory))
    write_suggestion(plan, file)
    config.write_text(json.dumps(tree() | {"deepspeed": "suggested.json"}))
    assert load_config(config).deepspeed == {"zero_optimization": plan.fit[0]}
    assert Sharing.of(plan.fit[0], 2, 2).offload_parameters == ("offload_param" in rung)
    with pytest.raises(UserError, match="not overwritten"):
        write_suggestion(plan, file)


def test_a_model_that_is_not_here_is_told(tmp_path):
    with pytest.raises(UserError, match="config cannot be read") as error:
        planned(tmp_path / "missing.json")
    assert "--model-config" in str(error.value)


def test_plan_without_data_needs_neither_weights_nor_data(architecture, tmp_path, command_line):
    config, suggested = tmp_path / "experiment.json", tmp_path / "suggested.json"
    config.write_text(json.dumps(tree(training__global_batch_rows=64)))
    options = ("--gpus", "16", "--no-data", "--model-config", str(architecture), "--suggest", str(suggested))
    shown = command_line(1, "plan", "--config", str(config), *options, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for part in ("trained; 5 layers", "ZeRO-2 on 16 GPUs on 2 machines", "the smallest stage that fits is ZeRO-0", "an estimate", "2 steps:"):
        assert part in shown.stdout
    assert json.loads(suggested.read_text())["zero_optimization"]["stage"] == 0
