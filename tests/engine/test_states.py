"""What an engine saves is what it loads, bit for bit, on any number of ranks and in any ZeRO stage; and what is wrong is told."""

from __future__ import annotations

import hashlib
import json
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mftcoder_coba.config import validate
from mftcoder_coba.engine import build_deepspeed_config
from mftcoder_coba.engine.fragments import Fragment, Layout
from mftcoder_coba.engine.states import STATES_FOLDER, read_states, write_states
from mftcoder_coba.engine.tensor_files import FileDigest, write_tensors
from mftcoder_coba.errors import UserError

WORKERS = str(Path(__file__).with_name("state_workers.py"))

BFLOAT16 = {"dtype": "bfloat16"}
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


# Files, without DeepSpeed.

SHAPES = {"matrix": (5, 7), "vector": (11,), "number": ()}


def layout(cuts: dict[str, list[int]], rank: int, seed: int | None, shapes: dict = SHAPES) -> Layout:
    """Rank `rank`'s part of parameters that are cut at `cuts`, each in a flat of its own, stepped three times with `seed`."""
    fragments = []
    for name, shape in shapes.items():
        start, end = ([0, *sorted(cuts[name]), torch.Size(shape).numel()])[rank : rank + 2]
        if start < end:
            flat = nn.Parameter(torch.zeros(end - start + 3))
            fragments.append(Fragment(name, shape, start, end - start, flat, 2))
    flats = [fragment.flat for fragment in fragments]
    adam = torch.optim.AdamW(flats or [nn.Parameter(torch.zeros(1))], fused=True)
    if seed is not None:
        torch.manual_seed(seed)
        for _ in range(3):
            for flat in flats:
                flat.grad = torch.randn_like(flat)
            adam.step()
    return Layout(adam, shapes, flats, fragments, replicated=False)


def contents(parts: list[Layout]) -> dict[str, torch.Tensor]:
    result = {}
    for part in parts:
        for fragment in part.fragments:
            state = part.adam.state[fragment.flat]
            for kind, tensor in {"fp32": fragment.flat, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}.items():
                whole = result.setdefault(f"{kind}/{fragment.name}", torch.full([torch.Size(fragment.shape).numel()], torch.nan))
                whole[fragment.start : fragment.start + fragment.numel] = fragment.within(tensor)
    return result


def written(folder: Path, world_size: int = 2, cuts: dict | None = None) -> list[Layout]:
    cuts = cuts or {"matrix": [20], "vector": [0], "number": [0]}
    parts = [layout(cuts, rank, seed=rank) for rank in range(world_size)]
    for rank, part in enumerate(parts):
        write_states(folder, part, rank, world_size)
    return parts


@st.composite
def cuttings(draw) -> tuple[int, dict[str, list[int]]]:
    """(number of ranks, where each parameter is cut)"""
    ranks = draw(st.integers(1, 5))
    return ranks, {
        name: draw(st.lists(st.integers(0, torch.Size(shape).numel()), min_size=ranks - 1, max_size=ranks - 1)) for name, shape in SHAPES.items()
    }


@settings(max_examples=25, deadline=None)
@given(cuttings(), cuttings())
def test_any_cut_can_be_read_from_any_other(tmp_path_factory, writers, readers):
    folder = tmp_path_factory.mktemp("cuts")
    parts = written(folder, *writers)
    others = [layout(readers[1], rank, seed=None) for rank in range(readers[0])]
    for other in others:
        read_states(folder, other)
    expected, found = contents(parts), contents(others)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert all(float(other.adam.state[flat]["step"]) == 3.0 for other in others for flat in other.flats)


def test_a_parameter_that_was_never_stepped_stays_so_where_it_is_alone(tmp_path):
    part = layout({name: [] for name in SHAPES}, 0, seed=0)
    del part.adam.state[part.flats[1]]
    write_states(tmp_path, part, 0, 1)
    other = layout({name: [] for name in SHAPES}, 0, seed=1)
    read_states(tmp_path, other)
    assert [bool(other.adam.state.get(flat)) for flat in other.flats] == [True, False, True]


