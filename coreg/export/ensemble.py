"""A trained run as files that other programs read.

Every finished run has the folder export/:

    net1/, net2/   config.json and model.safetensors: `timm.create_model("local-dir:export/net1", pretrained=True)`
                   loads them after `import coreg.nets`; where there is a tuned.safetensors, it holds what timm cannot
                   compute (other heads, inserted modules), which `coreg.export.predict` and the programs do
    coreg.json     class names, preprocessing, temperature, how far the files' logits are from the trained networks', and
                   the SHA-256 of the files
    README.md      the model card

and on demand programs of the whole ensemble in one file, which need neither timm nor this package:

    coreg-export --run runs/a --format onnx            writes runs/a/export/model.onnx
    coreg-export --run runs/a --format torch_export    writes runs/a/export/model.pt2
    coreg-export --run runs/a --labels checked.csv     fits the temperature to labelled images that training has not seen,
                                                       or the thresholds, where images have several labels
    coreg-export --run runs/a --distances              writes runs/a/export/distances.safetensors, how far images lie from
                                                       those of training, for `coreg-predict --max_distance`
    coreg-export --run runs/a --push_to_hub USER/NAME  uploads the folder, as a private model

A program takes `images`, uint8 (n, c, H, W) for any n, and gives `logits` and `probabilities`, float32 (n, C): the mean of
the networks' logits divided by the temperature, and its softmax, or, where images have several labels, its sigmoid.
Normalisation is inside. Thresholds of several labels stand in coreg.json and in the program's metadata.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from scipy.special import expit
from torch import Tensor, nn

from coreg.config import option, parse
from coreg.data.images import ImageList
from coreg.data.sources import open_images, require_readable
from coreg.errors import UserError, exits_with_one_line
from coreg.export.calibration import fit_to_labels
from coreg.export.distance import FILE, measure_run, readable_pixels
from coreg.export.folder import SCHEMA, SETTINGS, TUNED, export_folder, files_of, load_export, write_settings
from coreg.export.programs import as_program
from coreg.files import making_folder
from coreg.hub import push_to_hub
from coreg.nets.tuning import Tuning
from coreg.plaintext import printable
from coreg.report.multi_metrics import thresholds_of_truth

PROGRAMS = {"onnx": "model.onnx", "torch_export": "model.pt2"}
# what a file's logits may differ from the trained networks', as a share of the largest logit: float32 sums in another order
TOLERANCE = 1e-4
CHECKED_IMAGES = 64
# fewer right or wrong answers say too little about how often to be right
FEWEST_LABELS = 20


# ---- the folder -----------------------------------------------------------------------------------------------------


def export(
    folder: Path,
    backbones: list[nn.Module],
    architecture: str,
    arguments: dict[str, Any],
    check: Tensor,
    tuning: Tuning | None = None,
    tuners: Sequence[nn.ModuleDict] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Write the backbones with their classifiers; built beside `folder` and renamed, so never half-written.

    Args:
        backbones: timm models, net1 first. architecture: their timm name. arguments: what they were created with.
        check: normalised images float (n, c, H, W) on which the written networks have to agree with `backbones`.
        tuning, tuners: how they were tuned, and what was inserted into each, where they were.
        settings: `class_names`, `image_size`, `channels`, `mean`, `std`, and what `fit_to_agreement` gave.

    Returns:
        What coreg.json holds.

    Raises:
        UserError: they do not agree, within `TOLERANCE`, or the folder cannot be written.
    """
    settings = {"schema": SCHEMA, "nets": len(backbones)} | settings
    with making_folder(folder, "free some space, then the same command goes on", replace=True) as temporary:
        inserted = tuners or [nn.ModuleDict()] * len(backbones)
        for number, (backbone, modules) in enumerate(zip(backbones, inserted), start=1):
            network = (backbone, tuning or Tuning(), modules)
            settings |= _save(temporary / f"net{number}", network, architecture, arguments, settings)
        settings["files"] = files_of(temporary, len(backbones))
        write_settings(temporary, settings)
        check = check.cpu().float()
        # the networks themselves, moved to where the files are read: a GPU's convolutions round to ten bits
        moved = copy.deepcopy(list(zip(backbones, inserted)))
        trained = ensemble_logits([nn.ModuleList(one).cpu().float().eval()[0] for one in moved], check)
        written = ensemble_logits(load_export(temporary)[0], check)
        settings["agreement"] = {"timm": agreement(written, trained, "the exported folder")}
        write_settings(temporary, settings)
    return settings


