"""coreg-report: what is joined, what is left out, and tables that hostile names cannot break."""

import csv
import html.parser
import io
import json
import os
import random
import re
import statistics

import pytest
import yaml

from coreg.report.compare import main, read_run
from coreg.report.record import read_report, write_report
from coreg.report.tables import FAMILIES, OTHERS, Row, Run, as_csv, as_html, as_markdown, compare, special_settings


def report(method="Co-Reg", seed=0, test=0.9, train=0.95, n=360, **more):
    accuracy = {
        split: {"ensemble": share, "n": n, "interval": [share - 0.03, share + 0.03]}
        for split, share in (("test", test), ("train", train))
        if share is not None
    }
    return {
        "schema": 1,
        "method": method,
        "dataset": "builtin:digits",
        "seed": seed,
        "labels_used": 0,
        "annotator": {"name": "builtin:glyph-clip"},
        "accuracy": accuracy,
        "parameters": 307722,
        "training_seconds": 101.0,
        "wall_seconds": 110.0,
    } | more


def write(folder, content, **settings):
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(content if isinstance(content, str) else json.dumps(content))
    if settings:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def printed(capsys, *arguments):
    """stdout and the lines of stderr."""
    main([str(word) for word in arguments])
    streams = capsys.readouterr()
    return streams.out, streams.err.splitlines()


def rows_of(markdown):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines() if line[:1] == "|"]


def test_seeds_become_mean_and_standard_deviation(tmp_path, capsys):
    shares = [0.925, 0.914, 0.947]
    for seed, share in enumerate(shares):
        write(tmp_path / f"coreg-{seed}", report(seed=seed, test=share), seed=seed, epochs=30, output_dir=f"r/{seed}")
    write(tmp_path / "kd", report("KD, averaged", test=0.8), seed=0, epochs=30)
    out, err = printed(capsys, tmp_path)
    assert err == []
    mean, sd = 100 * statistics.mean(shares), 100 * statistics.stdev(shares)
    (coreg,) = (row for row in rows_of(out) if row[0] == "Co-Reg")
    assert coreg == ["Co-Reg", f"{mean:.1f} ± {sd:.1f}", "95.0 ± 0.0", *"–––", "3", "0", "30", "0.31", "101", "110"]
    (kd,) = (row for row in rows_of(out) if row[0] == "KD, averaged")
    assert kd[1] == "80.0 (77.0–83.0)" and kd[6] == "1"
    lines = csv.DictReader(io.StringIO(printed(capsys, tmp_path, "--format", "csv")[0]))
    (line,) = (row for row in lines if row["test_sd"])
    assert float(line["test_mean"]) == pytest.approx(statistics.mean(shares), abs=1e-15)
    assert float(line["test_sd"]) == pytest.approx(statistics.stdev(shares), abs=1e-15)
    assert line["seeds"] == "0 1 2" and line["test_low"] == "" and line["parameters"] == "307722.0"


def test_scores_without_labels_are_means_over_the_runs_that_have_them(tmp_path, capsys):
    for seed, (covered, consensus) in enumerate([(0.8, 0.9), (0.9, 0.96)]):
        scores = {"covering_rate": {"train": covered, "test": 0.1}, "consensus": consensus}
        write(tmp_path / f"coreg-{seed}", report(seed=seed, label_free=scores), seed=seed)
    write(tmp_path / "coreg-2", report(seed=2), seed=2)  # of an older version
    (coreg,) = (row for row in rows_of(printed(capsys, tmp_path)[0]) if row[0] == "Co-Reg")
    assert coreg[3:6] == ["85.0", "–", "93.0"]
    (line,) = csv.DictReader(io.StringIO(printed(capsys, tmp_path, "--format", "csv")[0]))
    assert float(line["covering_rate"]) == pytest.approx(0.85) and line["approximated_accuracy"] == ""


def test_the_run_that_is_picked_without_labels_is_named_under_the_table(tmp_path, capsys):
    def scores(covering, consensus):
        return {"covering_rate": {"train": 1 - covering, "test": covering}, "consensus": consensus}

    write(tmp_path / "believes", report("PRODEN", label_free={"covering_rate": {"test": 1.0}}))  # one network
    write(tmp_path / "first", report(test=0.95, label_free=scores(0.8, 0.9)))
    output, _ = printed(capsys, tmp_path)
    assert "Picked" not in output  # nothing to pick from
    write(tmp_path / "a_b", report(seed=1, test=0.5, label_free=scores(0.6, 0.95)))
    write(tmp_path / "nonsense", report(seed=2, label_free=scores(0.59, 1.0)))
    write(tmp_path / "tower", report(seed=3, label_free=scores(0.78, 1.0)), backbone="annotator")
    output, _ = printed(capsys, tmp_path)
    place = str(tmp_path / "a_b").replace("_", "\\_")
    assert f"\nPicked without labels: {place} (Co-Reg, consensus 95.0 %, among the runs of two networks).\n" in output
    printed(capsys, tmp_path, "--format", "html", "--output", tmp_path / "c.html")
    assert f'<p class="note">Picked without labels: {tmp_path / "a_b"} (' in (tmp_path / "c.html").read_text()


