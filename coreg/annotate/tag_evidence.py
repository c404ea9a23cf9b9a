"""What a store says of several labels an image, in the ways of `coreg.weak.tag_evidence`; no image is opened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from coreg.annotate.textual import class_embeddings, text_side
from coreg.data.images import TRAIN
from coreg.errors import UserError
from coreg.store.store import AnnotationStore
from coreg.weak.tag_evidence import class_bias, fit_gaussians, image_or_part, softmax, with_consistent_parts

Kind = Literal["image", "tiles", "ccd", "piaa"]


def label_evidence(store: AnnotationStore, kind: Kind, temperature: float) -> np.ndarray:
    """How probable each label is in every image, float64 (N, L); means nothing for images that could not be read.

    Biases and Gaussians are those of the training images. Of a refined store it is that of what it was refined from.

    Args:
        kind: `image`, the softmax of its cosines; `tiles`, the largest in it or a part of it; `ccd` or `piaa`, by these
            methods. temperature: of the softmax, which `piaa` has its own of; 0 for the annotator's own.

    Raises:
        UserError: there are no features, or no tiles where they are needed, or the annotator has no text side any more.
    """
    annotated = store.need_unrefined()
    annotated.need_features()
    if kind != "image" and not annotated.manifest.get("tiles"):
        raise UserError(f"{annotated.root} has no tiles, which --evidence {kind} needs; annotate with --tiles 2 3")
    side = text_side(annotated, annotated.templates)
    text, temperature = class_embeddings(side), temperature or 1 / side.scale

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Rows, cosines of the images, and features of their tiles, block by block."""
        for rows, tensors in annotated.parts():
            tiles = tensors["tiles"].astype(np.float32) if kind != "image" else None
            yield rows, tensors["features"].astype(np.float32) @ text.T, tiles

    trained = (annotated.split == TRAIN) & ~annotated.unreadable
    if kind == "image":
        return np.concatenate([softmax(image / temperature) for _, image, _ in parts()])
    if kind == "tiles":
        return np.concatenate([image_or_part(image, tiles @ text.T, temperature) for _, image, tiles in parts()])
    if kind == "ccd":
        whole = np.concatenate([softmax(image / temperature) for _, image, _ in parts()])
        bias = class_bias(whole[trained])
        of = ((image, tiles @ text.T) for _, image, tiles in parts())
        return np.concatenate([with_consistent_parts(image, tiles, temperature, bias) for image, tiles in of])
    gaussians = fit_gaussians((tiles[trained[rows]].reshape(-1, text.shape[1]) for rows, _, tiles in parts()), text)
    return np.concatenate([gaussians.scores(tiles, image) for _, image, tiles in parts()])
