"""Progress bars on a terminal and in the log file of a cluster job."""

from __future__ import annotations

import sys


def seconds_between_lines() -> float:
    """Seconds from one drawing of a bar to the next: a log file keeps every line that a terminal overwrites."""
    return 0.1 if sys.stderr.isatty() else 30.0
