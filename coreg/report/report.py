"""One report for Co-Reg and every baseline: report.json for machines, a short table for people, labels.csv for reuse."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coreg.data.folders import unmatched_folders
from coreg.data.labels import NONE, NONE_OF_THESE
from coreg.files import writing_csv
from coreg.label.page import PAGE
from coreg.plaintext import printable
from coreg.report.estimate import estimate_lines
from coreg.report.metrics import (
    accuracy,
    calibration_metrics,
    class_metrics,
    label_free_scores,
    per_class_accuracy,
    wilson_interval,
)
from coreg.report.record import SCHEMA
from coreg.report.tags import tag_summary
from coreg.report.trust import trust_lines
from coreg.store.store import AnnotationStore
from coreg.weak.rules import candidate_sets, mean_candidates, partial_accuracy
from coreg.webpage import percent

PACKAGES = (
    "coreg",
    "torch",
    "torchvision",
    "accelerate",
    "timm",
    "open_clip_torch",
    "transformers",
    "peft",
    "scikit-learn",
    "numpy",
)


def versions() -> dict[str, str]:
    """Of Python and the packages that results depend on."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def peak_memory_mb() -> float:
    """Largest memory of this process so far: on the GPU where there is one, otherwise resident, in MB (10^6 bytes)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def accuracies(predictions: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, Any]:
    """Accuracy of several predictions of the same images, the ensemble's with its 95 % Wilson interval.

    Args:
        predictions: int64 (n,) of `ensemble`, the method's own prediction, and of `net1`, `net2` where there are two.
        labels: int64 (n,), -1 unknown.

    Returns:
        A mapping from name to fraction, with `n` and `interval`; empty where no label is known.
    """
    n = int((labels >= 0).sum())
    if not n:
        return {}
    shares = {name: accuracy(predicted, labels) for name, predicted in predictions.items()}
    return shares | {"n": n, "interval": list(wilson_interval(next(iter(shares.values())), n))}


def metrics(
    named: np.ndarray | None, truth: dict[str, np.ndarray], split: str, n_classes: int, logits: np.ndarray | None
) -> dict[str, float]:
    """What of the method's own predictions of a split is measured besides their accuracy; empty where no label is known.

    Args:
        named: int64 (n,), -1 for none; None where nothing is predicted. truth: of each split int64 (n,), -1 unknown.
        logits: float (n, C), whose softmax is the probabilities, where there are some.
    """
    if named is None:
        return {}
    # of a class whose images are not all known nobody knows whether it has many
    counts = np.bincount(truth["train"], minlength=n_classes) if (truth["train"] >= 0).all() else None
    over_classes = class_metrics(named, truth[split], n_classes, counts)
    return over_classes | ({} if logits is None else calibration_metrics(logits, truth[split]))


def per_class(
    class_names: list[str], labels: np.ndarray, annotator: np.ndarray | None, ensemble: np.ndarray
) -> dict[str, dict[str, float | int | None]]:
    """Recall of the annotator and of the ensemble for each class, by class name; empty where no label is known."""
    if (labels < 0).all():
        return {}
    before = [None] * len(class_names) if annotator is None else per_class_accuracy(annotator, labels, len(class_names))
    after = per_class_accuracy(ensemble, labels, len(class_names))
    return {
        name: {"annotator": before[c], "ensemble": after[c], "n": int((labels == c).sum())}
        for c, name in enumerate(class_names)
    }


def without_missing(value: Any) -> Any:
    """The same nested mapping without entries that are None or empty mappings: missing truth is a missing field."""
    if not isinstance(value, dict):
        return value
    kept = {key: without_missing(item) for key, item in value.items()}
    return {key: item for key, item in kept.items() if item is not None and item != {}}


def hardware() -> str:
    """Device and host in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"


