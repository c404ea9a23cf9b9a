"""Whatever is read from disk may be damaged: it is mended, or one line says so, or the result is the same."""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL_JOB
from damage import Subject, attack
from PIL import Image
from runs import final_state, killed_at, script
from test_annotate_annotators import save_tiny_clip
from test_annotate_transformers import save_tiny

import annotate_vlm
import train_coreg
from coreg.annotate import tools
from coreg.export import ensemble as export
from coreg.export import predict
from coreg.report import compare
from coreg.store.store import AnnotationStore

zero_shot = script("zero_shot")


def weights(output):
    state = final_state(output)
    return [hashlib.sha256(t.numpy().tobytes()).hexdigest() for one in state["learners"] for t in one.values()]


def job(copy, name):
    return ["--annotations", str(copy / "store"), "--output_dir", str(copy / name), *SMALL_JOB, "--report_to", "none"]


@pytest.fixture(scope="module")
def subjects(small_store, digits, tmp_path_factory):
    """One whole example of everything that is read from disk, and a command that reads it."""
    root, patch = tmp_path_factory.mktemp("whole"), pytest.MonkeyPatch()
    shutil.copytree(small_store, root / "run" / "store")
    train_coreg.main(job(root / "run", "a"))
    shutil.copytree(root / "run", root / "half")
    with killed_at(patch, 2):
        train_coreg.main(job(root / "half", "b"))
    shutil.copytree(digits.root, root / "digits" / "ann")
    (root / "export" / "images").mkdir(parents=True)
    shutil.copytree(root / "run" / "a" / "export", root / "export" / "model")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(root / "export" / "images" / f"{number}.png")
    with contextlib.redirect_stdout(io.StringIO()):
        images = ["--images", str(root / "export" / "images")]
        export.main(["--run", str(root / "export" / "model"), "--format", "onnx", *images])
    shutil.copytree(root / "export", root / "list")
    (root / "list" / "classes.txt").write_text("a\nb\nc\n")
    for kind, name in (("open_clip", "clip"), ("transformers", "siglip")):
        shutil.copytree(root / "export" / "images", root / kind / "images")
        save_tiny_clip(root / kind / name) if kind == "open_clip" else save_tiny(root / kind / name, name)
    (root / "shards").mkdir()
    with tarfile.open(root / "shards" / "00000.tar", "w") as shard:
        shard.add(root / "export" / "images", "train/a")
    (root / "tables").mkdir()
    cells = [path.read_bytes() for path in sorted((root / "export" / "images").rglob("*.png"))]
    pq.write_table(pa.table({"image": cells}), root / "tables" / "0.parquet")
    (root / "list" / "list.csv").write_text("path,label\nimages/0.png,a\nimages/1.png,b\nimages/2.png,\n")

    def predicted(copy, model):
        words = ["--model", copy / model, "--images", copy / "images", "--output", copy / "p.csv", "--workers", 0]
        predict.main([str(word) for word in words])
        return (copy / "p.csv").read_bytes()

    def trained(copy, name):
        train_coreg.main(job(copy, name))
        return weights(copy / name)

    def compared(copy):
        with contextlib.redirect_stdout(io.StringIO()) as page:
            compare.main([str(copy / "a")])
        return page.getvalue()

    def exported(copy):
        tools.main(["export", str(copy / "ann"), "--output", str(copy / "c.csv")])
        return (copy / "c.csv").read_bytes()

    def annotated(copy):
        annotate_vlm.main(["--output_dir", str(copy / "ann"), "--workers", "0"])
        return AnnotationStore.open(copy / "ann").hash

    def judged(copy):
        zero_shot.main(["--annotations", str(copy / "ann"), "--output_dir", str(copy / "z")])
        return json.loads((copy / "z" / "averaged" / "report.json").read_text())["accuracy"]

    def listed(copy, images, model="builtin:glyph-clip"):
        classes = copy / "classes.txt" if (copy / "classes.txt").exists() else root / "list" / "classes.txt"
        words = [
            "--images",
            copy / images,
            "--classes",
            classes,
            "--vlm",
            model,
            "--output_dir",
            copy / "new",
            "--workers",
            0,
        ]
        annotate_vlm.main([str(word) for word in words])

    def files_in(*parts):
        return lambda copy: [p for part in parts for p in copy.glob(part) if p.is_file() and p.name != ".lock"]

    store = ("ann/*.json", "ann/*.txt", "ann/*.safetensors", "ann/blocks/*", "ann/errors.csv")
    yield [
        Subject("export of a store", root / "digits", files_in(*store), exported),
        Subject("annotation that goes on", root / "digits", files_in(*store), annotated),
        Subject("zero-shot from a store", root / "digits", files_in(*store), judged),
        Subject("comparison", root / "run", files_in("a/report.json", "a/job.json"), compared),
        Subject("finished job", root / "run", files_in("a/*.json", "a/config.yaml"), lambda copy: trained(copy, "a")),
        Subject(
            "stopped job", root / "half", files_in("b/job.json", "b/config.yaml", "b/checkpoints/*/*"),
            lambda copy: trained(copy, "b"),
        ),
        Subject("prediction", root / "export", files_in("model/coreg.json", "model/n*/*"), lambda c: predicted(c, "model")),
        Subject("ONNX", root / "export", files_in("model/model.onnx"), lambda copy: predicted(copy, "model/model.onnx")),
        Subject(
            "lists and images", root / "list", files_in("list.csv", "classes.txt", "images/*"),
            lambda copy: listed(copy, "list.csv"), checked=False,
        ),
        Subject("shards", root / "shards", files_in("*.tar"), lambda copy: listed(copy, "."), checked=False),
        Subject("tables", root / "tables", files_in("*.parquet"), lambda copy: listed(copy, "0.parquet"), checked=False),
        Subject(
            "open_clip folder", root / "open_clip", files_in("clip/*"),
            lambda copy: listed(copy, "images", f"local-dir:{copy / 'clip'}"), checked=False,
        ),
        Subject(
            "transformers folder", root / "transformers", files_in("siglip/*"),
            lambda copy: listed(copy, "images", f"transformers:{copy / 'siglip'}"), checked=False,
        ),
    ]  # fmt: skip
    patch.undo()


def report(subjects, rounds, seed, folder):
    faults, counts = attack(subjects, rounds, seed, folder)
    print(f"seed {seed}, {rounds} damages: {counts}")
    assert not faults, f"seed {seed}: {len(faults)} of {rounds}\n" + "\n".join(faults)


def test_two_dozen_damages(subjects, tmp_path):
    report(subjects, 24, 0, tmp_path)


@pytest.mark.slow
def test_five_hundred_damages(subjects, tmp_path):
    """The seed is another one each time and is printed; DAMAGE_SEED repeats one, DAMAGES makes it more or fewer."""
    seed = int(os.environ.get("DAMAGE_SEED", random.SystemRandom().randrange(10**6)))
    report(subjects, int(os.environ.get("DAMAGES", "500")), seed, tmp_path)
