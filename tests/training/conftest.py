"""Checkpoints as two ranks have saved them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training.checkpoint_workers import on_threads, save


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of steps 50 and 100, saved by two ranks."""
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    for step in (50, 100):
        assert on_threads(2, lambda processes, step=step: save(folder, step, processes=processes)) == [None, None]
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of `written`."""
    return Path(shutil.copytree(written, tmp_path / "run" / "checkpoints", symlinks=True))
