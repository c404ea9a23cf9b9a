"""Name the class, or the several labels, of every image of a folder, or of one image, with an exported run.

    coreg-predict --model runs/a/export --images new/ --output predictions.csv
    coreg-predict --model runs/a/export --images photo.jpg
    coreg-predict --model model.onnx --images new/
    coreg-predict --model runs/tags/export --images new/ --threshold 0.5
    coreg-predict --model runs/a/export --images new/ --min_probability 0.6
    coreg-predict --model runs/a/export --images new/ --max_distance auto
    coreg-predict --model runs/a/export --images new/ --min_probability auto --coverage 0.95 --calibrate checked.csv

The probabilities of classes are calibrated by the temperature that the export came with; its coreg.json says what that was
fitted to. An image can be of none of the classes (--max_distance, --min_probability), or be given all classes that are
possible (--coverage). Where images have several labels, those are given whose probability reaches their threshold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coreg.config import SAFE_CSV, option, parse
from coreg.data.decode import SUFFIXES, Resize, decode, read_image
from coreg.data.images import ImageList
from coreg.data.label_studio import BETWEEN
from coreg.data.sources import open_images
from coreg.errors import UserError, exits_with_one_line
from coreg.export import cutoff, distance, tagging
from coreg.export.cutoff import CutOff
from coreg.export.ensemble import Ensemble
from coreg.export.folder import CONFIG, REMEDY, SETTINGS, TUNED, WEIGHTS, export_folder, load_export
from coreg.export.programs import open_onnx
from coreg.files import check_writable, writing_csv
from coreg.hub import HUB, from_hub
from coreg.plaintext import first_line, printable
from coreg.progress import progress_bar
from coreg.records import RecordError, read_file

# of unreadable images on the terminal; the CSV file has them all
SHOWN = 5

# of a model of the hub: nothing that could run code is ever fetched
HUB_FILES = (SETTINGS, distance.FILE, *(f"net*/{name}" for name in (CONFIG, WEIGHTS, TUNED)))


@dataclass
class PredictConfig:
    """What to predict with, on what, and where to."""

    model: str | None = option(
        None, "a finished run, its export folder, hf-hub:USER/NAME, or an .onnx file that coreg-export wrote"
    )
    images: str | None = option(None, "an image, or a folder, CSV file or torchvision name as for annotate_vlm.py")
    output: str | None = option(
        None, "CSV file to write: path, label, probability, and the next best labels; or labels, their probabilities, and "
        "those of all labels (default: predictions.csv; for one image none)"
    )  # fmt: skip
    top_k: int = option(
        3, "labels a row; where an image has several, so many are shown of a single image at least", (1, 1_000_000)
    )
    threshold: str | None = option(
        None, "several labels an image: a number for all, or a .csv (label,threshold) or .json file with one for each; "
        "default: those of the model"
    )  # fmt: skip
    min_probability: str | None = option(
        None, "one class an image: images whose best class is less probable are labelled 'none of these', a number from 0 "
        "to 1; auto: the number that keeps --coverage (95 % where it is not given) of images like those of --calibrate"
    )  # fmt: skip
    max_distance: str | None = option(
        None, "one class an image: images farther from those of training are labelled 'none of these', a number; auto: "
        "that of the export (coreg-export --distances), or with --calibrate the one that keeps --coverage of such images"
    )  # fmt: skip
    coverage: float | None = option(
        None, "one class an image: write prediction sets, of as many classes as it takes for this share of images like "
        "those of --calibrate to have their class in the set", (0.5, 0.999)
    )  # fmt: skip
    calibrate: str | None = option(
        None, "50 images or more that a person labelled and training has not seen: a .csv file with path,label, the paths "
        "those of --images or relative to the file, or a folder with a folder for each class"
    )  # fmt: skip
    batch_size: int = option(256, "images at a time", (1, 1_000_000))
    workers: int = option(2, "threads that decode images", (0, 1024))
    safe_csv: bool = option(False, SAFE_CSV)


@dataclass
class Classifier:
    """An exported ensemble, from whatever file: of classes, or of several labels an image."""

    class_names: list[str]  # C names
    image_size: int  # side in pixels to which images are decoded
    channels: int  # 1 or 3, of decoded images
    run: Callable[[Tensor], Tensor]  # uint8 (n, channels, image_size, image_size) -> float32 (n, C), both on the CPU
    resize: Resize = "squash"  # how they become squares
    # float64 (C,) where an image has several labels: probabilities from which on it has each
    thresholds: np.ndarray | None = None
    # how far images lie from those of training, where the export has that: uint8 images as above -> float32 (n,)
    distances: Callable[[Tensor], Tensor] | None = None
    farthest: float | None = None  # the distance beyond which they are of none of the classes

    def tags(self, probabilities: np.ndarray) -> list[list[str]]:
        """The labels of each image, the most probable first, where it has several: those that reach their threshold.

        Args:
            probabilities: float (n, C), as `batches` gives them.

        Raises:
            UserError: the model names one class an image.
        """
        if self.thresholds is None:
            raise UserError("this model names one class an image; take the most probable one")
        return [[self.class_names[c] for c in tagging.chosen(row, self.thresholds)] for row in probabilities]

    def batches(
        self, images: ImageList, batch_size: int = 256, workers: int = 2, rows: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, dict[int, str]]]:
        """Predict all images in order, or those of `rows`, a batch at a time.

        Yields:
            Rows int64 (n,), probabilities float32 (n, C), which of classes are calibrated, and row -> reason of those that
            cannot be read, whose probabilities mean nothing.

        Raises:
            UserError: what the model gives are no probabilities.
        """
        for batch, probabilities, _, failed in self.judged(images, batch_size, workers, rows):
            yield batch, probabilities, failed

    def judged(
        self,
        images: ImageList,
        batch_size: int = 256,
        workers: int = 2,
        rows: np.ndarray | None = None,
        far: bool = False,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]]:
        """As `batches`, with distances float32 (n,) from the training images before the reasons; 0 without `far`.

        Raises:
            UserError: what the model gives are no probabilities.
        """
        chosen = np.arange(len(images)) if rows is None else rows
        for start in range(0, len(chosen), batch_size):
            failed: dict[int, str] = {}
            batch = chosen[start : start + batch_size]
            pixels = decode(images, batch, self.image_size, self.channels, workers, failed, self.resize)
            apart = self.distances(pixels).numpy() if far and self.distances else np.zeros(len(batch), np.float32)
            yield batch, self._probabilities(pixels), apart, failed

    def _probabilities(self, pixels: Tensor) -> np.ndarray:
        """Of uint8 images, checked: whatever the file holds, its answer is numbers or an error."""
        try:
            probabilities = self.run(pixels).numpy()
        except Exception as error:  # of onnxruntime or PyTorch, on networks that do not fit their own settings
            raise UserError(
                f"the model cannot be run on images of {self.image_size}x{self.image_size} pixels "
                f"({first_line(error)}); {REMEDY}"
            ) from None
        wanted = (len(pixels), len(self.class_names))
        if probabilities.shape != wanted:
            raise UserError(f"the model gives {probabilities.shape} probabilities where {wanted} were expected; {REMEDY}")
        if not np.isfinite(probabilities).all():
            raise UserError(f"the model gives probabilities that are no numbers; {REMEDY}")
        return probabilities


def load_classifier(path: str | Path) -> Classifier:
    """Read a finished run, its export folder, an ONNX file or a model of the hub; on a GPU where there is one.

    Args:
        path: of one of the first three, or `hf-hub:USER/NAME`, an export that `coreg-export --push_to_hub` uploaded.

    Raises:
        UserError: it is none of these, damaged, or cannot be loaded.
    """
    path = from_hub(str(path), HUB_FILES) if str(path).startswith(HUB) else Path(path)
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

    measure = _distances(export_folder(path), settings, ensemble)
    return replace(_classifier(settings, run), **measure)


def _distances(folder: Path, settings: dict[str, Any], ensemble: Ensemble) -> dict[str, Any]:
    """What a classifier has of distances; nothing where the export has none.

    Raises:
        UserError: distances.safetensors is damaged.
    """
    if settings.get("distances") is None:
        return {}
    file = folder / distance.FILE
    try:
        content = read_file(file)
        if hashlib.sha256(content).hexdigest() != settings["files"].get(distance.FILE):
            raise RecordError(f"it does not agree with its checksum in {SETTINGS}")
        measure = distance.from_bytes(content, settings["nets"]).to(ensemble.scale.device)
    except Exception as error:  # a damaged file can raise anything in safetensors
        raise UserError(f"{file} is damaged ({first_line(error)}); type: coreg-export --run RUN --distances") from None

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        images = ensemble.normalised(pixels.to(ensemble.scale.device))
        return measure([distance.last_features(net, images) for net in ensemble.nets]).cpu()

    return {"distances": run, "farthest": settings["distances"]["farthest"]}


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
    names, at = about["class_names"], about.get("thresholds")
    resize: Resize = about.get("resize") or "squash"
    thresholds = None if at is None else np.array(at, dtype=np.float64)
    return Classifier(names, about["image_size"], about["channels"], run, resize, thresholds)


def best(probabilities: np.ndarray, k: int) -> np.ndarray:
    """int64 (n, k): the most probable classes of float (n, C), best first, the smaller class index at a tie."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :k]


