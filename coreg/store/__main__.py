"""Decoded images that trainings left on the disk (`--pixels disk`): what is there, and away with it.

python -m coreg.store list ann                          # of a store, or of a folder given as --pixels_dir
python -m coreg.store delete ann/pixels/32x32x3-squash-0123456789ab
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from coreg.errors import UserError, exits_with_one_line
from coreg.plaintext import printable
from coreg.store.pixels import delete, describe, pixel_folders


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m coreg.store list|delete FOLDER...`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__.strip())
        return 0
    if len(words) < 2 or words[0] not in ("list", "delete"):
        raise UserError("write python -m coreg.store list FOLDER, or python -m coreg.store delete FOLDER")
    folders = [Path(word) for word in words[1:]]
    if words[0] == "list":
        missing = [folder for folder in folders if not folder.is_dir()]
        if missing:
            raise UserError(f"there is no folder {missing[0]}; give an annotation store, or a --pixels_dir")
        lines = [describe(folder) for folder in pixel_folders(folders)]
        print(printable("\n".join(lines) or "no decoded images there", lines=True))
        return 0
    for folder in folders:
        line = describe(folder)
        delete(folder)
        print(printable(f"deleted {line}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
