"""The scripts of the repository as an installation has them: commands, and the places of files that launchers read.

    coreg-train, coreg-annotate        train_coreg.py and annotate_vlm.py
    coreg-baseline                     lists the scripts of baselines/
    coreg-baseline pll --method cc     runs one of them
    python -m coreg.scripts            lists the files of accelerate_configs/ and where they are
    python -m coreg.scripts cpu.yaml   prints where one of them is

Under a launcher a script is a module: accelerate launch -m train_coreg, accelerate launch -m coreg.baselines.pll. In the
repository coreg/baselines and coreg/accelerate_configs are links to the folders beside the package.
"""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from coreg.errors import UserError, exits_with_one_line
from coreg.plaintext import did_you_mean

_PACKAGE = Path(__file__).parent
# the command that runs a script, as it was typed; None where a script is started as it is
command: str | None = None


def baselines() -> dict[str, Path]:
    """Name of every script of baselines/ -> its file."""
    files = sorted([*(_PACKAGE / "baselines").glob("*.py"), *(_PACKAGE / "baselines").glob("*.sh")], key=lambda p: p.stem)
    # a shell file without a first line that names its shell is a part of others
    return {file.stem: file for file in files if file.suffix == ".py" or _text(file).startswith("#!")}


def configurations() -> dict[str, Path]:
    """Name of every file of accelerate_configs/ -> the file."""
    return {file.name: file for file in sorted((_PACKAGE / "accelerate_configs").iterdir()) if file.is_file()}


def launched(script: str) -> str:
    """How to launch a script of the repository: by its file where one types in a checkout, by its module elsewhere.

    Args:
        script: `train_coreg.py`, `baselines/pll.py`.
    """
    module = script.removesuffix(".py").replace("/", ".").replace("baselines.", "coreg.baselines.")
    return shlex.join(["accelerate", "launch", *([script] if os.path.isfile(script) else ["-m", module])])


def train() -> None:
    """`coreg-train`."""
    _run("coreg-train", "train_coreg", sys.argv[1:])


def annotate() -> None:
    """`coreg-annotate`."""
    _run("coreg-annotate", "annotate_vlm", sys.argv[1:])


def baseline() -> None:
    """`coreg-baseline`."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_listing({name: _summary(file) for name, file in baselines().items()}))
        print("\ncoreg-baseline NAME --help lists the options of one")
        print("several processes: accelerate launch -m coreg.baselines.NAME")
        return
    file = _chosen(name, baselines(), "baseline")
    if file.suffix == ".sh":
        os.execvpe("bash", ["bash", str(file), *words], {"PYTHON": sys.executable} | os.environ)
    _run(f"coreg-baseline {name}", f"coreg.baselines.{name}", words)


def _run(typed: str, module: str, words: list[str]) -> None:
    """Run a module as the main program with these arguments."""
    global command
    command = typed
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@exits_with_one_line
def _chosen(name: str, files: Mapping[str, Path], kind: str) -> Path:
    if name in files:
        return files[name]
    raise UserError(f"unknown {kind} {name}{did_you_mean(name, files)} (there are: {', '.join(files)})")


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _summary(file: Path) -> str:
    """The first line of a file's docstring, or its first comment."""
    lines = (line.strip('"# ') for line in _text(file).split("\n") if not line.startswith("#!"))
    return next(line for line in lines if line)


def _listing(rows: Mapping[str, object]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {row}" for name, row in rows.items())


def main() -> None:
    """`python -m coreg.scripts`."""
    files = configurations()
    if sys.argv[1:]:
        print(_chosen(sys.argv[1], files, "file"))
    else:
        print(_listing(files))


if __name__ == "__main__":
    main()