def written(classifier: Classifier, k: int) -> tuple[list[str], Callable[[np.ndarray], list[str]]]:
    """Heads of the columns that say what is predicted, and a function from probabilities (C,) to what stands in them.

    Args:
        k: classes a row, where an image has one.
    """
    names, at = classifier.class_names, classifier.thresholds
    if at is not None:
        return tagging.columns(names), lambda shares: tagging.cells(names, shares, at)
    columns = ["label", "probability"]
    heads = [*columns, *(f"{column}_{i}" for i in range(2, k + 1) for column in columns)]
    return heads, lambda shares: [word for c in best(shares[None], k)[0] for word in (names[c], f"{shares[c]:.4f}")]


def cut_off(classifier: Classifier, images: ImageList, config: PredictConfig) -> CutOff:
    """How sure a class has to be, as a person asked for it; prints what labelled images say of it.

    Raises:
        UserError: the options do not go together, or too few images are labelled.
    """
    automatic, names = config.min_probability == "auto", classifier.class_names
    range_of = "a number from 0 to 1, or auto with --calibrate FILE"
    least = cutoff.read_bound(config.min_probability, "min_probability", 1, range_of)
    farthest = cutoff.read_bound(config.max_distance, "max_distance", float("inf"), "a number from 0 on, or auto")
    far, asked = config.max_distance is not None, config.coverage is not None or automatic
    if classifier.thresholds is not None and (asked or far or least is not None):
        raise UserError(f"{config.model} gives images several labels; --threshold says how sure each has to be")
    if far and classifier.distances is None:
        raise UserError(
            f"{config.model} knows no distances; type: coreg-export --run runs/a --distances, and give its export"
        )
    chosen = config.max_distance == "auto"
    if config.calibrate is None and asked:
        raise UserError("--calibrate is missing; write for example: --coverage 0.95 --calibrate checked.csv")
    if config.calibrate is not None and not (asked or chosen):
        raise UserError(
            "--calibrate needs --coverage 0.95, --min_probability auto or --max_distance auto; write for example: "
            "--coverage 0.95 --calibrate checked.csv"
        )
    if config.coverage is not None and (strange := [name for name in names if BETWEEN in name]):
        raise UserError(
            f"a class is called {printable(strange[0])!r}, and {BETWEEN!r} stands between the labels of a prediction set; "
            f"leave out --coverage"
        )
    if config.calibrate is None:
        return CutOff(names, least, farthest=classifier.farthest if chosen else farthest)
    labelled, rows, classes = cutoff.labelled_images(config.calibrate, images, names)
    batches = list(classifier.judged(labelled, config.batch_size, config.workers, rows, far))
    readable = ~np.isin(rows, [row for *_, failed in batches for row in failed])
    probs = np.concatenate([np.zeros((0, len(names)), np.float32), *(some for _, some, _, _ in batches)])[readable]
    apart = np.concatenate([np.zeros(0, np.float32), *(some for _, _, some, _ in batches)])[readable]
    classes, source = classes[readable], config.calibrate
    made = cutoff.calibrated(
        names, probs, classes, source, least, config.coverage, automatic, apart if chosen else None, farthest
    )
    print(printable(cutoff.calibration_line(made, probs, classes, source, apart)))
    return made


