"""The image tower of the annotator that made a store, as a backbone: a folder for timm, with texts of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from coreg.annotate.annotators import Towers, load_towers
from coreg.annotate.models import one_line, resolve
from coreg.annotate.prompts import TEMPLATES, prompts
from coreg.errors import UserError
from coreg.files import making_folder
from coreg.nets.heads import ClassText, class_features
from coreg.nets.towers import ImageTower, timm_tower
from coreg.records import RecordError, read_record
from coreg.store.preprocessing import annotators_pixels
from coreg.store.store import AnnotationStore

TOLERANCE = 1e-5  # between features of length 1 of the two forms
PHOTO = "a photo of a {}."


def write_tower(
    store: AnnotationStore, folder: Path, head_prompts: str | None = None, descriptions: str | None = None
) -> None:
    """Make the folder, or nothing.

    Args:
        head_prompts: which texts of the classes are encoded beside it, see `class_texts`; None for none.
        descriptions: JSON file of texts that take their place.

    Raises:
        UserError: the annotator cannot be had, has changed, or its tower cannot be taken over.
    """
    annotated = store.unrefined()
    if annotated is None:
        raise UserError(
            f"{store.root} is refined, and the store that it was refined from, which says what annotated it, is gone; name "
            f"a timm model with --backbone"
        )
    annotated.need_annotator("name the store of an annotator with --prefilter_annotations, or a timm model with --backbone")
    made_by = annotated.manifest["model"]
    model = resolve(made_by["spec"])
    if model.weights != made_by["weights"]:
        raise UserError(
            f"{model.spec} is not what made {annotated.root}: its files changed; name a timm model with --backbone"
        )
    if model.kind in ("chat", "run"):
        kind = "a chat model" if model.kind == "chat" else "a finished run"
        raise UserError(f"{model.spec} is {kind}, whose image tower is no backbone; name a timm model with --backbone")
    towers = load_towers(model, torch.device("cpu"), "fp32")
    try:
        size = towers.preprocess(Image.new("RGB", (64, 64))).shape[-1]
        tower = timm_tower(towers.network, size)
        difference = disagreement(towers, tower, size)
        if difference > TOLERANCE:
            raise UserError(f"its features would differ by {difference:.1g}")
    except Exception as error:  # of whatever kind another architecture makes
        reason = str(error) if isinstance(error, UserError) else one_line(error)
        raise UserError(
            f"the image tower of {model.spec} cannot be taken over by timm ({reason}); name a timm model with --backbone"
        ) from None
    text = None
    if head_prompts is not None:
        text = _class_text(annotated, towers, tower, class_texts(annotated, head_prompts, descriptions))
    with making_folder(folder, "free some space, then the same command goes on", replace=True) as temporary:
        pixels = annotators_pixels(str(annotated.root))
        tower.network.pretrained_cfg = dict(tower.network.pretrained_cfg) | {
            "input_size": (3, size, size),
            "num_classes": 0,
            **{name: pixels[name] for name in ("mean", "std") if name in pixels},
        }
        timm.models.save_for_hf(tower.network, str(temporary), model_args=tower.arguments, safe_serialization=True)
        if text is not None:
            text.write(temporary)


@torch.no_grad()
def disagreement(towers: Towers, tower: ImageTower, size: int) -> float:
    """Largest difference between the annotator's image features of length 1 and those by way of timm, on noise."""
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    h = tower.network(pixels)
    if tower.projection is None:
        h = towers.network.visual.head(h)
    else:
        h = F.linear(h, *tower.projection)
    return float((F.normalize(h, dim=1) - F.normalize(towers.image(pixels), dim=1)).abs().max())


def class_texts(store: AnnotationStore, head_prompts: str, descriptions: str | None) -> tuple[list[str], Tensor]:
    """Texts of the classes, and int64 (m,) of which class each is.

    Args:
        head_prompts: `default`, `classname`, `ensemble`, or `annotator` for the store's own templates. descriptions: JSON
            file of texts by class name, which take the place of prompts.

    Raises:
        UserError: the file is no such file.
    """
    names = store.class_names
    if descriptions is not None:
        by_name = read_descriptions(descriptions, names)
        texts = [text for name in names for text in by_name[name]]
        return texts, torch.tensor([number for number, name in enumerate(names) for _ in by_name[name]])
    templates = {"default": [PHOTO], "classname": ["{}"], "ensemble": TEMPLATES, "annotator": store.templates}[head_prompts]
    if head_prompts != "annotator":  # as in PartialCLIP; an annotator was given the names as they are
        names = [name.replace("_", " ") for name in names]
    return prompts(templates, names), torch.arange(len(names)).repeat(len(templates))


def read_descriptions(path: str, class_names: Sequence[str]) -> Mapping[str, list[str]]:
    """A JSON file with a list of texts for every class name.

    Raises:
        UserError: it cannot be read, or lacks a class.
    """
    example = 'write for example {"cat": ["a small animal with whiskers", "a pet that purrs"]}'
    try:
        texts = read_record(Path(path), {name: [str] for name in class_names})
    except RecordError as error:
        raise UserError(f"--descriptions {path} does not describe every class ({error}); {example}") from None
    empty = [name for name in class_names if not texts[name]]
    if empty:
        raise UserError(f"--descriptions {path} has no text for {empty[0]!r}; {example}")
    return texts


def _class_text(store: AnnotationStore, towers: Towers, tower: ImageTower, texts: tuple[list[str], Tensor]) -> ClassText:
    if tower.projection is None:
        raise UserError(
            f"{store.manifest['model']['spec']} compares images with texts after more than a linear projection, so that "
            f"texts are no weights for a head; choose another --head_init"
        )
    sentences, classes = texts
    with torch.no_grad():
        parts = [towers.text(towers.tokenize(sentences[at : at + 256])) for at in range(0, len(sentences), 256)]
    features = class_features(torch.cat(parts).float(), classes, len(store.class_names))
    return ClassText(features, *tower.projection, towers.scale)
