"""An export folder as it lies on a disk: its settings, its networks, and the checksums that say whether they are whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file
from torch import nn

import coreg.nets  # noqa: F401  registers the PreAct ResNets with timm
from coreg.errors import UserError
from coreg.files import replacing, sha256_of
from coreg.nets.tuning import Tuning
from coreg.plaintext import one_line
from coreg.records import Each, Maybe, Number, RecordError, check_record, checksum_of, read_record

SCHEMA = 1
SETTINGS, CONFIG, WEIGHTS = "coreg.json", "config.json", "model.safetensors"
TUNED = "tuned.safetensors"  # of a network, beside its weights: what a plain timm model cannot compute

# what tells programs how to decode images and what their classes are called: in coreg.json, and inside every program
ABOUT = {
    "class_names": [str],
    "image_size": Number(1, 8192),
    "channels": Number(1, 3),
    "resize": Maybe(str),
    # where images have several labels; one above 1 is never reached
    "thresholds": Maybe([Number(0, 2, whole=False)]),
}
_KINDS = ABOUT | {
    "schema": Number(),
    "nets": Number(1, 100),
    "mean": [Number(-1e6, 1e6, whole=False)],
    "std": [Number(1e-6, 1e6, whole=False)],
    "temperature": Maybe(Number(1e-6, 1e6, whole=False)),
    "calibration": Maybe(dict),
    "thresholds_from": Maybe(str),
    "agreement": Maybe(dict),
    "tuning": Maybe(
        {
            "tuners": [str],
            "blocks": str,
            "bottleneck": Number(0),
            "prompt_tokens": Number(1),
            "mask_ratio": Number(0, 1, whole=False),
            "head": str,
            "head_scale": Number(0, whole=False),
        }
    ),
    # of distances.safetensors: the distance from which on an image is of none of the classes, and how it was chosen
    "distances": Maybe(
        {"farthest": Number(0, whole=False), "kept": Number(0, 1, whole=False), "images": Number(), "chosen_on": str}
    ),
    "files": Maybe(Each(str)),
    "checksum": Maybe(str),
}
_CONFIG = {
    "architecture": str,
    "num_classes": Number(),
    "pretrained_cfg": dict,
    "model_args": Maybe(dict),
}
REMEDY = (
    "copy it anew from where it was whole, or delete report.json of its run and repeat the command of the training, which "
    "writes the export again"
)


def check_about(settings: dict[str, Any]) -> None:
    """Class names, image size, channels and thresholds (`ABOUT`), compared with what they have to be.

    Raises:
        RecordError: they are something else.
    """
    check_record(settings, ABOUT)
    names = settings["class_names"]
    if not names or len(set(names)) < len(names):
        raise RecordError(f"class_names has {len(names)} names, {len(set(names))} of them different")
    if settings.get("thresholds") is not None and len(settings["thresholds"]) != len(names):
        raise RecordError(f"thresholds has {len(settings['thresholds'])} numbers for {len(names)} labels")
    # those that squash images do not say so
    if settings.get("resize", "crop") not in ("squash", "crop"):
        raise RecordError(f"resize is {settings['resize'][:20]!r}, expected squash or crop")
    if settings["channels"] == 2:
        raise RecordError("channels is 2, expected 1 or 3")


def files_of(folder: Path, nets: int) -> dict[str, str]:
    """The checksum of every file that the networks are loaded from, by its name within the folder."""
    names = [f"net{number}/{file}" for number in range(1, nets + 1) for file in (CONFIG, WEIGHTS, TUNED)]
    return {name: sha256_of(folder / name) for name in names if not name.endswith(TUNED) or (folder / name).exists()}


def write_settings(folder: Path, settings: dict[str, Any], programs: dict[str, bytes] | None = None) -> None:
    """Replace coreg.json, with its checksum, and the programs whose temperature it holds; all of them or none.

    Args:
        settings: everything but the checksums of the programs. programs: by file name.

    Raises:
        UserError: something cannot be written; the folder is as it was.
    """
    programs = programs or {}
    if programs:
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in programs.items()}
        settings = settings | {"files": settings.get("files", {}) | sums}
    text = json.dumps(settings | {"checksum": checksum_of(settings)}, indent=1, ensure_ascii=False) + "\n"
    with contextlib.ExitStack() as stack:
        # every file is on the disk before the first of them takes its place
        for name, content in ({SETTINGS: text.encode("utf-8", "surrogateescape")} | programs).items():
            stack.enter_context(replacing(folder / name)).write_bytes(content)


def export_folder(path: str | Path) -> Path:
    """The export folder of a run folder; any other path is taken as it is."""
    return Path(path) / "export" if (Path(path) / "export").is_dir() else Path(path)


def read_settings(folder: Path) -> dict[str, Any]:
    """What coreg.json holds.

    Raises:
        UserError: there is none, another version wrote it, or it is damaged.
    """
    path = folder / SETTINGS
    if not path.exists():
        raise UserError(f"{folder} is no exported model; give the export folder of a finished run, such as runs/a/export")
    try:
        settings = read_record(path)
        if settings.get("schema") != SCHEMA:
            raise UserError(
                f"{folder} has export schema {settings.get('schema')!r}, this version reads {SCHEMA}; export it anew"
            )
        # exports of older versions have none
        if "checksum" in settings and settings["checksum"] != checksum_of(settings):
            raise RecordError(
                'it does not agree with its checksum; whoever changed it by hand deletes the entry "checksum"'
            )
        check_record(settings, _KINDS)
        check_about(settings)
        for name in ("mean", "std"):
            if len(settings[name]) != settings["channels"]:
                raise RecordError(f"{name} has {len(settings[name])} numbers for {settings['channels']} channels")
    except RecordError as error:
        raise UserError(f"{path} is damaged ({error}); {REMEDY}") from None
    return settings


def load_export(path: str | Path) -> tuple[list[nn.Module], dict[str, Any]]:
    """The networks of an export (or of a run's) in evaluation mode on the CPU, and its settings.

    Raises:
        UserError: the folder is missing, is no export, or is damaged.
    """
    folder = export_folder(path)
    settings = read_settings(folder)
    return [_load_net(folder, number, settings) for number in range(1, settings["nets"] + 1)], settings


def _load_net(folder: Path, number: int, settings: dict[str, Any]) -> nn.Module:
    place = folder / f"net{number}"
    try:
        for file in (CONFIG, WEIGHTS, *([TUNED] if settings.get("tuning") else [])):
            # a pipe in its place would be waited for
            if not (place / file).is_file():
                raise RecordError(f"there is no file {file}")
            if "files" in settings and settings["files"].get(f"net{number}/{file}") != sha256_of(place / file):
                raise RecordError(f"{file} does not agree with its checksum in {SETTINGS}")
        classes, channels = len(settings["class_names"]), settings["channels"]
        outputs = read_record(place / CONFIG, _CONFIG)["num_classes"]
        if outputs != classes:
            raise RecordError(f"num_classes in {CONFIG} is {outputs}, and {SETTINGS} names {classes} classes")
        # not `pretrained=True`: timm then fits weights that do not fit, and a classifier of another size becomes random
        net = timm.create_model(f"local-dir:{place}", num_classes=classes, in_chans=channels)
        net.load_state_dict(load_file(place / WEIGHTS))
        if rule := settings.get("tuning"):
            Tuning(**rule | {"tuners": tuple(rule["tuners"])}).restore(net, load_file(place / TUNED))
    except Exception as error:  # a damaged configuration can raise anything in timm
        reason = one_line(error)
        raise UserError(f"{place} cannot be loaded ({reason}); {REMEDY}") from None
    return net.eval()
