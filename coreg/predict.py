"""Name the class of every image of a folder with an exported run.

coreg-predict --model runs/a/export --images new/ --output predictions.csv
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from coreg.config import option, parse
from coreg.data.augment import Augmentation
from coreg.data.decode import decode
from coreg.data.sources import open_images
from coreg.errors import UserError, exits_with_one_line
from coreg.export import ensemble_logits, load_export


@dataclass
class PredictConfig:
    """What to predict with, on what, and where to."""

    model: str | None = option(None, "the export folder of a finished run, such as runs/a/export")
    images: str | None = option(None, "folder, CSV file or torchvision name, as for annotate_vlm.py")
    output: str = option("predictions.csv", "CSV file to write: path, label, probability, and the next best labels")
    top_k: int = option(3, "labels a row")
    batch_size: int = option(256, "images at a time")
    workers: int = option(2, "processes that decode images")


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `coreg-predict`."""
    (config,) = parse(PredictConfig, argv=argv, prog="coreg-predict", description=__doc__)
    for name in ("model", "images"):
        if getattr(config, name) is None:
            raise UserError(f"--{name} is missing; write for example: coreg-predict --model runs/a/export --images new/")
    output = Path(config.output)
    if not output.parent.is_dir():
        raise UserError(f"the folder of --output {output} does not exist; create it or choose another file")
    nets, settings = load_export(config.model)
    names = settings["class_names"]
    images = open_images(config.images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    nets = [net.to(device) for net in nets]
    look = Augmentation(settings["image_size"], 0, False, mean=tuple(settings["mean"]), std=tuple(settings["std"]))
    k = max(1, min(config.top_k, len(names)))

    failed: dict[int, str] = {}
    temporary = output.with_name(f".{output.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        columns = ["label", "probability"]
        writer.writerow(["path", *columns, *(f"{column}_{i}" for i in range(2, k + 1) for column in columns), "error"])
        for start in tqdm(range(0, len(images), config.batch_size), desc="predict", unit="batch"):
            rows = np.arange(start, min(start + config.batch_size, len(images)))
            pixels = decode(images, rows, look.size, settings["channels"], config.workers, failed)
            # the mean of the logits: the ensemble's prediction at the scale of one network
            logits = ensemble_logits(nets, look.plain(pixels.to(device))) / len(nets)
            best = torch.softmax(logits, dim=1).topk(k)
            for row, shares, classes in zip(rows.tolist(), best.values.tolist(), best.indices.tolist()):
                if row in failed:
                    writer.writerow([images.paths[row], *[""] * 2 * k, failed[row]])
                    continue
                named = [word for c, share in zip(classes, shares) for word in (names[c], f"{share:.4f}")]
                writer.writerow([images.paths[row], *named, ""])
    temporary.replace(output)
    print(f"{output}: {len(images) - len(failed)} images named, {len(failed)} unreadable")
    if len(failed) == len(images):
        raise UserError(f"none of the {len(images)} images in {config.images} can be read; the reasons are in {output}")


if __name__ == "__main__":
    main()
