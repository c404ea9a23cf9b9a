"""The page to label on in a real browser: keys, buttons, undo, what is kept, what is saved, and training on it."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import ROOT
from test_label import shown_page

import train_coreg
from coreg.data.labels import NONE, read_labels
from coreg.data.tags import read_tags
from coreg.label.page import Asked, photo, read_page, write_label_page
from coreg.store.store import AnnotationStore

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not BROWSER, reason="needs the browser chromium"),
]
DIGITS = "zero one two three four five six seven eight nine".split()


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install -e .[browser]")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    """A new window of a desktop; whatever the page complains of, or loads from elsewhere, fails the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened, complaints, asked = context.new_page(), [], []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.complaints = complaints
    yield opened
    assert complaints == []
    assert not [url for url in asked if not re.match(r"file:|data:|blob:|http://127\.0\.0\.1:", url)]
    context.close()


def press(tab, *keys):
    for key in keys:
        tab.keyboard.press(key)


def opened(tab, folder, shown):
    write_label_page(folder, shown)
    tab.goto((folder / "label.html").as_uri())


def saved(tab, folder, button="#download"):
    """Press a button that saves, and put the file where the run folder has it."""
    with tab.expect_download() as waiting:
        tab.click(button)
    assert waiting.value.suggested_filename == "label_next.csv"
    waiting.value.save_as(folder / "label_next.csv")
    return str(folder / "label_next.csv")


def test_keys_label_undo_skip_and_save_a_file(tab, tmp_path):
    paths = ["a,b.png", 'c "d".png', "e\udcff.png", *(f"{i}.png" for i in range(5))]
    opened(tab, tmp_path, shown_page(n=8, paths=paths))
    assert tab.inner_text("#where") == "Image 1 of 8" and tab.inner_text("#path") == "a,b.png"
    press(tab, "1", "2", "3", "Backspace", "1", "Space", "0", "3", "Space", "9", "x")
    assert tab.inner_text("#where") == "Image 8 of 8"
    assert tab.inner_text("#count") == "5 of 8 answered, kept in this browser"
    rows, classes = read_labels(saved(tab, tmp_path), [*paths, "train/known.png"], shown_page().class_names)
    # the fourth and the seventh were skipped; the run's own label stands below
    assert dict(zip(rows.tolist(), classes.tolist())) == {0: 0, 1: 1, 2: 0, 4: NONE, 5: 2, 8: 1}
    written = (tmp_path / "label_next.csv").read_text(errors="replace").splitlines()
    tab.click("#copy")
    assert tab.inner_text("#copied") == "Copied."
    copied = tab.evaluate("navigator.clipboard.readText()").splitlines()
    # a clipboard holds no bytes that are no text
    assert [line for line in copied if line[0] != "e"] == [line for line in written if line[0] != "e"]


def test_what_was_answered_is_there_after_the_page_was_closed(tab, tmp_path):
    opened(tab, tmp_path, shown_page())
    press(tab, "2", "0", "1")
    other = tab.context.new_page()
    tab.close()
    other.goto((tmp_path / "label.html").as_uri())
    assert other.inner_text("#where") == "Image 4 of 6" and other.inner_text("#count").startswith("3 of 6")
    for key in "321":
        other.keyboard.press(key)
    assert other.inner_text("#outcome") == "All images have an answer." and other.is_hidden("#work")
    other.click("#undo-end")
    assert other.inner_text("#where") == "Image 6 of 6" and other.is_visible("#work")
    other.click("text=All images and their answers")
    other.click("#all button >> nth=0")
    assert other.inner_text("#where") == "Image 1 of 6"
    assert other.get_attribute("#classes button >> nth=1", "aria-pressed") == "true"
    other.keyboard.press("1")
    assert other.inner_text("#where") == "Image 6 of 6"  # the next without an answer
    other.click("#save-now")
    paths = [*(f"train/{i}.png" for i in range(6)), "train/known.png"]
    rows, classes = read_labels(saved(other, tmp_path, "#download-end"), paths, ["cat", "dog", "cow"])
    assert dict(zip(rows.tolist(), classes.tolist())) == {0: 0, 1: NONE, 2: 0, 3: 2, 4: 1, 6: 1}
    # another run of the same name does not get these answers
    write_label_page(tmp_path, shown_page(n=6, paths=[f"other/{i}.png" for i in range(6)]))
    other.reload()
    assert other.inner_text("#count").startswith("0 of 6")


def test_a_key_that_is_held_down_answers_once(tab, tmp_path):
    opened(tab, tmp_path, shown_page())
    for _ in range(4):  # without a release between them: the browser marks all but the first as repeated
        tab.keyboard.down("2")
    assert tab.inner_text("#where") == "Image 2 of 6"
    tab.keyboard.up("2")
    tab.click("#classes button >> nth=0")
    tab.keyboard.press("Space")  # the button that was clicked does not keep the keys
    assert tab.inner_text("#where") == "Image 4 of 6" and tab.inner_text("#count").startswith("2 of 6")


