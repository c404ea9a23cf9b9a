"""Image lists from folders, CSV files, torchvision sets and the digits; reading files of every odd kind."""

import hashlib
import os
import pickle
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from coreg.data import decode as decoding
from coreg.data.decode import UnreadableImage, decode, read_image
from coreg.data.images import escape, list_hash, unescape
from coreg.data.sources import open_images, require_readable
from coreg.errors import UserError


def put(path, colour=(10, 200, 30), size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, format="PNG")
    return path


def one_line(raised):
    message = str(raised.value)
    assert message and "\n" not in message
    return message


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_recursively_in_byte_order(tmp_path):
    names = [
        "b.png",
        "B.jpg",
        "a/z.PNG",
        "a/é.png",
        "a b/with space.png",
        "a/new\nline.png",
        "a/back\\slash.png",
        "猫/1.webp",
    ]
    for name in names:
        put(tmp_path / name)
    for other in ("classes.txt", "a/readme.md", ".hidden.png", ".cache/x.png", "a/._b.png"):
        put(tmp_path / other)
    images = open_images(str(tmp_path))
    assert images.paths == sorted(names, key=lambda name: name.encode())
    assert images.labels is None and images.class_names is None
    assert images.split.dtype == np.uint8 and not images.split.any()
    assert images.spec == str(tmp_path.resolve()) and open_images(images.spec).paths == images.paths
    for row in range(len(images)):
        assert images.load(row).getpixel((0, 0)) == (10, 200, 30)


def test_names_that_are_not_utf8_survive(tmp_path):
    try:
        put(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")))
    except OSError:
        pytest.skip("this file system refuses such names")
    images = open_images(str(tmp_path))
    assert os.fsencode(images.paths[0]) == b"\xff\xfe.png" and images.load(0).size == (6, 4)
    assert list_hash(images.paths) == hashlib.sha256(b"\xff\xfe.png\n").hexdigest()


def test_links_are_followed_once_and_loops_end(tmp_path):
    root = tmp_path / "root"
    put(root / "real" / "1.png")
    put(tmp_path / "elsewhere" / "2.png")
    (root / "real" / "up").symlink_to(root)  # a loop
    (root / "again").symlink_to(root / "real")  # sorted before "real", yet the real folder is the one listed
    (root / "outside").symlink_to(tmp_path / "elsewhere")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "broken.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "pipe.png")
    images = open_images(str(root))
    assert images.paths == ["broken.png", "outside/2.png", "pipe.png", "real/1.png", "self.png"]
    for row, reason in [(0, "no such file"), (2, "not a regular file"), (4, "symbolic links")]:
        with pytest.raises(UnreadableImage, match=reason):
            images.load(row)


def test_labels_come_from_the_innermost_folder_called_like_a_class(tmp_path):
    wanted = {
        "test/Lawn-Mower/1.png": (1, 1),
        "train/lawn_mower/2.png": (1, 0),
        "cat/lawnmower/3.png": (1, 0),
        "lawn mower/cat/4.png": (0, 0),
        "CAT/deep/er/5.png": (0, 0),
        "other/6.png": (-1, 0),
        "7.png": (-1, 0),
        "cats/test/cat.png": (-1, 0),
    }
    for name in wanted:
        put(tmp_path / name)
    images = open_images(str(tmp_path), ["cat", "lawn mower"])
    assert {p: (int(label), int(split)) for p, label, split in zip(images.paths, images.labels, images.split)} == wanted
    assert images.labels.dtype == np.int64
    assert open_images(str(tmp_path), ["dog", "horse"]).labels is None


def test_names_that_differ_in_separators_only_are_kept_apart_by_spelling(tmp_path):
    for folder in ("a b", "a_b", "A-B"):
        put(tmp_path / folder / "1.png")
    images = open_images(str(tmp_path), ["a b", "a_b"])
    assert dict(zip(images.paths, images.labels)) == {"A-B/1.png": -1, "a b/1.png": 0, "a_b/1.png": 1}


def test_sources_that_are_none_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.doc").write_text("x")
    for spec, words in [
        (str(tmp_path / "missing"), "does not exist"),
        (str(tmp_path / "empty"), "no image below"),
        (str(tmp_path / "notes.doc"), "neither a folder nor a .csv"),
        ("CIFAR1", "did you mean CIFAR10?"),
        ("builtin:digit", "did you mean builtin:digits?"),
        ("torchvision:EuroSat", "did you mean EuroSAT?"),
    ]:
        with pytest.raises(UserError) as raised:
            open_images(spec)
        assert words in one_line(raised)


def test_at_least_one_image_must_be_readable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError) as raised:
        require_readable(open_images(str(tmp_path)))
    assert "none of the 1 images" in one_line(raised) and "empty file" in str(raised.value)
    put(tmp_path / "b.png")
    require_readable(open_images(str(tmp_path)))