def test_nothing_is_changed_when_a_checkpoint_cannot_be_loaded(tmp_path):
    written(tmp_path)
    damaged = tmp_path / STATES_FOLDER / "rank-0001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    part = layout({name: [] for name in SHAPES}, 0, seed=5)
    before = contents([part])
    with pytest.raises(UserError, match="damaged"):
        read_states(tmp_path, part)
    after = contents([part])
    assert all(torch.equal(before[key], after[key]) for key in before)


def rewritten(path: Path, change) -> None:
    """The file again, after `change(tensors, parameters)`."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    table = json.loads(metadata["parameters"])
    change(tensors, table)
    save_file(tensors, path, metadata | {"parameters": json.dumps(table)})


def drop_tensor(tensors, table):
    del tensors["exp_avg/matrix"]


def drop_parameter(tensors, table):
    del table["matrix"]


def move_slice(tensors, table):
    table["matrix"]["start"] -= 1
    table["matrix"]["end"] -= 1


def shrink_shape(tensors, table):
    table["matrix"]["shape"] = [5, 6]


def other_step(tensors, table):
    table["matrix"]["step"] = 4.0


def no_weights(tensors, table):
    table["matrix"]["kinds"].remove("fp32")


@pytest.mark.parametrize("change", [drop_tensor, drop_parameter, move_slice, shrink_shape, other_step, no_weights], ids=lambda f: f.__name__)
def test_a_file_that_contradicts_itself_or_others_is_refused(tmp_path, change):
    written(tmp_path)
    rewritten(tmp_path / STATES_FOLDER / "rank-0001.safetensors", change)
    with pytest.raises(UserError, match="the checkpoint is damaged: .*matrix"):
        read_states(tmp_path, layout({name: [] for name in SHAPES}, 0, seed=None))


@pytest.mark.parametrize("position", [0, 7, 8, 9, 40, 300])
def test_a_damaged_header_is_told_with_the_file(tmp_path, position):
    written(tmp_path)
    path = tmp_path / STATES_FOLDER / "rank-0000.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 0x80
    path.write_bytes(content)
    with pytest.raises(UserError, match="the checkpoint is damaged") as raised:
        read_states(tmp_path, layout({name: [] for name in SHAPES}, 0, seed=None))
    assert raised.value.where.startswith(str(tmp_path / STATES_FOLDER))


@pytest.mark.parametrize("missing", [["rank-0000"], ["rank-0001"], ["rank-0000", "rank-0001"]], ids=len)
def test_missing_files_are_told(tmp_path, missing):
    written(tmp_path)
    for name in missing:
        (tmp_path / STATES_FOLDER / f"{name}.safetensors").unlink()
    with pytest.raises(UserError, match="holds no states" if len(missing) == 2 else "has 1 files; they say that there should be 2"):
        read_states(tmp_path, layout({name: [] for name in SHAPES}, 0, seed=None))


def test_states_of_another_model_are_refused_with_the_differences(tmp_path):
    written(tmp_path)
    shapes = {"matrix": (5, 8), "vector": (11,)} | {f"new{number}": (1,) for number in range(5)}
    with pytest.raises(UserError) as raised:
        read_states(tmp_path, layout({name: [] for name in shapes}, 0, seed=None, shapes=shapes))
    assert "only in the checkpoint: number" in raised.value.what
    assert "only in this run: new0, new1, new2 and 2 more" in raised.value.what
    assert "of another shape: matrix [5, 7], now [5, 8]" in raised.value.what


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.booleans()), max_size=6), st.text(max_size=5))
def test_written_tensors_are_what_safetensors_reads(tmp_path_factory, kinds, note):
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    tensors = {}
    for number, (dtype, shape, transposed) in enumerate(kinds):
        tensor = torch.randint(0, 100, shape).to(dtype)
        tensors[f"é/{number}"] = tensor.T if transposed and tensor.ndim == 2 else tensor
    digest = write_tensors(path, tensors, {"note": note})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"note": note}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert file.get_tensor(name).dtype == tensor.dtype and torch.equal(file.get_tensor(name), tensor)
    content = path.read_bytes()
    assert digest == FileDigest(len(content), hashlib.sha256(content).hexdigest())


def test_a_full_disk_is_an_os_error(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError):
            write_tensors(tmp_path / "file", {"a": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
