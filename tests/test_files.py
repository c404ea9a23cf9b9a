"""Files are there whole or not at all, with the umask's permissions, and records are checked before they are believed."""

import errno
import json
import os

import pytest

from coreg.errors import UserError
from coreg.files import (
    check_writable,
    file_name,
    inside,
    making_folder,
    place_below,
    replacing,
    this_machine,
    write_atomically,
)
from coreg.records import Each, Maybe, Number, RecordError, check_record, read_record


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    target = tmp_path / "report.json"
    write_atomically(target, "old")
    with (
        pytest.raises(UserError, match=r"report.json \(No space left on device\); free some space"),
        replacing(target) as file,
    ):
        file.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(KeyboardInterrupt), replacing(target) as file:
        file.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_what_a_library_says_of_a_full_disk_is_understood(tmp_path):
    for error in (
        RuntimeError("[enforce fail] . PytorchStreamWriter failed: No space left on device"),
        ValueError("I/O error: os error 28"),
    ):
        with pytest.raises(UserError, match="No space left"), replacing(tmp_path / "weights.safetensors"):
            raise error
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "weights.safetensors"):  # a fault of ours stays one
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_folder_is_there_whole_or_as_it_was(tmp_path):
    folder = tmp_path / "runs" / "export"
    with making_folder(folder, replace=True) as made:
        (made / "old").touch()
        os.chmod(made / "old", 0o600)
    plain = tmp_path / "plain"
    plain.touch()
    assert (folder / "old").stat().st_mode == plain.stat().st_mode
    for error, raised in (
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UserError),
        (UserError("the networks disagree"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ZeroDivisionError(), ZeroDivisionError),  # a fault of ours stays one
    ):
        with pytest.raises(raised), making_folder(folder, replace=True) as made:
            (made / "new").touch()
            raise error
        assert [path.name for path in folder.iterdir()] == ["old"] and list(folder.parent.iterdir()) == [folder]
    for owner in ("far.machine.7", f"{this_machine()}.1"):  # of programs that were killed, one on another machine
        (folder.parent / f".tmp.{owner}.{'0' * 16}.export").mkdir()
    with making_folder(folder, replace=True) as made:
        (made / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"] and list(folder.parent.iterdir()) == [folder]
    (tmp_path / "link").symlink_to(folder)
    with making_folder(tmp_path / "link", replace=True) as made:
        (made / "newer").touch()
    assert (tmp_path / "link").is_symlink() and [path.name for path in folder.iterdir()] == ["newer"]
    with pytest.raises(UserError, match="plain"), making_folder(plain, replace=True):  # a file is no folder of ours
        pass
    assert plain.is_file() and sorted(path.name for path in tmp_path.iterdir()) == ["link", "plain", "runs"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_reaches_the_disk_with_the_umasks_permissions_and_links_in_it_lead_to_files_that_stay_as_they_are(
    tmp_path, monkeypatch, replace
):
    photo = tmp_path / "photo.jpg"
    photo.touch(mode=0o600)
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}"))))
    with making_folder(tmp_path / "made", replace=replace) as made:
        (made / "cat").mkdir()
        (made / "cat" / "linked.jpg").symlink_to(photo)
        (made / "cat" / "copied.png").touch(mode=0o600)
        assert len(made.name) > len("made") + 16  # 64 bits that nobody can foresee
    assert flushed == ["copied.png"]
    assert (tmp_path / "made" / "cat" / "copied.png").stat().st_mode & 0o777 == (tmp_path / "made").stat().st_mode & 0o666
    assert (tmp_path / "made" / "cat" / "linked.jpg").is_symlink() and photo.stat().st_mode & 0o777 == 0o600


def test_each_value_of_an_object_is_checked():
    check_record({"a": 0.5, "b": 1}, Each(Number(0, 1, whole=False)))
    with pytest.raises(RecordError, match=r"accuracy\.b is 2, expected a number from 0 to 1"):
        check_record({"a": 0.5, "b": 2}, Each(Number(0, 1, whole=False)), "accuracy")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_permissions_follow_the_umask_whatever_a_library_prefers(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "model.safetensors") as file:
            file.unlink()
            file.touch(mode=0o600)  # as safetensors makes its files
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_links_are_written_through_and_pipes_written_into(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real, link, pipe = tmp_path / "elsewhere" / "real.csv", tmp_path / "link.csv", tmp_path / "pipe"
    link.symlink_to(real)
    write_atomically(link, "one")
    assert link.is_symlink() and real.read_text() == "one" and not list(real.parent.glob(".tmp*"))
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="a pipe that nobody reads"):
        write_atomically(pipe, "two")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "two")
    assert os.read(reader, 100) == b"two" and os.read(reader, 100) == b"" and pipe.is_fifo()
    os.close(reader)
    write_atomically(os.devnull, "three")
    assert not os.path.isfile(os.devnull)