def test_what_is_passed_over_is_counted_and_what_systems_leave_is_not(tmp_path):
    put(tmp_path / "a" / "1.png")
    for name in ("b/2.cr2", "b/3.CR2", "b/no suffix", "b/readme.md", "b/odd.\x1b[31m", "c/list.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("@eaDir/1.png/SYNOPHOTO_THUMB_XL.jpg", ".thumbnails/1.png", "a/__MACOSX/._1.png", "__MACOSX/1.png"):
        put(tmp_path / name)
    for name in ("Thumbs.db", "a/desktop.ini", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    images = open_images(str(tmp_path))
    assert images.paths == ["a/1.png"]
    assert images.notes == ["passed over: 2 .cr2, 1 .json, 1 .md, 1 of other kinds, 1 without suffix"]
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(UserError, match=r"no image below .* \(passed over: 2 .cr2, "):
        open_images(str(tmp_path))


def in_child(code, *arguments, path=""):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), *filter(None, sys.path)])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
LIST = """
import sys
from coreg.data.decode import UnreadableImage
from coreg.data.sources import open_images
images = open_images(sys.argv[1])
print(list(images.paths), images.notes, "pillow_heif" in sys.modules)
for row in range(len(images)):
    try:
        print(images.load(row).getpixel((0, 0)))
    except UnreadableImage as error:
        print(error)
"""


def test_heic_is_read_where_its_library_is_installed_and_named_where_it_is_not(tmp_path):
    """A stand-in for pillow-heif, which registers a format HEIF as that does."""
    put(tmp_path / "photos" / "1.png")
    for name in ("2.heic", "3.HEIF", "called.jpg"):
        (tmp_path / "photos" / name).write_bytes(HEIC)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "pillow_heif.py").write_text(
        "from PIL import Image\n"
        "def open_heif(file, name):\n"
        "    image = Image.new('RGB', (6, 4), (7, 8, 9))\n"
        "    image.format = 'HEIF'\n"
        "    return image\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', open_heif, lambda prefix: prefix[4:8] == b'ftyp')\n"
    )
    with_it = in_child(LIST, tmp_path / "photos", path=tmp_path / "library").splitlines()
    assert with_it[0] == "['1.png', '2.heic', '3.HEIF', 'called.jpg'] [] False"  # not loaded before it is needed
    assert with_it[1:] == ["(10, 200, 30)", "(7, 8, 9)", "(7, 8, 9)", "(7, 8, 9)"]


