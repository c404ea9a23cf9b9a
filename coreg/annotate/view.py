"""A view of an annotation store: the pooled features that another network than the annotator gives to its images.

    python -m coreg.annotate.view ann                                                    # the default student's own weights
    accelerate launch -m coreg.annotate.view ann --backbone vit_small_patch14_dinov2 --image_size 224

A view is a folder ann/views/NAME-SIZE of its own; any number of them lie beside each other:

    manifest.json             schema and job: network, hash of its weights, pixels, image list, block size
    blocks/00000.safetensors  features float16 (n, D), as pooled, neither centred nor scaled; 0 for unreadable images
    errors.csv                path and reason of every unreadable image; written last

Its blocks are like those of the store, written, checked, shared among processes and gone on with as those are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from PIL import Image

import coreg.nets
from coreg.annotate.settings import ViewConfig
from coreg.annotate.work import annotated, every_block
from coreg.config import parse, paths_and_options
from coreg.data.decode import as_square
from coreg.data.images import ImageList
from coreg.data.sources import require_readable
from coreg.errors import UserError, exits_with_one_line
from coreg.files import write_atomically
from coreg.nets.made_for import takes_one_size, trained_with
from coreg.nets.model import check_backbone, check_weights, create_backbone, parse_backbone_args
from coreg.network_options import check_pixels
from coreg.plaintext import first_line, printable
from coreg.process import all_or_none, build_accelerator, main_process_decides
from coreg.records import Number, RecordError, hash_of, read_record
from coreg.store.blocks import DamagedBlockError, read_block, stacked
from coreg.store.manifest import block_files
from coreg.store.store import AnnotationStore
from coreg.store.writer import BlockWriter, difference

SCHEMA, VERSION = "coreg-view", 1
JOB = ("network", "pixels", "images", "block_size")  # the manifest's entries that make two views differ
MANIFEST = {
    "schema": str,
    "version": object,
    "backbone": str,
    "network": {"architecture": str, "arguments": dict, "weights": str},
    "pixels": dict,
    "images": {"count": Number(1), "sha256": str},
    "block_size": Number(1),
    "features": Number(1),
}


@dataclass
class View:
    """An opened, verified and finished view."""

    root: Path  # its folder
    manifest: dict[str, Any]  # the content of manifest.json
    unreadable: np.ndarray  # bool (N,), images that could not be read; their features are zero
    hash: str  # sha256 (hex) over its job and all checksums

    @classmethod
    def open(cls, root: Path, store: AnnotationStore) -> View:
        """Open a view of `store` and verify every checksum.

        Raises:
            UserError: it is missing, unfinished or damaged, or shows other images.
        """
        manifest = read_manifest(root)
        again = f"run the same command again (python -m coreg.annotate.view {store.root})"
        if manifest["images"] != list_of(store):
            raise UserError(f"{root} shows other images than those of {store.root}; remove that folder, then {again}")
        files, job = block_files(root, manifest), job_hash(manifest)
        missing = sum(not file.exists() for file in files)
        if missing or not (root / "errors.csv").exists():
            raise UserError(f"view {root} is unfinished ({missing} of {len(files)} blocks missing); {again}")
        unreadable, checksums = np.zeros(len(store), dtype=bool), [job]
        for index, file in enumerate(files):
            try:
                _, errors, checksum = read_block(file, index, job)
            except DamagedBlockError as error:
                raise UserError(f"view {root} is damaged: {file.name}: {error}; {again}") from None
            unreadable[list(errors)] = True
            checksums.append(checksum)
        return cls(root, manifest, unreadable, hashlib.sha256("\n".join(checksums).encode()).hexdigest())

    def features(self) -> np.ndarray:
        """float16 (N, D)."""
        job = job_hash(self.manifest)
        files = block_files(self.root, self.manifest)
        return stacked((read_block(file, i, job)[0]["features"] for i, file in enumerate(files)), len(self.unreadable))


def read_manifest(root: Path) -> dict[str, Any]:
    """Read a view's manifest.json.

    Raises:
        UserError: there is none, or it is one of another schema.
    """
    try:
        manifest = read_record(root / "manifest.json", MANIFEST)
    except RecordError as error:
        raise UserError(
            f"{root} is no view of an annotation store: manifest.json: {error}; make one with python -m coreg.annotate.view"
        ) from None
    if (manifest["schema"], manifest["version"]) != (SCHEMA, VERSION):
        raise UserError(
            f"{root} has schema {manifest['schema']} version {manifest['version']} but this coreg reads {SCHEMA} version "
            f"{VERSION}; remove that folder and run python -m coreg.annotate.view again"
        )
    return manifest


def job_hash(manifest: dict[str, Any]) -> str:
    """sha256 (hex) of what makes a view: the network with its weights, the pixels, the image list and the block size."""
    return hash_of({key: manifest[key] for key in JOB})


def list_of(store: AnnotationStore) -> dict[str, Any]:
    """What a view's manifest says of the image list: not where it lies, which may change."""
    return {key: store.manifest["images"][key] for key in ("count", "sha256")}


