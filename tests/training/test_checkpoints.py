"""A checkpoint is whole or it is not taken; a kill, a full disk and a flipped byte leave the one before."""

import json
import os
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks
from training.checkpoint_workers import Alone, FakeEngine, names, newest, on_threads, save

from mftcoder_coba.errors import UserError
from mftcoder_coba.training import manifest
from mftcoder_coba.training.checkpoints import Checkpoints

FILES = ["manifest.json", "state.json", "states/rank-0000.safetensors", "states/rank-0001.safetensors"]
CHANGING_CALLS = ["fsync", "mkdir", "rename", "replace", "rmdir", "symlink", "unlink"]


def test_what_was_saved_is_found_and_says_what_it_consists_of(folder):
    assert names(folder) == ["latest", "step-000050", "step-000100"]
    found, damaged = newest(folder)
    assert (found, damaged) == (folder / "step-000100", [])
    assert Checkpoints.read_state(found) == {"step": 100, "content": "step 100"}
    assert sorted(path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()) == FILES
    assert sorted(manifest.read_manifest(found).files) == FILES[1:]
    assert os.readlink(folder / "latest") == "step-000100"


# Damage


def only_damage(folder):
    """The one message about step 100, after which step 50 is taken."""
    found, damaged = newest(folder)
    assert found == folder / "step-000050"
    (message,) = damaged
    return message


@pytest.mark.parametrize("name", FILES)
def test_every_missing_file_is_found_and_named(folder, name):
    (folder / "step-000100" / name).unlink()
    assert only_damage(folder) == f"checkpoints/step-000100: {name} is missing"


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_anywhere_is_found_and_named(folder, name):
    path = folder / "step-000100" / name
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 7), len(whole) - 1}:
        path.write_bytes(whole[:length])
        message = only_damage(folder)
        if name == "manifest.json":
            assert message == "checkpoints/step-000100: manifest.json is not what was written: it does not match its own checksum"
        else:
            assert message == f"checkpoints/step-000100: {name} is shorter than it was written ({length} of {len(whole)} bytes)"
    path.write_bytes(whole + b"\n")
    assert f"step-000100: {name} is " in only_damage(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("bits", [0x01, 0x20, 0x80])
def test_every_changed_byte_is_found_and_its_file_named(folder, name, bits):
    path = folder / "step-000100" / name
    whole = path.read_bytes()
    for position in range(0, len(whole), 1 if name.endswith(".json") else 13):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ bits]) + whole[position + 1 :])
        assert only_damage(folder).startswith(f"checkpoints/step-000100: {name} is not what was written")
    path.write_bytes(whole)
    assert newest(folder) == (folder / "step-000100", [])


def test_a_checkpoint_of_which_nothing_but_the_name_is_left_is_told(folder):
    shutil.rmtree(folder / "step-000100")
    (folder / "step-000100").mkdir()
    assert only_damage(folder) == "checkpoints/step-000100: manifest.json is missing"


def test_the_files_of_another_step_are_not_taken_for_those_of_this_one(folder):
    shutil.rmtree(folder / "step-000100")
    shutil.copytree(folder / "step-000050", folder / "step-000100")
    assert only_damage(folder) == "checkpoints/step-000100: manifest.json is of step 50"


def test_a_file_that_was_copied_in_is_told(folder):
    (folder / "step-000100" / "states" / "rank-0002.safetensors").write_bytes(b"of a run on three ranks")
    assert only_damage(folder) == "checkpoints/step-000100: states/rank-0002.safetensors is none of its files"


def test_all_that_is_wrong_with_a_checkpoint_is_told(folder):
    shutil.rmtree(folder / "step-000100" / "states")
    found, damaged = newest(folder)
    assert found == folder / "step-000050"
    assert damaged == [f"checkpoints/step-000100: {name} is missing" for name in FILES[2:]]


def test_without_any_sound_checkpoint_the_run_does_not_start_over(folder):
    for step in ("step-000050", "step-000100"):
        (folder / step / "state.json").write_text("{}")
    with pytest.raises(UserError) as refusal:
        newest(folder)
    text = str(refusal.value)
    assert "step-000100: state.json is shorter" in text and "step-000050: state.json is shorter" in text
    assert "restore a file" in text and 'another run.name and checkpoint.resume = "never"' in text