def test_heic_by_its_own_library(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    Image.new("RGB", (64, 48), (10, 200, 30)).save(tmp_path / "1.heic", quality=95)
    image = read_image(tmp_path / "1.heic")
    assert image.size == (64, 48) and np.abs(np.subtract(image.getpixel((5, 5)), (10, 200, 30))).max() < 8


@pytest.mark.skipif(decoding.READS_HEIF, reason="pillow-heif is installed")
def test_heic_that_cannot_be_read_is_counted_with_the_remedy(tmp_path):
    put(tmp_path / "1.png")
    for name in ("2.heic", "3.HEIC", "4.heif"):
        (tmp_path / name).write_bytes(HEIC)
    images = open_images(str(tmp_path))
    assert images.paths == ["1.png"]
    hint = "(pip install pillow-heif and they are read)"
    assert images.notes == [f"passed over: 2 .heic {hint}, 1 .heif {hint}"]
    (tmp_path / "called.png").write_bytes(HEIC)
    with pytest.raises(UnreadableImage, match=r"^not an image of a known format"):
        read_image(tmp_path / "called.png")


# ---- text lists -----------------------------------------------------------------------------------------------------


def test_text_lists_as_imagenet_lt_comes(tmp_path):
    for name in ("train/n01/a.png", "train/n02/with space.png", "val/b.png", "val/c.png"):
        put(tmp_path / name)
    (tmp_path / "X_LT_train.txt").write_text("train/n02/with space.png 1\r\n\ntrain/n01/a.png 0\ntrain/n03/gone.png 1\n")
    (tmp_path / "X_LT_test.txt").write_text("val/c.png 1\nval/b.png\t0")
    (tmp_path / "X_LT_val.txt").write_text("val/c.png 0\n")  # not looked at
    images = open_images(str(tmp_path / "X_LT_train.txt"), ["cat", "dog"])
    assert images.paths == ["train/n01/a.png", "train/n02/with space.png", "train/n03/gone.png", "val/b.png", "val/c.png"]
    assert images.labels.tolist() == [0, 1, 1, 0, 1] and images.split.tolist() == [0, 0, 0, 1, 1]
    assert images.load(1).size == (6, 4) and images.class_names is None
    with pytest.raises(UnreadableImage, match="no such file"):
        images.load(2)
    assert images.spec == str(tmp_path / "X_LT_train.txt") and open_images(images.spec).labels is None
    assert open_images(str(tmp_path / "X_LT_test.txt"), ["cat", "dog"]).split.tolist() == [1, 1]
    (tmp_path / "X_LT_test.txt").unlink()
    assert open_images(images.spec, ["cat", "dog"]).split.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("../x.png 0\n", "line 1 names '../x.png'; paths must lie in the folder of the list"),
        ("a.png 0\n/etc/x.png 0\n", "line 2 names '/etc/x.png'"),
        ("a.png 0\nb/../a.png 1\n", "line 2 names 'a.png' a second time"),
        ("airplane\nbird\n", "line 1 is 'airplane'; write `path label` a line"),
        ("a.png -1\n", "line 1 is 'a.png -1'"),
        ("a.png 1.0\n", "line 1 is 'a.png 1.0'"),
        ("a.png ²\n", "line 1 is"),
        ("a.png 2\n", "has the label 2, and there are 2 class names"),
        ("\n \n", "lists no image"),
        ("", "lists no image"),
    ],
)
def test_a_bad_text_list_ends_in_one_line(tmp_path, text, words):
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        open_images(str(tmp_path / "list.txt"), ["cat", "dog"])
    assert words in one_line(raised)


# ---- CSV lists ------------------------------------------------------------------------------------------------------


def test_a_csv_list_gives_paths_labels_and_split(tmp_path):
    for name in ("b.png", "sub/a.png", "c,comma.png"):
        put(tmp_path / name)
    text = '\ufeffpath,label,split\n./sub/a.png,Dog,test\nb.png,,train\n"c,comma.png",cat,\nmissing.png,cat,0\n'
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    images = open_images(str(tmp_path / "list.csv"), ["cat", "dog"])
    assert images.paths == ["b.png", "c,comma.png", "missing.png", "sub/a.png"]
    assert images.labels.tolist() == [-1, 0, 0, 1] and images.split.tolist() == [0, 0, 0, 1]
    assert images.load(3).size == (6, 4)
    with pytest.raises(UnreadableImage, match="no such file"):
        images.load(2)
    assert open_images(str(tmp_path / "list.csv")).labels is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path\n../../etc/x.png\n", "line 2 names '../../etc/x.png'; paths must lie in the folder"),
        ("path\na/../../x.png\n", "paths must lie in the folder"),
        ("path\n/etc/x.png\n", "paths must lie in the folder"),
        ("path,label\n,cat\n", "paths must lie in the folder"),
        ("path\na.png\nb/../a.png\n", "a second time"),
        ("file,label\na.png,cat\n", "first line must be path"),
        ("path,label,weight\na.png,cat,1\n", "first line must be path"),
        ("path\n", "lists no image"),
        ("", "one path a line below the header path[,label][,split]"),
        ("path,split\na.png,validation\n", "line 2 has the split 'validation'; write train, val or test"),
        ("path,label\na.png,cst\n", "'cst', which is none of the class names, did you mean 'cat'?"),
        ("path,label\na,b.png,cat\n", "more fields than the header"),
    ],
)
def test_a_bad_csv_list_ends_in_one_line(tmp_path, text, words):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError) as raised:
        open_images(str(tmp_path / "list.csv"), ["cat", "dog"])
    assert words in one_line(raised)


