"""The checks of launch/gpu_check.sh, as far as a CPU goes: right code passes them, wrong code does not."""

import importlib.util
import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flash_reference import flash_reference
from ranks import ROOT, run_command, run_ranks
from rich.console import Console
from tiny_models import tiny_model

sys.path.insert(0, str(Path(__file__).parent))
import checks
import gpu_check
import runs

from mftcoder_coba.objective import linear_cross_entropy

CPU = torch.device("cpu")


def test_bfloat16_and_experts_pass():
    assert "gradients" in checks.bfloat16_training(CPU) and "gradients" in checks.experts(CPU)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes")
def test_a_four_bit_base_passes():
    assert "gradients" in checks.four_bit_base(CPU)


def test_packed_rows_through_a_varlen_kernel_pass_and_without_borders_they_fail(monkeypatch):
    model = tiny_model("llama", **checks.WIDE)
    with flash_reference(model) as calls:
        checks.compare_flash(model, CPU)
    assert calls.borders[0] == [0, 100, 101, 192, 256, 512, 515, 715, 768]
    monkeypatch.setattr("mftcoder_coba.objective.multi_task.MultiTaskObjective.check_isolation", lambda *_: None)
    whole = {"cu_seq_lens_q": torch.tensor([0, 768]).int(), "cu_seq_lens_k": torch.tensor([0, 768]).int(), "max_length_q": 768, "max_length_k": 768}
    monkeypatch.setattr("mftcoder_coba.objective.multi_task.document_borders", lambda positions: dict(whole))
    with flash_reference(model), pytest.raises(checks.CheckFailed, match="gradients"):
        checks.compare_flash(model, CPU)


def test_a_loss_that_weighs_the_sum_instead_of_the_tokens_fails():
    def by_the_mean(hidden, weight, bias, labels, factors, transform):
        return linear_cross_entropy(hidden, weight, bias, labels, factors.mean().expand_as(factors), transform)

    assert "bfloat16" in checks.compare_losses(linear_cross_entropy, CPU)
    with pytest.raises(checks.CheckFailed, match="float32"):
        checks.compare_losses(by_the_mean, CPU)


def test_ranks_are_started_and_add_up():
    assert "2 ranks" in runs.all_reduce(CPU)
    with pytest.raises(checks.CheckFailed, match="ended with 1: KeyError: .no_such_function."):
        runs.on_ranks(1, CPU, "no_such_function")


@pytest.fixture
def forked(monkeypatch):
    """The same ranks and commands, forked, which is faster."""

    def on_ranks(count, device, function, *arguments):
        run_ranks(str(Path(runs.__file__).with_name("rank.py")), function, count, *arguments)

    def started(command, device, cwd):
        assert command[:2] == ["-m", "mftcoder_coba"]
        assert run_command(1, tuple(command[2:]), cwd).returncode == 0

    monkeypatch.setattr(runs, "on_ranks", on_ranks)
    monkeypatch.setattr(runs, "started", started)


def test_two_ranks_train_as_one(forked):
    assert "ZeRO-0 to 3" in runs.two_ranks_are_one(CPU)


def test_a_small_run_is_resumed(forked):
    assert "after the resume 0.0e+00" in runs.training_resumes(CPU)


def test_a_check_that_ends_badly_is_told_and_the_others_run():
    def breaks(device):
        raise RuntimeError("CUDA error: an illegal memory access\nmore lines")

    def fails(device):
        return checks.expect(float("nan"), 0.1, "gradients")

    def skips(device):
        checks.needs("no_such_package")

    outcomes = gpu_check.run_checks(CPU, {"a": breaks, "b": fails, "c": skips, "d": lambda device: "all well"})
    assert [outcome.result for outcome in outcomes] == ["failed", "failed", "skipped", "passed"]
    assert outcomes[0].figure == "RuntimeError: CUDA error: an illegal memory access" and "nan" in outcomes[1].figure
    shown = io.StringIO()
    gpu_check.show(outcomes, Console(file=shown, width=120))
    assert "1 passed, 2 failed, 1 skipped" in shown.getvalue() and "all well" in shown.getvalue()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_script_says_so(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (tmp_path / ".installed").touch()
    environment = os.environ | {"MFTCODER_COBA_VENV": str(tmp_path)}
    result = subprocess.run(["bash", str(ROOT / "launch" / "gpu_check.sh")], env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: there is no GPU here") and "Traceback" not in result.stderr