def test_without_test_images_the_training_images_are_covered(tmp_path, capsys):
    for name, seed, covering, consensus in (("good", 0, 0.9, 0.8), ("nonsense", 1, 0.3, 0.99)):
        scores = {"covering_rate": {"train": covering}, "consensus": consensus}
        write(tmp_path / name, report(seed=seed, test=None, label_free=scores))
    assert f"{tmp_path / 'good'} (Co-Reg" in printed(capsys, tmp_path)[0].replace("\\_", "_")


def test_other_metrics_stand_in_a_table_of_their_own(tmp_path, capsys):
    for seed, (f1, nll) in enumerate([(0.8, 0.5), (0.9, 0.75)]):
        measured = {"test": {"macro_f1": f1, "nll": nll, "few": 0.25}, "train": {"macro_f1": 0.1, "ece": 0.1}}
        write(tmp_path / f"coreg-{seed}", report(seed=seed, metrics=measured), seed=seed)
    write(tmp_path / "kd", report("KD"))  # of an older version
    out = printed(capsys, tmp_path)[0]
    head, _, line = rows_of(out)[-3:]
    assert head == ["method", "macro F1", "classes of few images", "NLL"]
    assert line == ["Co-Reg", "85.0%", "25.0%", "0.625"]
    assert "20 to 100" in out and "macro F1" in as_html(compare([read_run(tmp_path / "coreg-0" / "report.json")])[0])
    lines = {row["method"]: row for row in csv.DictReader(io.StringIO(printed(capsys, tmp_path, "--format", "csv")[0]))}
    assert float(lines["Co-Reg"]["test_macro_f1"]) == pytest.approx(0.85) and lines["Co-Reg"]["test_ece"] == ""
    assert lines["KD"]["test_macro_f1"] == ""
    write(tmp_path / "bad", report(seed=7, metrics={"test": {"macro_f1": "0.9"}}))
    assert "metrics.test.macro_f1" in " ".join(printed(capsys, tmp_path)[1])


def tagged(method, seed, value, **more):
    measured = {"mAP": value, "CF1": value / 2, "OF1": 0.625, "images": 90, "annotator": 0.31}
    tags = {"test": measured, "validation": measured | {"mAP": value - 0.1}, **more}
    return report(method, seed, tags=tags, labels_used=77) | {"accuracy": {}}


def test_runs_with_several_labels_an_image_stand_in_a_table_of_their_own(tmp_path, capsys):
    for seed, value in enumerate([0.5, 0.75]):
        write(tmp_path / f"vlpl-{seed}", tagged("VLPL", seed, value), seed=seed, method="vlpl", epochs=10)
    write(tmp_path / "an", tagged("AN", 0, 0.9), seed=0, method="an", epochs=10, tags="mine.csv")
    write(tmp_path / "coreg", report())
    out, err = printed(capsys, tmp_path)
    assert err == [] and out.count("## builtin:digits, annotated by builtin:glyph-clip") == 2
    head = next(row for row in rows_of(out) if row[1] == "test mAP %")
    rows = {row[0]: dict(zip(head, row)) for row in rows_of(out)}
    assert list(rows)[-2:] == ["AN", "VLPL"]  # the best first
    sd = 100 * statistics.stdev([0.5, 0.75])
    assert rows["VLPL"]["test mAP %"] == f"62.5 ± {sd:.1f}" and rows["VLPL"]["OF1 %"] == "62.5 ± 0.0"
    assert rows["AN"] == {
        "method": "AN", "test mAP %": "90.0", "CF1 %": "45.0", "OF1 %": "62.5", "annotator mAP %": "31.0",
        "validation mAP %": "80.0", "runs": "1", "observed": "77", "epochs": "10", "M parameters": "0.31",
        "training s": "101", "wall s": "110",
    }  # fmt: skip
    assert "mean over all labels of average precision" in out and "Accuracy of the last epoch" in out
    page = printed(capsys, tmp_path, "--format", "html")[0]
    assert "test mAP %" in page and "62.5 ±" in page
    lines = {row["method"]: row for row in csv.DictReader(io.StringIO(printed(capsys, tmp_path, "--format", "csv")[0]))}
    assert float(lines["VLPL"]["test_mAP"]) == pytest.approx(0.625) and lines["Co-Reg"]["test_mAP"] == ""
    assert float(lines["AN"]["validation_mAP"]) == pytest.approx(0.8) and lines["AN"]["test_mean"] == ""
    alone = printed(capsys, tmp_path / "an")[0]
    assert "Accuracy of the last epoch" not in alone
    write(tmp_path / "bad", tagged("AN", 7, 0.5) | {"tags": {"test": {"mAP": 0.5, "images": 3, "CF1": "x"}}})
    assert "tags.test.CF1" in " ".join(printed(capsys, tmp_path)[1])


