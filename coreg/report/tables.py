"""Many runs as tables: seeds joined into rows, rows sorted into families, written as Markdown, CSV or HTML."""

from __future__ import annotations

import io
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coreg.plaintext import csv_rows, printable
from coreg.report.metrics import METRICS, pick, written
from coreg.webpage import bar, document, table, text

# in the order of the papers' tables; a method belongs where the first word of its name is listed
FAMILIES: dict[str, tuple[str, ...]] = {
    "Zero-shot": ("zero",),
    "Distillation": ("kd", "probe"),
    "DivideMix": ("dividemix",),
    "Partial-label learning": ("partial", "cc", "rc", "lws", "lwc", "proden", "cr", "pico", "irnet", "alim"),
    "Few labels and adapters": ("coop", "lora", "linear"),
    "Co-Reg": ("co",),
    "Supervised ceiling": ("supervised",),
}
OTHERS = "Other methods"
TEST, TRAIN = "test", "train"
WITHOUT_LABELS = ("covering_rate", "approximated_accuracy", "consensus")
HEAD = (
    "method",
    "test %",
    "train %",
    "covering %",
    "approximated %",
    "consensus %",
    "runs",
    "labels",
    "epochs",
    "M parameters",
    "training s",
    "wall s",
)
# of runs with several labels an image, which stand in tables of their own
TAG_HEAD = (
    "method",
    "test mAP %",
    "CF1 %",
    "OF1 %",
    "annotator mAP %",
    "validation mAP %",
    "runs",
    "observed",
    "epochs",
    "M parameters",
    "training s",
    "wall s",
)
VALIDATION = "validation"
TAG_MEASURES = ("mAP", "CF1", "OF1")
TAG_READING = (
    "mAP is the mean over all labels of average precision on the test images (a label that no image has counts 0); CF1 and "
    "OF1 are the F1 of mean precision and recall of the labels and of all cells, at the run's thresholds; ± is the "
    "standard deviation over seeds (n − 1). Annotator: mAP of its similarities to the labels. Observed: labels that "
    "training saw."
)
MEASURED = (
    "Other metrics on the test images, means over the seeds; NLL is in nats. Harmonic and geometric mean are of the "
    "accuracies of the classes; classes of many images have more than 100 for training, of medium size 20 to 100, of few "
    "fewer than 20."
)
READING = (
    "Accuracy of the last epoch; ± is the standard deviation over seeds (n − 1), in parentheses stands the 95 % Wilson "
    "interval of a single run. Covering, approximated, consensus: means of what can be had without labels, on the training "
    "images: the share of predictions among the annotator's candidates, how sure they are within them, and agreement times "
    "balance of two networks. Labels: true labels that training saw. Parameters are of one network, seconds the mean of "
    "a run."
)


@dataclass
class Run:
    """A report, and the settings beside it that make its method what it is."""

    path: Path
    report: dict[str, Any]
    settings: dict[str, str] = field(default_factory=dict)  # as short texts

    def value(self, *place: str) -> Any:
        """What the report says at a place, such as `accuracy`, `test`, `ensemble`; None where it says nothing."""
        found: Any = self.report
        for name in place:
            found = found.get(name) if isinstance(found, dict) else None
        return found


