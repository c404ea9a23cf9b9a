"""The page to label on and the server of `coreg-label`: what they hold, whom they answer, what they write."""

import base64
import csv
import http.client
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from runs import ROOT, error_of, refused

import coreg.files
from coreg.data.decode import UnreadableImage
from coreg.data.labels import NONE, read_labels
from coreg.data.tags import read_tags
from coreg.errors import UserError
from coreg.label.__main__ import main
from coreg.label.answers import merge_answers, read_answers
from coreg.label.page import Asked, LabelPage, page, photo, read_page, write_label_page
from coreg.label.server import LARGEST, LabelServer
from coreg.report.tags import tag_page, unsure_images
from coreg.run.pixels import photos

NAMES = ["cat", "dog", "cow"]
EVIL = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "<!-- a & 'b'"]


def shown_page(names=NAMES, several=False, n=6, paths=None, **changed):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(n)]
    paths = paths or [f"train/{i}.png" for i in range(n)]
    asked = [Asked(path, [(1, 0.5), (0, 0.3)], photo(image)) for path, image in zip(paths, images)]
    others = [["train/known.png", "dog", "cat;cow"]] if several else [["train/known.png", "dog"]]
    fields = {
        "images": asked,
        "run": "runs/a",
        "others": others,
        "script": "train_coreg.py",
        "annotations": "ann",
        "few_shot": False,
    }
    return LabelPage(several=several, class_names=list(names), **(fields | changed))


