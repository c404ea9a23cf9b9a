"""What the documentation says can be typed does something: every command is run, on a folder as a reader would have it.

Three things are exchanged: the annotator, which would come from the hub, for the built-in one; training settings, for ones
that take seconds; and the launcher, which has tests of its own, for a call of the program in this process.
"""

import csv
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from test_docs import ALL, ROOT, TEXT, fenced, program_of

NAMES = "zero one two three four five six seven eight nine".split()
SMALL = (
    "--recipe folder --pretrained false --backbone preact_resnet_tiny --image_size 12 --padding 1 --mean 0.3 --std 0.4 "
    "--epochs 2 --batch_size 32 --workers 0"
)
QUICK = "--epochs 2 --batch_size 32 --workers 0".split()  # where the network is the annotator's
TINY_VIT = [
    *SMALL.replace("preact_resnet_tiny", "vit_tiny_patch16_224").replace("size 12", "size 16").split(),
    "--backbone_args",
]
TINY_VIT += ['{"img_size": 16, "patch_size": 8, "depth": 2}']
TRAINERS = ("train_coreg.py", "baselines/distill.py", "baselines/dividemix.py", "baselines/pll.py", "baselines/probe.py")
TAGS = "docs/tags.md"
TUNERS = ("baselines/coop.py", "baselines/lora.py")

# programs that are not run here, and where they are
ELSEWHERE = {
    "baselines/run_all.sh": "test_baseline_scripts.py",
    "baselines/flips.sh": "test_baseline_scripts.py",
    "accelerate_configs/slurm.sh": "needs Slurm; it hands everything on to train_coreg.py",
    "coreg.demo.pretrain": "test_demo_pretrain.py; here it would take minutes",
    "coreg.label": "test_label.py; it waits for a person",
    "benchmarks": "test_benchmarks.py",
    "benchmarks.labelling": "test_benchmarks.py",
    "benchmarks.annotate": "test_benchmarks.py",
    "benchmarks.tiny_clip": "test_benchmarks.py",
    "benchmarks.evidence": "test_evidence.py",
    "benchmarks.partialclip": "test_partialclip.py",
    "benchmarks.conse": "test_evidence.py",
    "benchmarks.lite": "test_evidence.py",
    "benchmarks.spoil": "test_evidence.py",
    "benchmarks.unlabelled": "test_evidence.py",
}
# test_export.py and test_tuners_lora.py have stand-ins for the hub and for a chat model
OUT_OF_REACH = ("--push_to_hub", "chat:llava-1.5-7b-hf")


def is_run(line):
    if line.startswith("make ") or any(word in line for word in OUT_OF_REACH):
        return False
    program, words = program_of(line)
    # `train_coreg.py --candidates RULE` and `accelerate launch annotate_vlm.py` name an option or a program
    names_something = not words or (line.startswith(program) and "--output_dir" not in words)
    whole = program.startswith("coreg.") or (program == "train_coreg.py" and "launch" in line) or not names_something
    return program not in ELSEWHERE and whole and words != ["merge"]


EVERY = list(dict.fromkeys(line for _, line in ALL if is_run(line)))
# what a newcomer types is always run, the rest with the slow tests
FIRST = {line for page, line in ALL if page in ("README.md", "docs/own_images.md", TAGS)}
FIRST -= {line for page, line in ALL if page == TAGS and "--format" in line}  # tests/test_export_tags.py writes programs
FIRST -= {line for line in FIRST if "benchmarks." in line}
OF_TAGS = {line for page, line in ALL if page == TAGS} - {line for page, line in ALL if page not in (TAGS, "README.md")}


def digits_folder(root, rows):
    """Digits as PNG files in folders called like their classes; path -> class."""
    bunch, labels = load_digits(), {}
    for row in rows:
        path = Path(root) / NAMES[bunch.target[row]] / f"IMG_{row:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((bunch.images[row] * 15.9375).astype(np.uint8)).resize((20, 20)).save(path)
        labels[path.as_posix()] = path.parent.name
    return labels


def call(program, words):
    """Run a program as if it had been typed; its exit status."""
    before = sys.argv
    sys.argv = [program, *words]
    try:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
    return 0


