"""A full disk, a read-only one and a kill at any moment: what was there stays whole."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from killing import lines_of, records
from ranks import started_command
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoTokenizer

from mftcoder_coba.config import Config
from mftcoder_coba.errors import UserError
from mftcoder_coba.models import recover_export, write_export
from mftcoder_coba.training.manifest import problem, read_manifest
from mftcoder_coba.training.run_folder import PROBE_BYTES, RunFolder

ALONE = SimpleNamespace(is_main=True, any=bool)  # as `Processes` of one rank


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """(size in KiB, options) -> an empty file system in memory, in place of the one before."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = []

    def unmount() -> None:
        while mounted:
            subprocess.run(["umount", "--lazy", mounted.pop()], check=True)  # a failed test holds its files open

    def mount(size: int, options: str = "rw") -> Path:
        unmount()
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k,{options}", "none", folder], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {result.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    unmount()


@pytest.fixture(scope="module")
def tokenizer(toy):
    return AutoTokenizer.from_pretrained(toy / "model")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def write(model, tokenizer):
    """(number, folder): exports a model whose parameters all are that number."""

    def write(number: float, folder: Path) -> None:
        write_export(model, {name: torch.full_like(value, number) for name, value in model.state_dict().items()}, tokenizer, folder)

    return write


def number_in(folder: Path) -> float:
    """Of a whole export: every file is there, and every parameter is that number."""
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    for path in folder.glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors").values()
    (number,) = {value for tensor in tensors for value in (tensor.min().item(), tensor.max().item())}
    return number