@pytest.mark.parametrize("name", ["../state.json", "/etc/hostname", "states/../../state.json", "", ".", "states//x", "manifest.json"])
def test_a_manifest_from_elsewhere_cannot_name_what_is_outside_of_the_checkpoint(folder, name):
    forged = manifest.Manifest(100, manifest.read_manifest(folder / "step-000100").files | {name: manifest.digest_of(b"")})
    (folder / "step-000100" / "manifest.json").write_bytes(forged.to_bytes())
    assert only_damage(folder) == f"checkpoints/step-000100: manifest.json names {name!r}, which is no file inside the checkpoint"


@pytest.mark.parametrize(
    "claim, told",
    [
        ({"format": 2, "step": 100, "files": {}}, "has format 2; this version reads 1"),
        ({"format": 1, "step": "100", "files": {}}, "is not one of this program"),
        ({"format": 1, "step": 100}, "is not one of this program"),
        ({"format": 1, "step": 100, "files": {"state.json": 3}}, "has no size and checksum of 'state.json'"),
        ({"format": 1, "step": 100, "files": {}}, "names no state.json"),
    ],
)
def test_a_manifest_that_proves_itself_but_is_none_of_ours_is_refused(folder, claim, told):
    (folder / "step-000100" / "manifest.json").write_bytes(manifest._proven(claim))
    assert only_damage(folder) == f"checkpoints/step-000100: manifest.json {told}"


# What `checkpoint.resume` means


def test_never_and_auto(folder, tmp_path):
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.candidates("never") == []
    assert checkpoints.candidates("auto") == [folder / "step-000100", folder / "step-000050"]
    for name in ("step-000200.partial", "step-000200.removing", "step-000200.set-aside", "step-200", "step-0000300"):
        (folder / name).mkdir()
    assert checkpoints.candidates("auto") == [folder / "step-000100", folder / "step-000050"]
    assert Checkpoints(tmp_path / "no run" / "checkpoints", keep=2).candidates("auto") == []
    assert newest(tmp_path / "no run" / "checkpoints") == (None, [])


def test_steps_of_more_than_six_digits_are_newer(tmp_path):
    for step in (999_999, 1_000_000):
        assert save(tmp_path, step) is None
    assert newest(tmp_path)[0].name == "step-1000000"


@pytest.mark.parametrize("path, found", [("step-000050", [50]), ("latest", [100]), (".", [100, 50]), ("..", [100, 50])])
def test_a_path_in_the_own_folder_goes_back_to_that_one(folder, path, found):
    candidates = Checkpoints(folder, keep=2).candidates(os.path.normpath(folder / path))
    assert candidates == [folder / f"step-{step:06d}" for step in found]


def test_what_was_saved_after_going_back_comes_before_the_one_gone_back_to(folder):
    """So a job that is queued again with the same path goes on, and does not go back again."""
    path = str(folder / "step-000050")
    Checkpoints(folder, keep=2).set_aside_after(50)
    state = {"step": 75, "content": "after", "config": {"checkpoint": {"resume": path}}}
    assert Checkpoints(folder, keep=2).save(FakeEngine(Alone(), "after"), 75, state, None) is None
    assert [one.name for one in Checkpoints(folder, keep=2).candidates(path)] == ["step-000075", "step-000050"]


@pytest.mark.parametrize("path, found", [("step-000050", [50]), ("latest", [100]), (".", [100, 50]), ("..", [100, 50])])
def test_a_path_elsewhere_is_where_a_run_begins_and_its_own_checkpoints_come_first(folder, tmp_path, path, found):
    own = tmp_path / "other" / "checkpoints"
    given = os.path.normpath(folder / path)
    theirs = [folder / f"step-{step:06d}" for step in found]
    assert Checkpoints(own, keep=2).candidates(given) == theirs
    assert save(own, 7) is None
    assert Checkpoints(own, keep=2).candidates(given) == [own / "step-000007", *theirs]
    assert newest(own, given)[0] == own / "step-000007"
    (own / "step-000007" / "state.json").unlink()
    assert newest(own, given) == (theirs[0], ["checkpoints/step-000007: state.json is missing"])


