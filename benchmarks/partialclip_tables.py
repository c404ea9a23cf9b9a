"""The tables of `benchmarks.partialclip`, from the reports of its runs; what is not finished is an empty cell."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.evidence_tables import Runs, spread
from benchmarks.tables import as_markdown

SHARES = {"many": "many", "medium": "medium", "few": "few", "macro_f1": "macro F1"}
Lines = dict[str, dict[str, Runs]]  # row -> column -> the runs of a cell


def metric(runs: Runs, name: str) -> list[float]:
    """A metric of the test images of each run that has it, in percent."""
    found = [((report.get("metrics") or {}).get("test") or {}).get(name) for report in runs.reports.values()]
    return [100 * value for value in found if value is not None]


def in_all(cells: Iterable[Runs]) -> str:
    """How many seeds are finished in every cell that has any."""
    counts = [len(runs.reports) for runs in cells if runs.reports]
    return str(min(counts, default=0))


def grid(head: str, lines: Lines) -> str:
    """Test accuracy; empty where nothing is finished, and so is a row that has nothing.

    Returns:
        Markdown: mean ± standard deviation of a cell, and the number of seeds that every cell of a row has, if it has any.
    """
    rows = []
    for title, cells in lines.items():
        if not any(runs.reports for runs in cells.values()):
            continue
        row = {head: title} | {column: spread(runs.accuracy()) for column, runs in cells.items()}
        rows.append(row | {"seeds": in_all(cells.values())})
    return as_markdown(rows) if rows else ""


def tail_table(head: str, lines: dict[str, Runs]) -> str:
    """Test accuracy over classes of many, medium and few training images, over all, and macro F1; rows: `lines`."""
    rows = []
    for title, runs in lines.items():
        if runs.reports:
            groups = {shown: spread(metric(runs, name)) for name, shown in SHARES.items()}
            rows.append({head: title, "all": spread(runs.accuracy())} | groups | {"seeds": str(len(runs.reports))})
    return as_markdown(rows) if rows else ""


def filter_table(head: str, lines: dict[str, Runs]) -> str:
    """What a pre-filter did to candidate sets: their mean size, and the share that holds the truth, before and after."""
    rows = []
    for title, runs in lines.items():
        done = [(report.get("weak_labels") or {}).get("prefilter") for report in runs.reports.values()]
        done = [one for one in done if one]
        if not done:
            continue
        row = {head: title}
        for when in ("before", "after"):
            sizes = [one["mean_candidates"][when] for one in done]
            right = [100 * one["partial_accuracy"][when] for one in done if (one["partial_accuracy"] or {}).get(when)]
            row |= {f"candidates {when}": f"{statistics.fmean(sizes):.2f}", f"truth in {when}": spread(right)}
        row["left out"] = f"{100 * sum(one['dropped'] for one in done) / sum(one['images'] for one in done):.1f}"
        rows.append(row)
    return as_markdown(rows) if rows else ""


def free_table(head: str, lines: dict[str, Runs]) -> str:
    """What can be had without labels of the training images, and test accuracy last; rows: `lines`."""
    rows = []
    for title, runs in lines.items():
        if runs.reports:
            scores = {name: spread(runs.without_labels(name)) for name in ("covering_rate", "approximated_accuracy")}
            free = {name.replace("_", " "): value for name, value in scores.items()}
            rows.append({head: title} | free | {"test": spread(runs.accuracy()), "seeds": str(len(runs.reports))})
    return as_markdown(rows) if rows else ""