def test_several_labels_an_image(tab, tmp_path):
    opened(tab, tmp_path, shown_page(several=True, others=[]))
    press(tab, "1", "3", "Enter", "2", "2", "Enter", "Space", "1", "0")
    tab.click("#classes button >> nth=1")
    tab.click("#confirm")
    table = read_tags(saved(tab, tmp_path), [f"train/{i}.png" for i in range(6)], ["cat", "dog", "cow"])
    assert table.tolist() == [[1, -1, 1], [-1, -1, -1], [0] * 3, [-1, -1, -1], [-1, 1, -1], [0] * 3]


def test_many_classes_are_searched(tab, tmp_path):
    names = [f"class {i}" for i in range(60)] + ["Zebra finch", "zebra"]
    shown = shown_page(names)
    opened(tab, tmp_path, shown)
    assert tab.locator("#classes button").count() == 2  # the likeliest, by digits
    press(tab, "2")
    tab.keyboard.type("zeb")
    assert tab.locator("#classes button span").all_inner_texts() == ["Zebra finch", "zebra"]
    press(tab, "Enter")
    tab.keyboard.type("/finch")
    press(tab, "Enter")
    tab.keyboard.type("class 5")
    tab.click("#classes button >> text=class 59")
    tab.keyboard.type("nothing")
    press(tab, "Enter", "Escape", "0")
    lines = Path(saved(tab, tmp_path)).read_text().splitlines()[1:6]
    assert [line.split(",")[1] for line in lines] == ["class 0", "Zebra finch", "Zebra finch", "class 59", "none of these"]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("count", [3, 24, 80])
def test_nothing_overflows(tab, tmp_path, width, count):
    names = [f"{'a_long_class_name_' * (1 + i % 3)}{i}" for i in range(count)]
    picture = photo(Image.fromarray(np.zeros((300, 900, 3), np.uint8)))
    asked = [Asked("folder_" * 20 + f"{i}.png", [(1, 0.5)], picture) for i in range(12)]
    tab.set_viewport_size({"width": width, "height": 800})
    opened(tab, tmp_path, shown_page(names, images=asked, run="runs/" + "a" * 80))
    for act in ("text=All images and their answers", "text=label_next.csv as text", "#save-now"):
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator("#picture").bounding_box()["height"] >= 250
        tab.click(act)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_twenty_answers_through_the_server_and_training_on_them(tab, tmp_path, monkeypatch):
    """As a person would: train, `coreg-label`, twenty digits by keys, one undone, one skipped, the command it prints."""
    monkeypatch.chdir(tmp_path)
    tiny = ["--backbone_args", '{"norm": "group", "widths": [8, 16], "depths": [1, 1]}', "--share", "0.2", "--workers", "0"]
    base = ["--recipe", "digits", "--refine", "none", *tiny, "--epochs", "2", "--warmup_epochs", "1"]
    train_coreg.main([*base, "--output_dir", "runs/a"])
    store = AnnotationStore.open("runs/a/annotations")
    truth = dict(zip(store.paths, store.labels.tolist()))
    server = subprocess.Popen(
        [sys.executable, "-m", "coreg.label", "runs/a"], env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        tab.goto(re.search(r"http://\S+", server.stdout.readline()).group())
        paths = [asked.path for asked in read_page(Path("runs/a")).images]
        keys = [str(index + 1) if index < 9 else "a" for index in range(10)]  # of the classes
        for number, path in enumerate(paths[:21]):
            if number == 5:
                press(tab, "Space")
                continue
            if number == 7:  # a slip of the finger
                press(tab, keys[(truth[path] + 1) % 10], "Backspace")
            press(tab, keys[truth[path]])
        tab.wait_for_function("document.getElementById('count').textContent.endsWith(', saved')")
        assert tab.inner_text("#count") == "20 of 100 answered, saved"
        tab.reload()
        assert tab.inner_text("#count") == "20 of 100 answered, saved" and tab.inner_text("#where") == "Image 6 of 100"
        tab.click("#save-now")
        tab.click("#finish")
        tab.wait_for_function("document.getElementById('outcome').textContent.startsWith('Saved in')")
        printed = server.communicate(timeout=60)[0].splitlines()
    finally:
        server.kill()
    rows, classes = read_labels("runs/a/label_next.csv", store.paths, DIGITS)
    assert {store.paths[row]: index for row, index in zip(rows, classes)} == {
        path: truth[path] for path in paths[:21] if path != paths[5]
    }
    assert printed[0] == "runs/a/label_next.csv: 20 images labelled, 0 none of these, 80 left"
    words = shlex.split(printed[1].removeprefix("next: "))
    train_coreg.main(words[words.index("--recipe") :])
    assert json.loads(Path("runs/a-labelled/report.json").read_text())["labels_used"] == 20
