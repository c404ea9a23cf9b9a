"""Built-in recipes: one YAML file a data set, with the commands that use it and its published results on top."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def listing() -> dict[str, str]:
    """Name of every built-in recipe -> its description in one line, the first comment line of its file."""
    files = sorted(FOLDER.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("#").strip() for file in files}
