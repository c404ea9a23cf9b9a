"""The health report: numbers by hand, verdicts where something is wrong, and a page that is safe to open."""

import base64
import html
import io
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from runs import write_store, zero_shot_accuracy

from coreg.annotate.confused import more_words
from coreg.annotate.health import examine, write_report
from coreg.annotate.tools import main
from coreg.data.images import ImageList, Paths
from coreg.store.texts import TextFeatures, write_texts
from coreg.weak.rules import candidate_sets, partial_accuracy

NAMES = ["cat", "dog", "cow"]


def store_of(
    root,
    votes,
    probs=None,
    labels=None,
    features=None,
    errors=None,
    names=NAMES,
    templates=None,
    images=None,
    block_size=10**6,
):
    """A finished store with the given evidence, in one block if nothing else is given."""
    votes = np.asarray(votes, np.int16)
    count, classes = len(votes), len(names)
    if probs is None:
        probs = np.full((count, classes), 1 / classes)
    paths = Paths([b"%05d.png" % row for row in range(count)])
    labels = None if labels is None else np.asarray(labels)
    images = images or ImageList("/somewhere", paths, labels, np.zeros(count, np.uint8), None, lambda row: None)
    templates = templates or [f"template {number} {{}}" for number in range(votes.shape[1])]
    tensors = {"votes": votes, "probs": np.asarray(probs, np.float16)}
    tensors |= {} if features is None else {"features": np.asarray(features, np.float16)}
    return write_store(root, images, names, templates, tensors, block_size, errors)


def test_numbers_by_hand(tmp_path):
    votes = [[0, 0, 0], [0, 1, 1], [0, 1, 2], [-1, -1, -1], [1, 1, -1], [2, 2, 2]]
    probs = [[0.9, 0.1, 0], [0.4, 0.5, 0.1], [0.3, 0.3, 0.4], [1 / 3] * 3, [0, 1, 0], [0, 0, 1]]
    store = store_of(tmp_path / "ann", votes, probs, [0, 1, 2, 0, -1, 2], errors={5: "empty file"})
    health = examine(store)
    assert health.sizes.tolist() == [0, 2, 1, 2]  # one candidate: rows 0 and 4; all three: row 2 and, abstaining, row 3
    assert health.named.tolist() == [3 / 4, 3 / 4, 1 / 4]  # of the four images with a vote
    assert health.most_named.tolist() == [1, 2, 1]
    assert health.abstained.tolist() == [1 / 5, 1 / 5, 2 / 5]
    assert health.contested.tolist() == [3, 2, 1, 0, 4]  # no vote; 1/3; 2/3; then the less probable winner
    # templates 0 and 1: rows 0, 1, 2, 4 of which 0 and 4; 0 and 2: rows 0, 1, 2 of which 0; 1 and 2: of which 0 and 1
    wanted = [[1, 2 / 4, 1 / 3], [2 / 4, 1, 2 / 3], [1 / 3, 2 / 3, 1]]
    assert np.allclose(health.agreement, wanted)
    assert health.duplicates is None
    # labels 0, 1, 2, 0 in rows 0 to 3
    assert np.allclose(health.accuracy["templates"], [1 / 4, 2 / 4, 3 / 4])
    assert np.allclose(health.accuracy["classes"], [1.0, 1.0, 1.0])  # row 3's uniform probabilities name class 0
    assert np.allclose(health.accuracy["partial"], [1, 1, 1])
    # row 5 counts here: it is labelled, and who cannot read it cannot name it
    assert np.allclose([health.splits[name][0] for name in ("zero_shot", "single", "among")], [4 / 5, 1 / 5, 5 / 5])
    assert np.isnan(health.splits["among"][1])
    for name, single in (("zero_shot", False), ("single", True)):
        assert health.splits[name][0] == zero_shot_accuracy(store, single)["train"]
    assert health.splits["among"][0] == partial_accuracy(candidate_sets(store), store.labels)
    assert np.isclose(health.unanimity, (3 + 2 + 1 + 0 + 2) / 3 / 5)


def texts_of(store, vectors):
    """Let the store keep text features, of one template, in these directions (C, D)."""
    vectors = np.asarray(vectors, np.float32)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = [template.replace("{}", name) for template in store.templates for name in store.class_names]
    rows = np.tile(vectors, (len(store.templates), 1))
    write_texts(store.root, store.manifest, TextFeatures(texts, rows, 100.0, None))
    return store


