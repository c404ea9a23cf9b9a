"""Label the images whose label would teach a finished run most, in a browser, and write the labels into the run folder.

    coreg-label runs/a                   prints an address of this machine; open it
    coreg-label runs/a --port 8000       after ssh -L 8000:127.0.0.1:8000 from where the browser is

The page is the run's label.html. Every answer is written into the run's label_next.csv at once, beside what stands there.
The end, or Ctrl-C, prints the command that trains with the labels.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coreg.config import option, parse, paths_and_options
from coreg.errors import UserError, exits_with_one_line
from coreg.label.answers import read_answers
from coreg.label.page import read_page
from coreg.label.server import LabelServer
from coreg.plaintext import printable


@dataclass
class LabelConfig:
    """Where the page is."""

    port: int = option(0, "port of this machine that the page is served at, 0 for a free one", (0, 65_535))


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `coreg-label`."""
    folders, options = paths_and_options(argv)
    (config,) = parse(LabelConfig, argv=options, prog="coreg-label RUN", description=__doc__)
    if len(folders) != 1:
        raise UserError(f"{len(folders)} run folders are named; write for example: coreg-label runs/a")
    folder = Path(folders[0])
    shown = read_page(folder)
    with LabelServer(folder, shown, config.port) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        print(f"Open {server.address} in a browser. Ctrl-C ends; every answer is saved at once.", flush=True)
        try:
            server.done.wait()
        except KeyboardInterrupt:
            print()
        server.shutdown()
        answers = [answer for answer in read_answers(server.file, shown) if answer is not None]
    none = sum(not answer for answer in answers)
    counts = f"{len(answers) - none} images labelled, {none} none of these, {len(shown.images) - len(answers)} left"
    print(printable(f"{server.file}: {counts}"))
    if answers:
        print(printable(f"next: {shown.next_command(folder)}"))


if __name__ == "__main__":
    main()