def adjusted(program, words):
    """The words of a command, with what there is here in the place of what the reader has."""
    here = {
        "ViT-B-32/openai": "builtin:glyph-clip",
        "local-dir:clip": "builtin:glyph-clip",
        "local-dir:lite0": "preact_resnet_tiny",
        "ann/cifar10": "ann",
        "NEWPLACE": "photos",
        "runs/flips/images": "photos",
        "n": "1",
    }
    here |= dict.fromkeys(("ann/st", "ann/lt", "ann/id"), "drawn") | {"ann/cifar100": "ann"}
    words = [here.get(word, word) for word in words]
    if program in TRAINERS and "--print_config" not in words:
        of_annotator = any(word == "annotator" or word.startswith("partialclip_") for word in words)
        own = QUICK if of_annotator else TINY_VIT if "--tuner" in words else SMALL.split()
        words += own + ["--queue_size", "64"] * (program == "train_coreg.py")
        words += ["--warmup_epochs", "1"] * (program in ("train_coreg.py", "baselines/dividemix.py"))
    if program == "baselines/spml.py":
        words += SMALL.split()
    # the built-in annotator reads short prompts only
    words += ["--context_tokens", "4"] * (program == "baselines/coop.py" and "--context_init" not in words)
    return words + ["--epochs", "1"] * (program in TUNERS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A reader's folder after the first steps: images, class names, stores, a finished run, ten labels filled in."""
    root = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        digits_folder("photos/train", range(150))
        digits_folder("photos/test", range(200, 230))
        for name in ("images", "eurosat"):
            shutil.copytree("photos", name)
        digits_folder("new", range(300, 305))
        shutil.copy(next(Path("new").rglob("*.png")), "photo.jpg")
        checked = digits_folder("checked", range(400, 460))
        Path("checked.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in checked.items()))
        for name in ("classes.txt", "better.txt", "other.txt"):
            Path(name).write_text("\n".join(NAMES) + "\n")
        Path("other_templates.txt").write_text("a photo of the number {}\nthe number {}\n")
        given = "--images photos --classes classes.txt --vlm builtin:glyph-clip --workers 0 --output_dir ann"
        assert call("annotate_vlm.py", given.split()) == 0
        draw = "--images photos --classes classes.txt --rule fps --q 0.3 --output_dir drawn"
        assert call("coreg.weak", draw.split()) == 0
        for name in ("ann1", "ann2"):
            shutil.copytree("ann", name)
        words = ["--annotations", "ann", "--output_dir", "runs/a"]
        assert call("train_coreg.py", adjusted("train_coreg.py", words)) == 0
        assert call("coreg.export", ["--run", "runs/a", "--distances"]) == 0
        shutil.copytree("runs/a", "runs/compare/a")
        assert call("coreg.export", ["--run", "runs/compare/a", "--format", "onnx"]) == 0
        shutil.copy("runs/compare/a/export/model.onnx", "model.onnx")
        with Path("runs/a/label_next.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows[:10]:
            row["label"] = Path(row["path"]).parent.name
        with Path("runs/a/label_next.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return root


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """The same for tags: photos without labels, a list of tags, a tiled store, a finished run, ten lines filled in."""
    root = tmp_path_factory.mktemp("tags")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        digits_folder("all", range(130))
        for place, rows in (("photos", slice(100)), ("new", slice(100, 105)), ("checked", slice(105, 130))):
            Path(place).mkdir()
            for file in sorted(Path("all").rglob("*.png"))[rows]:
                shutil.copy(file, place)
        shutil.copy(next(Path("new").glob("*.png")), "photo.jpg")
        lines = [
            f"checked/{file.name},{NAMES[n % 3]};{NAMES[n % 4 + 3]}" for n, file in enumerate(Path("checked").iterdir())
        ]
        Path("checked.csv").write_text("\n".join(["path,labels", *lines]) + "\n")
        for name in ("tags.txt", "better.txt"):
            Path(name).write_text("\n".join(NAMES) + "\n")
        given = "--images photos --classes tags.txt --vlm builtin:glyph-clip --tiles 2 --workers 0 --output_dir ann"
        assert call("annotate_vlm.py", given.split()) == 0
        words = ["--annotations", "ann", "--method", "soft", "--output_dir", "runs/tags"]
        assert call("baselines/spml.py", adjusted("baselines/spml.py", words)) == 0
        with Path("runs/tags/label_next.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows[:10]:
            row |= {"labels": "one;two", "absent": "three"}
        with Path("runs/tags/label_next.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return root


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=() if line in FIRST else pytest.mark.slow, id=line[:90]) for line in EVERY]
)
def test_every_command_does_what_it_says(line, request, tmp_path, monkeypatch, capsys):
    shutil.copytree(request.getfixturevalue("tagged" if line in OF_TAGS else "prepared"), tmp_path / "reader")
    monkeypatch.chdir(tmp_path / "reader")
    program, words = program_of(line)
    outputs = [Path(words[i + 1]) for i, word in enumerate(words) if word in ("--output_dir", "--output")]
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
    before = set(Path().rglob("*"))
    assert call(program, adjusted(program, words)) == 0, capsys.readouterr().err
    assert all(output.is_file() or any(output.iterdir()) for output in outputs)
    made = set(Path().rglob("*")) - before
    assert made or capsys.readouterr().out.strip()


def test_the_example_of_tags_in_python_runs(tagged, monkeypatch, capsys):
    monkeypatch.chdir(tagged)
    (example,) = fenced(TEXT[TAGS], "python")
    exec(example, {})
    assert [line.split(" ", 1)[0] for line in capsys.readouterr().out.splitlines()] == list("01234")
