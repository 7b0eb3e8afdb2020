"""The command `merge` as a user types it."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file

from mftcoder_coba.merging import METHODS, merge


def test_the_command_writes_what_the_function_writes(command_line, llamas, tmp_path):
    models = [argument for number in range(3) for argument in ("--models", str(llamas / f"model{number}"))]
    options = ["--probabilities", "0.5", "--probabilities", "0.25", "--probabilities", "0.25", "--seed", "7", "--resample-rounds", "2"]
    result = command_line(1, "merge", "--base", str(llamas / "base"), *models, "--dtype", "bfloat16", *options, "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"wrote {tmp_path / 'out'}: 0.0 M parameters in 21 tensors, bfloat16; parameter_selection of 3 models")
    given = {"probabilities": (0.5, 0.25, 0.25), "seed": 7, "resample_rounds": 2}
    folders = [llamas / f"model{number}" for number in range(3)]
    merge(str(llamas / "base"), folders, "parameter_selection", tmp_path / "expected", dtype="bfloat16", **given)
    for name in ("model.safetensors", "merge.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_paths_may_be_relative_and_weights_one_for_all(command_line, llamas, tmp_path):
    arguments = ["--base", "base", "--models", "model0", "--models", "model1", "--method", "task_arithmetic", "--weight", "1"]
    result = command_line(1, "merge", *arguments, "--out", str(tmp_path / "out"), cwd=llamas)
    assert result.returncode == 0, result.stderr
    name = "model.norm.weight"
    base, first, second = (load_file(llamas / folder / "model.safetensors")[name] for folder in ("base", "model0", "model1"))
    assert load_file(tmp_path / "out" / "model.safetensors")[name].allclose(first + second - base, rtol=0, atol=1e-6)


def test_a_mistake_is_one_message_with_exit_code_2_and_no_folder(command_line, llamas, tmp_path):
    def told(*arguments: str, models: tuple[Path, ...] = (llamas / "model0",)) -> str:
        named = [argument for model in models for argument in ("--models", str(model))]
        result = command_line(1, "merge", "--base", str(llamas / "base"), *named, *arguments, "--out", str(tmp_path / "out"))
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert os.listdir(tmp_path) == []
        return result.stderr

    error = told(models=(llamas / "model0", llamas / "none"))
    assert error.splitlines() == ["error: no such folder", f"  where: {llamas / 'none'}", "  what to do: give a run folder, or its folder export"]
    assert "--probabilities" in told("--probabilities", "0.5", "--probabilities", "0.5")
    unknown = told("--method", "slerp")
    assert all(name in unknown for name in METHODS)
