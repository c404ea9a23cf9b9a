"""Is this annotation store fit to be trained on? What can be said without labels, and more where there are some.

    python -m coreg.annotate.health ann

writes ann/report.html (one file, nothing is loaded from elsewhere) and ann/report.txt; annotate_vlm.py does so at its end.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from coreg.annotate.blocks import write_atomically
from coreg.annotate.candidates import candidate_sets, partial_accuracy, vote_counts
from coreg.annotate.health_html import page
from coreg.annotate.store import AnnotationStore
from coreg.data.images import ImageList
from coreg.errors import UserError, exits_with_one_line

FEW_IMAGES = 50  # per class; below this a prototype and a class's share of a batch are mostly noise (rule of thumb)
NEARLY_ALWAYS = 0.95
GALLERY = 24
SAME = 4e-3  # features are rounded to 11 bits and differ a little with the place in a batch


@dataclass
class Health:
    """What a store looks like.

    Attributes:
        sizes: sizes[k] images have k candidates, k = 0 ... C (unreadable images are left out everywhere here).
        agreement: float (T, T), share of images on which two templates give the same vote, abstentions left out; NaN where
            there is none.
        named: float (C,), share of images that have the class among their candidates.
        most_named: int (C,), images whose most named class it is.
        abstained: float (T,), share of images on which the template abstains.
        contested: rows of the images the templates agree on least, most contested first.
        duplicates: pairs of rows with the same features, or None where there are no features.
        accuracy: `templates` (T,), `classes` zero-shot (C,), `partial` (C,), NaN where nothing is labelled; None without
            labels.
        verdicts: what is wrong, in plain words; empty when nothing is.
    """

    sizes: np.ndarray
    agreement: np.ndarray
    named: np.ndarray
    most_named: np.ndarray
    abstained: np.ndarray
    contested: np.ndarray
    duplicates: list[tuple[int, int]] | None
    accuracy: dict[str, np.ndarray] | None
    verdicts: list[str] = field(default_factory=list)


def examine(store: AnnotationStore) -> Health:
    """Look at a store."""
    rows = np.flatnonzero(~store.unreadable)
    votes, probs = store.votes()[rows], store.probs()[rows]
    classes = len(store.class_names)
    candidates = candidate_sets(store)[rows]
    counts = vote_counts(votes, classes)
    voted = counts.sum(axis=1)
    share = counts.max(axis=1) / np.maximum(voted, 1)
    # Least agreement first; among equals, the least probable winner.
    order = np.lexsort((probs.max(axis=1), np.where(voted > 0, share, -1.0)))
    features = store.features()
    health = Health(
        sizes=np.bincount(candidates.sum(axis=1), minlength=classes + 1),
        agreement=_agreement(votes),
        named=candidates[voted > 0].mean(axis=0) if (voted > 0).any() else np.zeros(classes),
        most_named=np.bincount((counts + 0.5 * probs)[voted > 0].argmax(axis=1), minlength=classes),
        abstained=(votes < 0).mean(axis=0),
        contested=rows[order[:GALLERY]],
        duplicates=None if features is None else _duplicates(features[rows], rows),
        accuracy=None if store.labels is None else _accuracy(store.labels[rows], votes, probs, candidates),
    )
    health.verdicts = _verdicts(store, health)
    return health


def _agreement(votes: np.ndarray) -> np.ndarray:
    templates = votes.shape[1]
    matrix = np.ones((templates, templates))
    for a in range(templates):
        for b in range(a + 1):
            both = (votes[:, a] >= 0) & (votes[:, b] >= 0)
            same = float((votes[both, a] == votes[both, b]).mean()) if both.any() else np.nan
            matrix[a, b] = matrix[b, a] = same
    return matrix


def _duplicates(features: np.ndarray, rows: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of rows with (nearly) the same features: neighbours on a random line are compared, so no N x N matrix."""
    line = np.random.default_rng(0).normal(size=features.shape[1])
    order = np.argsort(features.astype(np.float32) @ line.astype(np.float32), kind="stable")
    pairs = []
    for start in range(0, len(order) - 1, 4096):  # not all at once, in float32
        part = order[start : start + 4097]
        table = features[part].astype(np.float32)
        same = np.abs(np.diff(table, axis=0)).max(axis=1) <= SAME
        pairs += [tuple(sorted((int(rows[part[i]]), int(rows[part[i + 1]])))) for i in np.flatnonzero(same)]
    return sorted(pairs)


def _accuracy(labels: np.ndarray, votes: np.ndarray, probs: np.ndarray, candidates: np.ndarray) -> dict[str, np.ndarray]:
    classes = probs.shape[1]
    known = labels >= 0
    named = probs.argmax(axis=1)
    of_class = [labels == index for index in range(classes)]
    return {
        "templates": (votes[known] == labels[known, None]).mean(axis=0),
        "classes": np.array([(named[own] == index).mean() if own.any() else np.nan for index, own in enumerate(of_class)]),
        "partial": np.array([candidates[own, index].mean() if own.any() else np.nan for index, own in enumerate(of_class)]),
    }


