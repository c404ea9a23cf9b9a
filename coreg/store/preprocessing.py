"""What of an image the annotator that made a store is given; read without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coreg.errors import UserError
from coreg.records import RecordError, read_record
from coreg.store.manifest import read_manifest

GLYPH_CLIP_CONFIG = Path(__file__).parents[1] / "demo" / "glyph_clip" / "open_clip_config.json"


def annotators_pixels(annotations: str | None) -> dict[str, Any]:
    """`image_size`, `mean` and `std` of what made a store, and what built-in digits want where there is none yet.

    Nothing where they are not known; what is wrong with a store is said when it is opened.
    """
    try:
        if annotations is not None:
            return _in_our_words(read_manifest(Path(annotations))["preprocessing"])
        config = read_record(GLYPH_CLIP_CONFIG)
        size = config["model_cfg"]["vision_cfg"]["image_size"]
        return _in_our_words(config["preprocess_cfg"] | {"size": size}) | {"flip": False}
    except (UserError, RecordError, LookupError, AttributeError, TypeError):
        return {}


def _in_our_words(preprocessing: dict[str, Any]) -> dict[str, Any]:
    """From the words of open_clip or of transformers."""
    size = preprocessing.get("crop_size") or preprocessing["size"]
    if isinstance(size, dict):
        size = size.get("height") or size["shortest_edge"]
    values = {"image_size": size[0] if isinstance(size, list) else size}
    return values | {name: preprocessing.get(name) or preprocessing[f"image_{name}"] for name in ("mean", "std")}