def write_labels(
    path: Path,
    class_names: list[str],
    image_paths: list[str],
    logits: dict[str, np.ndarray],
    weights: list[np.ndarray],
    annotator: np.ndarray,
    temperature: float = 1.0,
    safe_csv: bool = False,
) -> int:
    """Purified labels of the training images as CSV, one row an image; gives the number that a person should look at.

    An image is marked for review when neither network trusts its candidate set and the ensemble is not sure of it
    (probability below 0.9), or when the two networks name different classes.

    Args:
        logits: (N, C) of `ensemble` (the sum) and, where there are two networks, of `net1` and `net2`.
        weights: w (N,) of both divisions, if any.
        annotator: int64 (N,), its predictions. temperature: that logits are divided by for the probabilities.
        safe_csv: see `csv_rows`.
    """
    nets = [rows for name, rows in logits.items() if name != "ensemble"]
    # the mean of the networks' logits: the ensemble at the scale of one network
    mean = logits["ensemble"] / (max(len(nets), 1) * temperature)
    probabilities = np.exp(mean - mean.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    best, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    named = np.stack([rows.argmax(axis=1) for rows in nets or [logits["ensemble"]]])
    disagree = (named != named[0]).any(axis=0)
    trust = np.stack(weights) if weights else np.full((2, len(best)), np.nan)
    review = disagree | (~(trust > 0.5).any(axis=0) & (sure < 0.9))
    with writing_csv(path, safe_csv) as write:
        write(["path", "label", "probability", "annotator_label", "trust_net1", "trust_net2", "needs_review"])
        for i, image in enumerate(image_paths):
            weight = ["" if np.isnan(w) else f"{w:.4f}" for w in trust[:, i]]
            label, before = class_names[best[i]], class_names[annotator[i]]
            write([image, label, f"{sure[i]:.4f}", before, *weight, int(review[i])])
    return int(review.sum())


def write_known_labels(path: Path, store: AnnotationStore, known: np.ndarray) -> None:
    """The labels that training is given, as a CSV that `--labels` reads back.

    Args:
        known: int64 over the store, -1 where nothing is known, `NONE` for images of no class.
    """
    with writing_csv(path) as write:
        write(["path", "label"])
        for row in np.flatnonzero(known != -1):
            write([store.paths[row], NONE_OF_THESE if known[row] == NONE else store.class_names[known[row]]])


def build_report(
    method: str,
    store: AnnotationStore,
    seed: int,
    candidates: np.ndarray,
    samples: dict[str, np.ndarray],
    predictions: dict[str, dict[str, np.ndarray]],
    labels_used: int = 0,
    logits: dict[str, np.ndarray] | None = None,
    **measured: Any,
) -> dict[str, Any]:
    """The report of a run in the one schema that every method writes. Missing ground truth means missing fields.

    Args:
        method: its name. store: what was annotated. seed: of the run.
        candidates: bool (N, C) of the training images.
        samples: for `train` and `test` the rows of the store, int64 (n,); `test` may be empty.
        predictions: for `train` and `test`, by name (`ensemble` first), int64 (n,); `test` may be empty.
        labels_used: number of true labels that training saw.
        logits: for `train` and `test` float (n, C), whose softmax is the method's own probabilities, where it has some.
        measured: further numbers: `parameters`, `images_per_second`, `wall_seconds`, `command`, …
    """
    probs, names = store.probs(), store.class_names
    truth = {k: np.full(len(rows), -1) if store.labels is None else store.labels[rows] for k, rows in samples.items()}
    zero_shot = {k: probs[rows].argmax(axis=1) if len(rows) else np.zeros(0, int) for k, rows in samples.items()}
    judged = "test" if (truth["test"] >= 0).any() else "train"
    return without_missing(
        {
            "schema": SCHEMA,
            "method": method,
            "dataset": store.images_spec,
            "seed": seed,
            "labels_used": labels_used,
            "images": {split: len(rows) for split, rows in samples.items()},
            "labelled": {split: int((known >= 0).sum()) for split, known in truth.items()},
            "unmatched_folders": unmatched_folders(store.images_spec, store.paths, store.split, store.labels, names)
            or None,
            "classes": len(names),
            "annotator": {
                "name": store.manifest["model"]["spec"],
                "zero_shot_accuracy": None if store.drawn else {k: accuracy(zero_shot[k], truth[k]) for k in samples},
                "partial_accuracy": partial_accuracy(candidates, truth["train"]),
                "mean_candidates": mean_candidates(candidates),
            },
            "accuracy": {split: accuracies(by_name, truth[split]) for split, by_name in predictions.items() if by_name},
            "metrics": {
                split: metrics(by_name.get("ensemble"), truth, split, len(names), (logits or {}).get(split))
                for split, by_name in predictions.items()
            },
            "per_class_accuracy": per_class(
                names, truth[judged], None if store.drawn else zero_shot[judged], predictions[judged].get("ensemble")
            ),
            "per_class_split": judged,
            **measured,
            "peak_memory_mb": peak_memory_mb(),
            "hardware": hardware(),
            "versions": versions(),
        }
    )


def without_labels(
    store: AnnotationStore,
    rule: str,
    samples: dict[str, np.ndarray],
    predictions: dict[str, np.ndarray],
    log_p: dict[str, np.ndarray] | None = None,
    networks: Sequence[np.ndarray] = (),
) -> dict[str, Any] | None:
    """`label_free_scores` against the annotator's own candidate sets; None where a refined store's source is gone.

    Args:
        store: what was annotated, refined or not. rule: of candidate sets. samples: rows of the store by split.
    """
    source = store.unrefined()
    if source is None:
        return None
    sets = candidate_sets(source, rule)
    return label_free_scores({split: sets[rows] for split, rows in samples.items()}, predictions, log_p, networks)


def known_labels_lines(report: dict[str, Any]) -> list[str]:
    """Of how many images the truth is known, and which folders are called like no class, as far as the report says so."""
    images, labelled, folders = (report.get(key, {}) for key in ("images", "labelled", "unmatched_folders"))
    counts = [f"{labelled[split]} of {images[split]} {split} images" for split in images if labelled.get(split)]
    lines = [f"Labels are known for {' and '.join(counts)}."] if counts else []
    if none := report.get("none_of_these"):
        lines.append(f"Left out, because a person labelled them {NONE_OF_THESE!r}: {none} images.")
    return lines + ([f"Called like no class: {', '.join(folders)}."] if folders else [])


def prefilter_line(filtered: dict[str, Any]) -> str:
    """What a pre-filter did to the candidate sets, from their source (`WeakLabels.keep_likely`)."""
    sizes, covered = filtered["mean_candidates"], filtered.get("partial_accuracy") or {}
    shares = (
        ""
        if covered.get("after") is None
        else (f"; {percent(covered['before'])} of the sets held the truth, and {percent(covered['after'])} do")
    )
    return (
        f"Pre-filter {filtered['rule']}: mean candidates {sizes['before']:.2f} before and {sizes['after']:.2f} after"
        f"{shares}; {filtered['dropped']} of {filtered['images']} images lost all candidates and are left out."
    )


def label_free_lines(report: dict[str, Any]) -> list[str]:
    """The scores that compare runs without labels, as far as the report has them."""
    scores = report.get("label_free", {})
    shares = {name: scores.get(name.replace(" ", "_"), {}) for name in ("covering rate", "approximated accuracy")}
    splits = next(iter(shares.values()))
    if not splits:
        return []
    head = "".join(f"{split:>8}" for split in splits)
    lines = ["", f"{'without labels':<24}{head}   (train: the images that were trained on)"]
    for name, by_split in shares.items():
        if by_split:
            lines.append(f"{name:<24}" + "".join(f"{percent(by_split.get(split)):>8}" for split in splits))
    lines += [f"{'consensus':<24}{scores['consensus']:>8.1%}"] if "consensus" in scores else []
    return lines


def summary(report: dict[str, Any], root: Path) -> str:
    """What a person wants to know at the end: annotator against method, per class, and where everything lies."""
    if report.get("tags"):
        return tag_summary(report, root)
    wide = max(10, len(report["method"]) + 2)
    lines = [
        "",
        f"{report['dataset']}: {report['annotator']['name']} annotated, {report['method']} trained (seed {report['seed']})",
    ]
    zero_shot, achieved = report["annotator"].get("zero_shot_accuracy", {}), report.get("accuracy", {})
    mended = report.get("refined", {}).get("accuracy", {})
    if achieved:
        between = f"{'refined':>10}" if mended else ""
        lines += ["", f"{'accuracy':<12}{'annotator':>10}{between}{report['method']:>{wide}}{'gain':>8}"]
        for split in ("train", "test"):
            if split in achieved:
                before, after = zero_shot.get(split), achieved[split]["ensemble"]
                between = f"{percent(mended.get(split)):>10}" if mended else ""
                low, high = achieved[split]["interval"]
                gain = "" if before is None else f"{100 * (after - before):+.1f}"
                lines.append(
                    f"{split:<12}{percent(before):>10}{between}{after:>{wide}.1%}{gain:>8}"
                    f"   (95 % interval {low:.1%} to {high:.1%}, n = {achieved[split]['n']})"
                )
    if filtered := (report.get("weak_labels") or {}).get("prefilter"):
        lines += ["", prefilter_line(filtered)]
    if report.get("part"):
        lines += ["", f"Trained on {report['images']['train']} of {report['part']['available']} training images."]
    rows = report.get("per_class_accuracy", {})
    if rows:
        width = max(12, *(min(len(name), 28) + 2 for name in rows))
        lines += [
            "",
            f"{'class':<{width}}{'annotator':>10}{report['method']:>{wide}}   ({report['per_class_split']} images)",
        ]
        for name, row in rows.items():
            if row.get("ensemble") is not None:
                before, after = percent(row.get("annotator"), 0), row["ensemble"]
                lines.append(f"{name[:28]:<{width}}{before:>10}{after:>{wide}.0%}   n = {row['n']}")
    else:
        lines.append("No true labels are known, so there is no accuracy to report.")
    lines += known_labels_lines(report)
    lines += label_free_lines(report)
    lines += estimate_lines(report)
    if verdict := trust_lines(report):
        lines += ["", *verdict]
    chosen = report.get("chosen_epoch", {})
    if chosen.get("accuracy"):
        shares = ", ".join(f"{share:.1%} on {split} images" for split, share in chosen["accuracy"].items())
        lines += [
            "",
            f"Epoch {chosen['epoch']} of {chosen['epochs']} looked best without labels ({shares}): export_chosen.",
        ]
    if report.get("warnings"):
        lines += ["", "Warning: " + "; ".join(report["warnings"]) + "."]
    tuned = f" ({report['trainable_parameters']:,} of them trained)" if "trainable_parameters" in report else ""
    left = {
        "export": f"the trained networks: coreg-predict --model {root / 'export'} --images DIR",
        "prompt": "the learned context vectors",
        "adapter": "the trained adapter, which peft's PeftModel.from_pretrained reads",
    }
    page, asked, has_curves = root / "report.html", root / PAGE, any(root.rglob("events.out.tfevents.*"))
    lines += [
        "",
        f"{report['parameters'] / 1e6:.2f} M parameters a network{tuned}, {report['images_per_second']:.0f} images/s, "
        f"{report['wall_seconds']:.0f} s, {report['peak_memory_mb']:.0f} MB",
        *([f"Tuned: {report['tuning']}"] if "tuning" in report else []),
        *([f"  {page}   to look at: curves, classes, changed labels, what to label next"] if page.is_file() else []),
        *([f"  {asked}    to label these on: coreg-label {root}"] if asked.is_file() else []),
        f"  {root / 'report.json'}   all numbers",
        f"  {root / 'labels.csv'}    purified labels of the training images, {report['needs_review']} of them worth a look",
        *(f"  {root / name!s:<{len(str(root)) + 15}}{what}" for name, what in left.items() if (root / name).is_dir()),
        *([f"  {root}               curves: tensorboard --logdir {root}"] if has_curves else []),
    ]
    return printable("\n".join(lines), lines=True)
