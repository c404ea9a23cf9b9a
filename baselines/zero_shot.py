"""What the annotator itself knows, in four ways and template by template; nothing is trained and no label is used.

    accelerate launch baselines/zero_shot.py                                             # built-in digits
    accelerate launch baselines/zero_shot.py --annotations ann --output_dir runs/zero_shot

Needs an annotation store alone, no images. Every variant leaves a folder with a report.json, so that `coreg-report` lists
it beside trained methods; a variant that is there already is not computed again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coreg.config import option, parse
from coreg.errors import UserError, exits_with_one_line
from coreg.plaintext import printable


@dataclass
class ZeroShotConfig:
    """What is judged, how, and where the reports go."""

    annotations: str | None = option(
        None, "annotation store made by annotate_vlm.py; without it the built-in digits are used"
    )
    variant: Literal["all", "single", "averaged", "embeddings", "neighbours", "transductive", "refined"] = option(
        "all",
        "single: the first template; averaged: mean of the templates' probabilities; embeddings: mean of their text "
        "features; neighbours: mean of what an image's nearest ones in its split are called; transductive: averaged, "
        "corrected by how the images of a split lie to each other; refined: a mixture of Gaussians in the annotator's "
        "features, which classifies test images without it",
    )
    output_dir: str = option("runs/zero_shot", "folder that gets one folder a variant")


@exits_with_one_line
def read_settings(argv: Sequence[str] | None = None) -> ZeroShotConfig:
    """The command line, checked."""
    (config,) = parse(ZeroShotConfig, argv=argv, prog="baselines/zero_shot.py", description=__doc__)
    return config


if __name__ == "__main__":
    read_settings()  # faults in them are reported before the imports below, which take seconds

import shlex
import time
from pathlib import Path

import numpy as np
import torch

from annotate_vlm import annotate_digits
from coreg.annotate.textual import averaged_embedding_logits
from coreg.annotate.transductive import transduce
from coreg.process import all_or_none, build_accelerator, main_process_decides
from coreg.report.metrics import accuracy
from coreg.report.record import finished_report, write_report
from coreg.report.report import build_report, without_labels
from coreg.run.folder import RunFolder
from coreg.store.store import AnnotationStore
from coreg.weak.neighbours import vote
from coreg.weak.refine import refine
from coreg.weak.rules import candidate_sets

SPLITS = ("train", "test")
Judged = tuple[np.ndarray, np.ndarray | None]  # classes int64 (N,), -1 for none; log probabilities (N, C), if there are any


def of_probabilities(probs: np.ndarray) -> Judged:
    """The most probable class of probabilities (N, C)."""
    with np.errstate(divide="ignore"):
        return probs.argmax(axis=1), np.log(probs, dtype=np.float32)


def embeddings(store: AnnotationStore) -> Judged:
    """One text feature a class, the mean over all templates."""
    logits = averaged_embedding_logits(store, "cuda" if torch.cuda.is_available() else "cpu")
    return logits.argmax(axis=1), logits


def split_by_split(store: AnnotationStore, judged: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Judged:
    """The images of each split judged together, by their features (n, D) and mean probabilities (n, C).

    Raises:
        UserError: the store keeps no features.
    """
    store.need_features()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features, probs = store.features(), store.probs()
    mended = probs.astype(np.float32)
    for split in range(len(SPLITS)):
        if len(rows := store.rows_of(split)):
            mended[rows] = judged(*(torch.from_numpy(x[rows]).to(device).float() for x in (features, probs))).cpu().numpy()
    return of_probabilities(mended)


def refined(store: AnnotationStore) -> Judged:
    """The training images judged by a mixture of Gaussians in the annotator's own features, others by their features alone.

    Raises:
        UserError: the store keeps no features, or has no readable training image.
    """
    store.need_features()
    train, test = map(store.rows_of, range(len(SPLITS)))
    if not len(train):
        raise UserError(f"{store.root} has no readable training image")
    return of_probabilities(refine(store.features(), store.probs(), train, test).probs)


# variant -> name in reports, how all images of a store are judged
VARIANTS: dict[str, tuple[str, Callable[[AnnotationStore], Judged]]] = {
    # -1 where the template names no class
    "single": ("Zero-shot, single template", lambda store: (store.votes()[:, 0].astype(np.int64), None)),
    "averaged": ("Zero-shot, averaged probabilities", lambda store: of_probabilities(store.probs())),
    "embeddings": ("Zero-shot, averaged embeddings", embeddings),
    "neighbours": ("Zero-shot, neighbours", lambda store: split_by_split(store, vote)),
    "transductive": ("Zero-shot, transductive", lambda store: split_by_split(store, transduce)),
    "refined": ("Zero-shot, refined", refined),
}


def template_table(store: AnnotationStore) -> dict[str, dict[str, float]]:
    """Accuracy of every template by itself, by split; no vote counts as wrong. Empty where no label is known."""
    votes, table = store.votes(), {}
    for number, template in enumerate(store.templates if store.labels is not None else []):
        table[template] = {}
        for split, name in enumerate(SPLITS):
            rows = store.rows_of(split)
            share = accuracy(votes[rows, number], store.labels[rows])
            if share is not None:
                table[template][name] = share
    return table


def report_variant(store: AnnotationStore, variant: str, folder: RunFolder, command: str) -> dict[str, Any]:
    """Compute a variant and write its report; gives the report.

    Raises:
        UserError: the variant cannot be had from this store; nothing has been written then.
    """
    name, judged = VARIANTS[variant]
    started = time.perf_counter()
    classes, log_p = judged(store)
    samples = {name: store.rows_of(split) for split, name in enumerate(SPLITS)}
    predictions = {split: classes[rows] for split, rows in samples.items()}
    logits = None if log_p is None else {split: log_p[rows] for split, rows in samples.items()}
    report = build_report(
        method=name,
        store=store,
        seed=0,
        candidates=candidate_sets(store)[samples["train"]],
        samples=samples,
        predictions={split: {"ensemble": named} for split, named in predictions.items()},
        logits=logits,
        label_free=without_labels(store, "union", samples, predictions, logits),
        templates=template_table(store) if variant == "single" else None,
        wall_seconds=time.perf_counter() - started,
        command=command,
    )
    with folder.locked():
        folder.claim(identity(store, variant))
        write_report(folder.report, report)
    return report


def identity(store: AnnotationStore, variant: str) -> dict[str, Any]:
    """What makes a variant's folder the one of this job."""
    return {"script": "baselines/zero_shot.py", "variant": variant, "store": store.hash}


