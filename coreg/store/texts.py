"""What the annotator's text side says of texts, kept beside a store's blocks: nobody has to load the model for it again.

texts.safetensors holds, in the form of a block, features float32 (m, D) of length 1, the m texts as JSON, and by which
numbers the model makes scores of cosines: scale float64 (1,), and bias float64 (1,), empty where there is none. It belongs
to the annotator and not to the job; where it is missing, damaged or of another annotator, it counts as not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coreg.errors import UserError
from coreg.store.blocks import REMEDY, DamagedBlockError, pack_answers, read_block, unpack_answers, write_block

TEXTS = "texts.safetensors"


@dataclass(frozen=True)
class TextFeatures:
    """Texts and their features, as an annotator's text side gives them in its own precision."""

    texts: Sequence[str]  # m, all different
    features: np.ndarray  # float32 (m, D), of length 1
    scale: float  # of the cosine
    bias: float | None  # that is added to it, of models trained with a sigmoid

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """Features of some texts, float32 (n, D).

        Raises:
            KeyError: one of them is not among those that are kept.
        """
        places = {text: place for place, text in enumerate(self.texts)}
        return self.features[[places[text] for text in texts]]


def write_texts(root: Path, manifest: dict[str, Any], kept: TextFeatures) -> None:
    """Keep texts in the folder of a store.

    Raises:
        UserError: they cannot be written.
    """
    tensors = {
        "texts": pack_answers([list(kept.texts)]),
        "features": kept.features,
        "scale": np.array([kept.scale]),
        "bias": np.array([] if kept.bias is None else [kept.bias], dtype=np.float64),
    }
    write_block(root / TEXTS, 0, _annotator(manifest), tensors, {}, REMEDY)


def read_texts(root: Path, manifest: dict[str, Any]) -> TextFeatures | None:
    """What `write_texts` wrote, or None."""
    try:
        tensors, _, _ = read_block(root / TEXTS, 0, _annotator(manifest))
        (texts,) = unpack_answers(tensors["texts"])
        features, scale, bias = tensors["features"], tensors["scale"], tensors["bias"]
    except (DamagedBlockError, UserError, KeyError, ValueError):
        return None
    kinds = [(table.dtype, table.shape) for table in (features, scale)]
    double, shape = np.dtype(np.float64), (len(texts), manifest.get("features"))
    if kinds != [(np.dtype(np.float32), shape), (double, (1,))] or (bias.dtype, bias.ndim) != (double, 1) or len(bias) > 1:
        return None
    if not all(np.isfinite(table).all() for table in (features, scale, bias)):
        return None
    return TextFeatures(texts, features, float(scale[0]), float(bias[0]) if len(bias) else None)


def _annotator(manifest: dict[str, Any]) -> str:
    """sha256 (hex) of what the features of a text depend on."""
    model = {key: manifest["model"].get(key) for key in ("spec", "weights", "precision")}
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()
