"""Name the class of every image of a folder, or of one image, with an exported run.

    coreg-predict --model runs/a/export --images new/ --output predictions.csv
    coreg-predict --model runs/a/export --images photo.jpg
    coreg-predict --model model.onnx --images new/

The probabilities are calibrated by the temperature that the export came with; its coreg.json says what that was fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coreg.config import SAFE_CSV, option, parse
from coreg.data.decode import SUFFIXES, Resize, decode, read_image
from coreg.data.images import ImageList
from coreg.data.sources import open_images
from coreg.errors import UserError, exits_with_one_line
from coreg.export.ensemble import Ensemble
from coreg.export.folder import REMEDY, load_export
from coreg.export.programs import open_onnx
from coreg.files import check_writable, writing_csv
from coreg.plaintext import printable
from coreg.progress import progress_bar
from coreg.records import RecordError, read_file

# of unreadable images on the terminal; the CSV file has them all
SHOWN = 5


@dataclass
class PredictConfig:
    """What to predict with, on what, and where to."""

    model: str | None = option(None, "a finished run, its export folder, or an .onnx file that coreg-export wrote")
    images: str | None = option(None, "an image, or a folder, CSV file or torchvision name as for annotate_vlm.py")
    output: str | None = option(
        None, "CSV file to write: path, label, probability, and the next best labels (default: predictions.csv; for one "
        "image none)"
    )  # fmt: skip
    top_k: int = option(3, "labels a row", (1, 1_000_000))
    batch_size: int = option(256, "images at a time", (1, 1_000_000))
    workers: int = option(2, "threads that decode images", (0, 1024))
    safe_csv: bool = option(False, SAFE_CSV)


@dataclass
class Classifier:
    """An exported ensemble, from whatever file."""

    class_names: list[str]  # C names
    image_size: int  # side in pixels to which images are decoded
    channels: int  # 1 or 3, of decoded images
    run: Callable[[Tensor], Tensor]  # uint8 (n, channels, image_size, image_size) -> float32 (n, C), both on the CPU
    resize: Resize = "squash"  # how they become squares

    def batches(
        self, images: ImageList, batch_size: int = 256, workers: int = 2
    ) -> Iterator[tuple[np.ndarray, np.ndarray, dict[int, str]]]:
        """Predict all images in order, a batch at a time.

        Yields:
            Rows int64 (n,), calibrated probabilities float32 (n, C), and row -> reason of those that cannot be read,
            whose probabilities mean nothing.

        Raises:
            UserError: what the model gives are no probabilities.
        """
        for start in range(0, len(images), batch_size):
            rows, failed = np.arange(start, min(start + batch_size, len(images))), {}
            pixels = decode(images, rows, self.image_size, self.channels, workers, failed, self.resize)
            yield rows, self._probabilities(pixels), failed

    def _probabilities(self, pixels: Tensor) -> np.ndarray:
        """Of uint8 images, checked: whatever the file holds, its answer is a distribution or an error."""
        try:
            probabilities = self.run(pixels).numpy()
        except Exception as error:  # of onnxruntime or PyTorch, on networks that do not fit their own settings
            raise UserError(
                f"the model cannot be run on images of {self.image_size}x{self.image_size} pixels "
                f"({(str(error).strip() or type(error).__name__).splitlines()[0][:200]}); {REMEDY}"
            ) from None
        wanted = (len(pixels), len(self.class_names))
        if probabilities.shape != wanted:
            raise UserError(f"the model gives {probabilities.shape} probabilities where {wanted} were expected; {REMEDY}")
        if not np.isfinite(probabilities).all():
            raise UserError(f"the model gives probabilities that are no numbers; {REMEDY}")
        return probabilities


def load_classifier(path: str | Path) -> Classifier:
    """Read a finished run, its export folder or an ONNX file; on a GPU where there is one.

    Raises:
        UserError: it is none of these, or damaged.
    """
    path = Path(path)
    if path.suffix == ".pt2":
        # reading one unpickles what is in it and evaluates expressions (torch.export.load warns of it)
        raise UserError(
            f"{path} could run code when it is read, so only your own programs should (torch.export.load); give the "
            f"export folder or an .onnx file"
        )
    if path.suffix == ".onnx":
        return _from_onnx(path)
    nets, settings = load_export(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ensemble = Ensemble(nets, settings).to(device).eval()

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        return ensemble(pixels.to(device))[1].cpu()

    return _classifier(settings, run)


def _from_onnx(path: Path) -> Classifier:
    try:
        model = read_file(path)
    except RecordError as error:
        raise UserError(f"cannot read {path} ({error}); give a file that coreg-export wrote") from None
    session, about = open_onnx(model, str(path), gpu=torch.cuda.is_available())

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["probabilities"], {"images": pixels.numpy()})[0])

    return _classifier(about, run)


def _classifier(about: dict[str, Any], run: Callable[[Tensor], Tensor]) -> Classifier:
    return Classifier(about["class_names"], about["image_size"], about["channels"], run, about.get("resize") or "squash")


def one_image(path: Path) -> ImageList:
    """A list of one image file."""
    return ImageList(str(path), [path.name], None, np.zeros(1, np.uint8), None, lambda row: read_image(path))


def best(probabilities: np.ndarray, k: int) -> np.ndarray:
    """int64 (n, k): the most probable classes of float (n, C), best first, the smaller class index at a tie."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :k]


