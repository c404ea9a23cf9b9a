"""Is this annotation store fit to be trained on? What can be said without labels, and more where there are some.

    python -m coreg.annotate health ann

writes ann/report.html (one file, nothing is loaded from elsewhere) and ann/report.txt; annotate_vlm.py does so at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coreg.annotate.changes import before_and_after
from coreg.annotate.confused import Pair, confused_pairs, more_words, together
from coreg.annotate.health_html import page
from coreg.data.folders import counts_line, labelled_counts, unmatched_folders
from coreg.data.images import ImageList
from coreg.files import write_atomically
from coreg.store.store import AnnotationStore
from coreg.weak.labels import next_command
from coreg.weak.rules import candidates_of, vote_counts
from coreg.webpage import percent

FEW_IMAGES = 50  # per class; below this a prototype and a class's share of a batch are mostly noise (rule of thumb)
NEARLY_ALWAYS = 0.95
GALLERY = 24
SHOWN_PAIRS = 20
REPORTS = ("report.txt", "report.html")
LINES, SAME = 8, 4e-3  # features are compared by their places on 8 random lines; rounding to 11 bits moves them by less


@dataclass
class Health:
    """What a store looks like; sums over the images that could be read."""

    sizes: np.ndarray  # int (C + 1,), sizes[k] images have k candidates
    # float (T, T), share of images on which two templates give the same vote, abstentions left out; NaN where there is none
    agreement: np.ndarray
    unanimity: float  # mean share of the templates that name an image's most named class
    named: np.ndarray  # float (C,), share of the images with a vote that have the class among their candidates
    most_named: np.ndarray  # int (C,), images whose most named class it is
    abstained: np.ndarray  # float (T,), share of images on which the template abstains
    contested: np.ndarray  # rows of the images the templates agree on least, most contested first
    duplicates: list[tuple[int, int]] | None  # rows with the same features but for rounding; None without features
    # `templates` (T,), `classes` zero-shot (C,), `partial` (C,), NaN where nothing is labelled; None without labels
    accuracy: dict[str, np.ndarray] | None
    # with labels, `zero_shot`, `single` (template 0 alone) and `among` (the candidates), of train, test and held out
    splits: dict[str, np.ndarray] | None = None
    confused: list[Pair] = field(default_factory=list)  # classes that are candidates of the same images
    verdicts: list[str] = field(default_factory=list)  # what is wrong, in plain words; empty when nothing is
    about: list[str] = field(default_factory=list)  # where the images and their labels came from, one line each


@np.errstate(invalid="ignore", divide="ignore")
def examine(store: AnnotationStore) -> Health:
    """Look at a store, block by block: memory for a few numbers an image, not for its votes, probabilities and features."""
    classes, templates = len(store.class_names), len(store.templates)
    sums: dict[str, np.ndarray] = {}
    worst = np.empty((0, 3))  # agreement, probability of the winner, row
    places, pairs = [], 0
    lines = None
    for rows, tensors in store.parts():
        readable = ~store.unreadable[rows]
        rows, votes, probs = rows[readable], tensors["votes"][readable], tensors["probs"][readable].astype(np.float32)
        candidates = candidates_of(votes, probs)
        counts = vote_counts(votes, classes)
        spoken = votes >= 0
        voted = spoken.any(axis=1)
        winners = (counts + 0.5 * probs)[voted].argmax(axis=1)
        tables = {
            # (T, T), images on which two templates both vote, and on which they vote the same
            "both": spoken.T.astype(np.float64) @ spoken,
            "same": np.stack([((votes == votes[:, [t]]) & spoken).sum(axis=0) for t in range(templates)]),
            "sizes": np.bincount(candidates.sum(axis=1), minlength=classes + 1),
            "top": counts.max(axis=1, initial=0).sum(),
            "voted": voted.sum(),
            "named": candidates[voted].sum(axis=0),
            "most_named": np.bincount(winners, minlength=classes),
            "abstained": (votes < 0).sum(axis=0),
        }
        pairs = pairs + together(candidates[voted])
        share = np.where(voted, counts.max(axis=1, initial=0) / np.maximum(counts.sum(axis=1), 1), -1.0)
        # Least agreement first; among equals, the least probable winner.
        worst = np.concatenate([worst, np.stack([share, probs.max(axis=1, initial=0), rows], axis=1)])
        worst = worst[np.lexsort(worst.T[::-1])][:GALLERY]
        if "features" in tensors:
            features = tensors["features"][readable].astype(np.float32)
            lines = np.random.default_rng(0).normal(size=(features.shape[1], LINES)) if lines is None else lines
            places.append(np.concatenate([features @ lines.astype(np.float32), rows[:, None]], axis=1))
        if store.labels is not None:
            tables |= _judged(store.labels[rows], store.split[rows], votes, probs, candidates)
        for name, table in tables.items():
            sums[name] = sums.get(name, 0.0) + table
    count = sums["sizes"].sum()
    health = Health(
        sizes=sums["sizes"].astype(int),
        agreement=sums["same"] / sums["both"],
        unanimity=float(sums["top"].sum() / max(1, count) / templates),
        named=sums["named"] / max(1, sums["voted"].sum()),
        most_named=sums["most_named"].astype(int),
        abstained=sums["abstained"] / max(1, count),
        contested=worst[:, 2].astype(int),
        duplicates=None if lines is None else _duplicates(np.concatenate(places)),
        accuracy=None,
    )
    if store.labels is not None:
        health.accuracy = {
            "templates": sums["right votes"] / sums["labelled"].sum(),
            "classes": sums["right"] / sums["labelled"],
            "partial": sums["among"] / sums["labelled"],
        }
        # Unreadable images are named wrong, and every class is their candidate.
        labelled = np.bincount(store.split[store.labels >= 0], minlength=3)
        unreadable = np.bincount(store.split[(store.labels >= 0) & store.unreadable], minlength=3)
        counts = {"zero_shot": sums["split right"], "single": sums["split single"]}
        counts["among"] = sums["split among"] + unreadable
        health.splits = {name: table / labelled for name, table in counts.items()}
    health.confused = confused_pairs(store, pairs)
    health.verdicts, health.about = _verdicts(store, health), about(store)
    return health


def about(store: AnnotationStore) -> list[str]:
    """Images and labels of each split, folders called like no class, and how the list came about; one line each."""
    lines = [f"images: {counts_line(labelled_counts(store.split, store.labels))}"]
    folders = unmatched_folders(store.images_spec, store.paths, store.split, store.labels, store.class_names)
    if folders:
        lines.append(f"folders called like no class: {', '.join(folders)}")
    return lines + notes_of(store.manifest)


def notes_of(manifest: dict[str, Any]) -> list[str]:
    """The image list's notes from when it was annotated; stores of earlier versions have none."""
    notes = manifest.get("notes")
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []


