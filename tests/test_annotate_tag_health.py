"""The health report of several labels an image: numbers by hand, verdicts, a safe page, and when it is written."""

import numpy as np
import pytest
from PIL import Image
from runs import refused, write_store
from test_annotate_health import Page

import annotate_vlm
from coreg.annotate import tag_health
from coreg.annotate.tools import main
from coreg.data.images import ImageList, Paths
from coreg.store.texts import TextFeatures, write_texts

NAMES = ["sky", "cloud", "tree", "car", "dog"]
# what images show: each label's share of a probability of 1, so that more than three are below the threshold of 0.3
SHOWN = [(0, 1)] * 24 + [(2,)] * 6 + [(0, 1, 2)] * 2 + [(0, 1, 2, 3)] * 10 + [(3,)]


def store_of(root, shown=tuple(SHOWN), names=NAMES, tags=None, unreadable=0, images=None):
    """A store whose texts are the axes of a space, and whose images lie between those of what they show."""
    features = np.zeros((len(shown) + unreadable, 5))
    for row, labels in enumerate(shown):
        features[row, list(labels)] = 1 / np.sqrt(len(labels))
    count = len(features)
    tensors = {"votes": np.zeros((count, 1), np.int16), "probs": np.full((count, 5), 0.2, np.float16)}
    tensors["features"] = features.astype(np.float16)
    errors = dict.fromkeys(range(len(shown), count), "broken")
    tensors["votes"][len(shown) :] = -1
    paths = Paths([b"%05d.png" % row for row in range(count)])
    images = images or ImageList("/somewhere", paths, None, np.zeros(count, np.uint8), None, lambda row: None, tags=tags)
    store = write_store(root, images, names, ["{}"], tensors, 10**6, errors)
    write_texts(store.root, store.manifest, TextFeatures(list(names), np.eye(5, dtype=np.float32), 100.0, None))
    return store


def test_numbers_by_hand(tmp_path):
    tags = np.full((44, 5), -1, np.int8)
    tags[:24, 0] = tags[24:30, 2] = tags[0, 3] = 1
    tags[43] = 1  # of an image that cannot be read, which does not count
    health = tag_health.examine(store_of(tmp_path / "ann", tags=tags, unreadable=1))
    assert health.sizes.tolist() == [10, 7, 24, 2, 0, 0]
    assert health.suggested.sum(axis=0).tolist() == [26, 26, 8, 1, 0] and not health.suggested[43].any()
    assert health.together == [(0, 1, 26)]
    # sky is half of the probability of 24 images, and less elsewhere; car is in the last place of its image
    assert health.precision[0] == 1 and np.isnan(health.precision[[1, 4]]).all() and health.precision[3] < 0.1
    # a third is nearest to 0.3, then a quarter
    assert health.doubtful[:12].tolist() == [30, 31, *range(32, 42)]


def test_what_is_wrong_is_in_plain_words(tmp_path):
    verdicts = "\n".join(tag_health.examine(store_of(tmp_path / "a", unreadable=4)).verdicts)
    assert "Never above the threshold: dog." in verdicts and "nearly every image" not in verdicts
    assert "Always together: sky and cloud (26 images)." in verdicts
    assert "23% of the images have no label" in verdicts and "An image has 1.4 labels" in verdicts
    assert "Fewer than 20 images lead to: tree, car." in verdicts and "4 of 47 images cannot be read" in verdicts
    fine = [(a, (a + 1) % 5) for a in range(5)] * 20
    assert tag_health.examine(store_of(tmp_path / "b", fine)).verdicts == []
    always = [(0, 1 + row % 4) for row in range(100)]
    assert "nearly every image: sky." in tag_health.examine(store_of(tmp_path / "c", always)).verdicts[0]
    nothing = tag_health.examine(store_of(tmp_path / "d", [], unreadable=3))
    assert nothing.verdicts == ["No image could be read: see errors.csv for the reasons."]


def test_the_page_and_the_text_say_the_same_and_are_safe(tmp_path, capsys):
    evil = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b", "car", "dog"]
    store = store_of(tmp_path / "ann", names=evil, tags=np.ones((43, 5), np.int8))
    pictures = ImageList("x", store.paths, None, store.split, None, lambda row: Image.new("L", (9, 9), 5 * row))
    health = tag_health.write_report(store, pictures)
    html, text = ((store.root / name).read_text() for name in ("report.html", "report.txt"))
    assert "script" not in Page(html).tags and html.count("<img") == 24
    for line in health.verdicts:
        assert line in text
    assert (
        "images: train 43 (43 labelled)" in text and evil[0] in text and "average precision" in text and "2      24" in text
    )
    main(["health", str(store.root)])
    assert capsys.readouterr().out.startswith(text)


def test_a_report_is_of_what_the_store_is_of_or_of_what_is_asked(tmp_path, capsys):
    """With labels of several an image, or with --task multi, and never where nothing is compared with texts."""
    plain = store_of(tmp_path / "plain")
    for words, head in (([], "labels an image"), (["--task", "single"], None), (["--task", "multi"], "labels an image")):
        main(["health", str(plain.root), *words])
        out = capsys.readouterr().out
        several = bool(words and words[1] == "multi")
        assert ("labels an image" in out) == several == ("baselines/spml.py --method vlpl" in out), (words, head)
    tagged = store_of(tmp_path / "tagged", tags=np.ones((43, 5), np.int8))
    for words, several in (([], True), (["--task", "single"], False)):
        main(["health", str(tagged.root), *words])
        assert ("labels an image" in capsys.readouterr().out) == several


def test_annotating_ends_with_it(tmp_path, capsys):
    """Any images and a list of tags: --task multi."""
    (tmp_path / "photos").mkdir()
    for row in range(6):
        Image.new("L", (9, 9), 40 * row).save(tmp_path / "photos" / f"{row}.png")
    (tmp_path / "tags.txt").write_text("one\ntwo\nthree\n")
    places = ["--images", str(tmp_path / "photos"), "--classes", str(tmp_path / "tags.txt")]
    words = [*places, "--task", "multi", "--workers", "0"]
    annotate_vlm.main([*words, "--output_dir", str(tmp_path / "ann")])
    out = capsys.readouterr().out
    assert "6 images, 3 labels, several an image" in out and "next: accelerate launch baselines/spml.py" in out
    assert "How many labels an image has" in (tmp_path / "ann" / "report.html").read_text()
    line = refused(capsys, annotate_vlm.main, *words, "--vlm", f"chat:{tmp_path}", "--output_dir", str(tmp_path / "no"))
    assert "--task multi compares images with texts" in line


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_those_of_a_loop(seed):
    suggested = np.random.default_rng(seed).random((30, 6)) < 0.5
    suggested[:, 1], suggested[:, 4] = suggested[:, 0], False
    suggested[:4, 4] = suggested[:4, 5] = True
    suggested[4:, 5] = False  # four images, too few
    wanted = []
    for a in range(6):
        for b in range(a + 1, 6):
            both = (suggested[:, a] & suggested[:, b]).sum()
            if both >= 5 and both >= 0.95 * suggested[:, a].sum() and both >= 0.95 * suggested[:, b].sum():
                wanted.append((a, b, both))
    assert (0, 1) in [pair[:2] for pair in wanted]
    assert tag_health.always_together(suggested) == wanted