@dataclass
class Row:
    """Runs of one method with the same settings, one a seed."""

    method: str
    special: str  # what sets it apart from other rows of the method, in words
    runs: list[Run]

    def values(self, *place: str) -> list[Any]:
        """What the runs say at a place, of all that say something (see `Run.value`)."""
        return [value for run in self.runs if (value := run.value(*place)) is not None]

    def mean(self, *place: str) -> float | None:
        """Mean of a number over the runs that have it."""
        values = self.values(*place)
        return statistics.fmean(values) if values else None

    def shares(self, split: str) -> list[float]:
        """What is judged by, of all runs where it is known: accuracies, or mAP where an image has several labels."""
        return self.values("tags", split, "mAP") if self.several else self.values("accuracy", split, "ensemble")

    def without_labels(self, name: str) -> float | None:
        """Mean over the runs of a score that needs no labels, on the training images."""
        scores = self.values("label_free", name)
        return self.mean("label_free", name, *((TRAIN,) if any(isinstance(score, dict) for score in scores) else ()))

    @property
    def several(self) -> bool:
        """Whether an image has several labels."""
        return self.runs[0].value("tags") is not None

    @property
    def epochs(self) -> str | None:
        """Epochs of each run, None where nothing was trained or nobody wrote it down."""
        return self.runs[0].settings.get("epochs")

    @property
    def family(self) -> str:
        """Where the papers' tables have the method."""
        word = re.split(r"[^a-z0-9]+", self.method.lower(), maxsplit=1)[0]
        return next((family for family, words in FAMILIES.items() if word in words), OTHERS)

    @property
    def name(self) -> str:
        return f"{self.method} ({self.special})" if self.special else self.method

    @property
    def place(self) -> tuple[int, float, str]:
        """For sorting: by family, the best first."""
        shares = self.shares(TEST) or self.shares(VALIDATION) or self.shares(TRAIN)
        return [*FAMILIES, OTHERS].index(self.family), -statistics.fmean(shares or [-1.0]), self.name


@dataclass
class Table:
    """The methods on one data set that one annotator annotated."""

    dataset: str
    annotator: str
    rows: list[Row]
    several: bool = False  # whether images have several labels

    @property
    def heading(self) -> str:
        return f"{self.dataset}, annotated by {self.annotator}"

    @property
    def head(self) -> tuple[str, ...]:
        """Heads of the columns that `cells` fills."""
        return TAG_HEAD if self.several else HEAD

    def metrics(self) -> tuple[list[str], list[list[str]]]:
        """Heading and lines of the table of other metrics, as plain texts: the rows and columns that have some."""
        shown = [name for name in METRICS if any(row.values("metrics", TEST, name) for row in self.rows)]
        lines = []
        for row in self.rows:
            values = {name: row.mean("metrics", TEST, name) for name in shown}
            if any(value is not None for value in values.values()):
                texts = ("–" if value is None else written(name, value) for name, value in values.items())
                lines.append([row.name, *texts])
        return ["method", *(METRICS[name] for name in shown)], lines

    def picked(self) -> Run | None:
        """The run that is best as far as can be known without labels, of all with two networks; None of fewer than two.

        Networks that began as their annotator's tower are left out: they agree on the annotator's mistakes.
        """
        runs = [run for row in self.rows for run in row.runs if run.value("label_free", "consensus") is not None]
        runs = [run for run in runs if run.settings.get("backbone") != "annotator"]
        for split in (TEST, TRAIN):
            covering = [run.value("label_free", "covering_rate", split) for run in runs]
            if len(runs) > 1 and None not in covering:
                return runs[pick(covering, [run.value("label_free", "consensus") for run in runs])]
        return None

    def families(self) -> list[tuple[str, list[Row]]]:
        """Rows by family, in order; of several labels an image all in one without a name."""
        if self.several:
            return [("", self.rows)]
        names = dict.fromkeys(row.family for row in self.rows)
        return [(name, [row for row in self.rows if row.family == name]) for name in names]


def compare(runs: Sequence[Run]) -> tuple[list[Table], list[str]]:
    """Sort runs into tables; also gives a line for each run that repeats another one and is left out."""
    methods: dict[tuple[str, str, str], dict[tuple, dict[int, Run]]] = {}
    repeated = []
    for run in runs:
        report = run.report
        variants = methods.setdefault((report["dataset"], report["annotator"]["name"], report["method"]), {})
        seeds = variants.setdefault((report["labels_used"], *sorted(run.settings.items())), {})
        first = seeds.setdefault(report["seed"], run)
        if first is not run:
            repeated.append(f"{run.path} repeats {first.path}: the same method, settings and seed")
    tables: dict[tuple[str, str, bool], Table] = {}
    for (dataset, annotator, method), variants in methods.items():
        members = [[seeds[seed] for seed in sorted(seeds)] for seeds in variants.values()]
        words = special_settings([group[0].settings for group in members])
        for row in (Row(method, special, group) for special, group in zip(words, members)):
            shown = tables.setdefault((dataset, annotator, row.several), Table(dataset, annotator, [], row.several))
            shown.rows.append(row)
    for shown in tables.values():
        shown.rows.sort(key=lambda row: row.place)
    return [tables[key] for key in sorted(tables)], repeated


