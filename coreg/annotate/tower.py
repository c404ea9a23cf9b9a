"""The image tower of the annotator that made a store, as a backbone: a folder for timm, with texts of the classes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import open_clip
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from coreg.annotate.annotators import Towers, load_towers
from coreg.annotate.models import one_line, resolve
from coreg.annotate.prompts import CLASSNAME, PHOTO, plain_names, prompts, read_descriptions
from coreg.annotate.scores import description_texts, judging_texts
from coreg.errors import UserError
from coreg.files import making_folder
from coreg.nets.heads import ClassText, class_features
from coreg.nets.towers import ImageTower, timm_tower
from coreg.store.preprocessing import annotators_pixels
from coreg.store.store import AnnotationStore

TOLERANCE = 1e-5  # between features of length 1 of the two forms


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
    annotated = store.need_unrefined("name a timm model with --backbone")
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
    texts = None if head_prompts is None else class_texts(annotated, head_prompts, descriptions)
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
    text = None if head_prompts is None else _class_text(annotated, towers, tower, texts)
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


def class_texts(store: AnnotationStore, head_prompts: str, descriptions: str | None) -> tuple[list[str], Tensor] | None:
    """Texts of the classes, and int64 (m,) of which class each is; None for those that images were annotated with.

    Args:
        head_prompts: `default`, `classname`, `ensemble`, `descriptions` for those of the annotation, or `annotator`.
        descriptions: JSON file of texts by class name, which take the place of prompts.

    Raises:
        UserError: the file is no such file, or there are no descriptions.
    """
    names = store.class_names
    if descriptions is not None or head_prompts == "descriptions":
        texts = store.descriptions if descriptions is None else read_descriptions(descriptions, names)
        if texts is None:
            raise UserError(
                f"--head_prompts descriptions: {store.root} was annotated without descriptions; give some with "
                f"--descriptions names.json"
            )
        return description_texts(names, texts)
    if head_prompts == "annotator":
        return None
    ensemble = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    templates = {"default": [PHOTO], "classname": [CLASSNAME], "ensemble": ensemble}[head_prompts]
    return prompts(templates, plain_names(names)), torch.arange(len(names)).repeat(len(templates))


def _class_text(
    store: AnnotationStore, towers: Towers, tower: ImageTower, texts: tuple[list[str], Tensor] | None
) -> ClassText:
    """What a head begins with; `texts` are encoded, but for those that the store keeps in full precision."""
    if tower.projection is None:
        raise UserError(
            f"{store.manifest['model']['spec']} compares images with texts after more than a linear projection, so that "
            f"texts are no weights for a head; choose another --head_init"
        )
    kept = store.kept_texts() if store.manifest["model"]["precision"] == "fp32" else None

    @torch.no_grad()
    def encode(sentences: list[str]) -> Tensor:
        if kept is not None:
            with contextlib.suppress(KeyError):
                return torch.from_numpy(kept.of(sentences))
        parts = [towers.text(towers.tokenize(sentences[at : at + 256])) for at in range(0, len(sentences), 256)]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    if texts is None:
        encoded, count = judging_texts(encode, store.templates, store.class_names, store.descriptions), len(store.templates)
        classes = torch.arange(len(store.class_names)).repeat(count)
    else:
        encoded, classes = encode(texts[0]), texts[1]
    features = class_features(encoded, classes, len(store.class_names))
    return ClassText(features, *tower.projection, towers.scale / store.temperature)
