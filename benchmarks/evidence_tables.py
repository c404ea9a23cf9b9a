"""The tables of `benchmarks.evidence`, from the reports of its runs; what is not finished is an empty cell."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.jobs import cpu_seconds
from benchmarks.tables import as_markdown
from coreg.report.metrics import pick
from coreg.report.record import read_report

RAW, REFINED = "raw", "refined"
LABELS = "labels"  # in the place of a method: nothing is trained
NOTHING = "–"
NOTHING_OF_BOTH = f"{NOTHING} / {NOTHING}"


@dataclass
class Runs:
    """The finished runs of a method on one evidence, by seed.

    seconds: CPU seconds of each.
    """

    reports: dict[int, dict[str, Any]]
    seconds: list[float]

    def accuracy(self) -> list[float]:
        """Test accuracy of each, in percent."""
        return [100 * report["accuracy"]["test"]["ensemble"] for report in self.reports.values()]

    def refined(self) -> list[float]:
        """Test accuracy of the labels that a run refined on the way, in percent; of runs that did."""
        of_labels = [(report.get("refined") or {}).get("accuracy") or {} for report in self.reports.values()]
        return [100 * accuracy["test"] for accuracy in of_labels if "test" in accuracy]

    def without_labels(self, name: str) -> list[float]:
        """A score that needs no label, of the training images, in percent; of runs that have it."""
        scores = [(report.get("label_free") or {}).get(name) for report in self.reports.values()]
        known = [score.get("train") if isinstance(score, dict) else score for score in scores]
        return [100 * score for score in known if score is not None]


def collect(root: Path, name: str, method: str, evidence: str, seeds: Iterable[int]) -> Runs:
    """What is finished of a set's method."""
    reports, seconds = {}, []
    for seed in seeds:
        run = f"{name}/{method}-{evidence}-{seed}"
        if (root / run / "report.json").exists():
            reports[seed] = read_report(root / run / "report.json")
            seconds.append(cpu_seconds(root, run) or 0.0)
    return Runs(reports, seconds)