# ---- data sets ------------------------------------------------------------------------------------------------------


def test_the_digits_are_scikit_learns():
    images = open_images("builtin:digits")
    bunch = load_digits()
    assert len(images) == 1797 and images.paths == sorted(images.paths) and len(set(images.paths)) == 1797
    assert (images.labels == bunch.target).all() and images.split.sum() == 360
    assert np.abs(np.asarray(images.load(7), dtype=float) - 16 * bunch.images[7]).max() <= 1
    assert images.class_names[3] == "three" and open_images(images.spec).paths == images.paths


def test_labels_of_a_data_set_follow_the_names_that_are_asked_for():
    own = open_images("builtin:digits")
    swapped = ["one", "zero", *own.class_names[2:]]
    labels = open_images("builtin:digits", swapped).labels
    assert [swapped[label] for label in labels] == [own.class_names[label] for label in own.labels]
    # other words in the same order
    numerals = [f"number {digit}" for digit in range(10)]
    assert (open_images("builtin:digits", numerals).labels == own.labels).all()
    half = ["number 0", "one", *numerals[2:]]
    assert (open_images("builtin:digits", half).labels == own.labels).all()
    some = open_images("builtin:digits", ["nine", "cat"]).labels
    assert (some == np.where(own.labels == 9, 0, -1)).all()
    assert open_images("builtin:digits", ["cat", "dog"]).labels is None


def test_gtsrb_and_eurosat_are_read_from_torchvisions_folders(tmp_path):
    signs = tmp_path / "gtsrb" / "GTSRB"
    for number, shade in [(0, 10), (14, 20)]:
        (signs / "Training" / f"{number:05d}").mkdir(parents=True)
        Image.new("RGB", (20, 20), (shade, 0, 0)).save(signs / "Training" / f"{number:05d}" / "0.ppm")
    (signs / "Final_Test" / "Images").mkdir(parents=True)
    Image.new("RGB", (15, 20), (30, 0, 0)).save(signs / "Final_Test" / "Images" / "0.ppm")
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n0.ppm;42\n")
    images = open_images("torchvision:GTSRB", None, str(tmp_path))
    assert images.paths == ["test/000000", "train/000000", "train/000001"] == sorted(images.paths)
    assert images.split.tolist() == [1, 0, 0]
    # torchvision numbers the folders that are there; all 43 are in the real set
    assert images.labels.tolist() == [42, 0, 1] and images.load(0).getpixel((0, 0)) == (30, 0, 0)
    assert len(images.class_names) == 43 and images.class_names[14] == "German Traffic Sign: Stop"

    for name in ("AnnualCrop", "Forest"):
        for i in range(10):
            put(tmp_path / "eurosat" / "2750" / name / f"{i}.png")
    images = open_images("EuroSAT", None, str(tmp_path))
    assert images.class_names == ["AnnualCrop", "Forest"] and images.labels.tolist() == [0] * 10 + [1] * 10
    # no official split: a fifth for testing, the same rows every time
    assert images.split.sum() == 4 and (images.split == open_images("EuroSAT", None, str(tmp_path)).split).all()
    assert images.paths[0] == "all/000000"


