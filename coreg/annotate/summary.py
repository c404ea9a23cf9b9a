"""What an annotation store holds, for a person, in a few lines."""

from __future__ import annotations

import numpy as np

from coreg.annotate.changes import before_and_after
from coreg.annotate.health import examine, some
from coreg.plaintext import printable
from coreg.store.store import AnnotationStore
from coreg.weak.labels import drawn_summary, next_command


def summary(store: AnnotationStore) -> str:
    """What a person wants to know about a store, in a few lines, with the next command to type."""
    if store.drawn:
        return drawn_summary(store)
    health, names, unreadable = examine(store), store.class_names, int(store.unreadable.sum())
    sizes = health.sizes
    lines = [
        f"{store.root}: {len(store)} images, {len(names)} classes, {len(store.templates)} templates",
        *(f"  {line}" for line in health.about),
        f"  unreadable images      {unreadable}" + (" (see errors.csv)" if unreadable else ""),
        f"  mean candidates        {np.arange(len(sizes)) @ sizes / max(1, sizes.sum()):.2f} of {len(names)}",
        f"  template agreement     {health.unanimity:.1%} of the templates name an image's most named class",
        f"  classes never named    {some(names, np.flatnonzero(health.named == 0)) or 'none'}",
        f"  classes always named   {some(names, np.flatnonzero(health.named == 1)) or 'none'}",
    ]
    if health.confused:
        shown = [" and ".join(names[c] for c in pair.classes) for pair in health.confused[:3]]
        lines.append(f"  confused pairs         {len(health.confused)}, such as {'; '.join(shown)}")
    if health.splits is not None:
        for index, split in enumerate(("train", "test")):
            averaged, single, among = (health.splits[name][index] for name in ("zero_shot", "single", "among"))
            if np.isfinite(averaged):
                lines.append(
                    f"  {split:5}                  zero-shot {averaged:.1%} (template 0 alone {single:.1%}), "
                    f"label among the candidates {among:.1%}"
                )
    lines += [f"  {line}" for line in before_and_after(store.manifest)]
    if (store.root / "report.html").exists():
        lines.append(f"  more                   {store.root / 'report.html'}")
    lines.append(f"next: {next_command(store)}")
    return printable("\n".join(lines), lines=True)