def special_settings(variants: Sequence[dict[str, str]]) -> list[str]:
    """For each of several settings of a method, where it differs from what most of them say; on a tie all say theirs.

    Epochs have a column of their own.
    """
    differences: list[list[str]] = [[] for _ in variants]
    for name in sorted({name for settings in variants for name in settings} - {"epochs"}):
        values = [settings.get(name, "none") for settings in variants]
        counts = Counter(values).most_common(2)
        usual = None if len(counts) == 2 and counts[0][1] == counts[1][1] else counts[0][0]
        for words, value in zip(differences, values):
            if value != usual:
                words.append(f"{name} {value}")
    return [", ".join(words) for words in differences]


# ---- writing --------------------------------------------------------------------------------------------------------


def spread(row: Row, split: str) -> str:
    """Mean and standard deviation (n - 1) over seeds in percent, or one run with its 95 % interval."""
    shares = row.shares(split)
    if len(shares) != 1:
        return over_seeds(shares)
    low, high = row.values("accuracy", split, "interval")[0]
    return f"{100 * shares[0]:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def over_seeds(shares: Sequence[float]) -> str:
    """Mean and standard deviation (n - 1) in percent."""
    if len(shares) < 2:
        return f"{100 * shares[0]:.1f}" if shares else "–"
    return f"{100 * statistics.fmean(shares):.1f} ± {100 * statistics.stdev(shares):.1f}"


def cells(row: Row) -> list[str]:
    """A row as plain texts under `HEAD`, or `TAG_HEAD`."""
    parameters, training, wall = (row.mean(name) for name in ("parameters", "training_seconds", "wall_seconds"))
    if row.several:
        columns = [(TEST, "mAP"), (TEST, "CF1"), (TEST, "OF1"), (TEST, "annotator"), (VALIDATION, "mAP")]
        measured = [over_seeds(row.values("tags", *column)) for column in columns]
    else:
        measured = [spread(row, TEST), spread(row, TRAIN)]
        measured += ["–" if score is None else f"{100 * score:.1f}" for score in map(row.without_labels, WITHOUT_LABELS)]
    return [
        row.name,
        *measured,
        str(len(row.runs)),
        str(row.runs[0].report["labels_used"]),
        row.epochs or "–",
        "–" if parameters is None else f"{parameters / 1e6:.2f}",
        "–" if training is None else f"{training:.0f}",
        "–" if wall is None else f"{wall:.0f}",
    ]


def as_markdown(tables: Sequence[Table]) -> str:
    """Tables that can be read as text and as Markdown."""
    lines = []
    for shown in tables:
        body: list[list[str]] = []
        for name, rows in shown.families():
            body += [[f"**{name}**"] + [""] * (len(shown.head) - 1)] if name else []
            body += [[_plain(cell) for cell in cells(row)] for row in rows]
        lines += [f"## {_plain(shown.heading)}", "", *_lines(shown.head, body), ""]
        choice = picked_without_labels(shown)
        lines += [_plain(choice), ""] if choice else []
        head, measured = shown.metrics()
        if measured:
            lines += [MEASURED, "", *_lines(head, [[_plain(cell) for cell in row] for row in measured]), ""]
    return "\n".join([*lines, *readings(tables)]) + "\n"


