"""What an engine saves is what it loads, bit for bit, on any number of ranks and in any ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mftcoder_coba.config import validate
from mftcoder_coba.engine import build_deepspeed_config
from mftcoder_coba.engine.fragments import layout_of
from mftcoder_coba.engine.states import STATES_FOLDER
from mftcoder_coba.errors import UserError

WORKERS = str(Path(__file__).with_name("state_workers.py"))

BFLOAT16 = {"dtype": "bfloat16"}
EXPERTS = {"adapter": {"kind": "cgc_lora", "clusters": {"one": ["a", "b"], "two": ["c"]}, "rank": 8, "dropout": 0.0}}
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
# Above what the tiny model's parameters have: they stay whole on every rank.
PERSISTENT = {"stage3_param_persistence_threshold": 100_000}
ROUND_ROBIN = {"round_robin_gradients": True}
VARIANTS = {
    "float32, 0": {"stage": 0},
    "float32, 2": {"stage": 2},
    "float32, 2, reordered": {"stage": 2, "zero": ROUND_ROBIN},
    "float32, 3": {"stage": 3},
    "bfloat16, 0": BFLOAT16 | {"stage": 0},
    "bfloat16, 1, float32 sums": BFLOAT16 | {"stage": 1, "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "bfloat16, 2, offloaded": BFLOAT16 | {"stage": 2, "zero": OFFLOADED},
    "bfloat16, 3, offloaded": BFLOAT16 | {"stage": 3, "zero": OFFLOADED | PERSISTENT | {"offload_param": {"device": "cpu"}}},
    "LoRA, 2": LORA | {"stage": 2},
    "experts, 3": EXPERTS | {"stage": 3},
    "LoRA in bfloat16, 3": LORA | BFLOAT16 | {"stage": 3},
}
# What is loaded into what, on 1 and on 4 ranks.
PAIRS = [
    ({"stage": 0}, ["float32, 2", "float32, 3"]),
    ({"stage": 1}, ["float32, 0", "float32, 3"]),
    ({"stage": 2}, ["float32, 2", "float32, 3"]),
    ({"stage": 3, "zero": PERSISTENT | {"sub_group_size": 2000}}, ["float32, 0", "float32, 2", "float32, 3"]),
    (VARIANTS["bfloat16, 0"], ["bfloat16, 1, float32 sums", "bfloat16, 3, offloaded"]),
    (VARIANTS["bfloat16, 1, float32 sums"], ["bfloat16, 0"]),
    (VARIANTS["bfloat16, 3, offloaded"], ["bfloat16, 0", "bfloat16, 2, offloaded"]),
    (LORA | {"stage": 1}, ["LoRA, 2"]),
    (EXPERTS | {"stage": 1}, ["experts, 3"]),
    (LORA | BFLOAT16 | {"stage": 2}, ["LoRA in bfloat16, 3"]),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Each variant's states, written by 2 ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(WORKERS, "write", 2, VARIANTS, str(folder))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_states_are_the_saved_ones_and_go_on_bit_for_bit(saved, variant):
    reports = torch.load(saved / variant / "reference.pt", weights_only=True)["reports"]
    assert reports == [dict.fromkeys(("untrained", "digests", "files", "states", "continued"), True)] * 2


@pytest.mark.parametrize("world_size", [1, 4])
def test_states_move_to_other_ranks_and_stages(saved, tmp_path, world_size):
    run_ranks(WORKERS, "read", world_size, PAIRS, str(saved), str(tmp_path / "out.pt"))
    for what, result in torch.load(tmp_path / "out.pt", weights_only=True).items():
        assert result["states"] == [True] * world_size, what
        exact = "bfloat16" not in what
        assert result["loss"] < (1e-6 if exact else 1e-2), what
        assert result["distance"] < (1e-6 if exact else 1e-2), what


def test_the_layout_that_deepspeed_reorders_is_saved_under_the_right_names(saved):
    """DeepSpeed's own view of states by name, which the other tests compare with, is wrong for this option."""
    states, expected = (whole_states(saved / variant / STATES_FOLDER) for variant in ("float32, 2, reordered", "float32, 0"))
    assert states.keys() == expected.keys()
    for name, tensor in states.items():
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_a_failure_of_one_rank_leaves_no_other_waiting(saved, tmp_path):
    run_ranks(WORKERS, "fail", 2, str(tmp_path), str(saved / "LoRA, 2"), str(tmp_path / "out.pt"), timeout=60)
    first, second = torch.load(tmp_path / "out.pt", weights_only=True)
    assert (first[0], second[0]) == ("1", "OSError")
    assert first[1:] == second[1:]
    assert "other parameters than this run trains" in first[1] and "lora_A" in first[1] and "only in this run" in first[1]
    assert "damaged" in first[2]
    assert first[3] == "True", "an engine that could not load is as it was"


def whole_states(folder: Path) -> dict[str, torch.Tensor]:
    """Key -> the flattened tensor, put together from all files."""
    result: dict[str, torch.Tensor] = {}
    for path in sorted(folder.iterdir()):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            table = json.loads(file.metadata()["parameters"])
        for key, tensor in tensors.items():
            entry = table[key.split("/", 1)[1]]
            result.setdefault(key, torch.full([torch.Size(entry["shape"]).numel()], torch.nan))[entry["start"] : entry["end"]] = tensor
    return result


def test_an_optimizer_whose_layout_is_unknown_is_refused():
    with pytest.raises(UserError, match="DpOptimizer, whose states cannot be saved"):
        layout_of(type("DpOptimizer", (), {})(), nn.Linear(2, 2))


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_offloading_to_nvme_is_refused(key):
    tree = {
        "run": {"name": "test"},
        "model": {"path": "none"},
        "data": {"tasks": [{"name": "a", "train": ["none"]}]},
        "training": {"global_batch_rows": 8, "micro_batch_rows": 8, "learning_rate": 1e-3},
        "deepspeed": {"zero_optimization": {"stage": 3, key: {"device": "nvme", "nvme_path": "/nvme"}}},
    }
    with pytest.raises(UserError, match="nvme") as raised:
        build_deepspeed_config(validate(tree, "test"), 1)
    assert raised.value.where == f"deepspeed.zero_optimization.{key}.device"
