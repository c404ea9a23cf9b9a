"""Which files of a folder are images, and notes about those that are not."""

from __future__ import annotations

import posixpath
import re
from collections import Counter

from coreg.data.decode import HEIC, SUFFIXES

# what operating systems and network drives leave in folders: small copies of images, and lists of them
SYSTEM_FOLDERS = frozenset(("@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found"))
SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini"))
SHOWN = 8


class PassedOver:
    """Counts the files of a source that are no images."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def takes(self, path: str) -> bool:
        """Whether the file at this posix path is listed as an image; other files are counted, the system's own are not."""
        *folders, name = path.split("/")
        if name.startswith(".") or name.casefold() in SYSTEM_FILES or any(is_system_folder(part) for part in folders):
            return False
        suffix = posixpath.splitext(name)[1].lower()
        if suffix in SUFFIXES:
            return True
        plain = re.fullmatch(r"\.[a-z0-9_+-]{1,12}", suffix)
        self.counts[suffix if plain else "of other kinds" if suffix else "without suffix"] += 1
        return False

    def notes(self) -> list[str]:
        """One line, or none: `passed over: 12 .heic (pip install pillow-heif and they are read), 5 without suffix`."""
        kinds = [kind for kind, count in self.counts.items() if count > 0]
        if not kinds:
            return []
        kinds = sorted(kinds, key=lambda kind: (kind not in HEIC, -self.counts[kind], kind))
        hint = " (pip install pillow-heif and they are read)"
        parts = [f"{self.counts[kind]} {kind}{hint if kind in HEIC else ''}" for kind in kinds[:SHOWN]]
        rest = sum(self.counts[kind] for kind in kinds[SHOWN:])
        return ["passed over: " + ", ".join([*parts, *([f"{rest} others"] if rest else [])])]


def is_system_folder(name: str) -> bool:
    """Whether a folder of this name is hidden, or one that a system makes for itself."""
    return name.startswith(".") or name.casefold() in SYSTEM_FOLDERS
