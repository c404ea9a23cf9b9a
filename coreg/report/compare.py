"""One table of many runs: every method writes the same report.json, so they stand side by side.

    coreg-report runs/*                                     Markdown on the screen
    coreg-report runs --format html --output compare.html   a page that stands alone
    coreg-report runs --format csv --output compare.csv     all numbers, unrounded

A path is a report.json or a folder that holds some, at any depth. Runs of a method that differ in their seed alone are one
row, with mean and standard deviation; where other settings differ, a row says what is special about it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coreg.config import beside_the_job, names_of, option, parse, paths_and_options, read_yaml
from coreg.errors import UserError, exits_with_one_line
from coreg.files import check_writable, sha256_of, write_atomically
from coreg.learn.partial_options import OPTIONS
from coreg.plaintext import printable
from coreg.records import RecordError
from coreg.report.record import SETTINGS, read_report
from coreg.report.tables import FORMATS, Run, compare
from coreg.settings import JobConfig, TagJob

# settings that make no other method of a run
NOT_THE_METHOD = {"seed", *beside_the_job(JobConfig), *beside_the_job(TagJob)}


@dataclass
class CompareConfig:
    """What the table looks like and where it goes."""

    format: Literal["md", "csv", "html"] = option("md", "Markdown, all numbers as CSV, or a page that stands alone")
    output: str | None = option(None, "file to write; default: the screen")


def find_reports(paths: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The report.json files at or under `paths`, each once and in order, and a line for each path without any."""
    reports: dict[Path, None] = {}
    left_out = []
    for path in map(Path, paths):
        here = [path] if path.is_file() else sorted(path.rglob("report.json"))
        if not here:
            left_out.append(f"{path} holds no report.json" if path.exists() else f"{path} does not exist")
        reports |= dict.fromkeys(here)
    return list(reports), left_out


def read_run(path: Path) -> Run:
    """A report with the settings of the config.yaml beside it.

    Raises:
        UserError: it cannot be read, is damaged, or is no report of this schema; the message is one line.
    """
    try:
        report = read_report(path)
    except RecordError as error:
        raise UserError(f"{path} is no report of a run ({error})") from None
    settings = path.with_name(SETTINGS)
    recorded = (report.get("files") or {}).get(SETTINGS)
    if recorded and settings.exists() and not (settings.is_file() and sha256_of(settings) == recorded):
        raise UserError(f"{settings} was changed after {path.name} had been written; take the run's own, or delete it")
    return Run(path, report, read_settings(settings))


def read_settings(path: Path) -> dict[str, str]:
    """What makes a run's method, as short texts by name; empty where no config.yaml can be read."""
    try:
        settings = read_yaml(path)
    except RecordError:
        return {}
    settings, texts = settings if isinstance(settings, dict) else {}, {}
    own = OPTIONS.get(str(settings.get("method")))
    # older versions gave every method the options of all
    others = names_of(*OPTIONS.values()) - names_of(own) if own else set()
    for name, value in settings.items():
        parts = value if isinstance(value, list) else [value]
        if name not in NOT_THE_METHOD | others and all(isinstance(part, (str, int, float)) for part in parts):
            texts[str(name)] = " ".join(map(str, parts))
    return texts


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `coreg-report`."""
    paths, options = paths_and_options(argv)
    (config,) = parse(CompareConfig, argv=options, prog="coreg-report PATH ...", description=__doc__)
    if not paths:
        raise UserError("no runs are named; write for example: coreg-report runs/*")
    if config.output is not None:
        check_writable(config.output, "--output")
    reports, left_out = find_reports(paths)
    runs = []
    for path in reports:
        try:
            runs.append(read_run(path))
        except UserError as error:
            left_out.append(str(error))
    tables, repeated = compare(runs)
    for line in [*left_out, *repeated]:
        print(f"left out: {printable(line)}", file=sys.stderr)
    if not tables:
        raise UserError(f"{paths[0]} holds no report that can be read; give the folders of finished runs, such as runs/*")
    page = FORMATS[config.format](tables)
    if config.output is None:
        print(page, end="")
        return
    write_atomically(config.output, page, "choose another --output")
    print(f"{printable(config.output)}: {sum(len(shown.rows) for shown in tables)} rows from {len(runs)} runs")


if __name__ == "__main__":
    main()
