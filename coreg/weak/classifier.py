"""Probabilities that a trained classifier gives to images, for candidate sets that depend on them."""

from __future__ import annotations

import numpy as np
import timm
import torch

from coreg.data.decode import decode_annotated
from coreg.data.images import ImageList
from coreg.errors import UserError
from coreg.nets.model import check_backbone, check_weights
from coreg.plaintext import first_line

_ROWS = 512  # images decoded at a time
_BATCH = 64


@torch.no_grad()
def classifier_probabilities(name: str, images: ImageList, n_classes: int, workers: int = 2) -> np.ndarray:
    """Probabilities float64 (N, C) of a trained network, in evaluation mode.

    The images are squashed to the size that the network's weights were trained with, and normalised as they were.

    Args:
        name: a timm model, with its pretrained weights, or `local-dir:FOLDER`.

    Raises:
        UserError: no such network, its weights cannot be had, it tells other classes apart, or an image cannot be read.
    """
    check_backbone(name)
    check_weights(name)
    try:
        network = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # of whatever kind the architecture's own code raises
        reason = first_line(error)
        raise UserError(f"network {name} could not be loaded ({reason}); check the folder or the network") from None
    if network.num_classes != n_classes:
        raise UserError(
            f"network {name} tells {network.num_classes} classes apart, and there are {n_classes}; give one that was "
            f"trained on these, as local-dir:FOLDER"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = timm.data.resolve_model_data_config(network)
    channels, side = config["input_size"][:2]
    mean, std = (torch.tensor(config[key], device=device)[:, None, None] for key in ("mean", "std"))
    network.to(device)
    parts = []
    for start in range(0, len(images), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(images)))
        for batch in decode_annotated(images, rows, side, channels, workers).split(_BATCH):
            parts.append(network((batch.to(device).float() / 255 - mean) / std).double().softmax(1).cpu())
    return torch.cat(parts).numpy()
