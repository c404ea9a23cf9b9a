"""Annotation speed beside the bare forward of the same model, and judging again from features: seconds and peak memory.

    python -m benchmarks.annotate [--model ViT-B-32] [--images 128] [--workers 1] [--rows 50000]

End to end: JPEG files of 256 x 256 on disk -> decoded, preprocessed, encoded, judged under 27 templates, written as blocks
that are on disk when the clock stops. Bare: the image tower alone, on one preprocessed batch that is already on the device,
again and again, before and after every end-to-end run. Weights are random: they do not change the speed. Texts of all
`--classes` are encoded before, which takes a CPU minutes for many, and is not measured.

From features: `annotate_vlm.py --rescore` as a process of its own, for 100 new class names and 27 templates, over stores of
random features. Its peak memory is compared with that of a store of a tenth of the size.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

import annotate_vlm
from benchmarks.tables import as_markdown, environment
from benchmarks.tiny_clip import save_clip
from coreg.annotate.annotators import ClipAnnotator
from coreg.annotate.models import resolve
from coreg.annotate.prompts import TEMPLATES
from coreg.annotate.work import Progress, annotated, work
from coreg.data.images import ImageList, Paths
from coreg.data.sources import open_images
from coreg.store.claims import BlockQueue
from coreg.store.store import StoreWriter, make_manifest

NAMES = [f"thing number {number}" for number in range(100)]
# the system's own account of a child begins with the memory of the process that started it
TELL_PEAK = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
TINY = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def save_random(folder: Path, config: dict) -> str:
    """A randomly initialised open_clip model as a folder; returns its spelling for --vlm."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**{key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")})
    return save_clip(folder, model, config, 0.5, 0.25)