def readings(tables: Sequence[Table]) -> list[str]:
    """How tables are to be read, of each kind that there is."""
    kinds = {shown.several for shown in tables}
    return [text for several, text in ((False, READING), (True, TAG_READING)) if several in kinds]


def picked_without_labels(shown: Table) -> str | None:
    """A sentence on the run that is picked without labels, where there is something to pick from."""
    run = shown.picked()
    if run is None:
        return None
    consensus = 100 * run.value("label_free", "consensus")
    why = f"consensus {consensus:.1f} %, among the runs of two networks"
    return f"Picked without labels: {run.path.parent} ({run.report['method']}, {why})."


def _lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *body)]
    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for name, *numbers in (head, ruler, *body):
        cells = [name.ljust(widths[0]), *(number.rjust(width) for number, width in zip(numbers, widths[1:]))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _plain(value: str) -> str:
    """Text in which Markdown finds nothing to do, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(" ".join(value.split())))


def as_csv(tables: Sequence[Table]) -> str:
    """One line a row, numbers unrounded; empty where something is not known."""
    file = io.StringIO(newline="")
    write = csv_rows(file, safe=True)
    judged = [f"{split}_{what}" for split in (TEST, TRAIN) for what in ("mean", "sd", "low", "high")]
    names = ("parameters", "training_seconds", "wall_seconds")
    heading = ["dataset", "annotator", "family", "method", "special", "seeds", *judged, *WITHOUT_LABELS]
    tags = [(split, name) for split in (TEST, VALIDATION, TRAIN) for name in TAG_MEASURES]
    measured = [*(f"test_{name}" for name in METRICS), *(f"{split}_{name}" for split, name in tags)]
    write([*heading, "labels_used", "epochs", *names, *measured])
    for shown in tables:
        for row in shown.rows:
            seeds = " ".join(str(run.report["seed"]) for run in row.runs)
            words = [shown.dataset, shown.annotator, row.family, row.method, row.special, seeds]
            numbers = [number for split in (TEST, TRAIN) for number in _numbers(row, split)]
            numbers += map(row.without_labels, WITHOUT_LABELS)
            numbers += [row.runs[0].report["labels_used"], row.epochs, *(row.mean(name) for name in names)]
            numbers += [row.mean("metrics", TEST, name) for name in METRICS]
            numbers += [row.mean("tags", *column) for column in tags]
            write([*map(printable, words), *numbers])
    return file.getvalue()


def _numbers(row: Row, split: str) -> list[float | None]:
    shares = row.values("accuracy", split, "ensemble")
    if len(shares) == 1:
        return [shares[0], None, *row.values("accuracy", split, "interval")[0]]
    return [statistics.fmean(shares), statistics.stdev(shares), None, None] if shares else [None] * 4


def as_html(tables: Sequence[Table]) -> str:
    """A page that stands alone, for large and small screens, light and dark."""
    parts = ["<h1>Comparison of methods</h1>", *(f'<p class="note">{text(line)}</p>' for line in readings(tables))]
    for shown in tables:
        lines = []
        for name, rows in shown.families():
            lines += [[f"<b>{text(name)}</b>", *[""] * len(shown.head)]] if name else []
            for row in rows:
                named, test, *rest = (text(printable(cell)) for cell in cells(row))
                shares = row.shares(TEST)
                lines.append([named, test, bar(statistics.fmean(shares)) if shares else "", *rest])
        parts += [f"<h2>{text(printable(shown.heading))}</h2>", table([*shown.head[:2], "", *shown.head[2:]], lines)]
        choice = picked_without_labels(shown)
        parts += [f'<p class="note">{text(printable(choice))}</p>'] if choice else []
        head, measured = shown.metrics()
        if measured:
            escaped = ([text(printable(cell)) for cell in row] for row in measured)
            parts += [f'<p class="note">{text(MEASURED)}</p>', table([text(name) for name in head], escaped)]
    return document("Comparison of methods", *parts)


FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {"md": as_markdown, "csv": as_csv, "html": as_html}