def test_confused_pairs_and_the_classes_for_which_more_words_would_help(tmp_path, capsys):
    """Votes by hand: crow and raven share 12 of 20 images, sun and moon 10 of 20, sun and fire 9, crow and fire 1."""
    names = ["crow", "raven", "sun", "moon", "fire"]
    votes = [[0, 1]] * 12 + [[0, 0]] * 18 + [[1, 1]] * 8 + [[2, 3]] * 10 + [[3, 3]] * 10 + [[2, 4]] * 9 + [[4, 4]] * 6
    votes += [[0, 4]] + [[-1, -1]] * 40
    store = store_of(tmp_path / "ann", votes, np.full((len(votes), 5), 0.2), names=names, features=np.eye(5)[[0] * 114])
    pairs = examine(store).confused
    assert [(pair.classes, pair.images, pair.share, pair.alike) for pair in pairs] == [
        ((0, 1), 12, 12 / 20, None),
        ((2, 3), 10, 10 / 19, None),  # sun is a candidate of 19 images, moon of 20
    ]
    # crow and raven read nearly alike; sun and moon are further apart than two classes are on average
    texts_of(store, [[1, 0.1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]])
    health = examine(store)
    assert [pair.alike for pair in health.confused] == [True, False]
    (words,) = more_words(store, health.confused)
    assert words.startswith("more words would help: crow, raven; say what tells them apart")
    assert words.endswith(
        f"--rescore {tmp_path / 'ann'} --descriptions names.json --output_dir {tmp_path / 'ann_described'}"
    )
    write_report(store, None)
    report, page = ((tmp_path / "ann" / f"report.{kind}").read_text() for kind in ("txt", "html"))
    assert "      12   60.0%  crow and raven: names read nearly alike" in report
    assert "      10   52.6%  sun and moon: names apart, images look alike" in report
    assert words in report and html.escape(words) in page and "<td>nearly alike</td>" in page
    assert "<td>apart: images look alike to the model</td>" in page
    assert main(["info", str(store.root)]) == 0
    assert "confused pairs         2, such as crow and raven; sun and moon" in capsys.readouterr().out


def test_of_many_classes_the_nearest_twentieth_is_alike(tmp_path):
    """42 classes whose texts lie on a circle, a degree apart: two of the 41 others are near enough."""
    names, angles = [f"class {n}" for n in range(42)], np.radians(np.arange(42.0))
    votes = [[0, n] for n in (1, 2, 3, 4) for _ in range(50)] + [[n, n] for n in (1, 2, 3, 4) for _ in range(50)]
    store = store_of(tmp_path / "ann", votes, names=names, features=np.ones((400, 2)))
    texts_of(store, np.stack([np.cos(angles), np.sin(angles)], axis=1))
    # to class 0 the nearest are 1 and 2; class 3's nearest are 2 and 4 (or 1 and 5), class 4's 3 and 5
    assert {pair.classes[1]: pair.alike for pair in examine(store).confused} == {1: True, 2: True, 3: False, 4: False}


def test_two_classes_are_never_alike_by_being_nearest(tmp_path):
    store = store_of(tmp_path / "ann", [[0, 1]] * 20, names=["a", "b"], features=np.ones((20, 2)))
    (pair,) = examine(texts_of(store, [[1, 0.01], [1, 0]])).confused
    assert pair.share == 1 and not pair.alike  # nothing to compare with


def test_blocks_are_summed_up(tmp_path):
    """Many small blocks say what one large block says."""
    generator = np.random.default_rng(0)
    votes, labels = generator.integers(-1, 3, (50, 4)), generator.integers(-1, 3, 50)
    probs, features = generator.dirichlet(np.ones(3), 50), generator.normal(size=(50, 4))
    features[40] = features[2]
    evidence = {"probs": probs, "labels": labels, "features": features, "errors": {9: "x"}}
    one = examine(store_of(tmp_path / "one", votes, **evidence))
    many = examine(store_of(tmp_path / "many", votes, **evidence, block_size=7))
    for name in ("sizes", "agreement", "unanimity", "named", "most_named", "abstained", "contested"):
        assert np.allclose(getattr(one, name), getattr(many, name)), name
    assert one.duplicates == many.duplicates and (2, 40) in one.duplicates
    for name in ("templates", "classes", "partial"):
        assert np.allclose(one.accuracy[name], many.accuracy[name])
    for name in one.splits:
        assert np.allclose(one.splits[name], many.splits[name], equal_nan=True)


def test_copies_are_found_by_their_features(tmp_path):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(9000, 4))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features[[17, 8000]] = features[[4000, 3]]
    features[17] += 1e-4  # rounding
    health = examine(store_of(tmp_path / "ann", np.zeros((9000, 1)), features=features))
    assert {(17, 4000), (3, 8000)} <= set(health.duplicates)
    # few others: in four dimensions some rows are close to each other by chance
    for a, b in health.duplicates:
        assert np.abs(features[a] - features[b]).max() < 6e-3
    assert len(health.duplicates) < 60 and all(a < b for a, b in health.duplicates)


def verdict(tmp_path, *arguments, **options):
    shutil.rmtree(tmp_path / "ann", ignore_errors=True)
    return " | ".join(examine(store_of(tmp_path / "ann", *arguments, **options)).verdicts)


