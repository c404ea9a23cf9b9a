"""What an annotation store holds, said to a person in a few lines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import numpy as np

from coreg.annotate.candidates import candidate_sets, mean_candidates, partial_accuracy, vote_counts, zero_shot_accuracy
from coreg.annotate.store import AnnotationStore


def summary(store: AnnotationStore) -> str:
    """What a person wants to know about a store, in a few lines, with the next command to type."""
    candidates, names, readable = candidate_sets(store), store.class_names, ~store.unreadable
    counts = vote_counts(store.votes()[readable], len(names))
    share = (counts > 0).mean(axis=0)  # how often a class is among the candidates
    agreement = (counts.max(axis=1) / len(store.templates)).mean()
    lines = [
        f"{store.root}: {len(store)} images, {len(names)} classes, {len(store.templates)} templates",
        f"  unreadable images      {store.unreadable.sum()}" + (" (see errors.csv)" if store.unreadable.any() else ""),
        f"  mean candidates        {mean_candidates(candidates[readable]):.2f} of {len(names)}",
        f"  template agreement     {agreement:.1%} of the templates name an image's most named class",
        f"  classes never named    {some(names, share == 0)}",
        f"  classes always named   {some(names, share == 1)}",
    ]
    if store.labels is not None:
        averaged, single = zero_shot_accuracy(store), zero_shot_accuracy(store, single_template=True)
        for index, split in enumerate(("train", "test")):
            rows = store.split == index
            if split in averaged:
                lines.append(
                    f"  {split:5}                  zero-shot {averaged[split]:.1%} (template 0 alone {single[split]:.1%}), "
                    f"label among the candidates {partial_accuracy(candidates[rows], store.labels[rows]):.1%}"
                )
    lines.append(
        f"next: accelerate launch train_coreg.py --annotations {shlex.quote(str(store.root))} --output_dir runs/mine"
    )
    return "\n".join(lines)


def some(names: Sequence[str], chosen: np.ndarray) -> str:
    """The chosen names, shortened to ten; "none" without any."""
    found = [names[index] for index in np.flatnonzero(chosen)]
    more = f" and {len(found) - 10} more" if len(found) > 10 else ""
    return ", ".join(found[:10]) + more if found else "none"
