"""A finished run as an annotator: the networks that it exported judge images, and no texts are compared with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from coreg.data.decode import Resize, as_square
from coreg.errors import UserError
from coreg.export.ensemble import Ensemble
from coreg.export.folder import export_folder, files_of, load_export, read_settings
from coreg.records import hash_of

# a classifier has no words: its only template stands for its one vote
RUN_TEMPLATES = ("{}",)
# of an export's settings, what its probabilities depend on beside the networks' files
JUDGES_BY = ("class_names", "image_size", "channels", "resize", "mean", "std", "temperature", "tuning")


def resolve_run(path: str) -> tuple[Path, str]:
    """The export folder of a run, made absolute, and the SHA-256 of all that its probabilities depend on.

    Raises:
        UserError: there is none, it is damaged, or its images have several labels.
    """
    folder = export_folder(Path(path).expanduser()).resolve()
    settings = read_settings(folder)
    if settings.get("thresholds") is not None:
        raise UserError(f"{path} gives images several labels, and an annotator names one class; name another with --vlm")
    try:
        files = files_of(folder, settings["nets"])
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}); copy the export folder anew") from None
    return folder, f"sha256 {hash_of([files, {name: settings.get(name) for name in JUDGES_BY}])}"


@dataclass
class _Pixels:
    """An image as the networks were trained on it, uint8 (c, H, W)."""

    size: int
    channels: int
    resize: Resize

    def __call__(self, image: Image.Image) -> Tensor:
        square = np.asarray(as_square(image, self.size, self.channels, self.resize))
        return torch.from_numpy(square.reshape(self.size, self.size, self.channels).transpose(2, 0, 1).copy())


class RunAnnotator:
    """The networks of an export. One vote, the most probable class; probabilities at the export's temperature.

    The features are the networks' pooled ones, each brought to length 1, one after the other, and all to length 1.
    """

    collate = staticmethod(torch.stack)

    def __init__(self, folder: str, class_names: Sequence[str], device: torch.device | str = "cpu") -> None:
        """Load the networks.

        Raises:
            UserError: the folder is damaged, or its classes are not `class_names`.
        """
        nets, settings = load_export(folder)
        if settings["class_names"] != list(class_names):
            raise UserError(f"the classes of {folder} are others than those asked for; leave out --classes")
        self.device = torch.device(device)
        self.ensemble = Ensemble(nets, settings).to(self.device).eval()
        resize = settings.get("resize") or "squash"
        self.preprocess = _Pixels(settings["image_size"], settings["channels"], resize)
        self.preprocessing: dict[str, Any] = {
            "size": settings["image_size"],
            "mean": settings["mean"],
            "std": settings["std"],
            "interpolation": "bilinear",
            "resize_mode": resize,
        }
        self.features = sum(net.head_hidden_size for net in nets)
        self.notes: list[str] = []

    @torch.inference_mode()
    def annotate(self, batch: Tensor) -> dict[str, Tensor]:
        """Judge a batch of images, uint8 (n, c, H, W).

        Returns:
            votes int16 (n, 1); probs float16 (n, C); features float16 (n, D).
        """
        ensemble = self.ensemble
        x = ensemble.normalised(batch.to(self.device, non_blocking=True))
        maps = [net.forward_features(x) for net in ensemble.nets]
        logits = sum(net.forward_head(one) for net, one in zip(ensemble.nets, maps)) / (len(maps) * ensemble.temperature)
        pooled = [net.forward_head(one, pre_logits=True).flatten(1) for net, one in zip(ensemble.nets, maps)]
        features = normalize(torch.cat([normalize(h, dim=1) for h in pooled], dim=1), dim=1)
        return {
            "votes": logits.argmax(dim=1, keepdim=True).to(torch.int16),
            "probs": logits.softmax(dim=1).half(),
            "features": features.half(),
        }
