"""The page of a run: its numbers against scikit-learn and loops, safe with any names, alone, and readable in a browser."""

import base64
import csv
import html
import io
import json
import math
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import SMALL_JOB
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

import train_coreg
from coreg.data.labels import read_labels
from coreg.label.page import write_label_page
from coreg.report import page as page_module
from coreg.report.page import write_page
from coreg.report.page_charts import Line, line_chart, mixture_chart, nice_ticks
from coreg.report.page_images import changed_rows, in_turn, label_page, unsure_rows
from coreg.report.page_record import RunRecord, Split
from coreg.store.store import AnnotationStore

NAMES = ["cat", "dog", "cow"]
EVIL = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & 'b' </td></style>"]


def split_of(rng, n, n_classes, nets=2, labelled=True):
    labels = rng.integers(0, n_classes, n)
    each = [rng.normal(size=(n, n_classes)) + 2.0 * (np.arange(n_classes) == labels[:, None]) for _ in range(nets)]
    annotator = np.where(rng.random(n) < 0.6, labels, rng.integers(0, n_classes, n))
    several = {f"net{i + 1}": logits for i, logits in enumerate(each)} if nets > 1 else {}
    return Split({"ensemble": sum(each)} | several, annotator, labels if labelled else np.full(n, -1))


def record_of(names=NAMES, n=90, nets=2, labelled=True, tested=True, epochs=6, size=8, channels=3, **changed):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, channels, size, size)).astype(np.uint8)
    train, test = (split_of(rng, rows, len(names), nets, labelled) for rows in (n, 70))
    losses = [np.where(rng.random(n) < 0.7, rng.normal(0.1, 0.03, n), rng.normal(0.6, 0.1, n)).clip(0, 1) for _ in range(2)]
    weights = [1.0 / (1.0 + np.exp(30 * (loss - 0.3))) for loss in losses]
    curves = []
    for epoch in range(epochs):
        curves.append({"lr": 0.1 / (epoch + 1)} | {f"loss/net{k + 1}/total": math.exp(-epoch) + k for k in range(nets)})
        if labelled and tested:
            curves[-1] |= {"accuracy/test/ensemble": 0.5 + 0.05 * epoch}
        if nets > 1 and epoch >= 2:
            curves[-1] |= {"division/trusted": 0.3 + 0.1 * epoch, "division/agreement_of_nets": 0.8}
    if nets > 1 and curves:
        for net in (1, 2):
            for size_, values in (("small", (0.1, 0.03, 0.7)), ("large", (0.6, 0.1, 0.3))):
                curves[-1] |= {f"gmm/net{net}_{what}_{size_}": v for what, v in zip(("mean", "deviation", "share"), values)}
    report = {
        "method": "Co-Reg", "dataset": "pets", "annotator": {"name": "clip"}, "command": "train_coreg.py --seed 3",
        "parameters": 1234567, "versions": {"torch": "2.0"}, "hardware": "CPU", "seed": 3, "warnings": [],
    }  # fmt: skip
    if labelled:
        splits = {"train": train} | ({"test": test} if tested else {})
        shares = {name: float((split.annotator == split.labels).mean()) for name, split in splits.items()}
        report["annotator"]["zero_shot_accuracy"] = shares
    fields = {
        "report": report, "settings": {"lr": 0.1, "annotations": "ann"}, "curves": curves, "folder": "runs/a",
        "annotations": "ann", "class_names": list(names), "paths": [f"train/{i:03d}.png" for i in range(n)],
        "pixels": lambda rows: images[rows], "train": train, "test": test if tested else None, "known": np.full(n, -1),
        "weights": weights if nets > 1 else [], "losses": losses if nets > 1 else [],
    }  # fmt: skip
    return RunRecord(**(fields | changed))


def page(record):
    return page_module.page(record, label_page(record))


