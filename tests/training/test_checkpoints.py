"""A checkpoint is whole or it is not taken; a kill, a full disk and a flipped byte leave the one before."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks
from training.checkpoint_workers import Alone, FakeEngine, on_threads

from mftcoder_coba.errors import UserError
from mftcoder_coba.training import manifest
from mftcoder_coba.training.checkpoints import Checkpoints

FILES = ["manifest.json", "state.json", "states/rank-0000.safetensors", "states/rank-0001.safetensors"]
CHANGING_CALLS = ["fsync", "mkdir", "rename", "replace", "rmdir", "symlink", "unlink"]


def save(folder, step, content=None, processes=None, keep=2, best=None, full=None):
    processes = processes or Alone()
    content = content or f"step {step}"
    return Checkpoints(folder, keep).save(FakeEngine(processes, content, full), step, {"step": step, "content": content}, best)


def newest(folder, resume="auto", processes=None):
    checkpoints = Checkpoints(folder, keep=2)
    return checkpoints.newest_sound(checkpoints.candidates(resume), processes or Alone())


def content_of(checkpoint):
    return Checkpoints.read_state(checkpoint)["content"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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


# Kills


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