def _save(
    place: Path,
    network: tuple[nn.Module, Tuning, nn.ModuleDict],
    architecture: str,
    arguments: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """One network as a folder that timm reads, in float32, whatever training used; gives what coreg.json says of it."""
    names, channels, size = (settings[name] for name in ("class_names", "channels", "image_size"))
    backbone, tuning, modules = network
    plain = timm.create_model(architecture, num_classes=len(names), in_chans=channels, **arguments)
    plain, rule, rest = tuning.separated(backbone, modules, plain)
    plain.pretrained_cfg = dict(plain.pretrained_cfg) | {
        "input_size": (channels, size, size),
        "mean": tuple(settings["mean"]),
        "std": tuple(settings["std"]),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "num_classes": len(names),
    }
    timm.models.save_for_hf(
        plain,
        str(place),
        model_config={"label_names": list(names)},
        model_args={"in_chans": channels} | arguments,
        safe_serialization=True,
    )
    if not rest:
        return {}
    save_file(rest, place / TUNED)
    return {"tuning": json.loads(json.dumps(vars(rule)))}


def agreement(written: Tensor, trained: Tensor, what: str) -> dict[str, float | int]:
    """How far the logits (n, C) of `what` are from those of the trained networks, for the record.

    Raises:
        UserError: further than `TOLERANCE` times the largest trained logit, or no numbers.
    """
    difference = float((written - trained).abs().max())
    allowed = TOLERANCE * max(1.0, float(trained.abs().max()))
    if not difference <= allowed:
        raise UserError(
            f"the logits of {what} differ by {difference:.2g} from those of the trained networks on {len(trained)} images, "
            f"and {allowed:.2g} is allowed; it was not kept: try another --format, or another version of torch"
        )
    return {"images": len(trained), "largest_difference": difference, "allowed": allowed}


@torch.no_grad()
def ensemble_logits(nets: list[nn.Module], images: Tensor) -> Tensor:
    """Sum of the networks' logits, (n, c, H, W) -> (n, C): the prediction that reports call `ensemble`."""
    return sum(net(images) for net in nets)


class Ensemble(nn.Module):
    """Pixels uint8 (n, c, H, W) to calibrated logits (n, C), the mean over the networks divided by T, and probabilities.

    These are a softmax over the classes, or, where images have several labels (`thresholds`), a sigmoid of each.
    """

    def __init__(self, nets: list[nn.Module], settings: dict[str, Any]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.temperature = float(settings.get("temperature", 1.0))
        self.several = settings.get("thresholds") is not None
        mean, std = (torch.tensor(settings[name], dtype=torch.float64) for name in ("mean", "std"))
        # the arithmetic of Augmentation.plain, so that no bit of what the networks saw in training is lost
        self.register_buffer("scale", (1 / (255 * std)).float().view(-1, 1, 1))
        self.register_buffer("shift", (-mean / std).float().view(-1, 1, 1))

    def normalised(self, images: Tensor) -> Tensor:
        """What the networks take, of pixels uint8 (n, c, H, W)."""
        return images.float() * self.scale + self.shift

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.normalised(images)
        logits = sum(net(x) for net in self.nets) / (len(self.nets) * self.temperature)
        return logits, logits.sigmoid() if self.several else logits.softmax(dim=1)


# ---- the command ----------------------------------------------------------------------------------------------------


@dataclass
class ExportConfig:
    """Which export, and what to do with it."""

    run: str | None = option(None, "run folder, or the export folder of one")
    format: Literal["onnx", "torch_export"] | None = option(
        None, "write the ensemble as one program into the export folder"
    )
    images: str | None = option(
        None, "where the images of the run are now; on some of them a program is compared with the networks"
    )
    labels: str | None = option(
        None,
        "CSV file (path,label, or path,labels where images have several) of images that training has not seen: fit the "
        "temperature, or the thresholds, to them",
    )
    distances: bool = option(
        False, "one class an image: measure how far images lie from the class means of the training images, so that "
        "coreg-predict --max_distance recognises images of none of the classes"
    )  # fmt: skip
    push_to_hub: str | None = option(None, "USER/NAME: upload the export folder to the model hub, as a private model")


def spread_rows(n: int) -> np.ndarray:
    """Up to 64 of n rows, evenly spread: int64, ascending."""
    return np.unique(np.linspace(0, n - 1, CHECKED_IMAGES).astype(int))


def images_of_run(folder: Path, images: str | None) -> ImageList:
    """The images of the run whose export `folder` is, or those in `images`.

    Raises:
        UserError: there are none.
    """
    if images is None:
        try:
            images = json.loads((folder.parent / "report.json").read_text(encoding="utf-8"))["dataset"]
        except (OSError, json.JSONDecodeError, KeyError):
            raise UserError(
                f"{folder.parent} holds no report that says what images {folder} was trained on; name some with --images"
            ) from None
    opened = open_images(images)
    require_readable(opened)
    return opened


def calibrate(nets: list[nn.Module], settings: dict[str, Any], labels: str) -> dict[str, Any]:
    """The settings with a temperature, or thresholds of several labels, fitted to what the CSV file `labels` names.

    Raises:
        UserError: the file or its images cannot be read, or too few of them have a label of one of the classes.
    """
    images, several = open_images(labels, settings["class_names"]), settings.get("thresholds") is not None
    truth = images.tags if several else images.labels
    known = np.zeros(0, int) if truth is None else np.flatnonzero(truth.any(axis=1) if several else truth >= 0)
    pixels, rows = readable_pixels(images, known, settings)
    if len(rows) < FEWEST_LABELS:
        raise UserError(
            f"{labels} has {len(rows)} readable images with a label of the {len(settings['class_names'])} classes; give "
            f"at least {FEWEST_LABELS}, as rows {'path,labels' if several else 'path,label'}"
        )
    # at temperature 1, whatever it is now
    ensemble = Ensemble(nets, settings | {"temperature": 1.0})
    with torch.no_grad():
        logits = np.concatenate([ensemble(batch)[0].numpy() for batch in pixels.split(256)])
    if several:
        before = np.array(settings["thresholds"])  # they stay where no image has the label, or every one
        at = thresholds_of_truth(expit(logits.astype(np.float64)), truth[rows], before)
        return settings | {"thresholds": at.tolist(), "thresholds_from": f"labels of {Path(labels).name}"}
    return settings | fit_to_labels(logits, truth[rows], Path(labels).name)


def make_program(
    nets: list[nn.Module], settings: dict[str, Any], kind: str, images: Tensor
) -> tuple[bytes, dict[str, float | int]]:
    """The content of a program file, and how far its logits on `images`, uint8 (n, c, H, W), are from the networks'.

    Raises:
        UserError: it cannot be made, or differs by more than `TOLERANCE`.
    """
    ensemble = Ensemble(nets, settings).eval()
    content, run = as_program(ensemble, settings, kind)
    with torch.no_grad():
        trained = ensemble(images)[0]
        # the first image alone as well: another number of images than the program was traced with
        written = torch.cat([run(images[:1]), run(images)[1:]])
    return content, agreement(written, trained, PROGRAMS[kind])


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `coreg-export`."""
    (config,) = parse(ExportConfig, argv=argv, prog="coreg-export", description=__doc__)
    if config.run is None:
        raise UserError("--run is missing; write for example: coreg-export --run runs/a --format onnx")
    if not (config.format or config.labels or config.distances or config.push_to_hub):
        raise UserError(
            "nothing to do; add --format onnx, --format torch_export, --labels FILE, --distances or --push_to_hub USER/NAME"
        )
    folder = export_folder(config.run)
    nets, settings = load_export(folder)
    if config.distances and settings.get("thresholds") is not None:
        raise UserError(f"{folder} gives images several labels, or none; leave out --distances")
    kinds = {config.format} - {None}
    if (config.format or config.labels or config.distances) and not os.access(folder, os.W_OK):
        raise UserError(f"cannot write into {folder} (permission denied); copy it to a place of your own, and export that")
    if config.labels:
        settings = calibrate(nets, settings, config.labels)
        # programs carry temperature and thresholds inside
        kinds |= {kind for kind, file in PROGRAMS.items() if (folder / file).exists()}
    images, programs = images_of_run(folder, config.images) if kinds or config.distances else None, {}
    pixels = readable_pixels(images, spread_rows(len(images)), settings)[0] if kinds else None
    for kind in sorted(kinds):
        programs[PROGRAMS[kind]], record = make_program(nets, settings, kind, pixels)
        settings = settings | {"agreement": settings.get("agreement", {}) | {kind: record}}
    if config.distances:
        normalised = Ensemble(nets, settings).normalised
        programs[FILE], distances = measure_run(nets, normalised, settings, images, folder.parent)
        settings = settings | {"distances": distances}
    if config.labels or programs:
        write_settings(folder, settings, programs)
    if config.labels:
        fitted = "thresholds" if settings.get("thresholds") else f"temperature {settings['temperature']:.3f}"
        print(printable(f"{folder / SETTINGS}: {fitted}, fitted to {config.labels}"))
    for kind in sorted(kinds):
        record = settings["agreement"][kind]
        within = f"logits within {record['largest_difference']:.1g} of the networks'"
        print(printable(f"{folder / PROGRAMS[kind]}: {within} on {record['images']} images"))
    if config.distances:
        distances = settings["distances"]
        at = f"{distances['kept']:.0%} of {distances['chosen_on']} lie within {distances['farthest']:.4g}"
        print(printable(f"{folder / FILE}: {at}"))
    if config.push_to_hub:
        print(printable(push_to_hub(folder, config.push_to_hub, "model", "Exported by coreg-export")))


if __name__ == "__main__":
    main()