def views_of(store: AnnotationStore) -> list[Path]:
    """The folders of all views of a store, finished or not."""
    return sorted(path.parent for path in (store.root / "views").glob("*/manifest.json"))


class ViewWriter(BlockWriter):
    """Writes a view."""

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        super().__init__(root, manifest, job_hash(manifest))

    def start(self) -> list[str]:
        """Make the folder, or go on with the view of the same job; returns one line for each block that was damaged.

        Raises:
            UserError: the folder holds another view, or cannot be written.
        """
        record = self.root / "manifest.json"
        if record.exists():
            there = read_manifest(self.root)
            for key in JOB:
                if there[key] != self.manifest[key]:
                    raise UserError(
                        f"{self.root} holds another view: {key} {difference(there[key], self.manifest[key])}; remove that "
                        f"folder, or give the network another name (local-dir:FOLDER)"
                    )
            return self.discard_damaged()
        try:
            (self.root / "blocks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.root}: {error.strerror}; make it writable, or copy the store") from None
        write_atomically(record, json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n")
        return []

    def write(self, index: int, tensors: dict[str, np.ndarray], errors: dict[int, str]) -> None:
        """Write block `index` with `features` float16 (n, D); rows in `errors` (numbers in the whole list) become zero.

        Raises:
            UserError: a feature is no number, or the disk is full.
        """
        features = np.array(tensors["features"])
        features[[row - self.rows(index).start for row in errors]] = 0
        if not np.isfinite(features).all():
            raise UserError(
                f"{self.manifest['backbone']} gives features that are no numbers in float16; take another --backbone, or "
                f"the --mean and --std of its weights"
            )
        super().write(index, {"features": features}, errors)


class Encoder:
    """A network that gives pooled features, in the form that `annotated` asks of an annotator."""

    def __init__(self, config: ViewConfig, device: torch.device | str) -> None:
        """Load the network.

        Raises:
            UserError: there is no such network, its weights cannot be had, or it has no pooled features of such images.
        """
        self.config = config
        # what it is made with besides its name
        sized = {"img_size": config.image_size} if takes_one_size(config.backbone) else {}
        self.arguments = sized | parse_backbone_args(config.backbone_args)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # untrained weights are the same in all processes, too
            network = create_backbone(config.backbone, 0, config.channels, self.arguments, config.pretrained)
        self.network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.mean, self.std = pixels_of(config)  # of the pixels in 0..1, one number a channel
        self._mean, self._std = (torch.tensor(x, device=device)[:, None, None] for x in (self.mean, self.std))

        side = config.image_size
        try:
            empty = torch.zeros(1, config.channels, side, side, dtype=torch.uint8)
            self.features = self.annotate(empty)["features"].shape[1]
        except Exception as error:  # of whatever kind the architecture's own code raises
            reason = first_line(error)
            raise UserError(
                f"backbone {config.backbone} gives no pooled features of images of {side}x{side} pixels ({reason}); choose "
                f"another --image_size or another --backbone"
            ) from None

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the network and its pixels."""
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        architecture = self.network.pretrained_cfg.get("architecture") or type(self.network).__name__
        config = self.config
        return {
            "network": {
                "architecture": architecture,
                "arguments": self.arguments,
                "weights": f"sha256 {digest.hexdigest()}",
            },
            "pixels": {"size": config.image_size, "channels": config.channels, "mean": self.mean, "std": self.std}
            | {"mirror": config.mirror}
            | ({"resize": config.resize} if config.resize != "squash" else {}),
            "features": self.features,
        }

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """uint8 (c, S, S), made a square as for training (`coreg.data.decode.decode`)."""
        size, channels = self.config.image_size, self.config.channels
        image = as_square(image, size, channels, self.config.resize)
        return torch.from_numpy(np.array(image).reshape(size, size, channels)).permute(2, 0, 1)

    collate = staticmethod(torch.stack)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}  # decoding processes need no network

    @torch.no_grad()
    def annotate(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pixels uint8 (n, c, S, S) to `features` float16 (n, D): mean over the image and its mirror image."""
        pixels = batch.to(self._mean.device, non_blocking=True).float().div(255).sub(self._mean).div(self._std)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        h = self._pooled(pixels)
        if self.config.mirror:
            h = (h + self._pooled(pixels.flip(3))) / 2
        return {"features": h.half()}

    def _pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network.forward_head(self.network.forward_features(pixels), pre_logits=True).flatten(1).float()


def pixels_of(config: ViewConfig) -> tuple[list[float], list[float]]:
    """Mean and deviation of the pixels, one number a channel: those asked for, else those of the weights, else 0.5."""
    own = trained_with(config.backbone) or ([0.5], [0.5])
    numbers = []
    for given, known in zip((config.mean, config.std), own):
        values = given or known
        if len(values) not in (1, config.channels):
            values = [sum(values) / len(values)]  # weights for colours, grey images
        numbers.append([float(value) for value in values] * (config.channels if len(values) == 1 else 1))
    return numbers[0], numbers[1]


def make_view(store: AnnotationStore, config: ViewConfig, accelerator: Accelerator | None = None) -> View:
    """Make the view, or finish it, or find it finished; all processes of the group take part, and others may.

    Raises:
        UserError: there is no such network, the images are not those that were annotated, or the folder cannot be written.
    """
    check_pixels(config)
    accelerator = accelerator or build_accelerator(timeout_minutes=60)
    opened: list[ImageList] = []

    def prepare() -> None:
        check_backbone(config.backbone, config.backbone_args)
        if config.pretrained:
            check_weights(config.backbone)
        opened.append(store.images())
        require_readable(opened[0])

    main_process_decides(accelerator, prepare)
    images = opened[0] if opened else store.images()
    encoder = Encoder(config, accelerator.device)
    name = Path(config.backbone.removeprefix("local-dir:")).name.replace(os.sep, "_")
    crop = "" if config.resize == "squash" else f"-{config.resize}"
    root = store.root / "views" / f"{name}-{config.image_size}{crop}"

    def block_size() -> int:  # of what is there already
        return read_manifest(root)["block_size"] if (root / "manifest.json").exists() else config.block_size

    size = main_process_decides(accelerator, block_size)
    writer = ViewWriter(
        root,
        {"schema": SCHEMA, "version": VERSION, "backbone": config.backbone}
        | encoder.describe()
        | {"images": list_of(store), "block_size": size}
        | {"versions": {"coreg": coreg.__version__, "timm": timm.__version__, "torch": torch.__version__}},
    )
    for line in main_process_decides(accelerator, writer.start):
        accelerator.print(f"damaged, made again: {printable(line)}")
    if not main_process_decides(accelerator, lambda: (writer.root / "errors.csv").exists()):
        more = {"batch_size": config.batch_size, "workers": config.workers}
        evidence = partial(annotated, images=images, annotator=encoder, writer=writer, **more)
        every_block(writer, store.paths, accelerator, evidence, "features")
    return View.open(writer.root, store)


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m coreg.annotate.view DIR [options]`."""
    folders, options = paths_and_options(argv)
    (config,) = parse(ViewConfig, argv=options, prog="python -m coreg.annotate.view", description=__doc__)
    if len(folders) != 1:
        raise UserError(f"write the folder of one annotation store and then options, not {len(folders)} folders")
    check_pixels(config)
    accelerator = build_accelerator(timeout_minutes=60)
    store = all_or_none(accelerator, lambda: AnnotationStore.open(folders[0]))
    view = make_view(store, config, accelerator)
    made = f"{view.manifest['features']} features of {len(view.unreadable)} images"
    accelerator.print(f"{printable(view.root)}: {made}, {int(view.unreadable.sum())} of them unreadable")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