class Page(HTMLParser):
    """Tags, texts, attributes and pictures of a page; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes, self.sources = [], [], [], [], []
        self.feed(text)
        assert self.open == [], self.open
        self.plain = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.sources += [value for key, value in attributes if key in ("src", "action", "xlink:href")]
        assert all(value == "label.html" for key, value in attributes if key == "href")
        assert not [key for key, _ in attributes if key.startswith("on")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def pictures(self):
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in self.sources]

    def labels(self, name):
        return [value for key, value in self.attributes if key == name]


def cells(text, title):
    """Counts of a confusion matrix as the page shows them, int (C, C)."""
    table = re.search(rf"<h3>{re.escape(title)}</h3>.*?</table>", text, re.DOTALL).group()
    rows = [re.findall(r'<td[^>]*style="--s:[\d.]+">(\d*)</td>', row) for row in table.split("<tr>")[2:]]
    return np.array([[int(cell or 0) for cell in row] for row in rows])


def test_the_headline_and_its_intervals():
    record = record_of()
    shown_page, test = Page(page(record)), record.test
    before, after = (accuracy_score(test.labels, p) for p in (test.annotator, test.logits["ensemble"].argmax(axis=1)))
    assert (
        f"{after:.1%} of the test images are right; the annotator had {before:.1%} (+{100 * (after - before):.1f}"
        in shown_page.plain
    )
    plain = next(label for label in shown_page.labels("aria-label") if label.startswith("annotator "))
    for name, share in (("annotator", before), ("Co-Reg", after)):
        low, high = (float(x) / 100 for x in re.search(rf"{name} [\d.]+%, from ([\d.]+)% to ([\d.]+)%", plain).groups())
        for bound in (low, high):  # a Wilson bound p solves |share - p| = z sqrt(p (1 - p) / n)
            assert abs(share - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / 70), abs=2e-3)
    mended = sum(a != y and p == y for a, p, y in zip(test.annotator, test.predicted, test.labels))
    broken = sum(a == y and p != y for a, p, y in zip(test.annotator, test.predicted, test.labels))
    mistakes = sum(a != y for a, y in zip(test.annotator, test.labels))
    assert f"{mended} of the annotator’s {mistakes} mistakes are set right, {broken} new ones made" in shown_page.plain


def test_other_metrics_of_the_judged_split():
    record = record_of()
    assert "Other metrics" not in page(record)
    record.report["metrics"] = {"test": {"macro_f1": 0.8125, "nll": 0.4321}, "train": {"macro_f1": 0.5}}
    plain = Page(page(record)).plain
    assert "Other metrics, test images macro F1 81.2% NLL 0.432" in plain and "50.0%" not in plain.split("Health")[0]
    record = record_of(tested=False)
    record.report["metrics"] = {"train": {"few": 0.5}}
    assert "Other metrics, training images classes of few images 50.0%" in Page(page(record)).plain


def test_candidate_sets_that_were_drawn_have_no_annotator_to_be_better_than():
    record = record_of()
    del record.report["annotator"]["zero_shot_accuracy"]
    shown_page = Page(page(record))
    assert "of the test images are right" in shown_page.plain and "the annotator had" not in shown_page.plain
    assert "mistakes are set right" not in shown_page.plain


def test_confusions_and_classes():
    record = record_of()
    text = page(record)
    train, test = record.train, record.test
    shown = cells(text, "Annotator → Co-Reg, training images")
    assert (shown == confusion_matrix(train.annotator, train.predicted)).all()
    assert (cells(text, "Truth → Co-Reg, test images") == confusion_matrix(test.labels, test.predicted)).all()
    first, last = (recall_score(test.labels, p, average=None) for p in (test.annotator, test.predicted))
    for c, name in enumerate(NAMES):
        row = re.search(rf"<tr><td>{name}</td>(.*?)</tr>", text).group(1)
        values = re.findall(r"<td>([\d,.%–]*)</td>", row)
        rows_of_c = [i for i in range(len(train.labels)) if train.predicted[i] == c]
        sure = np.mean([np.exp(z).max() / np.exp(z).sum() for z in train.logits["ensemble"][rows_of_c] / 2])
        trusted = np.mean([(w > 0.5)[train.annotator == c].mean() for w in record.weights])
        assert values == [
            str((test.labels == c).sum()), f"{first[c]:.0%}", f"{last[c]:.0%}", str((train.annotator == c).sum()),
            str(len(rows_of_c)), f"{sure:.0%}", f"{trusted:.0%}",
        ]  # fmt: skip
    pairs = {(NAMES[a], NAMES[b]): n for (a, b), n in np.ndenumerate(shown) if a != b and n}
    listed = re.findall(r"<li>(\w+) → (\w+) <b>(\d+)</b>", text)
    assert {(a, b): int(n) for a, b, n in listed} == pairs
    assert [int(n) for *_, n in listed] == sorted(pairs.values(), reverse=True)


def test_health_needs_no_label():
    record = record_of()
    plain = Page(page(record)).plain
    nets = [record.train.logits[name].argmax(axis=1) for name in ("net1", "net2")]
    predicted = record.train.logits["ensemble"].argmax(axis=1)
    assert f"gave them {(predicted == record.train.annotator).mean():.1%}" in plain
    assert f"both networks agree {(nets[0] == nets[1]).mean():.1%}" in plain
    assert f"are trusted {np.mean([w > 0.5 for w in record.weights]):.1%}" in plain
    assert "named at all 3 of 3" in plain
    blind = Page(page(record_of(labelled=False, tested=False))).plain
    assert "No true labels are known" in blind and "right" not in blind and "Truth" not in blind
    changed = (predicted != record.train.annotator).sum()
    assert f"Co-Reg changed {changed} of the annotator’s 90 labels" in blind


def test_an_earlier_epoch_that_looked_better_is_named():
    record = record_of()
    assert "export_chosen" not in Page(page(record)).plain
    record.report["chosen_epoch"] = {"epoch": 6, "epochs": 6, "score": 0.5}
    assert "export_chosen" not in Page(page(record)).plain
    record.report["chosen_epoch"]["epoch"] = 4
    assert "epoch 4 was the best: it is in export_chosen" in Page(page(record)).plain


def test_changed_labels_are_counted_and_shown():
    record = record_of(n=200)
    train, shown_page = record.train, Page(page(record))
    before, after, truth = train.annotator, train.predicted, train.labels
    rows = [i for i in range(200) if before[i] != after[i]]
    right, wrong = (sum(p[i] == truth[i] for i in rows) for p in (after, before))
    stay = len(rows) - right - wrong
    assert f"{len(rows)} of 200 labels differ" in shown_page.plain
    assert f"{right} became right, {wrong} became wrong, {stay} stay wrong" in shown_page.plain
    # each pair of classes in turn, the surest first; written out
    queues = {}
    for i in sorted(rows, key=lambda i: -train.sure[i]):
        queues.setdefault((before[i], after[i]), []).append(i)
    wanted = []
    for turn in range(max(map(len, queues.values()))):
        wanted += sorted((queue[turn] for queue in queues.values() if len(queue) > turn), key=lambda i: -train.sure[i])
    assert changed_rows(record).tolist() == wanted
    pictures = shown_page.pictures()
    assert len(pictures) == 48
    for image, row in zip(pictures[:24], wanted):
        assert (np.asarray(image) == record.pixels(np.array([row]))[0].transpose(1, 2, 0)).all()


def test_in_turn_by_hand():
    groups, order = np.array([0, 0, 0, 1, 1, 2]), np.array([2, 0, 4, 1, 3])
    assert in_turn(groups, order).tolist() == [2, 4, 0, 3, 1]
    assert in_turn(groups, order[:0]).tolist() == []


def test_images_to_label_are_those_with_small_margins():
    record = record_of(nets=2)
    record.known[[3, 5]] = 1
    rows = unsure_rows(record)
    assert sorted(rows) == [i for i in range(90) if i not in (3, 5)]
    margins = []
    for z1, z2 in zip(record.train.logits["net1"], record.train.logits["net2"]):
        shares = sorted((np.exp(z1) / np.exp(z1).sum() + np.exp(z2) / np.exp(z2).sum()) / 2)
        margins.append(shares[-1] - shares[-2])
    for c in range(3):
        rows_of_c = [i for i in rows if record.train.predicted[i] == c]
        assert rows_of_c == sorted(rows_of_c, key=lambda i: margins[i])
    assert {record.train.predicted[i] for i in rows[:3]} == {0, 1, 2}


def test_label_next_goes_out_empty_and_comes_back_filled(tmp_path):
    paths = [f'b/{i}, "q".png' for i in range(148)] + ["b/\udcff.png", "=1+1.png"]
    record = record_of(paths=paths, n=150)
    record.known[7] = 2
    write_page(tmp_path, record)
    file = tmp_path / "label_next.csv"
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as opened:
        lines = list(csv.DictReader(opened))
    assert [line["path"] for line in lines] == [paths[row] for row in unsure_rows(record)[:100]] + [paths[7]]
    assert {line["label"] for line in lines[:-1]} == {""} and lines[-1]["label"] == "cow"
    # untouched it says what was known before; then a person fills in two of the rows
    rows, classes = read_labels(str(file), paths, NAMES)
    assert (rows.tolist(), classes.tolist()) == ([7], [2])
    lines[0]["label"], lines[4]["label"] = "dog", "Cat"
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as opened:
        writer = csv.DictWriter(opened, ["path", "label"])
        writer.writeheader()
        writer.writerows(lines)
    rows, classes = read_labels(str(file), paths, NAMES)
    wanted = {7: 2, paths.index(lines[0]["path"]): 1, paths.index(lines[4]["path"]): 0}
    assert dict(zip(rows.tolist(), classes.tolist())) == wanted
    assert "The 100 images whose label would teach most" in Page(page(record)).plain


def test_a_run_its_page_and_the_next_run_with_labels(small_store, tmp_path):
    """A person fills in two rows of label_next.csv and types what the page says; the next file holds what was given."""
    command = ["--annotations", str(small_store), *SMALL_JOB, "--epochs", "2", "--few_shot", "1"]
    command += ["--output_dir", str(tmp_path / "run")]
    for name, given in (("run", 3), ("run-labelled", 5)):
        train_coreg.main(command)
        report = json.loads((tmp_path / name / "report.json").read_text())
        text = (tmp_path / name / "report.html").read_text()
        plain = Page(text).plain
        assert report["labels_used"] == given and report["command"] in plain
        assert f"{report['accuracy']['test']['ensemble']:.1%} of the test images are right" in plain
        assert f"labels worth a look (labels.csv) {report['needs_review']}" in plain
        file = tmp_path / name / "label_next.csv"
        lines = file.read_text().splitlines()
        assert sum(line.endswith(",") for line in lines) == 97 - given and len(lines) == 1 + 97
        for place in (2, 5):
            lines[place] += lines[place].split("/")[1]  # the folder is the truth
        file.write_text("\n".join(lines))
        typed = shlex.split(html.unescape(re.search(r"<pre>(accelerate launch [^<]*)</pre>", text).group(1)))
        assert typed[:3] == ["accelerate", "launch", "train_coreg.py"]
        command = typed[3:]


def test_images_of_no_class_are_left_out_of_training(small_store, tmp_path):
    """`none of these` in the file of labels: no row in labels.csv, no question again, and the answer is handed on."""
    store = AnnotationStore.open(small_store)
    first, second, third = (store.paths[row] for row in store.rows_of(0)[[0, 5, 9]])
    file = tmp_path / "mine.csv"
    file.write_text(f"path,label\n{first},None of these\n{second},b\n{third},none of these\n")
    command = ["--annotations", str(small_store), *SMALL_JOB, "--epochs", "2", "--output_dir", str(tmp_path / "run")]
    train_coreg.main([*command, "--labels", str(file)])
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["none_of_these"] == 2 and report["labels_used"] == 1 and report["images"]["train"] == 95
    labelled = [line["path"] for line in csv.DictReader((tmp_path / "run/labels.csv").open(newline=""))]
    assert len(labelled) == 95 and second in labelled and not {first, third} & set(labelled)
    asked = list(csv.DictReader((tmp_path / "run/label_next.csv").open(newline="")))
    assert len(asked) == 97 and {line["path"]: line["label"] for line in asked if line["label"]} == {
        first: "none of these", second: "b", third: "none of these"
    }  # fmt: skip
    kept = read_labels(str(tmp_path / "run/known_labels.csv"), store.paths, store.class_names)
    assert [rows.tolist() for rows in kept] == [rows.tolist() for rows in read_labels(str(file), store.paths, "abc")]


def test_nothing_is_left_to_label(tmp_path):
    record = record_of()
    record.known[:] = record.train.labels
    write_label_page(tmp_path, label_page(record))
    assert len((tmp_path / "label_next.csv").read_text().splitlines()) == 91 and not (tmp_path / "label.html").exists()
    assert "Label these next" not in page(record)


def test_the_page_is_whole_safe_and_alone():
    evil = [f"{name}\n{i}" for i, name in enumerate(EVIL * 30)]
    record = record_of(EVIL, paths=evil, folder="runs/<b>a", annotations="'an\"n<i>", settings={"<u>": "</td>"})
    record.report |= {"method": "<s>Co-Reg", "dataset": "<em>'\"", "command": "x </pre>", "warnings": ["<q>"]}
    record.report["annotator"]["name"] = record.report["hardware"] = "<svg onload=alert(1)>"
    text = page(record)
    shown_page = Page(text)
    assert not set(shown_page.tags) & {"script", "u", "s", "em", "q", "link", "iframe", "object", "form"}
    shown = 24 + min(24, len(changed_rows(record)))
    assert shown_page.tags.count("style") == 1 and shown_page.tags.count("img") == shown
    assert all(source.startswith("data:image/png;base64,") for source in shown_page.sources)
    assert not re.search(r"https?:|url\(|@import|javascript:", text)
    policy = dict(zip(shown_page.labels("http-equiv"), shown_page.labels("content")[1:]))["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    for words in (*EVIL, "runs/<b>a", "<s>Co-Reg", "<em>'\"", "x </pre>", "<svg onload=alert(1)>", "<u>", "</td>", "<q>"):
        assert words in shown_page.plain, words
    # what does not move is said to those who do not see it
    assert all(shown_page.labels("alt")) and len(shown_page.labels("alt")) == shown
    assert len(shown_page.labels("role")) == len(shown_page.labels("aria-label")) == shown_page.tags.count("svg") > 5


@pytest.mark.parametrize(
    ("variant", "there", "missing"),
    [
        ({"nets": 1}, "Truth", "Division by|networks agree|trusted|mean over networks"),
        ({"labelled": False}, "Division by net2", "are right|✓|Truth|Accuracy"),
        ({"tested": False}, "of the training images are right", "Accuracy on the test images"),
        ({"nets": 1, "labelled": False, "tested": False, "epochs": 0}, "No true labels", "How training went"),
        ({"epochs": 1}, "Learning rate", "Shaded"),
        ({"names": ["yes", "no"]}, "Truth", "cow"),
        ({"names": [f"class {i}" for i in range(40)]}, "All 40 classes", "Annotator → Co-Reg"),
        ({"channels": 1, "size": 224, "n": 30}, "Label these next", "The 100 images"),
        ({"n": 2}, "Label these next", "The 100 images"),
    ],
    ids=str,
)
def test_runs_with_less_to_show(variant, there, missing):
    shown_page = Page(page(record_of(**variant)))
    plain = " ".join(
        [shown_page.plain, *shown_page.labels("aria-label"), *shown_page.labels("d"), *shown_page.labels("points")]
    )
    assert there in plain and not re.search(missing, plain) and not re.search(r"\bnan\b", plain)


def test_a_method_that_leaves_every_label_alone():
    record = record_of()
    record.train.annotator = record.train.logits["ensemble"].argmax(axis=1)
    plain = Page(page(record)).plain
    assert "None: every label is the annotator’s." in plain and "Most frequent changes" not in plain


def test_large_pictures_stay_small():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (90, 3, 512, 512), np.uint8)
    text = page(record_of(pixels=lambda rows: noise[rows]))
    assert len(text) < 2_000_000
    assert all(max(image.size) <= 144 and image.format == "JPEG" for image in Page(text).pictures())


def axis(drawn):
    """Functions from a chart's coordinates back to values, from where its ticks stand: {label: position} of both axes."""
    number = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([-\d.,]+)%?</text>', drawn)
    across = {float(label): float(x) for x, _, anchor, label in number if anchor == "middle"}
    up = {float(label.replace(",", "")): float(y) - 4 for _, y, anchor, label in number if anchor == "end"}
    return across, up