def test_families_stand_in_the_order_of_the_papers_and_the_best_first(tmp_path, capsys):
    names = [
        "Supervised", "Co-Reg", "LoRA, 4 shots", "CoOp, 1 shot", "PiCO+", "CR-DPLL", "RC", "ALIM-Scale", "Brand new",
        "DivideMix, averaged", "KD, single template", "Zero-shot, transductive", "Zero-shot, single template",
    ]  # fmt: skip
    for number, name in enumerate(names):
        write(tmp_path / f"r{number}", report(name, test=0.5 + number / 100))
    first_cells = [row[0] for row in rows_of(printed(capsys, tmp_path)[0])[2:]]
    families = [name.strip("*") for name in first_cells if name.startswith("**")]
    assert families == [*FAMILIES, OTHERS]
    assert [name for name in first_cells if not name.startswith("**")] == [
        "Zero-shot, single template", "Zero-shot, transductive", "KD, single template", "DivideMix, averaged",
        "ALIM-Scale", "RC", "CR-DPLL", "PiCO+", "CoOp, 1 shot", "LoRA, 4 shots", "Co-Reg", "Supervised", "Brand new",
    ]  # fmt: skip


def test_settings_that_differ_make_other_rows():
    assert special_settings([{"a": "1", "b": "2"}]) == [""]
    # most say a 1 and b 2: only what departs is named
    ablations = [{"a": "1", "b": "2"}, {"a": "0", "b": "2"}, {"a": "1", "b": "9"}]
    assert special_settings(ablations) == ["", "a 0", "b 9"]
    # no majority, and a setting that one of them lacks
    assert special_settings([{"lr": "0.1"}, {"lr": "0.2"}]) == ["lr 0.1", "lr 0.2"]
    assert special_settings([{"few_shot": "4"}, {}, {}]) == ["few_shot 4", "", ""]


def test_rows_are_kept_apart_by_settings_and_labels_but_not_by_places(tmp_path, capsys):
    for seed in (0, 1):
        common = {"seed": seed, "output_dir": f"x{seed}", "workers": seed, "annotations": f"y{seed}"}
        write(tmp_path / f"a{seed}", report(seed=seed), epochs=30, **common)
        write(tmp_path / f"b{seed}", report(seed=seed), epochs=360, **common)
        write(tmp_path / f"d{seed}", report(seed=seed), epochs=30, contrast_weight=0, **common)
    write(tmp_path / "c", report(labels_used=40), epochs=30, seed=0)
    cells = {tuple(row[i] for i in (0, 6, 7, 8)) for row in rows_of(printed(capsys, tmp_path)[0]) if row[0][:2] == "Co"}
    assert cells == {
        ("Co-Reg", "2", "0", "30"), ("Co-Reg", "2", "0", "360"), ("Co-Reg (contrast\\_weight 0)", "2", "0", "30"),
        ("Co-Reg", "1", "40", "30"),
    }  # fmt: skip


def test_a_run_of_an_older_version_with_the_options_of_all_methods_stands_in_the_row_of_a_new_one(tmp_path, capsys):
    same = {"method": "cc", "schedule": "cosine", "epochs": 3}
    write(tmp_path / "old", report("CC", seed=0), **same, seed=0, leverage=1.0, pure_ratio=0.6, projection_dim=128)
    write(tmp_path / "new", report("CC", seed=1), **same, seed=1)
    (row,) = (row for row in rows_of(printed(capsys, tmp_path)[0]) if row[0].startswith("CC"))
    assert row[0] == "CC" and row[6] == "2"


