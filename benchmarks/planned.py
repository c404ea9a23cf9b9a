"""The command line of a benchmark that is a plan of many jobs: `benchmarks.evidence`, `partialclip` and `tags`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.jobs import Job, run_jobs
from benchmarks.tables import fill
from coreg.errors import UserError
from coreg.files import write_atomically


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
    if not args.tables:
        before()
        try:
            failed = run_jobs(jobs, args.output_dir, args.jobs, forked)
        except KeyboardInterrupt:
            stopped = True
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