def _verdicts(store: AnnotationStore, health: Health) -> list[str]:
    """What a person should know before training, most serious first."""
    names, total, bad = store.class_names, len(store), int(store.unreadable.sum())
    readable = total - bad
    found = []
    if not readable:
        return ["No image could be read: see errors.csv for the reasons."]
    mean = float(np.arange(len(health.sizes)) @ health.sizes) / readable
    never = np.flatnonzero(health.most_named + (health.named > 0) == 0)
    always = np.flatnonzero(health.named >= NEARLY_ALWAYS)
    few = np.flatnonzero((health.most_named < FEW_IMAGES) & (health.named > 0))
    if mean > len(names) / 2:
        found.append(
            f"An image has {mean:.1f} of {len(names)} classes as candidates on average: the model hardly tells them apart. "
            "Try a larger --vlm, or class names that describe what is seen."
        )
    if len(never):
        found.append(
            f"Never named: {_some(names, never)}. Either there are no such images, or the model does not know the name; "
            "try another wording."
        )
    if len(always) and len(names) > 2:
        found.append(f"Named for nearly every image: {_some(names, always)}. The name is too general; try a narrower one.")
    if len(few):
        found.append(
            f"Fewer than {FEW_IMAGES} images lead to: {_some(names, few)}. They will be learned badly; add images."
        )
    if health.abstained.mean() > 0.2:
        found.append(
            f"{health.abstained.mean():.0%} of the answers named no class. Try other class names or --chat_mode likelihood."
        )
    if bad > 0.05 * total:
        found.append(f"{bad} of {total} images cannot be read: see errors.csv.")
    if health.duplicates and len(health.duplicates) > 0.05 * readable:
        found.append(f"{len(health.duplicates)} images are copies of others: the same image may be in training and test.")
    if health.sizes[1] == readable:
        found.append("Every image has one candidate: the templates always agree, so there is nothing to choose from.")
    return found


def _some(names: Sequence[str], chosen: np.ndarray) -> str:
    more = f" and {len(chosen) - 10} more" if len(chosen) > 10 else ""
    return ", ".join(names[index] for index in chosen[:10]) + more


def next_command(store: AnnotationStore) -> str:
    """What to type to train on the store."""
    return f"accelerate launch train_coreg.py --annotations {shlex.quote(str(store.root))} --output_dir runs/mine"


def as_text(store: AnnotationStore, health: Health) -> str:
    """The report for a terminal."""
    readable = int(health.sizes.sum())
    lines = [f"{store.root}: {len(store)} images, {len(store.class_names)} classes, {len(store.templates)} templates", ""]
    lines += [*(f"! {line}" for line in health.verdicts)] or ["Nothing looks wrong."]
    lines += [f"next: {next_command(store)}", "", "candidates  images"]
    lines += [
        f"{size:10d}  {count:6d}  {bar(count / max(1, readable))}" for size, count in enumerate(health.sizes) if count
    ]
    off = health.agreement[np.triu_indices(len(health.agreement), 1)]
    if np.isfinite(off).any():
        lines += ["", f"templates agree in pairs on {np.nanmin(off):.1%} to {np.nanmax(off):.1%} of the images"]
    lines += [f"unreadable images: {int(store.unreadable.sum())}; answers without a vote: {health.abstained.mean():.1%}"]
    lines += [f"copies: {'not known, no features' if health.duplicates is None else len(health.duplicates)}", ""]
    head = f"{'class':30}  candidate of  most named for"
    lines.append(head + ("  zero-shot  among candidates" if health.accuracy else ""))
    for index, name in enumerate(store.class_names):
        line = f"{name[:30]:30}  {health.named[index]:12.1%}  {health.most_named[index]:14d}"
        if health.accuracy:
            line += f"  {percent(health.accuracy['classes'][index]):>9}  {percent(health.accuracy['partial'][index]):>16}"
        lines.append(line)
    if health.accuracy:
        known = store.labels[~store.unreadable]
        partial = partial_accuracy(candidate_sets(store)[~store.unreadable], known)
        lines += ["", f"label among the candidates: {partial:.1%}; right votes of each template:"]
        lines += [f"{share:8.1%}  {name}" for share, name in zip(health.accuracy["templates"], store.templates)]
    return "\n".join(lines) + "\n"


def bar(share: float) -> str:
    """A share in [0, 1] as a bar of up to 40 signs."""
    return "#" * round(40 * share)


def percent(share: float) -> str:
    """A share as a percentage, "-" where it is not known."""
    return f"{share:.1%}" if np.isfinite(share) else "-"


def write_report(store: AnnotationStore, images: ImageList | None) -> Health:
    """Write report.html and report.txt into the store's folder.

    Args:
        store: the annotation store.
        images: where the pictures of the gallery come from; None for a report without pictures.

    Raises:
        UserError: the folder cannot be written.
    """
    health = examine(store)
    write_atomically(store.root / "report.txt", as_text(store, health).encode("utf-8", "replace"))
    html = page(store, health, images, next_command(store))
    write_atomically(store.root / "report.html", html.encode("utf-8", "replace"))
    return health


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """`python -m coreg.annotate.health DIR`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError("write: python -m coreg.annotate.health DIR, with the --output_dir of annotate_vlm.py")
    store = AnnotationStore.open(arguments[0])
    try:
        images = store.images()
    except UserError as error:  # moved or changed since
        print(f"note: without pictures: {error}", file=sys.stderr)
        images = None
    print(as_text(store, write_report(store, images)), end="")
    print(f"{store.root / 'report.html'}")


if __name__ == "__main__":
    main()
