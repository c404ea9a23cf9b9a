"""What is printed cannot steer a terminal, and what a spreadsheet opens cannot calculate."""

import csv
import io
import sys

import numpy as np
import pytest
from PIL import Image
from runs import refused
from test_annotate_annotators import save_tiny_clip

import annotate_vlm
from coreg.annotate.export import ExportConfig, export
from coreg.errors import UserError, exits_with_one_line
from coreg.plaintext import csv_rows, printable, without_credentials
from coreg.report.report import summary, write_labels
from coreg.settings import Place

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
FORMULA = '=HYPERLINK("http://example.org")'


def test_control_characters_are_shown_and_letters_are_left_alone():
    assert printable(f"a{ESCAPE}") == "a\\x1b]0;owned\\x07\\x1b[2J"
    assert printable("one\ntwo\t\r\x7f\x9b3m") == "one\\ntwo\\t\\r\\x7f\\x9b3m"
    assert printable("one\ntwo\r", lines=True) == "one\ntwo\\r"
    assert printable("\u202etxt.exe\u2066\u2028") == "\\u202etxt.exe\\u2066\\u2028"
    assert printable("bytes \udcff of a file name") == "bytes \\udcff of a file name"
    for text in ("Ärger naïve 猫 🐈 שלום ไทย \u200d é ½ a\\b", "plain"):
        assert printable(text) == text
    for code in range(sys.maxunicode + 1):
        shown = printable(chr(code))
        assert shown == chr(code) or (shown.isascii() and shown.isprintable())
        assert shown.isprintable() or code > 0x9F
        shown.encode()


def test_errors_are_one_line_without_escapes(capsys):
    @exits_with_one_line
    def main():
        raise UserError(f"cannot read {ESCAPE}\n/x")

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "error: cannot read \\x1b]0;owned\\x07\\x1b[2J\\n/x\n"


def test_formulas_get_an_apostrophe_where_that_is_asked_for():
    rows = [[FORMULA, "+1", "-1", "@x", "\tx", "\rx", "cat", "", "a=b", "'=", 3, -0.5, None]]
    for safe in (False, True):
        file = io.StringIO(newline="")
        csv_rows(file, safe)(rows[0])
        (read,) = csv.reader(io.StringIO(file.getvalue(), newline=""))
        expected = ["" if cell is None else str(cell) for cell in rows[0]]
        assert read == ([f"'{cell}" for cell in expected[:6]] + expected[6:] if safe else expected)


def test_labels_of_a_run_can_be_opened_in_a_spreadsheet(tmp_path):
    logits, names, paths = {"ensemble": np.eye(2)}, ["-cat", "@dog"], [f"{FORMULA}.png", "b.png"]
    for safe in (False, True):
        write_labels(tmp_path / "labels.csv", names, paths, logits, [], np.array([0, 1]), safe_csv=safe)
        with (tmp_path / "labels.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        mark = "'" if safe else ""
        assert [row["path"] for row in rows] == [f"{mark}{FORMULA}.png", "b.png"]
        assert [row["label"] for row in rows] == [f"{mark}-cat", f"{mark}@dog"]
        assert [row["annotator_label"] for row in rows] == [f"{mark}-cat", f"{mark}@dog"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A list of images with names that nobody should print, one of which cannot be read, and a model."""
    root = tmp_path_factory.mktemp("place")
    save_tiny_clip(root / "model")
    (root / "=1+1.png").write_bytes(b"")
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 0, 90)).save(root / f"=2+{number}.png")
    with (root / "list.csv").open("w", newline="") as file:
        write = csv_rows(file)
        write(["path", "label"])
        for name, label in zip(("1+1", "2+0", "2+1", "2+2", "2+3"), ("=cat", "dog", "=cat", "dog", "=cat")):
            write([f"={name}.png", label])
    (root / "classes.txt").write_text("=cat\ndog\n")
    return root


def test_annotating_prints_no_escapes_and_writes_no_formulas(place, tmp_path, capsys):
    job = ["--images", place / "list.csv", "--vlm", f"local-dir:{place}/model", "--workers", "0"]
    job += ["--classes", place / "classes.txt", "--output_dir"]
    annotate_vlm.main([str(word) for word in [*job, tmp_path / "ann\x1b[1m", "--safe_csv"]])
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out and "ann\\x1b[1m" in printed.out
    with (tmp_path / "ann\x1b[1m" / "errors.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["'=1+1.png"]
    export(str(tmp_path / "ann\x1b[1m"), ExportConfig(str(tmp_path / "all.csv"), safe_csv=True), Place())
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == {"'=cat", "dog"} and rows[0]["path"].startswith("'=")
    line = refused(capsys, annotate_vlm.main, "--images", place / "photos\x1b[5m")
    assert "\x1b" not in line and "photos\\x1b[5m" in line


def test_the_summary_of_a_run_shows_no_escapes_and_names_curves_where_there_are_some(tmp_path):
    report = {
        "dataset": f"photos{ESCAPE}", "annotator": {"name": "m"}, "method": "Co-Reg", "seed": 0, "parameters": 1,
        "images_per_second": 1, "wall_seconds": 1, "peak_memory_mb": 1, "needs_review": 0, "per_class_split": "test",
        "per_class_accuracy": {f"cat{ESCAPE}": {"annotator": 0.5, "ensemble": 0.5, "n": 2}},
    }  # fmt: skip
    text = summary(report, tmp_path)
    assert "\x1b" not in text and "photos\\x1b" in text and "cat\\x1b" in text and len(text.splitlines()) > 5
    assert "tensorboard" not in text
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1.host.1.0").write_bytes(b"")
    assert f"curves: tensorboard --logdir {tmp_path}" in summary(report, tmp_path)


def test_urls_lose_what_opens_doors():
    for text, clean in {
        "https://me:s3@cret@host/a.tar?key=1&b=2": "https://host/a.tar",
        "cannot read https://host/a.tar?key=1 (500)": "cannot read https://host/a.tar (500)",
        "URL('http://t0ken@host:80/x?y')": "URL('http://host:80/x')",
        'joined:["s3://a/{0..9}.tar?v=1", "b"]': 'joined:["s3://a/{0..9}.tar", "b"]',
        "hf://datasets/me/set@main/x.parquet": "hf://datasets/me/set@main/x.parquet",
        "who? me@host, s3: //x?": "who? me@host, s3: //x?",
    }.items():
        assert without_credentials(text) == clean