def test_damage_in_a_checkpoint_elsewhere_is_told_with_its_path(folder, tmp_path):
    (folder / "step-000050" / "state.json").unlink()
    with pytest.raises(UserError, match=f"{folder / 'step-000050'}: state.json is missing"):
        newest(tmp_path / "other" / "checkpoints", str(folder / "step-000050"))


@pytest.mark.parametrize("path", ["nowhere", "run", "run/checkpoints/step-000075", "run/checkpoints/step-000050/state.json"])
def test_a_path_that_leads_to_no_checkpoint_is_refused(folder, tmp_path, path):
    own = folder if path != "run" else tmp_path / "other" / "checkpoints"
    if path == "run":
        shutil.rmtree(folder)
    with pytest.raises(UserError) as refusal:
        Checkpoints(own, keep=2).candidates(str(tmp_path / path))
    assert f"checkpoint.resume = {tmp_path / path}" in str(refusal.value) and '"auto" or "never"' in str(refusal.value)


# Going back


def test_later_checkpoints_are_set_aside_and_never_taken_again(folder):
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.set_aside_after(100) == []
    assert checkpoints.set_aside_after(50) == ["step-000100.set-aside"]
    assert checkpoints.candidates("auto") == [folder / "step-000050"]
    assert os.readlink(folder / "latest") == "step-000050"
    assert save(folder, 100) is None
    assert checkpoints.set_aside_after(50) == ["step-000100.set-aside-2"]
    assert save(folder, 75) is None and save(folder, 125) is None
    assert names(folder) == ["latest", "step-000075", "step-000100.set-aside", "step-000100.set-aside-2", "step-000125"]


def test_one_that_was_set_aside_is_not_taken_by_path_but_its_owner_is_told_how(folder):
    checkpoints = Checkpoints(folder, keep=2)
    (name,) = checkpoints.set_aside_after(50)
    with pytest.raises(UserError, match="rename it to step-000100$"):
        checkpoints.candidates(str(folder / name))


# Several ranks


def test_the_list_of_rank_0_counts_and_all_ranks_get_the_same(folder):
    def look(processes):
        checkpoints = Checkpoints(folder, keep=2)
        return checkpoints.newest_sound(checkpoints.candidates("auto")[processes.rank :], processes)

    assert on_threads(3, look) == [(folder / "step-000100", [])] * 3


def test_each_file_is_read_by_one_rank(folder, monkeypatch):
    read, real = [], manifest.problem
    monkeypatch.setattr("mftcoder_coba.training.checkpoints.problem", lambda path, name, digest: read.append(name) or real(path, name, digest))
    assert on_threads(2, lambda processes: newest(folder, processes=processes)) == [(folder / "step-000100", [])] * 2
    assert sorted(read) == FILES[1:]


def test_checkpoints_that_rank_0_alone_does_not_see_are_told(folder, tmp_path):
    refusals = on_threads(2, lambda processes: newest(folder if processes.rank else tmp_path / "local", processes=processes))
    for refusal in refusals:
        assert isinstance(refusal, UserError) and f"rank 0 does not see {folder / 'step-000100'}, which rank 1 sees" in str(refusal)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What two real ranks saw: see `real_ranks`."""
    folder = tmp_path_factory.mktemp("real")
    run_ranks(str(Path(__file__).with_name("checkpoint_workers.py")), "real_ranks", 2, str(folder))
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]


def test_on_real_ranks_a_full_disk_on_one_is_told_on_both(seen):
    assert [one["troubles"] for one in seen] == [[None, "rank 1: No space left on device", None]] * 2


def test_on_real_ranks_damage_that_one_reads_is_told_on_both(seen):
    for one in seen:
        assert one["newest"] == "step-000001"
        assert len(one["damaged"]) == 1 and "step-000003: states/rank-0001.safetensors is shorter" in one["damaged"][0]


def test_a_rank_that_does_not_see_the_folder_is_named_on_all(seen):
    for one in seen:
        assert "rank 1 does not see checkpoints/step-000001: is the run folder on a file system that all machines share?" in one["refusal"]
