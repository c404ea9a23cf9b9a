"""What stored features say under texts: those that the store keeps, or the annotator's text side, loaded anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from coreg.annotate.annotators import ClipAnnotator
from coreg.annotate.models import ModelSpec, resolve
from coreg.annotate.scores import TextSide, class_embeddings, kept_side
from coreg.errors import UserError
from coreg.store.store import AnnotationStore

AT_ONCE = 4096  # images that are judged at the same time


def model_of(store: AnnotationStore) -> ModelSpec:
    """The annotator of a store with features, to be loaded again.

    Raises:
        UserError: it cannot be had, has changed since, or reads no texts.
    """
    made_by = store.manifest["model"]
    model = resolve(made_by["spec"])
    if model.weights != made_by["weights"]:
        raise UserError(f"{model.spec} is not what made {store.root}: its files changed; annotate the images again")
    if model.kind == "run":
        raise UserError(f"{model.spec} is a finished run, which reads no texts to judge by")
    return model


def text_side(store: AnnotationStore, templates: Sequence[str], device: torch.device | str = "cpu") -> TextSide:
    """The text side of the annotator of `store` with other templates for the same classes; its `score` takes features.

    The model is loaded where the store does not keep these texts.

    Raises:
        UserError: nobody annotated, the store keeps no features, or its annotator has no text side, cannot be had, or has
            changed since.
    """
    store.need_annotator()
    store.need_features()
    how = store.descriptions, store.temperature
    side = kept_side(store, templates, store.class_names, *how, device)
    if side is not None:
        return side
    precision = store.manifest["model"]["precision"]
    return ClipAnnotator(model_of(store), templates, store.class_names, device, precision, *how)


def evidence(
    store: AnnotationStore, temperature: float = 1.0, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """What the annotator says at a temperature, from a store's features; no image is opened.

    The scores of a template are divided by the temperature before they become probabilities: above 1 they are less sure.
    Votes are the same at every temperature.

    Returns:
        votes int16 (N, T), -1 for images that could not be read; mean over the templates of the class probabilities,
        float32 (N, C), uniform for those.

    Raises:
        UserError: as `text_side`.
    """
    side = text_side(store, store.templates, device)
    side.temperature = temperature
    votes, probs = [], []
    for _, tensors in store.parts():
        for start in range(0, len(tensors["features"]), AT_ONCE):
            some = side.judge(tensors["features"][start : start + AT_ONCE])
            votes.append(some[0].cpu().numpy())
            probs.append(some[1].cpu().numpy())
    votes, probs = np.concatenate(votes), np.concatenate(probs)
    votes[store.unreadable], probs[store.unreadable] = -1, 1 / len(store.class_names)
    return votes, probs


def single_template_probabilities(store: AnnotationStore, device: torch.device | str = "cpu") -> np.ndarray:
    """What template 0 alone says, float16 (N, C), where the store keeps its vote and the mean over all templates.

    Raises:
        UserError: as `text_side`.
    """
    if store.manifest["model"]["spec"].startswith("run:"):  # of one template, and without a text side
        return store.probs()
    side = text_side(store, store.templates[:1], device)
    return np.concatenate([side.score(tensors["features"])["probs"].cpu().numpy() for _, tensors in store.parts()])


def averaged_embedding_logits(store: AnnotationStore, device: torch.device | str = "cpu") -> np.ndarray:
    """Logits float32 (N, C) of one text feature a class, the mean over the templates of features of length 1.

    That is how CLIP itself joins templates, another classifier than the mean of probabilities.

    Raises:
        UserError: as `text_side`.
    """
    side = text_side(store, store.templates, device)
    text = np.float32(side.scale / side.temperature) * class_embeddings(side)
    return np.concatenate([t["features"].astype(np.float32) @ text.T for _, t in store.parts()])


def label_similarities(store: AnnotationStore) -> np.ndarray:
    """Cosines of every image and one text feature a label, float32 (N, L); 0 for images that could not be read.

    They know of no temperature, and of no other label. Of a refined store they are those of what it was refined from.

    Raises:
        UserError: as `text_side`, or a refined store's source is gone.
    """
    annotated = store.need_unrefined()
    text = class_embeddings(text_side(annotated, annotated.templates))
    return np.concatenate([t["features"].astype(np.float32) @ text.T for _, t in annotated.parts()])
