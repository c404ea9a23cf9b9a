"""The command line of a benchmark that is a plan of many jobs: `benchmarks.evidence`, `partialclip` and `tags`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.jobs import Job, cpu_seconds, run_jobs, seconds_file
from benchmarks.tables import fill, processor
from coreg.errors import UserError
from coreg.files import write_atomically
from coreg.report.record import read_report, write_report

# what a record keeps of a report: what the tables need, and where it came from
RECORDED = ("schema", "method", "dataset", "seed", "labels_used", "annotator", "accuracy", "metrics", "label_free")
RECORDED += ("refined", "weak_labels", "training_seconds", "versions")


def parsed(
    argv: Sequence[str] | None,
    description: str | None,
    page: str,
    data: str,
    sets: Sequence[str],
    parts: Sequence[str],
    kind: str = "stages",
) -> argparse.Namespace:
    """The options of a benchmark whose tables stand on a page between the lines of `page` (see `fill`).

    Args:
        data: what the folder `--data` holds. parts, kind: of the work, and the option that chooses among them.

    Raises:
        UserError: `--jobs` is no number of jobs.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help=f"folder with {data}")
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / page, help="folder of all runs and tables")
    parser.add_argument("--jobs", type=int, default=1, help="jobs at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the outermost loop")
    parser.add_argument("--sets", nargs="+", choices=sets, default=list(sets), help="data sets")
    parser.add_argument(f"--{kind}", nargs="+", choices=parts, default=list(parts), help="parts of the work, in order")
    parser.add_argument("--tables", action="store_true", help="write the tables of what is finished, and run nothing")
    parser.add_argument("--page", type=Path, help=f"Markdown file whose part between <!-- {page} --> lines they replace")
    parser.add_argument("--record", type=Path, help="file of finished runs, a line of JSON each: not run again, added to")
    parser.add_argument("--plan", action="store_true", help="list the commands, with what is done, and run none")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; write 1 or more")
    return args


def there(data: Path, titles: dict[str, str]) -> list[str]:
    """The sets, of name -> title, that lie in `data`; for each other one a line."""
    names = []
    for name, title in titles.items():
        if all((data / name / split).is_dir() for split in ("train", "test")):
            names.append(name)
        else:
            print(f"left out: {title}, because {data / name} has no folders train/ and test/")
    return names


# ---- what outlives the folder of all runs --------------------------------------------------------------------------------


def unpack(record: Path, root: Path, jobs: Sequence[Job]) -> None:
    """Write what a record keeps of jobs that have left no mark in `root`: their reports, and their CPU seconds.

    Raises:
        UserError: a line is not one of a record.
    """
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    try:
        kept = {line["run"]: (f"{line['cpu_seconds']}\n", dict(line["report"])) for line in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is no record of runs ({type(error).__name__}: {error}); give another --record") from None
    for job in jobs:
        if job.name in kept and not job.mark.exists():
            seconds, report = kept[job.name]
            for file in (job.mark, seconds_file(root, job.name)):
                file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(seconds_file(root, job.name), seconds)
            write_report(job.mark, report)


def pack(record: Path, root: Path, jobs: Sequence[Job]) -> None:
    """Add to a record the finished jobs that leave a report; what it has already stays as it is. Lines are sorted.

    The seconds were needed on the processor of this machine.
    """
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    kept = {json.loads(line)["run"]: line for line in lines}
    for job in jobs:
        if job.name not in kept and job.mark.name == "report.json" and job.mark.exists():
            report = read_report(job.mark)
            excerpt = {name: _rounded(report[name]) for name in RECORDED if report.get(name) is not None}
            seconds = round(cpu_seconds(root, job.name) or 0.0, 2)
            line = {"run": job.name, "cpu_seconds": seconds, "processor": processor(), "report": excerpt}
            kept[job.name] = json.dumps(line, ensure_ascii=False)
    write_atomically(record, "".join(f"{kept[name]}\n" for name in sorted(kept)))


def _rounded(value: Any) -> Any:
    """Numbers of a report to six places."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 6) if isinstance(value, float) else value


def needed(jobs: Sequence[Job]) -> list[Job]:
    """Without what is only made for other jobs, when all of those are finished."""
    for_others = {need for job in jobs for need in job.needs}
    kept: list[Job] = []
    for job in reversed(jobs):
        if job.mark not in for_others or any(job.mark in one.needs for one in kept if not one.mark.exists()):
            kept.insert(0, job)
    return kept


def carry_out(
    args: argparse.Namespace,
    jobs: Sequence[Job],
    page: str,
    before: Callable[[], None],
    tables: Callable[[], str],
    forked: bool = False,
) -> int:
    """Run what is left after `before()`, and write the tables; the exit status is 1 if a job failed.

    Args:
        forked: as of `run_jobs`.
    """
    if args.plan:
        print(*jobs, sep="\n")
        return 0
    failed, stopped = [], False
    if args.record:
        unpack(args.record, args.output_dir, jobs)
    if not args.tables:
        before()
        try:
            failed = run_jobs(needed(jobs), args.output_dir, args.jobs, forked)
        except KeyboardInterrupt:
            stopped = True
    if args.record:
        pack(args.record, args.output_dir, jobs)
    made = tables()
    write_atomically(args.output_dir / f"{page}.md", made)
    if args.page:
        write_atomically(args.page, fill(args.page.read_text(encoding="utf-8"), page, made.strip()))
    print(f"tables: {args.page or args.output_dir / f'{page}.md'}")
    if stopped:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return 130
    if failed:
        print(f"without a result: {' '.join(job.name for job in failed)}", file=sys.stderr)
    return 1 if failed else 0
