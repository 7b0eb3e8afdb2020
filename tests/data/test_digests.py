import hashlib
import json
import os
import time

import pytest

from mftcoder_coba.data.digests import CLOCK_TICK_NS, digest_of
from mftcoder_coba.errors import UserError


@pytest.fixture
def file(tmp_path):
    """A file of yesterday, as far as the clock of its content goes."""
    path = tmp_path / "data.jsonl"
    path.write_text("one")
    return path


@pytest.fixture
def later(monkeypatch):
    """The time at which files that were just written are old enough."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 2 * CLOCK_TICK_NS)


def test_a_file_is_read_once_and_its_note_is_believed(tmp_path, file, later):
    first = digest_of(file, tmp_path)
    assert first.sha256 == hashlib.sha256(b"one").hexdigest()
    (note,) = tmp_path.glob("*.json")
    note.write_text(note.read_text().replace(first.sha256, "noted"))
    assert digest_of(file, tmp_path).sha256 == "noted"


def test_a_changed_file_of_the_same_size_and_time_is_read_again(tmp_path, file, later):
    before = file.stat()
    digest_of(file, tmp_path)
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest_of(file, tmp_path).sha256 == hashlib.sha256(b"two").hexdigest()


def test_a_file_that_was_written_just_now_gets_no_note(tmp_path, file):
    digest_of(file, tmp_path)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"signature": 1, "sha256": "x"}'])
def test_a_damaged_note_is_no_note(tmp_path, file, later, text):
    digest_of(file, tmp_path)
    (note,) = tmp_path.glob("*.json")
    note.write_text(text)
    assert digest_of(file, tmp_path).sha256 == hashlib.sha256(b"one").hexdigest()
    assert json.loads(note.read_text())["sha256"] == hashlib.sha256(b"one").hexdigest()


def test_a_file_that_changes_meanwhile_is_told(tmp_path, file):
    digest = digest_of(file, tmp_path)
    digest.check_unchanged(file)
    file.write_text("longer")
    with pytest.raises(UserError, match="changed while it was read"):
        digest.check_unchanged(file)


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, file, later):
    assert digest_of(file, tmp_path / "nowhere").sha256 == hashlib.sha256(b"one").hexdigest()
