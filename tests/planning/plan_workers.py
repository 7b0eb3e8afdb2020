"""What a plan says of a configuration, and what a run of it holds and sends: on each rank of real processes."""

from __future__ import annotations

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mftcoder_coba.config import Config, validate
from mftcoder_coba.engine import Engine, Processes, build_deepspeed_config
from mftcoder_coba.models import add_adapter
from mftcoder_coba.objective import MultiTaskObjective
from mftcoder_coba.planning.cluster import Cluster, plan_cluster
from mftcoder_coba.planning.passes import KeptTensors

STORIES = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5}
STORIES |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True}
SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True}
# A bucket that takes up more than a small model would hide what it does.
SMALL_BUCKETS = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
SENDING = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


def experiment(dtype: str, stage: int, ranks: int, checkpointing: bool, adapter: dict[str, Any] | None, length: int, packing: str) -> dict[str, Any]:
    """Two micro-batches of two rows on each rank."""
    return {
        "run": {"name": "plan"},
        "model": {"path": "model", "dtype": dtype, "attention": "sdpa", "gradient_checkpointing": checkpointing},
        "adapter": adapter,
        "data": {"tasks": [{"name": name, "train": [name]} for name in ("a", "b")], "sequence_length": length, "packing": packing},
        "balancer": {"kind": "uniform"},
        "training": {"max_steps": 2, "global_batch_rows": 4 * ranks, "micro_batch_rows": 2, "learning_rate": 1e-4},
        "deepspeed": {"zero_optimization": {"stage": stage, **SMALL_BUCKETS}},
    }


def planned(tree: dict[str, Any], architecture: str, ranks: int) -> dict[str, float]:
    """Bytes: of states at the optimizer's step, kept by a forward pass, sent per step and rank."""
    plan = plan_cluster(validate(tree, "plan"), Cluster(ranks, 8, 80.0, 312.0, 0.4, 200.0), Path(architecture))
    rows, sent = tree["training"]["micro_batch_rows"], plan.traffic[ranks]
    kept = plan.kept.activations_of(rows) + plan.kept.kept_by_loss(rows)
    return {"states": plan.memory.at_step, "kept": kept, "gradients": sent.gradients, "weights": sent.weights}


class KeptInRun(KeptTensors):
    """ZeRO-3 gathers parameters into storages that were not there before."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(model)
        self._model = model

    def _keep(self, tensor: Tensor) -> Tensor:
        self._own |= {parameter.untyped_storage()._cdata for parameter in self._model.parameters()}
        return super()._keep(tensor)


def measure(tree: dict[str, Any], architecture: str, out: str) -> None:
    """Trains two steps; the second one is measured and written to `out` by rank 0, in the terms of `planned`."""
    sent: Counter[str] = Counter()
    with count_sending(sent):
        processes = Processes()
        config = validate(tree, "plan")
        engine = build(config, architecture, processes)
        for step in range(2):
            sent.clear()
            found = train_step(engine, config, measured=step == 1)
    if processes.is_main:
        ring = (processes.world_size - 1) / processes.world_size
        once = {name: ring * size for name, size in sent.items()}
        gradients = 2 * once.get("all_reduce", 0) + once.get("reduce_scatter_tensor", 0)
        Path(out).write_text(json.dumps(found | {"gradients": gradients, "weights": once.get("all_gather_into_tensor", 0)}))
    engine.close()
    processes.close()


def build(config: Config, architecture: str, processes: Processes) -> Engine:
    dtype = getattr(torch, config.model.dtype)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(architecture), dtype=dtype, attn_implementation="sdpa")
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    objective = MultiTaskObjective(add_adapter(model, config.adapter, config.data.task_names), len(config.data.tasks))
    external = [(objective.output_loss, objective.output_loss.external_parameters)]
    return Engine(objective, build_deepspeed_config(config, processes.world_size), config.training, processes, external)


def train_step(engine: Engine, config: Config, measured: bool) -> dict[str, float]:
    rows, length = config.training.micro_batch_rows, config.data.sequence_length
    ids = torch.randint(0, 500, (rows, length))
    positions = torch.arange(length).expand(rows, length).contiguous()
    if config.data.packing != "none":  # two documents in each row
        positions = positions % (length // 2)
    arguments = (ids, positions, ids.roll(-1, 1), torch.zeros_like(ids), torch.ones(rows, length), torch.full((2,), 1 / ids.numel()).double())
    found: dict[str, float] = {}
    for number in range(engine.accumulation_steps):
        kept = KeptInRun(engine.module)
        with kept.counting():
            loss, _ = engine.forward(*arguments)
        found = found or {"kept": float(kept.total)}
        del kept  # it would keep their storages alive
        engine.backward(loss)
        del loss
        if number < engine.accumulation_steps - 1:
            engine.accumulate()
    states: list[int] = []

    def look(*_: Any) -> None:
        states.append(all_tensors() - sum(tensor.nbytes for tensor in arguments))

    handle = engine._layout.adam.register_step_pre_hook(look) if measured else None
    engine.step(1e-4)
    if handle:
        handle.remove()
        found["states"] = float(max(states))
    return found


def all_tensors() -> int:
    """Bytes of all storages that tensors of this process hold; each counts once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor):
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def count_sending(sent: Counter[str]) -> Any:
    """Within it, the bytes of the larger tensor of each collective are counted: the whole one."""

    def counted(name: str, original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            tensors = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]
            sent[name] += max(tensor.nbytes for tensor in tensors)
            return original(*arguments, **named)

        return call

    patches = {name: counted(name, getattr(torch.distributed, name)) for name in SENDING}
    return mock.patch.multiple(torch.distributed, **patches)