def test_aircraft_and_cars_are_read_from_torchvisions_folders(tmp_path):
    from scipy.io import savemat

    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    (data / "images").mkdir(parents=True)
    (data / "variants.txt").write_text("707-320\nA300B4\n")
    for split, lines in (("trainval", "01 A300B4\n02 707-320\n"), ("test", "03 A300B4\n")):
        (data / f"images_variant_{split}.txt").write_text(lines)
        for line in lines.splitlines():
            put(data / "images" / f"{line[:2]}.jpg")
    images = open_images("torchvision:FGVCAircraft", None, str(tmp_path))
    assert images.class_names == ["707-320", "A300B4"] and images.labels.tolist() == [1, 1, 0]
    assert images.paths == ["test/000000", "train/000000", "train/000001"] and images.load(2).size == (6, 4)

    cars = tmp_path / "stanford_cars"
    for part, file, names in (("train", "devkit/cars_train_annos", "ab"), ("test", "cars_test_annos_withlabels", "cd")):
        (cars / f"cars_{part}").mkdir(parents=True)
        (cars / "devkit").mkdir(exist_ok=True)
        rows = [(f"{name}.jpg", 2 - number) for number, name in enumerate(names)]
        for name, _ in rows:
            put(cars / f"cars_{part}" / name)
        savemat(cars / f"{file}.mat", {"annotations": np.array(rows, dtype=[("fname", object), ("class", object)])})
    savemat(cars / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi R8", "BMW X3"], dtype=object)})
    images = open_images("StanfordCars", None, str(tmp_path))
    assert images.class_names == ["Audi R8", "BMW X3"] and images.labels.tolist() == [1, 0, 1, 0]
    assert images.split.tolist() == [1, 1, 0, 0] and images.load(0).size == (6, 4)


def test_cifar10_keeps_its_own_split_names_and_labels(tmp_path, monkeypatch):
    from torchvision import datasets

    class Tiny:
        classes = ("airplane", "bird")

        def __init__(self, root, train, download=False):
            self.targets = [0, 1, 1] if train else [1]

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, row):
            return Image.new("RGB", (32, 32), (row, self.targets[row], 0)), self.targets[row]

    monkeypatch.setattr(datasets, "CIFAR10", Tiny)
    images = open_images("CIFAR10", ["bird", "airplane"], str(tmp_path))
    assert images.labels.tolist() == [0, 1, 0, 0] and images.split.tolist() == [1, 0, 0, 0]
    assert images.load(3).getpixel((0, 0)) == (2, 1, 0)


@pytest.mark.parametrize(
    "name", ["CIFAR10", "CIFAR100", "SVHN", "FashionMNIST", "EuroSAT", "FER2013", "GTSRB", "FGVCAircraft", "StanfordCars"]
)
def test_a_data_set_that_cannot_be_downloaded_ends_in_one_line(tmp_path, monkeypatch, name):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(UserError) as raised:
        open_images(name, None, str(tmp_path / "data"))
    assert f"data set {name} is not in" in one_line(raised) and "--data_root" in str(raised.value)
    assert not (tmp_path / "data").exists()


# ---- list identity --------------------------------------------------------------------------------------------------


def test_escaping_is_reversible_and_keeps_a_path_on_one_line():
    generator = np.random.default_rng(0)
    for _ in range(300):
        path = "".join(generator.choice(["\\", "\n", "\r", "n", "r", "x", "é"], size=8))
        line = escape(path)
        assert unescape(line) == path and "\n" not in line and "\r" not in line


def test_the_hash_depends_on_names_and_order():
    assert list_hash(["a", "b\nc"]) == hashlib.sha256(b"a\nb\\nc\n").hexdigest()
    assert len({list_hash(paths) for paths in (["a", "b"], ["b", "a"], ["a\nb"], ["ab"], [])}) == 5


def test_lists_can_be_sent_to_worker_processes(tmp_path):
    put(tmp_path / "a.png")
    for images in (open_images(str(tmp_path)), open_images("builtin:digits")):
        assert pickle.loads(pickle.dumps(images)).load(0).size == images.load(0).size


# ---- files of every kind --------------------------------------------------------------------------------------------


def test_exif_orientation_is_applied(tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8))
    # what a viewer has to do for each orientation value, from the EXIF standard
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}
    assert [m.value for m in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90)] == [0, 2]
    for orientation, (method,) in undo.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright.save(tmp_path / "x.png", exif=exif)
        wanted = upright.transpose(Image.Transpose(method))
        assert (np.asarray(read_image(tmp_path / "x.png")) == np.asarray(wanted)).all(), orientation


def test_transparent_parts_are_laid_over_white(tmp_path):
    pixels = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [200, 100, 0, 51]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    wanted = pixels[..., :3] * (pixels[..., 3:] / 255) + 255 * (1 - pixels[..., 3:] / 255)
    assert np.abs(np.asarray(read_image(tmp_path / "rgba.png")) - wanted).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png")
    assert np.asarray(read_image(tmp_path / "p.png")).tolist() == [[[9, 8, 7], [1, 2, 3]]]
    palette.save(tmp_path / "t.png", transparency=1)
    assert np.asarray(read_image(tmp_path / "t.png")).tolist() == [[[9, 8, 7], [255, 255, 255]]]