def test_a_run_given_twice_counts_once_and_a_repeated_seed_is_left_out(tmp_path, capsys):
    write(tmp_path / "a", report())
    write(tmp_path / "b", report())
    out, err = printed(capsys, tmp_path / "a", tmp_path / "a" / "report.json", tmp_path)
    assert next(row for row in rows_of(out) if row[0] == "Co-Reg")[6] == "1"
    assert len(err) == 1 and "b/report.json repeats" in err[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1, 2]", "expected an object"),
        ("{}", "schema None"),
        (report(schema=7), "schema 7"),
        (report(method=["x"]), "method"),
        (report() | {"seed": "0"}, "seed"),
        (report(annotator="clip"), "annotator"),
        (report(test=1.5), "accuracy"),
        (report(accuracy={"test": 0.5}), "accuracy"),
        (report(accuracy={"test": {"ensemble": float("nan"), "interval": [0, 1]}}), "accuracy"),
        (report(wall_seconds=float("inf")), "wall_seconds"),
        (report(labels_used=10**400), "labels_used"),
        (report(parameters="many"), "parameters"),
        (report(accuracy={"test": {"ensemble": 0.5, "interval": [0.4, 0.5, 0.6]}}), "interval has 3 numbers"),
        (report(checksum="0" * 64), "its checksum is wrong"),
    ],
)
def test_what_is_no_report_is_left_out_with_one_line(tmp_path, capsys, content, message):
    write(tmp_path / "bad", content)
    write(tmp_path / "good", report())
    out, err = printed(capsys, tmp_path)
    assert len(err) == 1 and err[0].startswith("left out: ") and message in err[0] and "bad/report.json" in err[0]
    assert sum(row[0] == "Co-Reg" for row in rows_of(out)) == 1


