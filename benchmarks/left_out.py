"""How well images of no class are recognised, measured with classes that are left out on purpose.

    python -m benchmarks.left_out --annotations ann --leave zero,eight one,nine --output_dir left_out --recipe digits

For each list of classes the images are annotated with the names of the others, networks are trained without the images of
those that are left out (labelled `none of these`), and all test images are predicted; options that are not its own go to
the script. Finished runs are not repeated. Scores of an image, the higher the more it is of one of the classes:

    probability   of the best class, calibrated, as `coreg-predict --min_probability` judges by
    distance      minus the distance of its features to the nearest class mean, in the classes' common covariance, mean over
                  the networks, as `coreg-predict --max_distance` judges by (`coreg.export.distance`)

A threshold is chosen as by `--min_probability auto` on half of the test images of the classes, and judged on the others.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import annotate_vlm
from benchmarks.labelling import trained
from benchmarks.tables import as_markdown
from coreg.data.decode import decode
from coreg.data.images import TEST, TRAIN, ImageList
from coreg.data.labels import NONE_OF_THESE
from coreg.errors import UserError, exits_with_one_line
from coreg.export.distance import KEPT, fit_distances, last_features
from coreg.export.ensemble import Ensemble
from coreg.export.folder import load_export
from coreg.files import writing_csv
from coreg.store.store import AnnotationStore
from coreg.weak.prefilter import conformal_threshold


def prepared(whole: AnnotationStore, leave: Sequence[str], folder: Path) -> tuple[AnnotationStore, Path]:
    """A store of the classes that stay, and a file with labels that keeps images of the others out of training."""
    folder.mkdir(parents=True, exist_ok=True)
    names, labels = folder / "classes.txt", folder / "none.csv"
    names.write_text("\n".join(name for name in whole.class_names if name not in leave) + "\n", encoding="utf-8")
    with contextlib.redirect_stdout(sys.stderr):
        annotate_vlm.main(["--rescore", str(whole.root), "--classes", str(names), "--output_dir", str(folder / "ann")])
    gone = [whole.class_names.index(name) for name in leave]
    with writing_csv(labels) as write:
        write(["path", "label"])
        for row in whole.rows_of(TRAIN)[np.isin(whole.labels[whole.rows_of(TRAIN)], gone)]:
            write([whole.paths[row], NONE_OF_THESE])
    return AnnotationStore.open(folder / "ann"), labels


@torch.no_grad()
def predicted(export: Path, images: ImageList, rows: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Probabilities (n, C) of images, and their features of each network, (n, d)."""
    nets, settings = load_export(export)
    ensemble = Ensemble(nets, settings).eval()
    probs, features = [], [[] for _ in nets]
    for start in range(0, len(rows), 256):
        pixels = decode(images, rows[start : start + 256], settings["image_size"], settings["channels"], 1)
        probs.append(ensemble(pixels)[1].numpy())
        x = ensemble.normalised(pixels)
        for net, kept in zip(nets, features):
            kept.append(last_features(net, x).numpy())
    return np.concatenate(probs), [np.concatenate(kept) for kept in features]


def measure(run: Path, store: AnnotationStore, leave: Sequence[str]) -> list[dict[str, float | str]]:
    """For each score its AUROC, and what a threshold keeps and recognises."""
    images, test = store.images(), store.rows_of(TEST)
    kept = store.rows_of(TRAIN)
    kept = kept[store.labels[kept] >= 0]
    probs, features = predicted(run / "export", images, test)
    own, trained_on = predicted(run / "export", images, kept)
    apart = fit_distances(trained_on, own.argmax(axis=1))([torch.from_numpy(some) for some in features]).numpy()
    known, half = store.labels[test] >= 0, np.arange(len(test)) % 2 == 0
    right = float((probs.argmax(axis=1) == store.labels[test])[known].mean())
    rows = []
    for name, score in {"probability": probs.max(axis=1), "distance": -apart}.items():
        held = score[known & half]
        least = conformal_threshold(held[:, None], np.zeros(len(held), int), 1 - KEPT)
        rows.append(
            {
                "left out": ", ".join(leave),
                "score": name,
                "accuracy": right,
                "AUROC": float(roc_auc_score(known, score)),
                "kept": float((score[known & ~half] >= least).mean()),
                "recognised": float((score[~known] < least).mean()),
            }
        )
    return rows


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Annotate, train and measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="store of images whose classes are known")
    parser.add_argument("--leave", nargs="+", required=True, help="classes to leave out, a comma between: one model each")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--script", default="train_coreg", help="module that trains: train_coreg, coreg.baselines.pll, …")
    args, words = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    whole, rows = AnnotationStore.open(args.annotations), []
    if whole.labels is None or {*",".join(args.leave).split(",")} - {*whole.class_names}:
        raise UserError(f"{whole.root} has no true labels, or none of these classes: {' '.join(args.leave)}")
    for listed in args.leave:
        leave = listed.split(",")
        folder = args.output_dir / "-".join(leave)
        store, labels = prepared(whole, leave, folder)
        trained(args.script, [*words, "--annotations", str(store.root), "--labels", str(labels)], folder / "run")
        rows += measure(folder / "run", store, leave)
        print(rows[-2:], file=sys.stderr, flush=True)
    print(table(rows))


def table(rows: Sequence[dict[str, float | str]]) -> str:
    """The rows as Markdown, and the mean of each score."""
    for name in dict.fromkeys(row["score"] for row in rows):
        some = [row for row in rows if row["score"] == name and row["left out"] != "mean"]
        means = {key: statistics.fmean(row[key] for row in some) for key in ("accuracy", "AUROC", "kept", "recognised")}
        rows = [*rows, {"left out": "mean", "score": name} | means]
    return as_markdown(
        [
            {key: f"{value:.3f}" if key == "AUROC" else f"{value:.1%}" if isinstance(value, float) else value
             for key, value in row.items()}
            for row in rows
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
