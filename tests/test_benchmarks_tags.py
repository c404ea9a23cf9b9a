"""What benchmarks.tags runs, in which order and how often, and its table, by hand."""

import json

import pytest

from benchmarks import tags
from coreg.learn.multi_options import NAMES, OPTIONS


def test_every_method_is_run_on_every_set_once_a_seed(tmp_path):
    jobs = list(tags.training(tmp_path, ["digits", "camvid"], [0, 1], list(tags.ROWS)))
    assert len({job.name for job in jobs}) == len(jobs) == 2 * 2 * len(tags.ROWS)
    assert {row.method for row in tags.ROWS.values()} == set(NAMES)
    # seeds are the outermost loop
    assert [job.name.endswith("-0") for job in jobs] == [True] * (len(jobs) // 2) + [False] * (len(jobs) // 2)
    assert all("{" not in word for job in jobs for word in job.command)
    for name, row in tags.ROWS.items():
        assert (row.observed == "none") == name.startswith("free_")
        own = {word[2:] for word in row.options if word.startswith("--")} - {"positives", "keep"}
        assert own <= set(OPTIONS[row.method].__dataclass_fields__), name


def test_images_of_camvid_have_the_labels_that_cover_a_hundredth(tmp_path):
    data = tmp_path / "camvid"
    data.mkdir()
    header = ["file", "split", *tags.LABELS, "Sky"]
    rows = [["train/a.jpg", "train", *[0.01, 0.0099, 0.5, 0, 0, 0, 0, 0], 0.4], ["val/b.jpg", "val", *[0] * 8, 1]]
    (data / "pixel_fractions.csv").write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]))
    tags.write_list(data, tmp_path / "place")
    lines = (tmp_path / "place" / "images.csv").read_text().split()
    assert lines == ["path,labels,split", "data/train/a.jpg,Pole;Tree,train", "data/val/b.jpg,,val"]
    assert (tmp_path / "place" / "data").resolve() == data


def report(path, value):
    path.parent.mkdir(parents=True)
    content = {"schema": 1, "method": "m", "dataset": "d", "annotator": {"name": "a"}, "seed": 0, "labels_used": 0}
    path.write_text(json.dumps(content | {"tags": {"test": {"mAP": value, "images": 9}}}))


def test_the_table_has_what_is_finished(tmp_path, capsys):
    report(tmp_path / "digits" / "an-0" / "report.json", 0.25)
    report(tmp_path / "digits" / "an-1" / "report.json", 0.35)
    report(tmp_path / "camvid" / "untrained" / "piaa" / "report.json", 0.5)
    (tmp_path / "logs" / "digits").mkdir(parents=True)
    (tmp_path / "logs" / "digits" / "an-0.seconds").write_text("12.00\n8.00\n")
    (tmp_path / "camvid" / "x").mkdir()
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- tags -->\n<!-- end of tags -->\nb\n")
    words = ["--output_dir", str(tmp_path), "--data", str(tmp_path), "--tables", "--page", str(page)]
    assert tags.main(words) == 0
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().split("\n") if "|" in line]
    assert cells[2][:4] == ["nothing trained: PIAA", "none", "–", "–"] and cells[2][5] == "50.0"
    assert cells[3] == ["AN", "1 present", "30.0 ± 7.1", "2", "20", "–", "–", "–"] and len(cells) == 4


def test_a_set_of_which_nothing_is_finished_has_no_columns(tmp_path):
    report(tmp_path / "digits" / "an-0" / "report.json", 0.25)
    (tmp_path / "camvid" / "an-0").mkdir(parents=True)
    assert "CamVid" not in tags.table(tmp_path, ["digits", "camvid"], [0])


def test_a_set_that_is_not_there_is_left_out(tmp_path, capsys):
    words = ["--output_dir", str(tmp_path), "--data", str(tmp_path), "--plan"]
    assert tags.main(words) == 0
    out = capsys.readouterr().out
    assert "left out: CamVid" in out and "digits/bce-2" in out and "camvid/" not in out.replace(f"{tmp_path}/camvid", "")
    with pytest.raises(SystemExit):
        tags.main([*words, "--jobs", "0"])
