"""Similarities of images and labels, from the features in a store: no image is opened."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from coreg.annotate.annotators import load_towers
from coreg.annotate.models import resolve
from coreg.annotate.prompts import prompts
from coreg.errors import UserError
from coreg.nets.heads import class_features
from coreg.store.store import AnnotationStore


@torch.no_grad()
def label_similarities(store: AnnotationStore) -> np.ndarray:
    """Cosines of every image's features and the mean text features of each label under the store's templates.

    They know of no temperature, and of no other label; an image that could not be read is equally similar to all.

    Returns:
        float32 (N, L).

    Raises:
        UserError: the store keeps no features, or what annotated it cannot be had or has changed.
    """
    annotated = store.unrefined()
    if annotated is None or annotated.drawn or annotated.manifest["features"] is None:
        raise UserError(
            f"{store.root} keeps no features of an annotator, and labels are compared with these; annotate the images with "
            f"annotate_vlm.py and a model of the CLIP family"
        )
    model = resolve(annotated.manifest["model"]["spec"])
    if model.weights != annotated.manifest["model"]["weights"]:
        raise UserError(f"{model.spec} is not what made {store.root}: its files changed; annotate the images again")
    towers, names = load_towers(model, torch.device("cpu"), "fp32"), annotated.class_names
    sentences = prompts(annotated.templates, names)
    parts = [towers.text(towers.tokenize(sentences[at : at + 256])) for at in range(0, len(sentences), 256)]
    classes = torch.arange(len(names)).repeat(len(annotated.templates))
    texts = F.normalize(class_features(torch.cat(parts).float(), classes, len(names)), dim=1)
    return (torch.from_numpy(annotated.features()).float() @ texts.T).numpy()
