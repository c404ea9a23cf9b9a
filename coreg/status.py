"""Where a job stands, from its folder alone: `coreg-status runs/a ann`.

Folders are those of trainings, of baselines, and annotation stores, on this machine or on a disk that another one shares.
Nothing is written, and no network, store or checkpoint is loaded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from coreg.errors import UserError, exits_with_one_line
from coreg.plaintext import printable
from coreg.progress import PROGRESS, SECONDS_BETWEEN_LINES
from coreg.records import Maybe, Number, RecordError, read_record
from coreg.report.record import read_report
from coreg.store.claims import STALE_SECONDS
from coreg.store.manifest import block_files, read_manifest

SILENT_SECONDS = 3 * SECONDS_BETWEEN_LINES  # after which a training that writes every minute counts as gone
RECORD = {
    "doing": str,
    "done": Number(0, whole=False),
    "total": Number(0, whole=False),
    "running": bool,
    "at": Number(0),
    "seconds_left": Maybe(Number(0)),
}


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(max(seconds, 0))))


def of_run(folder: Path, now: float) -> str:
    """One line on a run folder.

    Args:
        folder: holds `job.json`.
        now: seconds since 1970.

    Raises:
        RecordError: its record of progress or its report is damaged.
    """
    if (folder / "report.json").is_file():
        report = read_report(folder / "report.json")
        judged = [f"{part} {value['ensemble']:.1%}" for part, value in (report.get("accuracy") or {}).items()]
        return f"finished{': accuracy ' if judged else ''}{', '.join(judged)}"
    if not (folder / PROGRESS).is_file():
        return "begun, no epoch yet"
    record = read_record(folder / PROGRESS, RECORD)
    share = record["done"] / record["total"] if record["total"] else 1
    line = f"{record['doing']}: epoch {record['done']:.1f} of {record['total']:g} ({share:.0%})"
    silent = now - record["at"]
    if not record["running"]:
        over = record["done"] >= record["total"]
        return f"{line}, {'its report is being written' if over else 'stopped'}, {_span(silent)} ago"
    if silent > SILENT_SECONDS:
        return (
            f"{line}, silent for {_span(silent)}: it was killed or hangs; the same command goes on from its last checkpoint"
        )
    left = record["seconds_left"]
    return line + ("" if left is None else f", about {_span(left - silent)} left")


def of_store(folder: Path, now: float) -> str:
    """One line on an annotation store.

    Args:
        folder: holds `manifest.json`.
        now: seconds since 1970.

    Raises:
        UserError: its manifest is damaged.
    """
    manifest = read_manifest(folder)
    files, count = block_files(folder, manifest), manifest["images"]["count"]
    times = sorted(file.stat().st_mtime for file in files if file.is_file())
    images = min(count, len(times) * manifest["block_size"])
    if len(times) == len(files) and (folder / "errors.csv").is_file():
        return f"finished: {count:,} images"
    beats = [now - beat.stat().st_mtime for beat in (folder / "claims").glob("*.alive")]
    workers = sum(age < STALE_SECONDS for age in beats)
    line = f"{images:,} of {count:,} images ({images / max(count, 1):.0%}), "
    if not workers:
        return line + "nobody works on it; the same command goes on"
    line += f"{workers} {'process works' if workers == 1 else 'processes work'} on it"
    if len(times) > 1 and times[-1] > times[0]:
        # of the latest blocks alone: an annotation that was stopped for a night is not slower for it
        times = times[-20:]
        rate = (len(times) - 1) * manifest["block_size"] / (times[-1] - times[0])
        line += f", {rate:,.1f} images/s, about {_span((count - images) / rate)} left"
    return line


def status(folder: Path, now: float) -> str:
    """One line on whatever job a folder holds.

    Raises:
        UserError: it holds none, or one that is damaged.
    """
    try:
        if (folder / "job.json").is_file():
            return of_run(folder, now)
        if (folder / "manifest.json").is_file():
            return of_store(folder, now)
        inner = [name for name in ("annotations", "refined") if (folder / name / "manifest.json").is_file()]
        if inner:  # a training that makes its labels on the way
            return f"{inner[-1]}: {of_store(folder / inner[-1], now)}"
    except RecordError as error:
        raise UserError(f"{folder} is damaged ({error}); the command that made it says what can be kept") from None
    raise UserError(f"{folder} holds no job; give the --output_dir of a training or of an annotation")


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """`coreg-status FOLDER...`."""
    parser = argparse.ArgumentParser(
        "coreg-status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="--output_dir of a training or of an annotation")
    for word in parser.parse_args(argv).folders:
        print(f"{printable(word)}: {printable(status(Path(word), time.time()))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