def write_csv(
    classifier: Classifier, images: ImageList, config: PredictConfig, output: Path, cut: CutOff
) -> dict[int, str]:
    """Predict all images into a CSV file, whole or not at all; gives row -> reason of the unreadable ones."""
    heads, cells = written(classifier, min(config.top_k, len(classifier.class_names)))
    heads = [*heads, *cut.columns]
    unreadable: dict[int, str] = {}
    with writing_csv(output, config.safe_csv) as write:
        write(["path", *heads, "error"])
        with progress_bar(total=len(images), desc="predict", unit="image") as bar:
            far = cut.farthest is not None
            for rows, probabilities, apart, failed in classifier.judged(images, config.batch_size, config.workers, far=far):
                unreadable |= failed
                for row, shares, distance_of in zip(rows.tolist(), probabilities, apart):
                    named = [""] * len(heads) if row in failed else [*cells(shares), *cut.cells(shares, distance_of)]
                    if row not in failed and cut.is_none(shares, distance_of):
                        named[0] = cut.called_none
                    write([images.paths[row], *named, failed.get(row, "")])
                bar.update(len(rows))
    return unreadable


def show(classifier: Classifier, images: ImageList, config: PredictConfig, cut: CutOff) -> None:
    """Print the most probable classes of a single image, or its several labels.

    Raises:
        UserError: it cannot be read.
    """
    ((_, probabilities, apart, failed),) = classifier.judged(images, far=cut.farthest is not None)
    if failed:
        raise UserError(f"{config.images} cannot be read: {failed[0]}")
    if classifier.thresholds is not None:
        named = tagging.lines(classifier.class_names, probabilities[0], classifier.thresholds, config.top_k)
        print("\n".join(map(printable, named)))
        return
    for c in best(probabilities, config.top_k)[0]:
        print(f"{probabilities[0, c]:.4f}  {printable(classifier.class_names[c])}")
    for line in cut.lines(probabilities[0], float(apart[0])):
        print(printable(line))


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
    if config.threshold is not None:
        if classifier.thresholds is None:
            raise UserError(f"{config.model} names one class an image and has no thresholds; leave out --threshold")
        own = tagging.read_thresholds(config.threshold, classifier.class_names, classifier.thresholds)
        classifier = replace(classifier, thresholds=own)
    single = path.is_file() and path.suffix.lower() in SUFFIXES
    alone = ImageList(str(path), [path.name], None, np.zeros(1, np.uint8), None, lambda row: read_image(path))
    images = alone if single else open_images(config.images)
    cut = cut_off(classifier, images, config)
    if single:
        show(classifier, images, config, cut)
    if single and config.output is None:
        return
    unreadable = write_csv(classifier, images, config, output, cut)
    print(f"{printable(output)}: {len(images) - len(unreadable)} images named, {len(unreadable)} unreadable")
    for line in cut.summary():
        print(f"  {line}")
    for row in list(unreadable)[:SHOWN]:
        # a name may hold anything, so its printable form
        print(f"  unreadable: {images.paths[row]!r} ({printable(unreadable[row])})")
    if len(unreadable) > SHOWN:
        print(f"  … and {len(unreadable) - SHOWN} more, see the column `error`")
    if len(unreadable) == len(images):
        raise UserError(f"none of the {len(images)} images in {config.images} can be read; the reasons are in {output}")


if __name__ == "__main__":
    main()