def test_what_is_wrong_is_said_in_plain_words(tmp_path):
    generator = np.random.default_rng(0)
    good = np.repeat(generator.integers(0, 3, (600, 1)), 5, axis=1)
    good[:60, 3] = (good[:60, 3] + 1) % 3
    assert verdict(tmp_path, good) == ""
    assert "always agree" in verdict(tmp_path, np.repeat(good[:, :1], 5, axis=1))
    assert "Never named: cow." in verdict(tmp_path, good.clip(max=1))
    assert "Named for nearly every image: dog." in verdict(tmp_path, np.concatenate([good, np.ones((600, 1))], axis=1))
    assert "the model hardly tells them apart" in verdict(tmp_path, generator.integers(0, 3, (600, 9)))
    rare = good.copy()
    rare[rare[:, 0] == 0] = 1
    rare[:20] = 0
    assert "Fewer than 50 images lead to: cat." in verdict(tmp_path, rare)
    silent = np.where(generator.random((600, 5)) < 0.4, -1, good)
    assert "of the answers named no class" in verdict(tmp_path, silent)
    assert "100 of 600 images cannot be read" in verdict(tmp_path, good, errors=dict.fromkeys(range(100), "empty file"))
    assert verdict(tmp_path, good[:5], errors=dict.fromkeys(range(5), "x")).startswith("No image could be read")
    features = np.repeat(generator.normal(size=(300, 4)), 2, axis=0)
    assert "look like copies of others" in verdict(tmp_path, good, features=features)
    many = [f"class {number}" for number in range(30)]
    assert "and 17 more." in verdict(tmp_path, good, names=many)


class Page(HTMLParser):
    """Tags, texts and pictures of a page; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.sources = [], set(), [], []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href", "action")]
        assert not [key for key, _ in attributes if key.startswith("on")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def evil(tmp_path):
    """A store whose every name is an attack on the page, with 30 pictures."""
    names = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b"]
    shades = Paths([b"%02d <b>bold</b>\xff\n.png" % row for row in range(30)])
    pictures = ImageList(
        "/some<i>where", shades, np.arange(30) % 3, np.zeros(30, np.uint8), None,
        lambda row: Image.new("L", (20 + row, 9), 8 * row),
    )  # fmt: skip
    votes = np.random.default_rng(0).integers(-1, 3, (30, 4))
    votes[7] = [0, 1, 2, -1]
    templates = ["a {}", "<style>* {{}}", "'{}'", "</table>{}"]
    features = np.random.default_rng(1).normal(size=(30, 4))
    features[3] = features[4]
    return store_of(
        tmp_path / "a <u>nn", votes, names=names, templates=templates, images=pictures, features=features
    ), pictures


def test_the_page_is_whole_safe_and_alone(evil):
    store, images = evil
    health = write_report(store, images)
    text = (store.root / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "b", "i", "u", "link", "iframe", "object"} and page.tags >= {"table", "figure", "img"}
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?:|url\(", text)
    words_shown = " ".join(page.texts)
    for words in (
        *store.class_names,
        *store.templates,
        "Most contested",
        "/some<i>where" if "/some" in words_shown else "<u>",
    ):
        assert words in words_shown
    # the gallery shows the most contested images themselves, most contested first
    shown = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in page.sources]
    assert len(shown) == len(health.contested) == 24
    for image, row in zip(shown, health.contested):
        assert abs(np.asarray(image.convert("L"), dtype=float).mean() - 8 * row) < 6 and max(image.size) <= 112
    assert "1 images look to the model like copies" in words_shown


def test_the_text_says_the_same(evil):
    store, _ = evil
    health = write_report(store, None)
    text = (store.root / "report.txt").read_text(encoding="utf-8")
    assert all(f"! {line}" in text for line in health.verdicts) and "next: accelerate launch train_coreg.py" in text
    for size, count in enumerate(health.sizes):
        assert bool(re.search(rf"^ +{size} +{count} ", text, re.MULTILINE)) == (count > 0)
    for index, name in enumerate(store.class_names):
        line = next(line for line in text.split("\n") if line.startswith(name[:30]))
        assert f"{health.named[index]:.1%}" in line and f" {health.most_named[index]} " in line
    assert "right votes of each template" in text and "<img" not in (store.root / "report.html").read_text(encoding="utf-8")


def test_the_command_writes_and_prints_it(evil, capsys):
    store, _ = evil
    main(["health", str(store.root)])
    output = capsys.readouterr()
    assert "report.html" in output.out and "candidates  images" in output.out
    assert "note: without pictures: " in output.err  # the folder of this store does not exist
    for words, argv in [("not 0", ["health"]), ("does not exist", ["health", "/nowhere/at/all"])]:
        with pytest.raises(SystemExit) as raised:
            main(argv)
        assert raised.value.code == 2 and words in capsys.readouterr().err
