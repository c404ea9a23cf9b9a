"""The text side of the annotator that made a store, loaded anew: what stored features say under other texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from coreg.annotate.annotators import ClipAnnotator
from coreg.annotate.models import resolve
from coreg.errors import UserError
from coreg.store.store import AnnotationStore


def text_side(store: AnnotationStore, templates: Sequence[str], device: torch.device | str = "cpu") -> ClipAnnotator:
    """The annotator of `store` with other templates for the same class names; its `score` takes the stored features.

    Raises:
        UserError: nobody annotated, the store keeps no features, or its annotator has no text side, cannot be had, or has
            changed since.
    """
    store.need_annotator()
    made_by = store.manifest["model"]
    store.need_features()
    model = resolve(made_by["spec"])
    if model.weights != made_by["weights"]:
        raise UserError(f"{model.spec} is not what made {store.root}: its files changed")
    if model.kind == "run":
        raise UserError(f"{model.spec} is a finished run, which compares images with no texts")
    return ClipAnnotator(model, templates, store.class_names, device, made_by["precision"])


def single_template_probabilities(store: AnnotationStore, device: torch.device | str = "cpu") -> np.ndarray:
    """What template 0 alone says, float16 (N, C), where the store keeps its vote and the mean over all templates.

    Raises:
        UserError: as `text_side`.
    """
    if store.manifest["model"]["spec"].startswith("run:"):  # of one template, and without a text side
        return store.probs()
    annotator = text_side(store, store.templates[:1], device)
    return np.concatenate([annotator.score(tensors["features"])["probs"].cpu().numpy() for _, tensors in store.parts()])


def class_embeddings(annotator: ClipAnnotator) -> np.ndarray:
    """One text feature a class, float32 (C, D) of length 1: the mean over the templates of features of length 1."""
    templates, classes = annotator.shape
    text = annotator.text.view(templates, classes, -1).mean(dim=0)
    return torch.nn.functional.normalize(text, dim=1).cpu().numpy()


def averaged_embedding_logits(store: AnnotationStore, device: torch.device | str = "cpu") -> np.ndarray:
    """Logits float32 (N, C) of one text feature a class, the mean over the templates of features of length 1.

    That is how CLIP itself joins templates, another classifier than the mean of probabilities.

    Raises:
        UserError: as `text_side`.
    """
    annotator = text_side(store, store.templates, device)
    text = np.float32(annotator.towers.scale) * class_embeddings(annotator)
    return np.concatenate([t["features"].astype(np.float32) @ text.T for _, t in store.parts()])


def label_similarities(store: AnnotationStore) -> np.ndarray:
    """Cosines of every image and one text feature a label, float32 (N, L); 0 for images that could not be read.

    They know of no temperature, and of no other label. Of a refined store they are those of what it was refined from.

    Raises:
        UserError: as `text_side`, or a refined store's source is gone.
    """
    annotated = store.unrefined()
    if annotated is None:
        raise UserError(
            f"{store.root} is refined, and the store that it was refined from is gone; annotate the images again"
        )
    text = class_embeddings(text_side(annotated, annotated.templates))
    return np.concatenate([t["features"].astype(np.float32) @ text.T for _, t in annotated.parts()])