def test_deep_grey_becomes_eight_bits(tmp_path):
    deep = np.array([[0, 255, 256, 65535, 32768]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "16.png")
    Image.fromarray(deep).save(tmp_path / "16.tif")
    for name in ("16.png", "16.tif"):
        image = read_image(tmp_path / name)
        assert image.mode == "L" and np.asarray(image).tolist() == [[0, 0, 1, 255, 128]]
    Image.fromarray(np.array([[-1.0, 0.0, 1.0, np.nan]], dtype=np.float32)).save(tmp_path / "f.tif")
    assert np.asarray(read_image(tmp_path / "f.tif")).tolist() == [[0, 128, 255, 128]]
    Image.fromarray(np.full((1, 2), 70000, dtype=np.int32)).save(tmp_path / "flat.tif")
    assert np.asarray(read_image(tmp_path / "flat.tif")).tolist() == [[0, 0]]


def test_other_modes_become_grey_or_rgb(tmp_path):
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert read_image(tmp_path / "cmyk.tif").getpixel((0, 0)) == (255, 0, 0)
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert read_image(tmp_path / "bit.png").mode == "L" and read_image(tmp_path / "bit.png").getpixel((0, 0)) == 255
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "two.gif").convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def png_of_size(width, height):
    """A PNG that claims a size and holds hardly any data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_files_say_why(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png", "cut.gif", "cut.bmp"):
        noise.save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("this is no image")
    (tmp_path / "bomb.png").write_bytes(png_of_size(10000, 10000))
    (tmp_path / "huge.png").write_bytes(png_of_size(2**20, 2**20))
    (tmp_path / "long.png").write_bytes(png_of_size(60000, 1))
    (tmp_path / "ps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nquit\n")
    reasons = {}
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UnreadableImage) as raised:
            read_image(path)
        reasons[path.name] = str(raised.value)
        assert reasons[path.name] and "\n" not in reasons[path.name] and str(tmp_path) not in reasons[path.name]
    assert reasons["empty.jpg"] == "empty file"
    assert reasons["text.png"] == reasons["ps.jpg"] == "not an image of a known format"
    assert "truncated" in reasons["cut.jpg"] and "bomb" in reasons["huge.png"]
    assert "10000x10000 pixels are more" in reasons["bomb.png"] and "60000x1 has one side" in reasons["long.png"]


# ---- decoding -------------------------------------------------------------------------------------------------------


def test_decode_squashes_like_pillow_and_leaves_unreadable_rows_zero(tmp_path):
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for shape in [(9, 30, 3), (17, 5, 3)]]
    for name, picture in zip("ac", pictures):
        picture.save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"junk")
    images = open_images(str(tmp_path))
    failed = {}
    pixels = decode(images, np.array([2, 1, 0, 2]), 8, 3, 2, failed)
    assert failed == {1: "not an image of a known format"}
    assert pixels.dtype == torch.uint8 and pixels.shape == (4, 3, 8, 8)
    for place, picture in [(0, pictures[1]), (2, pictures[0]), (3, pictures[1])]:
        wanted = np.asarray(picture.resize((8, 8), Image.Resampling.BILINEAR))
        assert (pixels[place].permute(1, 2, 0).numpy() == wanted).all()
    assert not pixels[1].any()
    grey = decode(images, np.array([0]), size=8, channels=1, workers=0)
    assert (grey[0, 0].numpy() == np.asarray(pictures[0].convert("L").resize((8, 8), Image.Resampling.BILINEAR))).all()
    assert decode(images, np.array([], dtype=np.int64), 8, 3, 1).shape == (0, 3, 8, 8)


def test_decoding_does_not_depend_on_the_number_of_threads():
    images = open_images("builtin:digits")
    rows = np.arange(300)[::-1]
    one, four = (decode(images, rows, size=16, channels=1, workers=workers) for workers in (1, 4))
    assert torch.equal(one, four) and one[0].any()


def test_decode_checks_its_arguments_first(monkeypatch):
    images = open_images("builtin:digits")
    for rows, size, channels in [([0], 8, 2), ([0], 0, 3), ([1797], 8, 3), ([-1], 8, 3)]:
        with pytest.raises(ValueError, match="cannot decode"):
            decode(images, np.array(rows), size, channels, 1)
    monkeypatch.setattr(decoding.torch, "zeros", None)  # nothing is allocated
    with pytest.raises(UserError) as raised:
        decode(images, np.arange(1797), 10**6, 3, 1)
    assert "GiB of memory" in one_line(raised)