def test_nothing_to_compare_is_one_line(tmp_path, capsys):
    for arguments in ([], [str(tmp_path)], [str(tmp_path / "nowhere")], [str(tmp_path), "--format", "pdf"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert sum(line.startswith("error:") for line in capsys.readouterr().err.splitlines()) == 1


def test_missing_truth_and_times_are_dashes(tmp_path, capsys):
    bare = report()
    for name in ("accuracy", "parameters", "training_seconds", "wall_seconds"):
        del bare[name]
    write(tmp_path / "a", bare)
    write(tmp_path / "b", report("KD, averaged", test=None))
    out, _ = printed(capsys, tmp_path)
    assert ["Co-Reg", *"–––––", "1", "0", *"––––"] in rows_of(out)
    assert next(row for row in rows_of(out) if row[0].startswith("KD"))[1:3] == ["–", "95.0 (92.0–98.0)"]
    assert "Co-Reg" in printed(capsys, tmp_path, "--format", "csv")[0]
    assert "Co-Reg" in printed(capsys, tmp_path, "--format", "html")[0]


def test_a_settings_file_that_is_nonsense_is_as_good_as_none(tmp_path):
    for number, content in enumerate(("a: [", "- 1", "a: !!python/object/apply:os.system [echo]", "a: {b: 1}", "\x00")):
        folder = write(tmp_path / str(number), report())
        (folder / "config.yaml").write_text(content)
        assert read_run(folder / "report.json").settings == {}


def test_what_was_changed_since_a_report_was_written_is_left_out(tmp_path, capsys):
    """Any digit of any number, in the report or in the settings beside it; reports of old, without checksums, are read."""
    for name in ("whole", "flipped", "settings", "alone"):
        folder = write(tmp_path / name, report(test=0.5), lr=0.25)
        write_report(folder / "report.json", report(test=0.5, train=0.75))
    assert "Co-Reg" in printed(capsys, tmp_path / "whole")[0]
    report_file = tmp_path / "flipped" / "report.json"
    report_file.write_text(report_file.read_text().replace("0.75", "0.74"))
    (tmp_path / "settings" / "config.yaml").write_text("lr: 0.5\n")
    (tmp_path / "alone" / "config.yaml").unlink()  # a report that was copied without its folder
    out, err = printed(capsys, tmp_path / "alone", tmp_path / "flipped", tmp_path / "settings")
    assert [row[6] for row in rows_of(out) if row[0] == "Co-Reg"] == ["1"]
    assert len(err) == 2 and "flipped/report.json is no report of a run (its checksum is wrong)" in err[0]
    assert "settings/config.yaml was changed after report.json had been written" in err[1]


def test_a_report_laid_out_anew_is_the_same_report(tmp_path):
    write_report(tmp_path / "report.json", report(dataset="\udcff", test=0.1 + 0.2))
    read = read_report(tmp_path / "report.json")
    (tmp_path / "report.json").write_text(json.dumps(read, sort_keys=True))
    assert read_report(tmp_path / "report.json") == read and read["dataset"] == "\udcff"


def mutated(value, rng):
    """The value with one of its parts, at any depth, replaced by something else or gone."""
    odd = rng.choice([None, True, -1, 1e400, float("nan"), 10**400, "", "x", "\x1b[31m\n", [], {}, [[]], {"a": {"b": []}}])
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return {k: mutated(v, rng) if k == key else v for k, v in value.items() if k != key or rng.random() < 0.8}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [mutated(v, rng) if i == place else v for i, v in enumerate(value)]
    return odd


def test_damage_anywhere_is_one_line_or_the_same_table(tmp_path, capsys):
    """Seeded: parts replaced in reports without a checksum, bytes flipped and files cut off in those with one."""
    rng = random.Random(0)
    write(tmp_path / "good", report("KD, a"))
    folder = write(tmp_path / "bad", "", lr=0.1, epochs=3)
    write_report(folder / "report.json", report())
    whole = (folder / "report.json").read_bytes(), (folder / "config.yaml").read_bytes()
    same = printed(capsys, tmp_path)[0]
    for number in range(400):
        target, content = rng.choice([("report.json", whole[0]), ("config.yaml", whole[1])])
        (folder / "report.json").write_bytes(whole[0])
        (folder / "config.yaml").write_bytes(whole[1])
        if number % 2:
            (folder / "report.json").write_text(json.dumps(mutated(report(), rng)))
        else:
            damaged = bytearray(content)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            (folder / target).write_bytes(damaged[: rng.randrange(len(damaged))] if number % 4 else damaged)
        out, err = printed(capsys, tmp_path)
        assert len(err) <= 1 and all(line.startswith("left out: ") for line in err)
        assert "KD, a" in out and (err or number % 2 or out == same)


@pytest.mark.parametrize("name", ["report.json", "config.yaml"])
def test_folders_and_pipes_in_the_place_of_files_are_passed_over(tmp_path, capsys, name):
    write(tmp_path / "good", report("KD, a"))
    for number, make in enumerate((os.mkfifo, os.mkdir)):
        folder = write(tmp_path / str(number), report(), lr=0.1)
        (folder / name).unlink()
        make(folder / name)
    out, err = printed(capsys, tmp_path)
    assert "KD, a" in out and len(err) == 2 * (name == "report.json") + (name == "config.yaml")


NASTY = '<script>alert("1")</script> | **x** `y` \n# z \x1b[31m &amp; \udcff'


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.words = set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not {name for name, _ in attributes if name.startswith("on") or name in ("src", "href")}

    def handle_data(self, data):
        self.words.append(data)


def test_names_cannot_break_out():
    runs = [Run(None, report(NASTY, dataset="=cmd()|" + NASTY, annotator={"name": "@" + NASTY}))]
    tables, _ = compare(runs)
    page, markdown, table = as_html(tables), as_markdown(tables), as_csv(tables)
    reader = Page()
    reader.feed(page)
    assert not reader.tags & {"script", "link", "img", "iframe"}
    assert '<script>alert("1")</script>' in "".join(reader.words)
    page.encode("utf-8")
    for text in (page, markdown, table):
        assert "\x1b" not in text
    # one line, and nine cells: every bar of the name is escaped
    (line,) = (line for line in markdown.splitlines() if "alert" in line and line.startswith("|"))
    assert len(re.split(r"(?<!\\)\|", line)) == 14 and not re.search(r"(?<!\\)[<>`]", line)
    (head, row) = csv.reader(io.StringIO(table))
    assert len(head) == len(row) and row[0].startswith("'=") and row[1].startswith("'@")


def test_paths_do_not_speak_to_the_terminal(tmp_path, capsys):
    write(tmp_path / "a", report())
    output, _ = printed(capsys, tmp_path, "--output", tmp_path / "c\x1b[31m.md")
    assert output.startswith(f"{tmp_path}/c\\x1b[31m.md: 1 rows")


def test_the_page_stands_alone_and_fits_small_screens(tmp_path, capsys):
    write(tmp_path / "a", report())
    output, _ = printed(capsys, tmp_path, "--format", "html", "--output", tmp_path / "c.html")
    assert "1 rows from 1 runs" in output
    page = (tmp_path / "c.html").read_text()
    assert "prefers-color-scheme:dark" in page and "name='viewport'" in page and "overflow-x:auto" in page
    assert not re.search(r"https?://", page)
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--output", str(tmp_path / "no" / "c.html")])


def test_accuracy_without_test_labels_still_sorts():
    rows = [Row("KD, a", "", [Run(None, report(test=None, train=t))]) for t in (0.5, 0.7)]
    assert sorted(rows, key=lambda row: row.place)[0] is rows[1]