def save_jpegs(folder: Path, count: int) -> None:
    """Smooth noise, which compresses like a photo."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        small.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)


def bare_rate(annotator: ClipAnnotator, size: int, batch: int, seconds: float) -> float:
    """Images a second of the image tower alone."""
    pixels = torch.randn(batch, 3, size, size, device=annotator.device, dtype=annotator.dtype)

    def synchronize() -> None:
        if annotator.device.type == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        annotator.towers.image(pixels)
        synchronize()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            annotator.towers.image(pixels)
            synchronize()
            count += batch
    return count / (time.perf_counter() - start)


def end_to_end_rate(annotator: ClipAnnotator, classes: int, root: Path, folder: Path, batch: int, workers: int) -> float:
    """Images a second from files to blocks; loading the model and encoding the texts are left out."""
    names = NAMES[:classes]
    images = open_images(str(folder), names)
    details = {"features": annotator.features, "data_root": "data", "preprocessing": {}, "versions": {}}
    model = {"spec": "random", "weights": "random"}
    writer = StoreWriter(root, make_manifest(images, names, TEMPLATES, model, 2048, **details))
    writer.start(images)
    start = time.perf_counter()
    with BlockQueue(root, writer.files) as queue:
        progress = Progress(queue, writer, shown=False)
        evidence = partial(annotated, images=images, annotator=annotator, writer=writer, batch_size=batch, workers=workers)
        work(queue, writer, evidence, progress, images.paths)
    writer.complete(images.paths)
    return len(images) / (time.perf_counter() - start)


def compare_speed(options: argparse.Namespace, place: Path) -> list[dict[str, str]]:
    """Both rates in turns and the median of their ratios."""
    config = open_clip.get_model_config(options.model)
    size = config["vision_cfg"]["image_size"]
    spec = save_random(place / "model", config)
    save_jpegs(place / "photos", options.images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    annotator = ClipAnnotator(resolve(spec), TEMPLATES, NAMES[: options.classes], device, options.precision)
    bare, whole, shares = [], [], []
    for number in range(options.rounds):  # taken in turns, because other programs come and go
        before = bare_rate(annotator, size, options.batch, options.seconds)
        store = place / f"ann{number}"
        whole.append(end_to_end_rate(annotator, options.classes, store, place / "photos", options.batch, options.workers))
        after = bare_rate(annotator, size, options.batch, options.seconds)
        bare.append((before + after) / 2)
        shares.append(whole[-1] / bare[-1])
    model = f"{options.model}, {options.precision}, batches of {options.batch}"
    return [
        {"annotation": f"image tower alone, {model}", "images/s": f"{statistics.median(bare):.1f}", "share of it": "1.00"},
        {
            "annotation": f"from files to blocks, {options.classes} classes, {options.workers} decoding processes",
            "images/s": f"{statistics.median(whole):.1f}",
            "share of it": f"{statistics.median(shares):.2f}",
        },
    ]


def save_features(root: Path, spec: str, rows: int) -> None:
    """A finished store of random features of length 512."""
    paths = Paths([b"%08d.jpg" % row for row in range(rows)])
    images = ImageList("/nowhere", paths, None, np.zeros(rows, np.uint8), None, lambda row: None)
    model = {"spec": spec, "weights": resolve(spec).weights, "precision": "fp32"}
    details = {"features": 512, "data_root": "data", "preprocessing": {}, "versions": {}}
    writer = StoreWriter(root, make_manifest(images, NAMES, TEMPLATES, model, 2048, **details))
    writer.start(images)
    generator = np.random.default_rng(0)
    for index in range(len(writer.files)):
        count = len(writer.rows(index))
        features = generator.normal(size=(count, 512)).astype(np.float32)
        features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
        votes, probs = np.zeros((count, len(TEMPLATES)), np.int16), np.full((count, len(NAMES)), 0.01, np.float16)
        writer.write(index, {"votes": votes, "probs": probs, "features": features}, {})
    writer.complete(paths)


def run_child(script: Path, *arguments: str) -> tuple[float, float]:
    """Seconds and peak resident memory (MB) of a Python script in a process of its own."""
    start = time.perf_counter()
    printed = subprocess.run(
        [sys.executable, "-c", TELL_PEAK, str(script), *arguments], capture_output=True, text=True, check=True
    ).stdout
    return time.perf_counter() - start, int(printed.split("\n")[-2]) * 1024 / 1e6


def rescore(options: argparse.Namespace, place: Path) -> list[dict[str, str]]:
    """Seconds and memory of judging again, for two sizes of store."""
    spec = save_random(place / "tiny", TINY)
    (place / "classes.txt").write_text("\n".join(f"other {name}" for name in NAMES))
    (place / "idle.py").write_text("import annotate_vlm")
    idle = run_child(place / "idle.py")
    rows = [{"judging again": "importing only", "seconds": f"{idle[0]:.1f}", "peak MB": f"{idle[1]:.0f}"}]
    for count in (options.rows // 10, options.rows):
        save_features(place / f"features-{count}", spec, count)
        script = Path(annotate_vlm.__file__)
        where = ["--classes", str(place / "classes.txt"), "--output_dir", str(place / f"again-{count}")]
        seconds, peak = run_child(script, "--rescore", str(place / f"features-{count}"), *where, "--batch_size", "512")
        what = f"{count:,} images, 512 features, {len(NAMES)} classes, {len(TEMPLATES)} templates"
        rows.append({"judging again": what, "seconds": f"{seconds:.1f}", "peak MB": f"{peak:.0f}"})
    return rows


def measure(argv: Sequence[str] | None = None) -> str:
    """Both tables, for options as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="architecture of open_clip")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--classes", type=int, default=100, help="1 to 100, whose texts are encoded before")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each bare measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=50_000, help="of the store that is judged again")
    options = parser.parse_args(argv)
    if min(options.images, options.batch, options.rounds, options.rows // 10) < 1 or options.classes not in range(1, 101):
        parser.error("--images, --batch and --rounds must be at least 1, --rows at least 10 and --classes 1 to 100")
    with tempfile.TemporaryDirectory() as place:
        tables = [compare_speed(options, Path(place)), rescore(options, Path(place))]
    return "\n\n".join(map(as_markdown, tables))


if __name__ == "__main__":
    print(f"{environment()}\n\n{measure()}")