def write_csv(classifier: Classifier, images: ImageList, config: PredictConfig, output: Path) -> dict[int, str]:
    """Predict all images into a CSV file, whole or not at all; gives row -> reason of the unreadable ones."""
    names = classifier.class_names
    k = min(config.top_k, len(names))
    unreadable: dict[int, str] = {}
    with writing_csv(output, config.safe_csv) as write:
        columns = ["label", "probability"]
        write(["path", *columns, *(f"{column}_{i}" for i in range(2, k + 1) for column in columns), "error"])
        with progress_bar(total=len(images), desc="predict", unit="image") as bar:
            for rows, probabilities, failed in classifier.batches(images, config.batch_size, config.workers):
                unreadable |= failed
                for row, shares, classes in zip(rows.tolist(), probabilities, best(probabilities, k)):
                    named = [word for c in classes for word in (names[c], f"{shares[c]:.4f}")]
                    named = [""] * 2 * k if row in failed else named
                    write([images.paths[row], *named, failed.get(row, "")])
                bar.update(len(rows))
    return unreadable


def show(classifier: Classifier, images: ImageList, config: PredictConfig) -> None:
    """Print the most probable classes of a single image.

    Raises:
        UserError: it cannot be read.
    """
    ((_, probabilities, failed),) = classifier.batches(images)
    if failed:
        raise UserError(f"{config.images} cannot be read: {failed[0]}")
    for c in best(probabilities, config.top_k)[0]:
        print(f"{probabilities[0, c]:.4f}  {printable(classifier.class_names[c])}")


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `coreg-predict`."""
    (config,) = parse(PredictConfig, argv=argv, prog="coreg-predict", description=__doc__)
    for name in ("model", "images"):
        if getattr(config, name) is None:
            raise UserError(f"--{name} is missing; write for example: coreg-predict --model runs/a/export --images new/")
    output = Path(config.output or "predictions.csv")
    check_writable(output, "--output")
    classifier, path = load_classifier(config.model), Path(config.images)
    single = path.is_file() and path.suffix.lower() in SUFFIXES
    images = one_image(path) if single else open_images(config.images)
    if single:
        show(classifier, images, config)
    if single and config.output is None:
        return
    unreadable = write_csv(classifier, images, config, output)
    print(f"{printable(output)}: {len(images) - len(unreadable)} images named, {len(unreadable)} unreadable")
    for row in list(unreadable)[:SHOWN]:
        # a name may hold anything, so its printable form
        print(f"  unreadable: {images.paths[row]!r} ({printable(unreadable[row])})")
    if len(unreadable) > SHOWN:
        print(f"  … and {len(unreadable) - SHOWN} more, see the column `error`")
    if len(unreadable) == len(images):
        raise UserError(f"none of the {len(images)} images in {config.images} can be read; the reasons are in {output}")


if __name__ == "__main__":
    main()
