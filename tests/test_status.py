"""Progress in logs, and where a job stands by its folder."""

import json
import os
import re
import shutil
import sys

import pytest
from conftest import SMALL_JOB

import train_coreg
from coreg import progress
from coreg.errors import UserError
from coreg.progress import ProgressFile, progress_bar
from coreg.status import main, status
from coreg.store.store import AnnotationStore


def test_without_a_terminal_a_bar_is_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar(total=4, desc="predict", unit="image") as bar:
        for _ in range(4):
            bar.update()
    written = capsys.readouterr().err
    assert "\r" not in written and "\n\n" not in written
    lines = written.splitlines()
    assert [re.search(r"\d/4", line).group() for line in lines] == ["0/4", "1/4", "2/4", "3/4", "4/4", "4/4"]
    assert all(line.startswith("predict") and "image" in line for line in lines)


def test_without_a_terminal_there_is_a_line_a_minute(capsys):
    for _ in progress_bar(iterable=range(1000), desc="decoding"):
        pass
    assert len(capsys.readouterr().err.splitlines()) == 2  # the first and the last


def test_on_a_terminal_a_bar_is_drawn_over(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(total=1) as bar:
        bar.update()
    assert "\r" in capsys.readouterr().err


def test_progress_is_written_once_a_minute_with_the_time_that_is_left(tmp_path, monkeypatch):
    clock = iter([100.0, 100.0, 130.0, 161.0, 161.0, 400.0])
    monkeypatch.setattr("time.time", lambda: next(clock))
    file = ProgressFile(tmp_path, "Co-Reg", 8)  # it goes on after two of eight epochs
    file.begin(2.0)
    assert json.loads((tmp_path / "progress.json").read_text())["seconds_left"] is None
    file.update(2.5)  # after 30 s
    assert json.loads((tmp_path / "progress.json").read_text())["done"] == 2.0
    file.update(3.0)  # one epoch in 61 s, and five are left
    assert json.loads((tmp_path / "progress.json").read_text()) == {
        "doing": "Co-Reg", "done": 3.0, "total": 8, "running": True, "at": 161, "seconds_left": 305,
    }  # fmt: skip


# ---- where a training stands ---------------------------------------------------------------------------------------


def at(folder, done, running, seconds_left=90):
    record = {"doing": "Co-Reg", "done": done, "total": 8, "running": running, "at": 1000, "seconds_left": seconds_left}
    (folder / "progress.json").write_text(json.dumps(record))


def test_a_training_from_its_beginning_to_its_end(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    assert status(tmp_path, 1000) == "begun, no epoch yet"
    at(tmp_path, 0, True, None)
    assert status(tmp_path, 1000) == "Co-Reg: epoch 0.0 of 8 (0%)"
    at(tmp_path, 2, True)
    assert status(tmp_path, 1030) == "Co-Reg: epoch 2.0 of 8 (25%), about 0:01:00 left"
    assert status(tmp_path, 1000 + 3600) == (
        "Co-Reg: epoch 2.0 of 8 (25%), silent for 1:00:00: it was killed or hangs; "
        "the same command goes on from its last checkpoint"
    )
    at(tmp_path, 2, False)
    assert status(tmp_path, 1005) == "Co-Reg: epoch 2.0 of 8 (25%), stopped, 0:00:05 ago"
    at(tmp_path, 8, False)
    assert status(tmp_path, 1005) == "Co-Reg: epoch 8.0 of 8 (100%), its report is being written, 0:00:05 ago"


def test_a_damaged_record_is_one_line(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    (tmp_path / "progress.json").write_text('{"doing": "Co-Reg"}')
    with pytest.raises(UserError, match="is damaged"):
        status(tmp_path, 1000)


def test_a_folder_without_a_job_and_no_folder_at_all(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no job; give the --output_dir"):
        status(tmp_path, 0)
    with pytest.raises(SystemExit):
        main([])
    assert "required: FOLDER" in capsys.readouterr().err


def test_a_training_that_is_finished(small_store, tmp_path, capsys):
    words = ["--annotations", small_store, "--output_dir", tmp_path / "run", *SMALL_JOB]
    train_coreg.main([str(word) for word in words])
    lines = [line for line in capsys.readouterr().err.splitlines() if "| epoch" in line]
    assert [re.search(r"epoch [\d.]+", line).group() for line in lines] == [
        "epoch 0.0",
        "epoch 3.0",
    ]  # in less than a minute
    record = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert (record["done"], record["total"], record["running"]) == (3, 3, False)
    assert main([str(tmp_path / "run"), str(small_store)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    accuracy = json.loads((tmp_path / "run" / "report.json").read_text())["accuracy"]["test"]["ensemble"]
    assert first.startswith(f"{tmp_path / 'run'}: finished: accuracy ") and f"test {accuracy:.1%}" in first
    assert second == f"{small_store}: finished: 102 images"


# ---- where an annotation stands ------------------------------------------------------------------------------------


def test_an_annotation_by_its_blocks_and_by_who_works_on_it(small_store, tmp_path):
    store = AnnotationStore.open(small_store)
    root = tmp_path / "annotations"  # of a training that annotates first
    shutil.copytree(small_store, root)
    manifest = json.loads((root / "manifest.json").read_text()) | {"block_size": 20}  # 102 images: six blocks
    (root / "manifest.json").write_text(json.dumps(manifest))
    (root / "errors.csv").unlink()
    shutil.rmtree(root / "blocks")
    (root / "blocks").mkdir()
    assert len(store) == 102
    assert status(root, 5000) == "0 of 102 images (0%), nobody works on it; the same command goes on"
    for number in range(3):  # one every ten seconds
        block = root / "blocks" / f"{number:05d}.safetensors"
        block.touch()
        os.utime(block, (4000 + 10 * number,) * 2)
    (root / "claims").mkdir(exist_ok=True)
    for name, beat in (("a", 4990), ("b", 4995), ("dead", 4000)):
        (root / "claims" / f"{name}.alive").touch()
        os.utime(root / "claims" / f"{name}.alive", (beat, beat))
    # 40 images in 20 seconds, and 42 are left
    assert status(root, 5000) == "60 of 102 images (59%), 2 processes work on it, 2.0 images/s, about 0:00:21 left"
    assert status(tmp_path, 5000) == f"annotations: {status(root, 5000)}"
