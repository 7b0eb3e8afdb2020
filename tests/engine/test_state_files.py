"""Files of saved states: any cut of the parameters can be read from any other, and what is wrong is told."""

from __future__ import annotations

import hashlib
import json
import resource
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mftcoder_coba.engine import tensor_files
from mftcoder_coba.engine.fragments import Fragment, Layout
from mftcoder_coba.engine.states import STATES_FOLDER, read_states, write_states
from mftcoder_coba.engine.tensor_files import FileDigest, write_tensors
from mftcoder_coba.errors import UserError

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


def test_parameters_without_a_gradient_keep_their_own_count_where_they_are_stepped_alone(tmp_path):
    """As in stage 0; the other stages step all together."""
    whole = {name: [] for name in SHAPES}
    part = replace(layout(whole, 0, seed=0), replicated=True)
    part.adam.state[part.flats[0]]["step"] -= 1
    del part.adam.state[part.flats[1]]
    write_states(tmp_path, part, 0, 1)

    alone = replace(layout(whole, 0, seed=1), replicated=True)
    read_states(tmp_path, alone)
    assert [state and float(state["step"]) for state in map(alone.adam.state.get, alone.flats)] == [2.0, None, 3.0]

    together = [layout({"matrix": [20], "vector": [4], "number": [0]}, rank, seed=1) for rank in range(2)]
    for other in together:
        read_states(tmp_path, other)
        assert {float(other.adam.state[flat]["step"]) for flat in other.flats} == {3.0}
    found, expected = contents(together), {key: torch.zeros(11) for key in ("exp_avg/vector", "exp_avg_sq/vector")}
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


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
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.booleans()), max_size=6),
    st.text(max_size=5),
    st.sampled_from([1, 100, 2**26]),
)
def test_written_tensors_are_what_safetensors_reads(tmp_path_factory, kinds, note, block_bytes):
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    tensors = {}
    for number, (dtype, shape, transposed) in enumerate(kinds):
        tensor = torch.randint(0, 100, shape).to(dtype)
        tensors[f"é/{number}"] = tensor.T if transposed and tensor.ndim == 2 else tensor
    with mock.patch.object(tensor_files, "_BLOCK_BYTES", block_bytes):
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