def test_an_export_without_room_leaves_the_older_one_and_nothing_else(disk, write, tmp_path):
    write(1.0, tmp_path / "export")
    pages = sum(-(-path.stat().st_size // 4096) for path in (tmp_path / "export").iterdir())
    refused = 0
    for room in range(1, pages + 4, 2):  # for the new one
        folder = disk(4 * (pages + room)) / "export"
        shutil.copytree(tmp_path / "export", folder)
        try:
            write(2.0, folder)
        except OSError as error:
            refused += 1
            assert "No space left on device" in str(error)
            assert number_in(folder) == 1.0
        else:
            assert number_in(folder) == 2.0
        assert os.listdir(folder.parent) == ["export"]
    assert refused > 5 and number_in(folder) == 2.0


class Killed(BaseException):
    """Ends `write_export` where it is, as a kill does."""


def test_a_kill_at_any_moment_of_an_export_leaves_a_whole_one(write, tmp_path, monkeypatch):
    """At any call that the disk's content depends on. Once the new one is in place, it stays."""
    folder = tmp_path / "export"

    def left_by(call: int) -> float | None:
        """What is there after a kill at that call; None: there are fewer."""
        calls = 0

        def counted(original):
            def wrapped(*arguments, **more):
                nonlocal calls
                calls += 1
                if calls == call:
                    raise Killed
                return original(*arguments, **more)

            return wrapped

        write(1.0, folder)
        with monkeypatch.context() as patch:
            for module, name in ((os, "fsync"), (os, "rename"), (shutil, "rmtree")):
                patch.setattr(module, name, counted(getattr(module, name)))
            try:
                write(2.0, folder)
                return None
            except Killed:
                pass
        recover_export(folder)
        assert os.listdir(tmp_path) == ["export"]
        return number_in(folder)

    left = []
    while (number := left_by(len(left) + 1)) is not None:
        left.append(number)
    # The last two calls are behind the second rename: the folder above is brought to the disk, and the older export is removed.
    assert left == [1.0] * (len(left) - 2) + [2.0] * 2 and len(left) > 8


def test_the_next_export_puts_right_what_a_killed_one_left(write, tmp_path):
    folder = tmp_path / "export"
    write(1.0, folder)
    folder.rename(tmp_path / "export.old")
    (tmp_path / "export.new").mkdir()
    (tmp_path / "export.new" / "torn").write_text("")
    write(2.0, folder)
    assert number_in(folder) == 2.0 and os.listdir(tmp_path) == ["export"]


def run_folder(folder: Path, name: str = "r", resume: str = "auto") -> RunFolder:
    tree = {
        "run": {"name": name, "dir": str(folder)},
        "model": {"path": "m"},
        "data": {"tasks": [{"name": "a", "train": ["a.jsonl"]}]},
        "training": {"global_batch_rows": 1, "micro_batch_rows": 1, "learning_rate": 1e-3},
        "checkpoint": {"resume": resume},
    }
    return RunFolder(Config.model_validate(tree))


def claim(folder: Path) -> UserError:
    with pytest.raises(UserError) as error:
        run_folder(folder).claim(ALONE, resuming=False)
    assert error.value.where == str(folder / "r")
    return error.value


def test_a_json_file_without_room_is_the_older_one(disk, tmp_path):
    folder = run_folder(disk(256))
    folder.claim(ALONE, resuming=False)
    folder.write_json("best.json", {"step": 1})
    before = sorted(os.listdir(folder.path))
    with pytest.raises(OSError, match="No space left"):
        folder.write_json("best.json", {"step": 2, "values": ["x" * 300_000]})
    assert json.loads((folder.path / "best.json").read_text()) == {"step": 1}
    assert sorted(os.listdir(folder.path)) == before


@pytest.mark.parametrize("file", ["runs", "runs/r", "runs/r/checkpoints"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("")
    message = claim(tmp_path / "runs")
    assert "the run folder cannot be written" in message.what and str(tmp_path / file) in message.what


def test_a_run_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in claim(tmp_path / "file" / "below").what


def test_a_read_only_file_system_is_refused(disk):
    assert "Read-only file system" in claim(disk(64, "ro")).what


def test_a_disk_without_room_to_begin_is_refused_and_nothing_is_left_on_it(disk):
    folder = disk(PROBE_BYTES // 1024 // 2)
    assert "No space left on device" in claim(folder).what
    assert os.listdir(folder / "r") == []


@pytest.mark.parametrize("part", ["r", "r/checkpoints"])
def test_a_folder_that_one_may_not_write_to_is_refused(part):
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to others
        folder = Path(name)
        folder.chmod(0o755)
        (folder / part).mkdir(parents=True)
        (folder / "r").chmod(0o777)
        (folder / part).chmod(0o555)
        root = os.geteuid() == 0
        if root:  # nothing is forbidden to root
            os.seteuid(65534)
        try:
            message = claim(folder)
        finally:
            if root:
                os.seteuid(0)
    assert "Permission denied" in message.what and str(folder / part) in message.what


def test_a_start_puts_right_what_a_killed_export_left(write, tmp_path):
    folder = run_folder(tmp_path)
    write(1.0, folder.path / "export.old")
    folder.claim(ALONE, resuming=True)
    assert number_in(folder.export) == 1.0
    assert sorted(os.listdir(folder.path)) == [".lock", "checkpoints", "export"]


def fill(path: Path) -> None:
    """Leaves no room on its file system."""
    with open(path, "ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def damage(checkpoint: Path) -> list[str]:
    files = read_manifest(checkpoint).files.items()
    return [line for line in (problem(checkpoint, name, digest) for name, digest in files) if line]


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_training_goes_on(toy, disk):
    """Full from step 3 of 60 until a save has failed; a checkpoint every other step."""
    run = disk(6144) / "full"
    filler = run.parent / "filler"
    changes = (
        "run.name=full",
        f"run.dir={run.parent}",
        "training.max_steps=60",
        "validation.early_stopping.patience=null",
        "checkpoint.every_steps=2",
        "tracking.tensorboard=true",
    )
    arguments = ("train", "--config", str(toy / "toy.json"), *(part for change in changes for part in ("--set", change)))
    with started_command(2, arguments) as started:
        while lines_of(run, '"kind": "train"') < 3 and started.running:
            time.sleep(0.005)
        held = (run / "checkpoints" / "latest").resolve()
        fill(filler)
        # Records wait in memory: progress shows on the screen only, and in warnings.
        while "checkpoint_failed" not in started.output(0) and started.running:
            time.sleep(0.005)
        intact = damage((run / "checkpoints" / "latest").resolve())
        filler.unlink()
        results = started.wait(120)
    assert [result.returncode for result in results] == [0, 0], results
    assert held.name.startswith("step-") and intact == []
    assert [record["step"] for record in records(run, "train")] == list(range(1, 61))
    failed = [record for record in records(run, "event") if record["name"] == "checkpoint_failed"]
    assert failed and all("No space left on device" in record["why"] for record in failed)
    assert (run / "checkpoints" / "latest").resolve().name == "step-000060" and damage(run / "checkpoints" / "step-000060") == []