def test_two_writers_at_once_never_mix(tmp_path):
    with replacing(tmp_path / "a.csv") as first, replacing(tmp_path / "a.csv") as second:
        assert first != second
        first.write_text("1" * 1000)
        second.write_text("2" * 10)
    assert (tmp_path / "a.csv").read_text() == "1" * 1000


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "old.csv").write_text("kept")
    check_writable(tmp_path / "old.csv", "--output")
    check_writable(tmp_path / "new.csv", "--output")
    check_writable(os.devnull, "--output")
    assert (tmp_path / "old.csv").read_text() == "kept" and not (tmp_path / "new.csv").exists()
    with pytest.raises(UserError, match="is a folder"):
        check_writable(tmp_path, "--output")
    with pytest.raises(UserError, match="there is no folder"):
        check_writable(tmp_path / "no" / "such.csv", "--output")
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(tmp_path, "text")


KIND = {"names": [str], "count": Number(0, 10), "T": Number(0.0, whole=False), "note": Maybe(str), "inner": {"flag": bool}}
GOOD = {"names": ["a"], "count": 3, "T": 1.5, "inner": {"flag": True}, "more": None}


def test_a_good_record_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    assert read_record(tmp_path / "a.json", KIND) == GOOD
    check_record(2, (str, Number()))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"names": "a"}, "names is 'a', expected a list"),
        ({"names": ["a", 1]}, r"names\[1\] is 1, expected a text"),
        ({"count": True}, "count is True, expected a whole number from 0 to 10"),
        ({"count": 11}, "count is 11"),
        ({"count": 2.0}, "count is 2.0"),
        ({"T": float("nan")}, "T is nan, expected a number of at least 0"),
        ({"T": float("inf")}, "T is inf"),
        ({"note": 5}, "note is 5, expected a text"),
        ({"inner": {}}, "inner has no 'flag'"),
        ({"inner": None}, "inner is None, expected an object"),
    ],
)
def test_a_wrong_record_names_the_entry(tmp_path, change, problem):
    (tmp_path / "a.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(RecordError, match=problem):
        read_record(tmp_path / "a.json", KIND)


def test_files_that_are_no_records(tmp_path):
    os.mkfifo(tmp_path / "fifo.json")  # reading it would wait for ever
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "folder.json").mkdir()
    for name in ("fifo", "deep", "bytes", "list", "folder", "missing"):
        with pytest.raises(RecordError):
            read_record(tmp_path / f"{name}.json", KIND)
    with pytest.raises(RecordError, match="bytes"):
        read_record(tmp_path / "list.json", list, largest=1)


HOSTILE = (
    "../../x.png", "/etc/x.png", "a/../../../x.png", "..\\..\\x.png", "C:\\x.png", "a\0b.png", "\0", "..", ".", "", "/",
    "//a//b", "con", "NUL.txt", "aux.tar.gz", "com1", "a/lpt9/b", " ", "...", "a/./b", "\udcff\n.png", "~/x", "-rf",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_from_outside_leaves_the_folder(tmp_path, name):
    root = tmp_path / "a" / "root"
    root.mkdir(parents=True)
    place = place_below(root, name)
    place.write_text("x")
    written = [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert written == [place] and root in place.parents
    for part in place.relative_to(root).parts:
        assert not set(part) & set("\\/\0") and part.strip(" .")
        assert part.split(".")[0].strip().lower() not in ("con", "nul", "aux", "com1", "lpt9")


def test_ordinary_names_stay_what_they_are(tmp_path):
    for name in ("a.png", "train/cat/1, 'é'\n.png", ".hidden/x", "a..b/c", "console/nullable.txt", "12:30.png"):
        assert place_below(tmp_path, name) == tmp_path / name and inside(name) == name
    assert file_name("a b") == "a b" and file_name("a/b") == "a_b"
    assert inside("../x") == inside("/x") == inside("a/../../x") == inside("./x") == "x"


def test_links_that_lie_in_the_folder_are_not_followed(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "dangling").symlink_to(tmp_path / "victim")
    (tmp_path / "root" / "file").write_text("kept")
    for name in ("link/x", "link/deep/x", "link", "dangling", "dangling/x", "file", "file/x", "../link/x"):
        with pytest.raises(UserError, match="cannot be written"):
            place_below(tmp_path / "root", name)
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "victim").exists()


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "folder"
    with making_folder(target) as folder:
        (folder / "a").write_text("a")
        assert not target.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "folder", "a"]
    for error in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UserError("cannot write it"), KeyboardInterrupt()):
        with pytest.raises((UserError, KeyboardInterrupt)), making_folder(tmp_path / "half") as folder:
            (folder / "a").write_text("a")
            raise error
    with pytest.raises(UserError, match=r"cannot write .* not empty"), making_folder(target) as folder:
        (folder / "b").write_text("b")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "folder", "a"]
    with pytest.raises(UserError, match="cannot write"), making_folder(target / "a" / "below"):
        pass
    before = os.umask(0o027)
    try:
        with making_folder(tmp_path / "mine"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o750