def test_lines_lie_where_their_ticks_say():
    values = np.array([math.nan, 0.31, 0.42, 0.4, 0.77])
    drawn = line_chart("A", [Line("x", values, "a"), Line("y", np.full(5, math.nan), "b")], shares=True)
    across, up = axis(drawn)
    points = np.array([pair.split(",") for pair in re.search(r'points="([^"]+)"', drawn).group(1).split()], dtype=float)
    epochs = np.polyval(np.polyfit(list(across.values()), list(across), 1), points[:, 0])
    shares = np.polyval(np.polyfit(list(up.values()), list(up), 1), points[:, 1]) / 100
    assert np.allclose(epochs, [2, 3, 4, 5], atol=0.01) and np.allclose(shares, values[1:], atol=2e-3)
    assert "x from 31.0% in epoch 2 to 77.0% in epoch 5" in drawn and ">y" not in drawn
    assert line_chart("A", [Line("y", np.full(5, math.nan), "b")], shares=True) == ""
    long = line_chart("A", [Line("x", np.arange(1000.0), "a")], shares=False)
    assert len(re.search(r'points="([^"]+)"', long).group(1).split()) <= 252 and "to 999 in epoch 1000" in long


def test_bars_of_the_mixture_count_the_images():
    losses = np.concatenate([np.full(400, 0.05), np.full(90, 0.5), np.full(10, 1.0), [math.nan] * 3])
    drawn = mixture_chart("A", losses, losses < 0.2, [(0.05, 0.02, 0.8), (0.55, 0.1, 0.2)])
    _, up = axis(drawn)
    # heights are roots of counts
    slope, ground = np.polyfit(np.sqrt(list(up)), list(up.values()), 1)
    bars = re.findall(r'--k:var\(--(\w)\)" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', drawn)
    counts = {}
    for colour, y, height in bars:
        low, high = (((at - ground) / slope) ** 2 for at in (float(y) + float(height), float(y)))
        counts[colour] = counts.get(colour, 0) + high - low
    assert counts["a"] == pytest.approx(400, rel=0.03) and counts["b"] == pytest.approx(100, rel=0.03)
    assert "400 images trusted, P; 100 images distrusted, U; component of share 80% around 0.05" in drawn
    assert "mixture" not in mixture_chart("A", np.zeros(5), np.ones(5, bool), []).split("</h3>")[1]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.1), (0.501, 0.503), (0, 30), (99.5, 1e6), (-1e-9, 1e-9)])
