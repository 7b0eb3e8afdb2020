"""Every config in the repository is one that loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from mftcoder_coba.config import load_config

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((ROOT / "configs").glob("*.json"))
DEEPSPEED_FILES = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_loads(path):
    assert load_config(path).data.tasks


@pytest.mark.parametrize("path", DEEPSPEED_FILES, ids=lambda path: path.stem)
def test_a_deepspeed_file_fits_the_quick_start_and_deepspeed_knows_its_keys(path):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = load_config(ROOT / "configs" / "quickstart.json", [f"deepspeed={path}"])
    assert config.zero_stage == int(path.stem.removeprefix("zero").split("-")[0])
    with pytest.raises(ValueError):
        DeepSpeedZeroConfig(**config.deepspeed["zero_optimization"], reduce_bucket_sise=1)
    assert DeepSpeedZeroConfig(**config.deepspeed["zero_optimization"]).stage == config.zero_stage
