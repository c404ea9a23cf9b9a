"""The run folder and its checkpoints: claimed once, atomic, checksummed, refused clearly."""

import json

import pytest
import torch

from coreg.errors import UserError
from coreg.files import write_atomically
from coreg.run import checkpoint
from coreg.run.folder import RunFolder


def test_a_folder_is_claimed_once_and_then_belongs_to_the_job(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.claim({"lr": 0.1, "ops": ("a", "b"), "store": "abc"})
        folder.claim({"lr": 0.1, "ops": ("a", "b"), "store": "abc"})
        with pytest.raises(UserError, match=r"lr was 0.1 and is 0.2; store was abc and is abd"):
            folder.claim({"lr": 0.2, "ops": ("a", "b"), "store": "abd"})
    assert json.loads((tmp_path / "run" / "job.json").read_text())["lr"] == 0.1
    assert not folder.finished


def test_looking_at_a_free_folder_writes_nothing(tmp_path):
    RunFolder(tmp_path / "run").refuse_other({"lr": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["file", "other", "damaged"])
def test_what_is_no_run_is_refused(tmp_path, content):
    root = tmp_path / "run"
    if content == "file":
        root.write_text("x")
    else:
        root.mkdir()
        (root / ("job.json" if content == "damaged" else "photo.png")).write_text("{")
    with pytest.raises(UserError, match={"file": "is a file", "other": "photo.png", "damaged": "is damaged"}[content]):
        RunFolder(root).refuse_other({"lr": 1})


def test_the_lock_is_exclusive_and_ends_with_its_holder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(UserError, match="another job is running"), RunFolder(tmp_path / "run").locked():
        pass
    with folder.locked():
        pass


def test_a_failed_write_leaves_the_file_before_it(tmp_path):
    target = tmp_path / "report.json"
    write_atomically(target, "old")
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(tmp_path / "missing" / "report.json", "new")
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.json"]


STATE = {"weights": {"a": torch.arange(4.0)}, "epoch": 3, "curves": [{"loss": 0.5}], "none": None}


def test_a_checkpoint_comes_back_and_the_last_two_stay(tmp_path):
    assert checkpoint.latest(tmp_path / "c") is None
    for number in (1, 2, 3):
        checkpoint.save(tmp_path / "c", number, STATE | {"epoch": number})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["00000002", "00000003"]
    assert checkpoint.latest(tmp_path / "c") == 3
    loaded = checkpoint.load(tmp_path / "c", 3)
    assert loaded["epoch"] == 3 and torch.equal(loaded["weights"]["a"], torch.arange(4.0)) and loaded["none"] is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no checksum", "gone"])
def test_a_damaged_checkpoint_falls_back_with_a_warning(tmp_path, damage):
    for number in (1, 2):
        checkpoint.save(tmp_path, number, STATE)
    file = tmp_path / "00000002" / "state.pt"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-10])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "gone":
        file.unlink()
    else:
        (tmp_path / "00000002" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="falling back"):
        assert checkpoint.latest(tmp_path) == 1


def test_nothing_readable_is_an_error_and_not_a_fresh_start(tmp_path):
    checkpoint.save(tmp_path, 1, STATE)
    (tmp_path / "00000001" / "state.pt").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="delete"):
        checkpoint.latest(tmp_path)


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    checkpoint.save(tmp_path, 1, STATE)
    (tmp_path / ".00000002.tmp").mkdir()
    assert checkpoint.latest(tmp_path) == 1


def test_a_failed_save_keeps_the_earlier_ones(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, STATE)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(UserError, match=r"No space left on device.*intact"):
        checkpoint.save(tmp_path, 2, STATE)
    assert checkpoint.latest(tmp_path) == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("pwned",))

    checkpoint.save(tmp_path, 1, {"x": Evil()})
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.load(tmp_path, 1)