def test_ticks_are_round_few_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 5 and ticks == sorted(ticks)
    step = ticks[1] - ticks[0]
    assert (
        low - 1e-9 * step <= ticks[0] < low + step * (1 + 1e-6)
        and high - step * (1 + 1e-6) < ticks[-1] <= high + 1e-9 * step
    )
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(mantissa == pytest.approx(m) for m in (1, 2, 5))
    assert nice_ticks(3.0, 3.0) == [3.0]


FRAME = """<!doctype html><body><iframe style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, box = e => e.getBoundingClientRect();
  const beside = e => box(e).right > {width} + 0.5 || box(e).left < -0.5;
  const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll *") && beside(e));
  const small = [...page.querySelectorAll("svg text")].filter(e => box(e).height < 10);
  document.body.dataset.found = JSON.stringify([page.defaultView.innerWidth, page.documentElement.scrollWidth,
    wide.map(e => e.outerHTML.slice(0, 200)), small.length]);
}};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("names", [NAMES, [f"{word}_{'very_long_class_name' * 3}" for word in NAMES * 8]], ids=len)
def test_nothing_overflows_in_a_browser(tmp_path, width, names):
    """At the width of a phone and of a desktop; tables may scroll by themselves, the page may not."""
    record = record_of(names, folder="runs/" + "a" * 80, paths=["folder_" * 20 + f"{i}.png" for i in range(90)])
    record.report["command"] = "train_coreg.py --annotations " + "x" * 300
    text = page(record).replace("<details>", "<details open>")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=html.escape(text)))
    dump = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         "--window-size=1400,1000", f"file://{tmp_path / 'frame.html'}"],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    inner, scroll, wide, small = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dump).group(1)))
    assert inner == width and scroll <= width and wide == [] and small == 0
