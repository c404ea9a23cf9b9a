"""Claims on blocks: one process a block, and no block is lost to a process that died."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from coreg.errors import UserError
from coreg.store import claims
from coreg.store.claims import BlockQueue


@pytest.fixture
def store(tmp_path):
    (tmp_path / "blocks").mkdir()
    return tmp_path, [tmp_path / "blocks" / f"{index:05d}.safetensors" for index in range(6)]


def test_a_block_is_taken_by_one_process_only(store):
    root, files = store
    with BlockQueue(root, files) as one, BlockQueue(root, files, start=0.5) as two:
        taken = [queue.claim() for queue in (one, two, one, two, one, two)]
        assert sorted(taken) == [0, 1, 2, 3, 4, 5] and taken[:4] == [0, 3, 1, 4]  # they begin at different places
        assert one.claim() is None and two.claim() is None
        one.release(1)
        assert two.claim() == 1
        files[0].touch()
        one.release(0)
        assert two.claim() is None and two.finished() == [True] + [False] * 5
    with BlockQueue(root, files) as three:  # what they left is free again, what is finished is not taken
        assert [three.claim() for _ in range(6)] == [1, 2, 3, 4, 5, None]
        three.clear()
        files[1].unlink(missing_ok=True)
        assert three.claim() is None and not (root / "claims").exists()  # somebody saw the job finished
    assert not (root / "claims").exists()


def test_a_folder_that_another_process_clears_away_is_made_again(store, monkeypatch):
    """It has seen the job finished, just when this one begins."""
    root, files = store
    touch, cleared = Path.touch, []

    def clearing_touch(path, *args, **kwargs):
        if len(cleared) < 2:
            cleared.append(path.parent.rmdir())
        touch(path, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", clearing_touch)
    with BlockQueue(root, files) as queue:
        assert queue.alive.exists() and queue.claim() == 0
    monkeypatch.setattr(Path, "touch", lambda path: path.parent.rmdir() or touch(path))
    with pytest.raises(UserError, match=r"cannot write into .*claims: No such file"), BlockQueue(root, files):
        pass


def test_many_processes_at_once_take_every_block_once(tmp_path):
    (tmp_path / "blocks").mkdir()
    files = [tmp_path / "blocks" / f"{index}" for index in range(120)]
    queues, taken = [BlockQueue(tmp_path, files) for _ in range(8)], []

    def take(queue):
        with queue:
            while (index := queue.claim()) is not None:
                taken.append(index)
                files[index].touch()
                queue.release(index)

    threads = [threading.Thread(target=take, args=(queue,)) for queue in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(120))
    assert os.listdir(tmp_path / "claims") == []


def test_a_block_of_a_killed_process_is_free_at_once(store):
    root, files = store
    program = (
        "import os, sys; from pathlib import Path; from coreg.store.claims import BlockQueue\n"
        "files = [Path(name) for name in sys.argv[2:]]\n"
        "queue = BlockQueue(Path(sys.argv[1]), files).__enter__()\n"
        "print(queue.claim(), queue.claim(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(root), *map(str, files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "0 1\n"
        with BlockQueue(root, files) as queue:
            assert queue.claim() == 2  # the others are in work
            other.kill()
            other.wait()
            assert [queue.claim() for _ in range(6)] == [0, 1, 3, 4, 5, None]


def claimed_elsewhere(root, files, age, name="elsewhere.1.abcd"):
    """Block 0 is claimed by a process of another machine that was last heard of `age` seconds ago."""
    (root / "claims").mkdir(exist_ok=True)
    (root / "claims" / "00000.claim").write_text(name)
    (root / "claims" / f"{name}.alive").touch()
    then = time.time() - age
    os.utime(root / "claims" / f"{name}.alive", (then, then))
    os.utime(root / "claims" / "00000.claim", (then, then))


def test_a_process_of_another_machine_is_given_time(store):
    root, files = store
    claimed_elsewhere(root, files, age=claims.STALE_SECONDS - 20)
    with BlockQueue(root, files) as queue:
        assert queue.claim() == 1
        claimed_elsewhere(root, files, age=claims.STALE_SECONDS + 20)
        assert queue.claim() == 0
        assert (root / "claims" / "00000.claim").read_text() == queue.name
        queue.release(0)
        claimed_elsewhere(root, files, age=0)
        (root / "claims" / "elsewhere.1.abcd.alive").unlink()  # it ended without giving its block back
        assert queue.claim() == 0


def test_a_process_that_died_between_making_and_writing_a_claim(store):
    root, files = store
    (root / "claims").mkdir()
    claim = root / "claims" / "00000.claim"
    claim.touch()
    with BlockQueue(root, files) as queue:
        assert queue.claim() == 1
        then = time.time() - claims.STALE_SECONDS - 20
        os.utime(claim, (then, then))
        assert queue.claim() == 0


def test_a_living_process_keeps_its_claims_however_long_a_block_takes(store, monkeypatch):
    root, files = store
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(claims, "STALE_SECONDS", 0.6)
    with BlockQueue(root, files[:1]) as one, BlockQueue(root, files[:1]) as two:
        assert one.claim() == 0
        time.sleep(1.0)
        assert two.claim() is None
        one._ended.set()  # it stands still
        time.sleep(1.0)
        assert two.claim() == 0
        one.release(0)  # it comes back: the block is not its own any more
        assert two.claimed == {0} and (root / "claims" / "00000.claim").read_text() == two.name


def test_a_folder_that_cannot_be_written_is_one_line(store):
    root, files = store
    (root / "claims").write_text("a file")
    with pytest.raises(UserError) as raised, BlockQueue(root, files):
        pass
    assert "cannot write into" in str(raised.value) and "\n" not in str(raised.value)


def test_claims_that_nobody_wrote_hold_nobody_up(store, monkeypatch):
    root, files = store
    (root / "claims").mkdir()
    old = time.time() - 10_000
    for index, content in enumerate((b"\xff\xfe", b"\0", b"../../../etc/passwd", b"x" * 10_000, b"")):
        (root / "claims" / f"{index:05d}.claim").write_bytes(content)
        os.utime(root / "claims" / f"{index:05d}.claim", (old, old))
    with BlockQueue(root, files) as queue:
        assert [queue.claim() for _ in range(7)] == [0, 1, 2, 3, 4, 5, None]
    (root / "claims" / "00000.claim").mkdir()  # nobody would ever let go of it
    with BlockQueue(root, files) as queue, pytest.raises(UserError, match="is no file; remove it"):
        queue.claim()