def labels(root: Path, name: str, evidence: str, job: str) -> Runs:
    """The annotator itself, or its refined labels, with the seconds of the job that made them."""
    file, seconds = root / name / f"labels-{evidence}" / "averaged" / "report.json", cpu_seconds(root, f"{name}/{job}")
    return Runs({0: read_report(file)} if file.exists() else {}, [] if seconds is None else [seconds])


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation (n - 1) where there are several."""
    if not values:
        return NOTHING
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def _table(rows: Sequence[dict[str, str]], known: Sequence[bool]) -> str:
    """The rows of which something is known, as Markdown; empty without any."""
    there = [row for row, is_known in zip(rows, known) if is_known]
    return as_markdown(there) if there else ""


def _rounded(seconds: Sequence[float]) -> str:
    return f"{statistics.fmean(seconds):.0f}" if seconds else NOTHING


def main_table(root: Path, names: dict[str, str], methods: dict[str, str], seeds: Sequence[int]) -> str:
    """Rows: methods of which a run is finished; columns: of every set test accuracy on raw and refined labels, CPU seconds.

    Args:
        names: folder of a set -> its title. methods: name in the folders -> title.
    """
    rows = [{"test accuracy": "the labels, nothing trained"}]
    rows += [{"test accuracy": what} for what in methods.values()]
    known = [False] * len(rows)
    for name, title in names.items():
        # the seconds of this row are those of refining
        made = [Runs(labels(root, name, RAW, RAW).reports, []), labels(root, name, REFINED, REFINED)]
        pairs = [made, *([collect(root, name, method, e, seeds) for e in (RAW, REFINED)] for method in methods)]
        for line, (row, (raw, refined)) in enumerate(zip(rows, pairs)):
            known[line] |= bool(raw.reports or refined.reports)
            row[f"{title}, {RAW}"] = spread(raw.accuracy())
            row[f"{title}, {REFINED}"] = spread(refined.accuracy())
            row[f"{title}, CPU s"] = _rounded(raw.seconds + refined.seconds)
    return _table(rows, known)


def views_table(root: Path, names: dict[str, str], stores: dict[str, str]) -> str:
    """Rows: sets; columns: train and test accuracy of the labels in each store. stores: title -> evidence."""
    rows, known = [], []
    for name, title in names.items():
        row = {"train / test accuracy": title}
        for what, evidence in stores.items():
            of_store = labels(root, name, evidence, evidence)
            shares = [report["accuracy"] for report in of_store.reports.values()]
            cells = [
                spread([100 * one[split]["ensemble"] for one in shares if split in one]) for split in ("train", "test")
            ]
            row[what] = " / ".join(cells)
        rows.append(row)
        known.append(any(cell != NOTHING_OF_BOTH for cell in list(row.values())[1:]))
    return _table(rows, known)


def scores_table(
    root: Path, names: dict[str, str], variants: dict[str, str], seeds: Sequence[int], evidence: str = REFINED
) -> str:
    """Rows: variants of a method on each set, with what can be had without labels, test accuracy, and CPU seconds.

    The variant `labels` stands for those of the store itself, with the seconds of refining them.
    """
    rows, known = [], []
    for name, title in names.items():
        for variant, what in variants.items():
            of_store = variant == LABELS
            runs = labels(root, name, evidence, evidence) if of_store else collect(root, name, variant, evidence, seeds)
            scores = ("covering_rate", "approximated_accuracy", "consensus")
            free = {score.replace("_", " "): spread(runs.without_labels(score)) for score in scores}
            of_all = {"test": spread(runs.accuracy()), "CPU s": _rounded(runs.seconds), "seeds": str(len(runs.reports))}
            rows.append({"set": title, "variant": what} | free | of_all)
            known.append(bool(runs.reports))
    return _table(rows, known)


def picked(reports: Sequence[dict[str, Any]]) -> int:
    """Which of several runs on the same images `pick` picks by their reports: its number among them."""
    scores = [report["label_free"] for report in reports]
    return pick([score["covering_rate"]["test"] for score in scores], [score["consensus"] for score in scores])


def picks_table(
    root: Path, names: dict[str, str], among: dict[str, dict[str, tuple[str, str]]], seeds: Sequence[int]
) -> str:
    """Rows: sets and what is picked from; columns: what the rule picked, what was best, and what it would lose on average.

    Args:
        among: title of the runs that are picked from -> title of each, its method and its evidence. A seed of which a run
            is not finished is left out.
    """
    rows, known = [], []
    for name, title in names.items():
        for what, members in among.items():
            runs = {member: collect(root, name, *of, seeds).reports for member, of in members.items()}
            whole = [seed for seed in seeds if all(seed in reports for reports in runs.values())]
            chosen, best, lost, mean_lost = [], [], [], []
            for seed in whole:
                reports = [of[seed] for of in runs.values()]
                test = [100 * report["accuracy"]["test"]["ensemble"] for report in reports]
                place = picked(reports)
                chosen.append(list(runs)[place])
                best.append(list(runs)[test.index(max(test))])
                lost.append(max(test) - test[place])
                mean_lost.append(max(test) - statistics.fmean(test))
            row = {"set": title, "picked from": what, "picked": "; ".join(chosen), "best": "; ".join(best)}
            rows.append(row | {"points lost": spread(lost), "a random one": spread(mean_lost), "seeds": str(len(whole))})
            known.append(bool(whole))
    return _table(rows, known)


def raw_and_refined(lines: dict[str, tuple[Runs, Runs]], head: str) -> str:
    """Rows: settings of something on one set; columns: test accuracy on raw and on refined labels, CPU seconds, seeds."""
    rows, known = [], []
    for line, (raw, refined) in lines.items():
        seeds = f"{len(raw.reports)}, {len(refined.reports)}"
        cells = {RAW: spread(raw.accuracy()), REFINED: spread(refined.accuracy())}
        rows.append({head: line} | cells | {"CPU s": _rounded(raw.seconds + refined.seconds), "seeds": seeds})
        known.append(bool(raw.reports or refined.reports))
    return _table(rows, known)


def shares_table(lines: dict[str, tuple[Sequence[float], Sequence[Runs]]]) -> str:
    """Rows: shares of the images; columns: the refined labels by themselves, Co-Reg on raw and refined ones, seeds.

    Args:
        lines: share -> test accuracy of the refined labels, and runs: with the epochs that all images get, raw and
            refined, and with as many steps, raw and refined.
    """
    columns = ("Co-Reg, raw", "Co-Reg, refined", "as many steps, raw", "as many steps, refined")
    rows, known = [], []
    for share, (refined_labels, runs) in lines.items():
        row = {"share": share, "refined labels": spread(refined_labels)}
        row |= {column: spread(of.accuracy()) for column, of in zip(columns, runs)}
        seconds = [_rounded(first.seconds + second.seconds) for first, second in (runs[:2], runs[2:])]
        rows.append(row | {"CPU s": ", ".join(seconds), "seeds": ", ".join(str(len(of.reports)) for of in runs)})
        known.append(any(of.reports for of in runs))
    return _table(rows, known)