class Scripts(HTMLParser):
    """Scripts of a page by their type, its policy, and its attributes; scripts end where a browser ends them."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.kind, self.attributes, self.policy = {}, None, [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        named = dict(attributes)
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"]
        self.kind = named.get("type", "code") if tag == "script" else None

    def handle_endtag(self, tag):
        self.kind = None

    def handle_data(self, data):
        if self.kind:
            assert self.kind not in self.scripts
            self.scripts[self.kind] = data


# ---- the page -------------------------------------------------------------------------------------------------------


def test_what_a_page_shows_is_read_back(tmp_path):
    for shown in (shown_page(), shown_page(several=True), shown_page(EVIL, run="<b>", annotations="a'\"n", few_shot=True)):
        write_label_page(tmp_path, shown)
        assert read_page(tmp_path) == shown


def test_nothing_runs_but_the_script_of_the_package(tmp_path):
    paths = [f"{name}\n{i}\udcff" for i, name in enumerate(EVIL)]
    shown = shown_page(EVIL, n=3, paths=paths, run="runs/<em>", annotations="</pre><script>", others=[["<i>", EVIL[0]]])
    for answers in (None, [None] * 3):
        text = page(shown, tmp_path / "<u>", answers)
        parsed = Scripts(text)
        assert set(parsed.scripts) == {"code", "application/json"}
        record = json.loads(parsed.scripts["application/json"])
        assert record["class_names"] == EVIL and [image["path"] for image in record["images"]] == paths
        own = (ROOT / "coreg/label/page.js").read_text(encoding="utf-8")
        assert parsed.scripts["code"] == f"\n{own}"
        digest = base64.b64encode(sha256(parsed.scripts["code"].encode()).digest()).decode()
        allowed = ["default-src 'none'", "style-src 'unsafe-inline'", "img-src data:", f"script-src 'sha256-{digest}'"]
        assert parsed.policy.split("; ") == allowed + ["connect-src 'self'"] * (answers is not None)
        assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href", "action")]
        outside = text.replace(own, "").replace(parsed.scripts["application/json"], "")
        assert not re.search(r"https?:|url\(|@import|javascript:|<em>|<u>|<i>|onerror=alert", outside)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|https?:", own)


def test_pictures_are_large_enough_and_small_ones_keep_their_pixels():
    rng = np.random.default_rng(0)
    large, wide, small = (rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((700, 700), (200, 900), (28, 28)))

    def shown(pixels):
        return Image.open(io.BytesIO(base64.b64decode(photo(Image.fromarray(pixels)).split(",")[1])))

    assert shown(large).size == (360, 360) and shown(wide).size == (360, 80)
    assert (np.asarray(shown(small)) == small).all() and shown(small).format == "PNG"
    assert len(photo(Image.fromarray(large[:, :, 0]))) < 200_000


def test_a_person_sees_images_as_they_were_annotated(tmp_path):
    """Where they are larger than what was trained on, and there; one that has gone since is shown as it was trained on."""
    sizes = {0: (40, 30), 1: (4, 4), 2: (50, 50)}

    def load(row):
        if row == 2:
            raise UnreadableImage("no such file")
        return Image.new("RGB", sizes[row], (row, 0, 0))

    images = SimpleNamespace(load=load)
    pixels = np.full((3, 1, 8, 8), 9, np.uint8)
    run = SimpleNamespace(store=SimpleNamespace(images=lambda: images), job=SimpleNamespace(workers=2))
    shown = photos(run, np.array([0, 1, 2]), pixels)
    assert [image.size for image in shown] == [(40, 30), (8, 8), (8, 8)] and shown[1].getpixel((0, 0)) == 9

    def moved():
        raise UserError("the images were moved")

    run.store.images = moved
    assert [image.size for image in photos(run, np.array([0, 1, 2]), pixels)] == [(8, 8)] * 3


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text.replace('id="record"', "id='r'"), "holds no record"),
        (lambda text: text.replace('"several": false', '"several": 3'), "several is 3"),
        (lambda text: text.replace("data:image/png;base64,", "https://example.org/", 1), "images[0].picture is no picture"),
        (lambda text: text.replace("[[1, 0.5]", "[[7, 0.5]", 1), "likely.0 is 7"),
        (lambda text: text.replace('"train/1.png"', '"train/0.png"'), "there twice"),
        (lambda text: text[: text.index('"several"')], "is no JSON"),
    ],
    ids=range(6),
)
def test_a_damaged_page_is_one_line(tmp_path, damage, reason):
    write_label_page(tmp_path, shown_page())
    file = tmp_path / "label.html"
    file.write_text(damage(file.read_text()))
    line = error_of(read_page, tmp_path)
    assert line.startswith(f"{file} is damaged (") and reason in line and "by hand" in line


def test_no_page_is_one_line(tmp_path, capsys):
    assert "is no folder" in error_of(read_page, tmp_path / "x")
    assert "has no label.html" in error_of(read_page, tmp_path)
    assert "coreg-label runs/a" in refused(capsys, main)
    assert "coreg-label runs/a" in refused(capsys, main, "a", "b")


def test_the_next_command_names_the_folder_as_it_is_typed_now(tmp_path, monkeypatch):
    (tmp_path / "some where").mkdir()
    monkeypatch.chdir(tmp_path / "some where")
    words = shlex.split(shown_page(few_shot=True).next_command(Path("runs/b c")))
    assert words[:2] == ["accelerate", "launch"] and words[words.index("--labels") + 1] == "runs/b c/label_next.csv"
    assert words[words.index("--output_dir") + 1] == "runs/b c-labelled" and words[words.index("--few_shot") + 1] == "0"
    here = str((tmp_path / "some where").resolve())
    words = shlex.split(shown_page(several=True, script="baselines/spml.py").next_command(Path(".")))
    assert words[words.index("--tags") + 1] == f"{here}/label_next.csv" and f"{here}-labelled" in words
    assert "--few_shot" not in words and "--labels" not in words


# ---- the file -------------------------------------------------------------------------------------------------------


def test_answers_are_merged_into_what_stands_in_the_file(tmp_path):
    """Other rows, columns and answers stay; an answer that is taken back leaves an empty cell."""
    shown, file = shown_page(), tmp_path / "label_next.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([
            ["note", "path", "label"], ["mine", "train/0.png", "Cat"], ["", "elsewhere.png", "odd"],
            ["x", "train/known.png", "dog"], ["", "./train/2.png", "None of these"], ["", "train/3.png", "cow"],
            ["", "train/4.png", " "],
        ])  # fmt: skip
    assert read_answers(file, shown) == [[0], None, [], [2], None, None]
    merge_answers(file, shown, {1: [2], 3: None, 4: [], 5: [0]})
    assert read_answers(file, shown) == [[0], [2], [], None, [], [0]]
    with file.open(newline="") as opened:
        rows = list(csv.reader(opened))
    assert rows == [
        ["note", "path", "label"], ["mine", "train/0.png", "Cat"], ["", "elsewhere.png", "odd"],
        ["x", "train/known.png", "dog"], ["", "./train/2.png", "None of these"], ["", "train/3.png", ""],
        ["", "train/4.png", "none of these"], ["", "train/1.png", "cow"], ["", "train/5.png", "cat"],
    ]  # fmt: skip


def test_training_reads_what_is_written(tmp_path):
    paths = ["a,b.png", 'c "d".png', "e\udcff.png", "f\n.png", "=1+1.png", "g.png"]
    shown, file = shown_page(paths=paths, others=[["known.png", "dog"]]), tmp_path / "label_next.csv"
    merge_answers(file, shown, {0: [2], 1: [0], 2: [1], 3: [], 4: [1]})
    rows, classes = read_labels(str(file), [*paths, "known.png"], NAMES)
    assert dict(zip(rows.tolist(), classes.tolist())) == {0: 2, 1: 0, 2: 1, 3: NONE, 4: 1, 6: 1}
    several = shown_page(several=True, paths=paths, others=[["known.png", "dog", ""]])
    (tmp_path / "several").mkdir()
    file = tmp_path / "several/label_next.csv"
    merge_answers(file, several, {0: [0, 2], 2: [], 3: [1]})
    table = read_tags(str(file), [*paths, "known.png"], NAMES)
    assert table[[0, 2, 3, 6]].tolist() == [[1, -1, 1], [-1, -1, -1], [-1, 1, -1], [0, 1, 0]] and not table[[1, 4, 5]].any()
    assert read_answers(file, several) == [[0, 2], None, [], [1], None, None]


def test_a_file_that_was_spoilt_by_hand_is_one_line(tmp_path):
    shown, file = shown_page(), tmp_path / "label_next.csv"
    file.write_text("path,label\ntrain/1.png,dgo\n")
    assert "line 2 has the label 'dgo'" in (line := error_of(read_answers, file, shown)) and "'dog'" in line
    file.write_text("image,label\ntrain/1.png,dog\n")
    assert "no column 'path'" in error_of(merge_answers, file, shown, {0: [1]})
    assert file.read_text() == "image,label\ntrain/1.png,dog\n"


def test_none_of_these_may_be_a_class(tmp_path):
    file = tmp_path / "l.csv"
    file.write_text("path,label\na,none of these\nb,dog\n")
    assert read_labels(str(file), ["a", "b"], ["dog", "None of these"])[1].tolist() == [1, 0]
    assert read_labels(str(file), ["a", "b"], ["dog", "cat"])[1].tolist() == [NONE, 0]
    file.write_text("path,label\na,none of these\na,dog\n")
    assert "says 'none of these'" in error_of(read_labels, str(file), ["a"], ["dog"])


# ---- several labels -------------------------------------------------------------------------------------------------


def test_images_to_ask_about_where_each_has_several_labels():
    rng = np.random.default_rng(0)
    probabilities, observed = rng.random((30, 3)), np.zeros((30, 3), np.int8)
    observed[[4, 9], [0, 2]] = 1, -1
    rows = unsure_images(probabilities, observed)
    assert sorted(rows) == [i for i in range(30) if i not in (4, 9)]
    wrong = [sum(min(p, 1 - p) for p in row) for row in probabilities]
    for label in range(3):
        of_label = [i for i in rows if probabilities[i].argmax() == label]
        assert of_label == sorted(of_label, key=lambda i: -wrong[i])
    assert {probabilities[i].argmax() for i in rows[:3]} == {0, 1, 2}
    report = {"class_names": NAMES, "command": "baselines/spml.py --method an"}
    pictures = [Image.new("L", (4, 4), i) for i in range(30)]
    paths = [f"{i}.png" for i in range(30)]
    shown = tag_page(report, "runs/t", "ann", paths, probabilities, observed, lambda rows: [pictures[i] for i in rows])
    assert [asked.path for asked in shown.images] == [paths[i] for i in rows] and shown.several
    assert shown.others == [["4.png", "cat", ""], ["9.png", "", "cow"]] and shown.script == "baselines/spml.py"


# ---- the server -----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path):
    write_label_page(tmp_path, shown_page())
    with LabelServer(tmp_path, read_page(tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked(server, method, path, body=None, **headers):
    """Status, text and headers of an answer; a header of None is left out."""
    own = {"Host": f"127.0.0.1:{server.server_port}"}
    if method == "POST":
        own |= {"Origin": f"http://127.0.0.1:{server.server_port}", "Content-Type": "application/json"}
        own |= {"Content-Length": str(len(body or b""))}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in (own | {name.replace("_", "-"): value for name, value in headers.items()}).items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text, reply.headers


def answers_of(server, answers, **headers):
    body = answers if isinstance(answers, bytes) else json.dumps({"answers": answers}).encode()
    return asked(server, "POST", f"/{server.token}/answers", body, **headers)


def test_the_page_is_served_to_whoever_knows_the_token(served):
    status, text, headers = asked(served, "GET", f"/{served.token}/")
    record = json.loads(Scripts(text).scripts["application/json"])
    assert status == 200 and record["served"] and record["answers"] == [None] * 6
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'" and "Python" not in headers["Server"]
    assert served.address == f"http://127.0.0.1:{served.server_port}/{served.token}/" and len(served.token) >= 32
    assert served.server_address[0] == "127.0.0.1"
    assert asked(served, "GET", f"/{served.token}/", Host=f"localhost:{served.server_port}")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/label.html",
        "//",
        "/x/",
        "/{token}",
        "/{token}x/",
        "/{token}/label_next.csv",
        "/{token}/../config.yaml",
        "/%ff/",
    ],
)
def test_nothing_else_is_served(served, path):
    path = path.format(token=served.token)
    status, text, _ = asked(served, "GET", path)
    assert status == 404 and served.token not in text
    assert asked(served, "POST", path, b"{}")[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", None])
def test_another_name_of_the_host_is_refused(served, host):
    host = host and host.format(port=served.server_port)
    assert asked(served, "GET", f"/{served.token}/", Host=host)[0] == 404
    assert answers_of(served, {"0": [1]}, Host=host, Origin=f"http://{host}")[0] == 404
    assert read_answers(served.file, served.shown) == [None] * 6


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": None}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1"}, 403), ({"Content_Type": "text/plain"}, 415), ({"Content_Type": None}, 415),
        ({"Content_Length": None}, 411), ({"Content_Length": "-1"}, 411), ({"Content_Length": str(LARGEST + 1)}, 413),
        ({"Content_Length": "9" * 5000}, 413),
    ],
)  # fmt: skip
def test_what_a_stranger_could_send_is_refused(served, headers, status):
    assert answers_of(served, {"0": [1]}, **headers)[0] == status
    assert read_answers(served.file, served.shown) == [None] * 6 and not served.done.is_set()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{", b"\xff", b'{"answers": 3}', b"[" * 100_000, {"6": [0]}, {"-1": [0]}, {"x": [0]}, {"0": [3]},
        {"0": [-1]}, {"0": [0.5]}, {"0": [True]}, {"0": 1}, {"0": [0, 1]}, {"\u0661": [0]}, {"0": [1], "9" * 30: [1]},
    ],
    ids=range(17),
)  # fmt: skip
def test_what_is_no_answer_is_refused(served, body):
    before = served.file.read_bytes()
    status, text, _ = answers_of(served, body)
    assert status == 400 and json.loads(text)["trouble"] and served.file.read_bytes() == before


def test_answers_are_written_at_once_and_shown_when_the_page_is_opened_again(served):
    assert answers_of(served, {"0": [1], "3": [], "4": [2]})[0] == 200
    assert answers_of(served, {"4": None, "5": [0]})[0] == 200
    wanted = [[1], None, None, [], None, [0]]
    assert read_answers(served.file, served.shown) == wanted
    _, text, _ = asked(served, "GET", f"/{served.token}/")
    assert json.loads(Scripts(text).scripts["application/json"])["answers"] == wanted
    assert sorted(path.name for path in served.folder.iterdir()) == ["label.html", "label_next.csv"]


def test_a_full_disk_loses_nothing(served, monkeypatch):
    assert answers_of(served, {"0": [1]})[0] == 200
    before = served.file.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(coreg.files.os, "fsync", full)
    status, text, _ = answers_of(served, {"1": [1]})
    assert status == 500 and "No space left" in json.loads(text)["trouble"]
    monkeypatch.undo()
    assert served.file.read_bytes() == before and len(list(served.folder.iterdir())) == 2
    assert answers_of(served, {"1": [1]})[0] == 200
    assert read_answers(served.file, served.shown)[:2] == [[1], [1]]


def test_many_requests_at_once_are_all_written(served):
    threads = [threading.Thread(target=answers_of, args=(served, {str(i): [i % 3]})) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_answers(served.file, served.shown) == [[i % 3] for i in range(6)]


def test_a_port_that_is_taken_is_one_line(served):
    with pytest.raises(UserError, match="--port"):
        LabelServer(served.folder, served.shown, served.server_port)


def test_the_button_at_the_end_ends_the_server(served):
    assert not served.done.is_set() and asked(served, "GET", f"/{served.token}/done")[0] == 404
    assert asked(served, "POST", f"/{served.token}/done", b"{}", Origin="http://evil.example")[0] == 403
    assert not served.done.is_set()
    assert asked(served, "POST", f"/{served.token}/done", b"{}")[0] == 200 and served.done.wait(60)


def test_the_program_from_its_start_to_the_next_command(tmp_path):
    write_label_page(tmp_path, shown_page())
    program = subprocess.Popen(
        [sys.executable, "-m", "coreg.label", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        port, token = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/", program.stdout.readline()).groups()
        server = type("Server", (), {"server_port": int(port), "token": token})
        assert answers_of(server, {"0": [1], "1": []})[0] == 200
        program.send_signal(signal.SIGINT)
        printed = program.communicate(timeout=60)[0].strip().splitlines()
    finally:
        program.kill()
    assert program.returncode == 0
    assert printed[-2] == f"{tmp_path / 'label_next.csv'}: 1 images labelled, 1 none of these, 4 left"
    assert printed[-1] == f"next: {shown_page().next_command(tmp_path)}"
