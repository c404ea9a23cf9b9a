"""Labels of images that have several, in four ways, by what the annotator sees; nothing is trained and no label is used.

    accelerate launch annotate_vlm.py --images photos --classes tags.txt --vlm ViT-B-32/openai --tiles 2 3 --output_dir ann
    accelerate launch baselines/zero_shot_tags.py --annotations ann --output_dir runs/zero_shot_tags

Needs an annotation store alone, no images; without one, pictures of handwritten digits are annotated. Every way leaves a
folder with a report.json, so that `coreg-report` lists it beside trained methods, and a labels.csv; what is there already
is not computed again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coreg.config import option, parse
from coreg.errors import UserError, exits_with_one_line
from coreg.plaintext import printable


@dataclass
class ZeroShotTagsConfig:
    """What is judged, how, and where the reports go."""

    annotations: str | None = option(
        None, "annotation store made by annotate_vlm.py; without it pictures of several built-in digits are used"
    )
    evidence: Literal["all", "image", "tiles", "ccd", "piaa"] = option(
        "all",
        "image: the softmax of the image's similarities to the labels; tiles: the largest of it in the image or a tile; "
        "ccd: debiased by label, with a share of the tiles; piaa: Gaussians of the tiles; all but the first need --tiles",
    )
    temperature: float = option(0.0, "of the softmax, 0 for the annotator's own; piaa has its own", (0, 1e3))
    output_dir: str = option("runs/zero_shot_tags", "folder that gets one folder a way")


@exits_with_one_line
def read_settings(argv: Sequence[str] | None = None) -> ZeroShotTagsConfig:
    """The command line, checked."""
    (config,) = parse(ZeroShotTagsConfig, argv=argv, prog="baselines/zero_shot_tags.py", description=__doc__)
    return config


if __name__ == "__main__":
    read_settings()  # faults in them are reported before the imports below, which take seconds

import shlex
import time
from pathlib import Path

from annotate_vlm import annotate_digit_pictures
from coreg.annotate.tag_evidence import label_evidence
from coreg.data.images import SPLIT_NAMES
from coreg.process import all_or_none, build_accelerator, main_process_decides
from coreg.report.multi_metrics import thresholds
from coreg.report.record import SCHEMA, finished_report, write_report
from coreg.report.report import hardware, peak_memory_mb, versions
from coreg.report.tags import measured_splits, write_tags
from coreg.run.folder import RunFolder
from coreg.run.tags import true_labels
from coreg.store.store import AnnotationStore
from coreg.weak.tag_evidence import probable_labels

# evidence -> name in reports
WAYS = {"image": "Zero-shot, image", "tiles": "Zero-shot, tiles", "ccd": "Zero-shot, CCD", "piaa": "Zero-shot, PIAA"}


def report_way(
    store: AnnotationStore, config: ZeroShotTagsConfig, way: str, folder: RunFolder, command: str
) -> dict[str, Any]:
    """Judge all images in a way and write its labels and its report; gives the report.

    Raises:
        UserError: it cannot be had from this store; nothing has been written then.
    """
    started, evidence = time.perf_counter(), label_evidence(store, way, config.temperature)
    truth, rows = true_labels(store), {name: store.rows_of(split) for split, name in enumerate(SPLIT_NAMES)}
    rows = {"train": rows["train"], "validation": rows["held out"], "test": rows["test"]}
    rows = {split: some for split, some in rows.items() if len(some)}
    if "train" not in rows:
        raise UserError(f"{store.root} has no readable training image")
    scores, judged = ({split: table[some] for split, some in rows.items()} for table in (evidence, truth))
    at = thresholds(scores["train"], probable_labels(scores["train"], way))
    report = {
        "schema": SCHEMA,
        "method": WAYS[way],
        "dataset": store.images_spec,
        "seed": 0,
        "labels_used": 0,
        "images": {split: len(some) for split, some in rows.items()},
        "classes": len(store.class_names),
        "class_names": store.class_names,
        "annotator": {"name": store.manifest["model"]["spec"]},
        "tags": measured_splits(scores, judged, None, at),
        "thresholds": [float(value) for value in at],
        "thresholds_from": "predictions",
        "per_class_split": "test" if "test" in rows else "train",
        "wall_seconds": time.perf_counter() - started,
        "command": command,
        "peak_memory_mb": peak_memory_mb(),
        "hardware": hardware(),
        "versions": versions(),
    }
    with folder.locked():
        folder.claim(identity(store, config, way))
        paths = [store.paths[row] for row in rows["train"].tolist()]
        write_tags(folder.root / "labels.csv", paths, store.class_names, scores["train"], at, safe=True)
        write_report(folder.report, report)
    return report


def identity(store: AnnotationStore, config: ZeroShotTagsConfig, way: str) -> dict[str, Any]:
    """What makes a folder the one of this job."""
    how = {"evidence": way, "temperature": config.temperature}
    return {"script": "baselines/zero_shot_tags.py", **how, "store": store.hash}


def map_lines(reports: list[dict[str, Any]]) -> str:
    """The ways with their mAP by split, as lines of text."""
    splits = [split for split in ("train", "validation", "test") if any(split in report["tags"] for report in reports)]
    if not splits:
        return "No true labels are known, so there is no mAP to report."
    lines = [f"{'mAP':<24}" + "".join(f"{split:>12}" for split in splits)]
    for report in reports:
        cells = [f"{report['tags'][split]['mAP']:>12.1%}" for split in splits]
        lines.append(f"{report['method']:<24}" + "".join(cells))
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
        store = annotate_digit_pictures(root / "annotations", accelerator)
    command = shlex.join(["baselines/zero_shot_tags.py", *argv])
    chosen = list(WAYS) if config.evidence == "all" else [config.evidence]

    def work() -> str:
        lines, reports = [], []
        for way in chosen:
            folder = RunFolder(root / way)
            folder.refuse_other(identity(store, config, way))
            if folder.finished:
                reports.append(finished_report(folder.report))
                continue
            try:
                reports.append(report_way(store, config, way, folder, command))
            except UserError as error:
                if len(chosen) == 1:
                    raise
                lines.append(f"left out: {WAYS[way]} ({error})")
        where = f"labels: {root}/*/labels.csv; coreg-report {root} makes a table of the reports"
        return "\n".join([*lines, map_lines(reports), "", where])

    # files alone, and seconds of work: one process does it
    accelerator.print(printable(main_process_decides(accelerator, work), lines=True))


if __name__ == "__main__":
    main()
