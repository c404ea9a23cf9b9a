"""report.json on the disk: written with checksums, and read by one function that believes nothing unchecked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coreg.errors import UserError
from coreg.files import sha256_of, write_atomically
from coreg.records import Each, Maybe, Number, RecordError, check_record, checksum_of, read_record

SCHEMA = 1
LARGEST = 1e15  # of a count or a number of seconds
SETTINGS = "config.yaml"
_SHARE = Number(0, 1, whole=False)
_AMOUNT = Number(0, LARGEST, whole=False)
_COUNT = Number(0, LARGEST)
_SCORE = Number(-LARGEST, LARGEST, whole=False)
# what every report has to hold, of all that this package reads of one
REPORT = {
    "method": str,
    "dataset": str,
    "annotator": {"name": str, "zero_shot_accuracy": Maybe(Each(_SHARE))},
    "seed": Number(),
    "labels_used": _COUNT,
    "none_of_these": Maybe(_COUNT),
    "accuracy": Maybe(Each({"ensemble": _SHARE, "interval": [_SHARE], "n": Maybe(_COUNT)})),
    "metrics": Maybe(Each(Each(_AMOUNT))),
    "refined": Maybe({"features": str, "accuracy": Maybe(Each(_SHARE))}),
    "label_free": Maybe(
        {
            "covering_rate": Maybe(Each(_SHARE)),
            "approximated_accuracy": Maybe(Each(_SHARE)),
            "consensus": Maybe(_SHARE),
        }
    ),
    "estimate": Maybe(Each({"accuracy": _SHARE, "interval": [_SHARE], "scores": Each(_SHARE)})),
    "trust": Maybe(
        {
            "most": str,
            "features": str,
            "kind": str,
            "split": str,
            "images": _COUNT,
            "agreement": Each(_SHARE),
            "doubted": Maybe(bool),
            "surest": Maybe(Each(_SHARE)),
            "fit": {"score": _SCORE, "shuffled": _SCORE, "hopeless": bool},
        }
    ),
    "templates": Maybe(Each(Each(_SHARE))),
    "parameters": Maybe(_AMOUNT),
    "training_seconds": Maybe(_AMOUNT),
    "wall_seconds": Maybe(_AMOUNT),
    # of several labels an image, by split; see `coreg.report.multi_metrics`
    "tags": Maybe(
        Each({"mAP": _SHARE, "annotator": Maybe(_SHARE), "images": _COUNT, "CF1": Maybe(_SHARE), "OF1": Maybe(_SHARE)})
    ),
    "files": Maybe(Each(str)),
    "checksum": Maybe(str),
}
# what a pre-filter did to candidate sets
PREFILTER = {
    "rule": str,
    "images": _COUNT,
    "dropped": _COUNT,
    "mean_candidates": {"before": _AMOUNT, "after": _AMOUNT},
    "partial_accuracy": Maybe({"before": Maybe(_SHARE), "after": Maybe(_SHARE)}),
}
# what the report of a training holds besides
TRAINED = REPORT | {
    "parameters": _AMOUNT,
    "wall_seconds": _AMOUNT,
    "images_per_second": _AMOUNT,
    "peak_memory_mb": _AMOUNT,
    "needs_review": _COUNT,
    "per_class_split": str,
    "per_class_accuracy": Maybe(Each({"annotator": Maybe(_SHARE), "ensemble": Maybe(_SHARE), "n": _COUNT})),
    "chosen_epoch": Maybe({"epoch": _COUNT, "epochs": _COUNT, "accuracy": Maybe(Each(_SHARE))}),
    "weak_labels": Maybe({"prefilter": Maybe(PREFILTER)}),
    "part": Maybe({"asked": _AMOUNT, "available": _COUNT}),
    "images": Maybe({"train": _COUNT}),
    "warnings": Maybe([str]),
    "trainable_parameters": Maybe(_COUNT),
    "tuning": Maybe(str),
}


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report with its own checksum, and with that of the settings beside it, as `files`, where there are some.

    Raises:
        UserError: it cannot be written.
    """
    settings = path.with_name(SETTINGS)
    report = report | ({"files": {SETTINGS: sha256_of(settings)}} if settings.is_file() else {})
    sealed = report | {"checksum": checksum_of(report)}
    write_atomically(path, json.dumps(sealed, indent=1, ensure_ascii=False) + "\n")


def finished_report(path: Path, kind: dict[str, Any] = REPORT) -> dict[str, Any]:
    """The report of what is finished.

    Raises:
        UserError: it is damaged.
    """
    try:
        return read_report(path, kind)
    except RecordError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and the same command writes it anew") from None


def read_report(path: Path, kind: dict[str, Any] = REPORT) -> dict[str, Any]:
    """A report, checked field by field because it may come from anywhere; reports without a checksum are older ones.

    Args:
        kind: `REPORT`, or `TRAINED` where more of it is read.

    Raises:
        RecordError: it cannot be read, is damaged, or is no report of this schema.
    """
    report = read_record(path)
    if report.get("schema") != SCHEMA:
        raise RecordError(f"it has report schema {str(report.get('schema'))[:20]}, this version reads {SCHEMA}")
    check_record(report, kind)
    for name in ("accuracy", "estimate"):
        for split, judged in (report.get(name) or {}).items():
            if len(judged["interval"]) != 2:
                raise RecordError(f"{name}.{split}.interval has {len(judged['interval'])} numbers, expected 2")
    if report.get("checksum") not in (None, checksum_of(report)):
        raise RecordError("its checksum is wrong")
    return report
