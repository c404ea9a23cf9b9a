"""What answers on the page to label on are worth: accuracy after some, against as many labels of random images.

    python -m benchmarks.labelling --output_dir labelling --annotations ann --recipe digits
    python -m benchmarks.labelling --output_dir labelling --script coreg.baselines.probe --annotations ann --features own

The script is trained once without labels; then, for each order and number of answers, from the start with the true labels
of so many training images. Options that are not its own go to the script. Finished runs are not repeated. Orders:

    asked    as label.html asks: small margins of the networks' mean probabilities, each class in turn
    unsure   the lowest probability in labels.csv first, without turns
    changed  labels that differ from the annotator's first, the surest first
    random   drawn, keyed by the seed

The table has the share of the answers that correct the label which the first run gave, and the accuracy on test images
and on all training images, those with an answer among them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tables import as_markdown
from coreg.data.images import TRAIN
from coreg.data.keyed import keyed_generator
from coreg.errors import UserError, exits_with_one_line
from coreg.files import writing_csv
from coreg.label.page import read_page
from coreg.report.record import finished_report
from coreg.store.store import AnnotationStore

ORDERS = ("asked", "unsure", "changed", "random")


def ordered(order: str, run: Path, seed: int) -> list[str]:
    """Paths of training images in the order in which they are answered.

    Args:
        run: a finished run without labels.
    """
    if order == "asked":
        return [asked.path for asked in read_page(run).images]
    with (run / "labels.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    if order == "random":
        lines = [lines[place] for place in keyed_generator(seed, "answers").permutation(len(lines))]
    elif order == "unsure":
        lines.sort(key=lambda line: float(line["probability"]))
    else:
        lines.sort(key=lambda line: (line["label"] == line["annotator_label"], -float(line["probability"])))
    return [line["path"] for line in lines]


def corrected(before: Path, truth: dict[str, str], answered: Sequence[str]) -> float:
    """Share of the answered images whose label in the labels.csv of the first run is wrong."""
    with (before / "labels.csv").open(newline="", encoding="utf-8") as file:
        label = {line["path"]: line["label"] for line in csv.DictReader(file)}
    return statistics.fmean(label[path] != truth[path] for path in answered)


def measured(run: Path) -> tuple[float, float]:
    """Accuracy of a run on its test images, and on all its training images."""
    accuracy = finished_report(run / "report.json")["accuracy"]
    return accuracy["test"]["ensemble"], accuracy["train"]["ensemble"]


def trained(script: str, words: Sequence[str], run: Path) -> None:
    """Run a script in this process, where it has not been run before; what it prints goes beside the run.

    Raises:
        UserError: it ended with an error, which stands in the file beside the run.
    """
    if (run / "report.json").exists():
        return
    run.parent.mkdir(parents=True, exist_ok=True)
    file = run.with_suffix(".log")
    with file.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            importlib.import_module(script).main([*words, "--output_dir", str(run)])
        except SystemExit:
            raise UserError(f"{script} ended with an error: see the last line of {file}") from None


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Train, answer, train again, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--answers", type=int, nargs="+", default=[20, 50, 100], help="numbers of labelled images")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["asked", "random"])
    parser.add_argument("--script", default="train_coreg", help="module that trains: train_coreg, coreg.baselines.probe, …")
    args, words = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if "--annotations" not in words:
        raise UserError("name the store for the script to train on: --annotations ann")
    store = AnnotationStore.open(words[words.index("--annotations") + 1])
    if store.labels is None:
        raise UserError(f"{store.root} has no true labels to answer with; annotate images whose labels are known")
    rows = store.rows_of(TRAIN)
    truth = {store.paths[row]: store.class_names[store.labels[row]] for row in rows[store.labels[rows] >= 0]}
    scores: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    for seed in args.seeds:
        own = [*words, "--seed", str(seed)]
        before = args.output_dir / f"seed{seed}" / "none"
        trained(args.script, own, before)
        scores.setdefault(("none", 0), []).append((math.nan, *measured(before)))
        for order in args.orders:
            paths = [path for path in ordered(order, before, seed) if path in truth]
            for count in args.answers:
                run = before.with_name(f"{order}{count}")
                given = run.with_suffix(".csv")
                given.parent.mkdir(parents=True, exist_ok=True)
                with writing_csv(given) as write:
                    write(["path", "label"])
                    for path in paths[:count]:
                        write([path, truth[path]])
                trained(args.script, [*own, "--labels", str(given)], run)
                row = (corrected(before, truth, paths[:count]), *measured(run))
                scores.setdefault((order, count), []).append(row)
                print(f"seed {seed}, {order}, {count}: {scores[order, count][-1]}", file=sys.stderr, flush=True)
    print(table(scores))
    return 0


def table(scores: dict[tuple[str, int], list[tuple[float, ...]]]) -> str:
    """A row for each order and number of answers: mean and standard deviation over seeds, in percent."""
    lines = []
    for (order, count), several in scores.items():
        line = {"answers": str(count), "order": order}
        for name, values in zip(("corrections", "test", "training"), zip(*several)):
            if math.isnan(values[0]):
                line[name] = "–"
                continue
            spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
            line[name] = f"{100 * statistics.fmean(values):.1f}{spread}"
        lines.append(line)
    return as_markdown(sorted(lines, key=lambda line: int(line["answers"])))


if __name__ == "__main__":
    sys.exit(main())
