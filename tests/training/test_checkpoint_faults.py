"""A kill, a full disk and trouble at any moment of a save: the checkpoints that were there are there still, or the new one is."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest
from training.checkpoint_workers import Alone, FakeEngine, content_of, names, newest, on_threads, save

from mftcoder_coba.training import manifest
from mftcoder_coba.training.checkpoints import Checkpoints

CHANGING_CALLS = ["fsync", "mkdir", "rename", "replace", "rmdir", "symlink", "unlink"]


class Killed(BaseException):
    """Nothing in the program catches it, and afterwards nothing that it calls has an effect."""


@contextlib.contextmanager
def stopped_at(call, error=None):
    """The `call`-th change of the file system from here on does not happen: killed before it, or, with `error`, that one alone fails.

    Yields a function that tells how many there were.
    """
    count = 0

    def counted(real):
        def wrapper(*arguments, **keywords):
            nonlocal count
            count += 1
            if count == call and error:
                raise OSError(error, os.strerror(error))
            if count >= call and not error:
                raise Killed
            return real(*arguments, **keywords)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGING_CALLS:
            patch.setattr(os, name, counted(getattr(os, name)))
        with contextlib.suppress(Killed):
            yield lambda: count


SAVES = {  # step that is saved, the contents that may be the newest afterwards
    "a new step": (150, {"step 100", "new"}),
    "a step again": (100, {"step 100", "new"}),
}


def latest_is_absent_or_sound(folder):
    if not (folder / "latest").is_symlink():
        return True
    return newest(folder, str(folder / "latest")) == (folder / os.readlink(folder / "latest"), [])


def last_call(written, step, tmp_path):
    folder = Path(shutil.copytree(written, tmp_path / "counted" / "checkpoints", symlinks=True))
    with stopped_at(10**9) as calls:
        assert save(folder, step, "new") is None
    return calls()


@pytest.mark.parametrize("what", SAVES)
def test_a_kill_at_any_moment_of_a_save_leaves_the_old_or_the_new_one_and_the_next_save_works(written, tmp_path, what):
    step, allowed = SAVES[what]
    seen = []
    total = last_call(written, step, tmp_path)
    for call in range(1, total + 2):
        folder = Path(shutil.copytree(written, tmp_path / str(call) / "checkpoints", symlinks=True))
        with stopped_at(call):
            save(folder, step, "new")
        if (folder / "latest").is_symlink():
            # Before anything is set right: it points to a whole one.
            assert manifest.read_manifest(folder / "latest").step in (50, 100, 150)
        found, damaged = newest(folder)
        assert damaged == [], call
        assert latest_is_absent_or_sound(folder)
        seen.append(content_of(found))
        assert save(folder, 200, "next") is None
        assert newest(folder) == (folder / "step-000200", [])
        expected = {"step-000200", "step-000150" if "step-000150" in str(found) else "step-000100", "latest"}
        assert set(names(folder)) == expected, call
    # Once the new one is there, it stays.
    assert set(seen) == allowed and seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("what", SAVES)
def test_a_kill_while_the_rest_of_a_killed_save_is_cleared_away_leaves_the_same_one(written, tmp_path, what):
    step, _ = SAVES[what]
    for first in range(1, last_call(written, step, tmp_path) + 1, 2):
        for second in range(1, 60, 3):
            folder = Path(shutil.copytree(written, tmp_path / f"{first}-{second}" / "checkpoints", symlinks=True))
            with stopped_at(first):
                save(folder, step, "new")
            with stopped_at(second) as calls:
                newest(folder)
                save(folder, step, "newer")
            found, damaged = newest(folder)
            assert damaged == [] and content_of(found) in ("step 100", "new", "newer")
            if calls() < second:
                assert content_of(found) == "newer"
                break


@pytest.mark.parametrize("what", SAVES)
def test_an_error_of_the_disk_at_any_moment_of_a_save_is_told_and_nothing_is_lost(written, tmp_path, capsys, what):
    step, allowed = SAVES[what]
    seen = set()
    for call in range(1, last_call(written, step, tmp_path) + 1):
        folder = Path(shutil.copytree(written, tmp_path / str(call) / "checkpoints", symlinks=True))
        with stopped_at(call, errno.EIO):
            trouble = save(folder, step, "new")
        warned = capsys.readouterr().err
        assert ("Input/output error" in trouble) if trouble else ("warning: " in warned and "Input/output error" in warned), call
        assert (folder / "step-000100").is_dir()  # at once, not only when a run starts from it
        found, damaged = newest(folder)
        assert damaged == [] and content_of(found) in allowed
        assert trouble or content_of(found) == "new"
        seen.add(content_of(found))
        assert save(folder, 200, "next") is None
        assert not any(name.endswith((".partial", ".removing", ".replaced")) for name in names(folder))
    assert seen == allowed


def test_a_checkpoint_that_was_being_replaced_is_a_candidate_and_is_put_back_when_the_run_is_claimed(folder):
    os.rename(folder / "step-000100", folder / "step-000100.replaced")
    checkpoints = Checkpoints(folder, keep=2)
    before = names(folder)
    candidates = checkpoints.candidates("auto")
    assert candidates == [folder / "step-000100", folder / "step-000050"] and names(folder) == before
    assert checkpoints.newest_sound(candidates, Alone()) == (folder / "step-000100", [])
    assert names(folder) == ["latest", "step-000050", "step-000100"]


# Full disks


@pytest.mark.parametrize("full", [0, 2])
def test_a_full_disk_on_one_rank_is_told_on_all_and_leaves_what_was_there(folder, full):
    before = names(folder)
    troubles = on_threads(3, lambda processes: save(folder, 150, processes=processes, full=full))
    assert troubles == [f"rank {full}: No space left on device"] * 3
    assert names(folder) == before
    assert newest(folder) == (folder / "step-000100", [])
    assert on_threads(3, lambda processes: save(folder, 150, processes=processes)) == [None] * 3


@pytest.mark.parametrize("step", [100, 150])
@pytest.mark.parametrize("name", ["state.json", "manifest.json", "states", "step-000100.partial", "checkpoints"])
def test_a_disk_that_is_full_for_one_file_or_folder_is_told_on_all_ranks(folder, monkeypatch, name, step):
    name, real = name.replace("000100", f"{step:06d}"), os.fsync
    before = names(folder)

    def fsync(descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        troubles = on_threads(2, lambda processes: save(folder, step, "new", processes))
    assert troubles == ["rank 0: No space left on device"] * 2
    found, damaged = newest(folder)
    assert damaged == []
    if name == "checkpoints":  # after the rename: there, but not certain to outlive a loss of power
        assert content_of(found) == "new"
    else:
        assert (names(folder), content_of(found)) == (before, "step 100")
    assert save(folder, step, "again") is None
    assert content_of(newest(folder)[0]) == "again"


def test_a_file_that_is_not_on_the_disk_as_it_was_written_is_not_published(folder, monkeypatch):
    real = FakeEngine.save

    def cut(self, aside):
        files = real(self, aside)
        os.truncate(aside / "states" / "rank-0000.safetensors", 5)
        return files

    monkeypatch.setattr(FakeEngine, "save", cut)
    assert "states/rank-0000.safetensors is shorter than it was written (5 of " in save(folder, 150)
    assert newest(folder) == (folder / "step-000100", [])


def test_an_error_that_is_not_of_the_file_system_is_a_defect_and_is_raised(folder):
    class Broken(FakeEngine):
        def save(self, aside):
            raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        Checkpoints(folder, 2).save(Broken(Alone(), ""), 150, {}, None)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    assert save(tmp_path / "file" / "checkpoints", 1) == f"rank 0: Not a directory: {tmp_path / 'file' / 'checkpoints'}"


# Pruning, and the link


@pytest.mark.parametrize("keep, best, left", [(1, None, [4]), (2, None, [3, 4]), (2, 1, [1, 3, 4]), (1, 3, [3, 4]), (9, 2, [1, 2, 3, 4])])
def test_the_newest_and_the_best_are_kept(tmp_path, keep, best, left):
    for step in (1, 2, 3, 4):
        assert save(tmp_path, step, keep=keep, best=best if best and best <= step else None) is None
    assert names(tmp_path) == ["latest", *(f"step-{step:06d}" for step in left)]


def test_the_one_that_the_run_was_resumed_from_stays_until_a_newer_one_is_complete(folder):
    (folder / "step-000100" / "state.json").write_text("{}")
    assert newest(folder)[0] == folder / "step-000050"
    assert save(folder, 75, keep=1, full=0) is not None
    assert newest(folder)[0] == folder / "step-000050"
    # The damaged one, though newest by name, does not take the place of a good one.
    assert save(folder, 75, keep=2) is None
    assert {"step-000050", "step-000075"} < set(names(folder))
    assert newest(folder)[0] == folder / "step-000075"


def test_one_that_waits_to_be_put_back_is_not_removed_as_long_as_it_is_kept(folder):
    os.rename(folder / "step-000100", folder / "step-000100.replaced")
    assert save(folder, 150) is None
    assert names(folder) == ["latest", "step-000100.replaced", "step-000150"]
    assert save(folder, 200) is None
    assert names(folder) == ["latest", "step-000150", "step-000200"]


def test_pruning_that_fails_is_a_warning(folder, monkeypatch, capsys):
    real = os.rename

    def rename(source, target):
        if str(target).endswith(".removing"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    assert save(folder, 150) is None
    assert f"warning: {folder / 'step-000050'} could not be removed: Permission denied" in capsys.readouterr().err
    assert newest(folder) == (folder / "step-000150", [])


def test_a_link_that_cannot_be_moved_is_a_warning_and_what_it_points_to_is_not_pruned(folder, monkeypatch, capsys):
    def replace(source, target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert save(folder, 150, keep=1) is None
    assert f"warning: {folder / 'latest'} could not be moved: Operation not permitted" in capsys.readouterr().err
    assert os.readlink(folder / "latest") == "step-000100" and latest_is_absent_or_sound(folder)
    assert save(folder, 200, keep=1) is None
    assert names(folder) == ["latest", "step-000200"] and os.readlink(folder / "latest") == "step-000200"


def test_only_leftovers_of_our_own_are_cleared_away(folder):
    for name in ("step-000110.partial", "step-000020.removing", "step-000030.replaced.removing", "notes.partial", "step-1.removing"):
        (folder / name).mkdir()
    assert save(folder, 150) is None
    assert names(folder) == ["latest", "notes.partial", "step-000100", "step-000150", "step-1.removing"]


def test_a_kill_while_later_ones_are_set_aside_never_brings_one_back_that_was(written, tmp_path):
    for call in range(1, 20):
        folder = Path(shutil.copytree(written, tmp_path / str(call) / "checkpoints", symlinks=True))
        shutil.copytree(folder / "step-000050", folder / "step-000100.replaced")  # of a save that was killed before its end
        with stopped_at(call) as calls:
            Checkpoints(folder, keep=2).set_aside_after(50)
        gone = (folder / "step-000100.set-aside").exists()
        found, damaged = newest(folder)
        assert damaged == [] and content_of(found) == ("step 50" if gone else "step 100")
        assert latest_is_absent_or_sound(folder)
        if calls() < call:
            return
    raise AssertionError("never ran to its end")