def _judged(
    labels: np.ndarray, split: np.ndarray, votes: np.ndarray, probs: np.ndarray, candidates: np.ndarray
) -> dict[str, np.ndarray]:
    """Numbers of images, per class (C,), per template (T,) and per split (3,)."""
    rows = np.flatnonzero(labels >= 0)
    labels, split, classes = labels[rows], split[rows], probs.shape[1]
    right, among = probs[rows].argmax(axis=1) == labels, candidates[rows, labels]
    return {
        "split right": np.bincount(split[right], minlength=3),
        "split single": np.bincount(split[votes[rows, 0] == labels], minlength=3),
        "split among": np.bincount(split[among], minlength=3),
        "labelled": np.bincount(labels, minlength=classes),
        "right": np.bincount(labels[right], minlength=classes),
        "among": np.bincount(labels[among], minlength=classes),
        "right votes": (votes[rows] == labels[:, None]).sum(axis=0),
    }


def _duplicates(places: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of rows that lie at the same places on all lines; neighbours on the first line are compared, not all pairs.

    Args:
        places: float (N, LINES + 1), the last column is the row.
    """
    places = places[np.argsort(places[:, 0], kind="stable")]
    same = np.abs(np.diff(places[:, :LINES], axis=0)).max(axis=1, initial=0) <= SAME
    pairs = [(int(places[index, LINES]), int(places[index + 1, LINES])) for index in np.flatnonzero(same)]
    return sorted((min(pair), max(pair)) for pair in pairs)


def _verdicts(store: AnnotationStore, health: Health) -> list[str]:
    """What a person should know before training, most serious first."""
    names, total, bad = store.class_names, len(store), int(store.unreadable.sum())
    readable = total - bad
    verdicts = []
    if not readable:
        return ["No image could be read: see errors.csv for the reasons."]
    mean = float(np.arange(len(health.sizes)) @ health.sizes) / readable
    never = np.flatnonzero(health.named == 0)
    always = np.flatnonzero(health.named >= NEARLY_ALWAYS)
    few = np.flatnonzero((health.most_named < FEW_IMAGES) & (health.named > 0))
    if mean > len(names) / 2:
        verdicts.append(
            f"An image has {mean:.1f} of {len(names)} classes as candidates on average: the model hardly tells them apart. "
            "Try a larger --vlm, or class names that describe what is seen."
        )
    if len(never):
        verdicts.append(
            f"Never named: {some(names, never)}. Either there are no such images, or the model does not know the name; "
            "try another wording, or describe what is seen (--descriptions)."
        )
    if len(always) and len(names) > 2:
        verdicts.append(
            f"Named for nearly every image: {some(names, always)}. The name is too general; try a narrower one."
        )
    if len(few):
        verdicts.append(
            f"Fewer than {FEW_IMAGES} images lead to: {some(names, few)}. They will be learned badly; add images."
        )
    if health.abstained.mean() > 0.2:
        verdicts.append(
            f"{health.abstained.mean():.0%} of the answers named no class. Try other class names or --chat_mode likelihood."
        )
    if bad > 0.05 * total:
        verdicts.append(f"{bad} of {total} images cannot be read: see errors.csv.")
    if health.duplicates and len(health.duplicates) > 0.05 * readable:
        verdicts.append(
            f"{len(health.duplicates)} images look like copies of others, which may be in training and test at once."
        )
    if health.sizes[1] == readable:
        verdicts.append("Every image has one candidate: the templates always agree, so there is nothing to choose from.")
    return verdicts


def some(names: Sequence[str], chosen: np.ndarray) -> str:
    """The names at `chosen` int64 (n,), shortened to ten."""
    more = f" and {len(chosen) - 10} more" if len(chosen) > 10 else ""
    return ", ".join(names[index] for index in chosen[:10]) + more


def as_text(store: AnnotationStore, health: Health) -> str:
    """The report for a terminal."""
    readable = int(health.sizes.sum())
    lines = [f"{store.root}: {len(store)} images, {len(store.class_names)} classes, {len(store.templates)} templates"]
    lines += [*health.about, ""]
    lines += [*(f"! {line}" for line in health.verdicts)] or ["Nothing looks wrong."]
    lines += before_and_after(store.manifest)
    lines += [f"next: {next_command(store)}", "", "candidates  images"]
    total = max(1, readable)
    lines += [f"{size:10d}  {n:6d}  {'#' * round(40 * (n / total))}" for size, n in enumerate(health.sizes) if n]
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
    if health.confused:
        lines += ["", "confused pairs: images with both among their candidates, share of those of the rarer class"]
        known = {None: "", True: ": names read nearly alike", False: ": names apart, images look alike"}
        for pair in health.confused[:SHOWN_PAIRS]:
            names = " and ".join(store.class_names[c] for c in pair.classes)
            lines.append(f"{pair.images:8d}  {pair.share:6.1%}  {names}{known[pair.alike]}")
        more = len(health.confused) - SHOWN_PAIRS
        lines += [f"          and {more} more"] if more > 0 else []
        lines += more_words(store, health.confused)
    if health.accuracy:
        lines += ["", "right votes of each template:"]
        lines += [f"{share:8.1%}  {name}" for share, name in zip(health.accuracy["templates"], store.templates)]
    return "\n".join(lines) + "\n"


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