def accuracy_lines(reports: list[dict[str, Any]]) -> str:
    """The variants and templates with their accuracies, as lines of text."""
    if not any(report.get("accuracy") for report in reports):
        return "No true labels are known, so there is no accuracy to report."
    rows = [
        (report["method"], {split: shares["ensemble"] for split, shares in report["accuracy"].items()})
        for report in reports
    ]
    rows += [(f"  {text}", shares) for report in reports for text, shares in report.get("templates", {}).items()]
    width = max(len(text) for text, _ in rows) + 2
    lines = [f"{'accuracy':<{width}}{'train':>8}{'test':>8}"]
    for text, shares in rows:
        lines.append(f"{text:<{width}}" + "".join(f"{shares[s]:>8.1%}" if s in shares else f"{'–':>8}" for s in SPLITS))
    return "\n".join(lines)


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, annotate where there is no store yet, judge, report."""
    argv = list(sys.argv[1:] if argv is None else argv)
    config = read_settings(argv)
    accelerator, root = build_accelerator(), Path(config.output_dir)
    if config.annotations:
        store = all_or_none(accelerator, lambda: AnnotationStore.open(config.annotations))
        all_or_none(accelerator, store.need_annotator)
    else:
        store = annotate_digits(root / "annotations", accelerator)
    command = shlex.join(["baselines/zero_shot.py", *argv])
    chosen = list(VARIANTS) if config.variant == "all" else [config.variant]

    def work() -> str:
        lines, reports = [], []
        for variant in chosen:
            folder = RunFolder(root / variant)
            folder.refuse_other(identity(store, variant))
            if folder.finished:
                reports.append(finished_report(folder.report))
                continue
            try:
                reports.append(report_variant(store, variant, folder, command))
            except UserError as error:
                if len(chosen) == 1:
                    raise
                lines.append(f"left out: {VARIANTS[variant][0]} ({error})")
        where = f"reports: {root}/*/report.json; coreg-report {root} makes a table of them"
        return "\n".join([*lines, accuracy_lines(reports), "", where])

    # files alone, and seconds of work: one process does it
    accelerator.print(printable(main_process_decides(accelerator, work), lines=True))


if __name__ == "__main__":
    main()
