"""Model folders read and written a tensor at a time, beside safetensors' own reader and transformers."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mftcoder_coba.merging.folders import TORCH_DTYPES, ModelFolder, ShardedWriter


def random_tensors(shapes: list[list[int]], dtypes: list[torch.dtype]) -> dict[str, torch.Tensor]:
    return {f"layer.{number}.ω": (10 * torch.rand(shape)).to(dtype) for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))}


def write(folder, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> list[str]:
    """Gives the names of the weights files."""
    with ShardedWriter(folder, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}, max_shard_bytes) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])
    return sorted(path.name for path in folder.glob("*.safetensors"))


@given(
    tensors=st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(list(TORCH_DTYPES.values()))), min_size=1, max_size=8),
    most=st.sampled_from([1, 100, 10**6]),
)
@settings(deadline=None, max_examples=40)
def test_what_is_written_is_read_back_by_safetensors_and_by_the_room(tmp_path_factory, tensors, most):
    folder = tmp_path_factory.mktemp("written")
    expected = random_tensors(*map(list, zip(*tensors, strict=True)))
    files = write(folder, expected, most)
    (folder / "config.json").write_text("{}")
    theirs = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    ours = ModelFolder(folder)
    assert theirs.keys() == ours.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        for found in (theirs[name], ours.read(name)):
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
        assert tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().startswith(ours.beginning(name))
        assert (ours.tensors[name].shape, ours.tensors[name].dtype) == (tuple(tensor.shape), tensor.dtype)


def test_files_hold_as_much_as_fits_and_the_index_says_where_each_tensor_is(tmp_path):
    tensors = {name: torch.zeros(size) for name, size in {"a": 100, "b": 150, "c": 10, "d": 600, "e": 240}.items()}
    files = write(tmp_path, tensors, 1000)
    held = [sorted(load_file(tmp_path / file)) for file in files]
    assert held == [["a", "b"], ["c"], ["d"], ["e"]]  # of 4 bytes: 1000, 40 (the next has 2400), 2400 alone, 960
    assert files == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, names in zip(files, held, strict=True) for name in names}
    assert index["metadata"]["total_size"] == 4400


def test_a_file_does_not_depend_on_the_order_of_the_names(tmp_path):
    tensors = random_tensors([[3], [2, 2], [5]], [torch.bfloat16, torch.float32, torch.int8])
    contents = []
    for number, names in enumerate((list(tensors), list(reversed(tensors)))):
        (tmp_path / str(number)).mkdir()
        write(tmp_path / str(number), {name: tensors[name] for name in names}, 10**6)
        contents.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_each_tensor_lies_at_a_multiple_of_its_size(tmp_path):
    write(tmp_path, random_tensors([[3], [1], [5], [7]], [torch.int8, torch.float64, torch.bfloat16, torch.float32]), 10**6)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = {"I8": 1, "F64": 8, "BF16": 2, "F32": 4}
    assert length % 8 == 0
    assert all(part["data_offsets"][0] % sizes[part["dtype"]] == 0 for name, part in header.items() if name != "__metadata__")


def test_transformers_loads_many_files(llamas, tmp_path):
    tensors = load_file(llamas / "model0" / "model.safetensors")
    assert len(write(tmp_path, tensors, 10_000)) > 3
    (tmp_path / "config.json").write_bytes((llamas / "model0" / "config.json").read_bytes())
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path, llamas / "model0"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_what_was_not_announced_is_refused(tmp_path):
    announced = {"a": ((2,), torch.float32), "b": ((2,), torch.float32)}
    for name, tensor in (("b", torch.zeros(2)), ("a", torch.zeros(3)), ("a", torch.zeros(2, dtype=torch.float16))):
        with pytest.raises(ValueError, match="is next"), ShardedWriter(tmp_path, announced, 100) as writer:
            writer.write(name, tensor)
    with pytest.raises(ValueError, match="1 tensors were not written"), ShardedWriter(tmp_path, announced, 100) as writer:
        writer.write("a", torch.zeros(2))


def test_a_tensor_that_is_read_does_not_hold_its_file(tmp_path):
    """It is a copy: the file may be changed afterwards, and memory is that of the tensor."""
    save_file({"a": torch.ones(1000), "b": torch.zeros(1000)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    read = ModelFolder(tmp_path).read("a")
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(-8000, 2)
        file.write(bytes(4000))
    assert read.untyped_storage().nbytes() == 4000 and read.eq(1).all()
