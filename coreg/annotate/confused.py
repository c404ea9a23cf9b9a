"""Which classes an annotator confuses, and for which of them more words would help; no label is needed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coreg.annotate.scores import class_embeddings, kept_side
from coreg.scripts import launched
from coreg.store.store import AnnotationStore

FEWEST, LEAST = 10, 1 / 3  # images of a pair, and their share; fewer are chance
NEAREST = 0.05  # of the other classes
SHOWN = 20  # names in a line


@dataclass(frozen=True)
class Pair:
    """Two classes that are candidates of the same images."""

    classes: tuple[int, int]
    images: int  # that have both among their candidates
    share: float  # of the images of which the rarer one is a candidate
    alike: bool | None  # whether the annotator reads the texts of both nearly alike; None where texts are not known


def together(candidates: np.ndarray) -> Any:
    """Numbers of images that have two classes among their candidates, bool (n, C) -> a sparse int64 matrix (C, C)."""
    from scipy.sparse import csr_matrix  # here: most tools need none

    sets = csr_matrix(candidates.astype(np.int64))
    return sets.T @ sets


def confused_pairs(store: AnnotationStore, counts: Any) -> list[Pair]:
    """Pairs of classes that at least 10 images, and a third of those of the rarer class, have both among their candidates.

    Where the store keeps the annotator's texts, two classes are *alike* when the text of one is among the nearest twentieth
    of all other classes' texts to the other one (the nearest at least), and nearer than two classes are on average: what is
    confused then has texts that differ too little, and more words would help. Otherwise the texts are apart and images of
    both look alike to the model.

    Args:
        counts: the sum of `together` over the images with a vote.

    Returns:
        the pairs with the largest share first, then with most images.
    """
    counts = counts.tocoo()
    images = np.zeros(len(store.class_names), dtype=np.int64)
    diagonal = counts.row == counts.col
    images[counts.row[diagonal]] = counts.data[diagonal]
    chosen = (counts.row < counts.col) & (counts.data >= FEWEST)
    first, second, both = (table[chosen] for table in (counts.row, counts.col, counts.data))
    share = both / np.minimum(images[first], images[second])
    keep = np.flatnonzero(share >= LEAST)
    keep = keep[np.lexsort((second[keep], first[keep], -both[keep], -share[keep]))]
    side = kept_side(store, store.templates, store.class_names, store.descriptions) if len(keep) else None
    text = None if side is None else torch.from_numpy(class_embeddings(side))
    return [
        Pair((a, b), int(both[k]), float(share[k]), None if text is None else _alike(text, a, b))
        for k, a, b in zip(keep, first[keep].tolist(), second[keep].tolist())
    ]


def more_words(store: AnnotationStore, pairs: Sequence[Pair]) -> list[str]:
    """For which classes more words would help, and what to type then, in a line; none where it is for no class."""
    alike = [store.class_names[c] for c in sorted({c for pair in pairs if pair.alike for c in pair.classes})]
    if not alike:
        return []
    names = ", ".join(alike[:SHOWN]) + (f" and {len(alike) - SHOWN} more" if len(alike) > SHOWN else "")
    places = [shlex.quote(str(store.root) + end) for end in ("", "_described")]
    command = f"{launched('annotate_vlm.py')} --rescore {places[0]} --descriptions names.json --output_dir {places[1]}"
    return [f"more words would help: {names}; say what tells them apart from others that read alike: {command}"]


def _alike(text: torch.Tensor, a: int, b: int) -> bool:
    """See `confused_pairs`; of texts (C, D) of length 1."""
    classes = len(text)
    nearest = max(1, int(NEAREST * (classes - 1)))
    total = text.sum(dim=0)
    average = float((total @ total - classes) / (classes * (classes - 1)))
    cosine = text @ text[[a, b]].T  # (C, 2)
    between = cosine[b, 0]
    # the class itself is nearer than all others
    places = (cosine > between).sum(dim=0) - 1
    return bool(between > average) and bool((places < nearest).any())
