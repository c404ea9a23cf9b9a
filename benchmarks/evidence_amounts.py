"""What stage `amounts` of `benchmarks.evidence` tries: recipe `folder` with fewer and with more images."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.evidence_tables import LABELS

VIEW = 128  # pixels of a view, and of the recipe
COREG = "train_coreg.py"


@dataclass(frozen=True)
class Amount:
    """How recipe `folder` is tried at its own pixels on a list of a set's images.

    epochs: those of partial cross-entropy, with the recipe's batch. usual: those that go with each of `batches`. small:
        those at 64 pixels. coreg: pixels, epochs and warm-up of Co-Reg.
    """

    title: str
    epochs: tuple[int, ...]
    usual: int
    batches: tuple[int, ...]
    small: tuple[int, ...]
    coreg: tuple[tuple[int, int, int], ...]


AMOUNTS = {
    "few": Amount("500 images", (4, 8, 20), 8, (16, 64), (8, 20), ((64, 8, 3), (64, 20, 6), (128, 8, 3), (128, 20, 6))),
    "many": Amount(
        "4,000 (EuroSAT) and 5,000 images", (1, 2, 4), 2, (64,), (2, 4, 8), ((64, 4, 2), (64, 8, 3), (128, 4, 2))
    ),
}


def wide(size: int) -> tuple[str, ...]:
    """Options of a student with images of another size."""
    return ("--image_size", f"{size}", "--padding", f"{size // 8}")


def tried(of: Amount) -> dict[str, tuple[str, ...]]:
    """Scripts and options of what is trained on one amount of images; the cheap ones first."""
    lone = {f"partial_64_e{epochs}": (64, epochs, ()) for epochs in of.small}
    lone |= {f"partial_{VIEW}_e{epochs}": (VIEW, epochs, ()) for epochs in of.epochs}
    lone |= {f"partial_{VIEW}_e{of.usual}_b{b}": (VIEW, of.usual, ("--batch_size", f"{b}")) for b in of.batches}
    made = {
        name: (COREG, *wide(size), *options, "--epochs", f"{epochs}", "--warmup_epochs", f"{epochs}")
        for name, (size, epochs, options) in lone.items()
    }
    for size, epochs, warmup in of.coreg:
        options = (*wide(size), "--epochs", f"{epochs}", "--warmup_epochs", f"{warmup}")
        made[f"coreg_{size}_e{epochs}"] = (COREG, *options)
    return made


def tried_titles(of: Amount) -> dict[str, str]:
    """Method in the folders -> title, of one amount of images."""
    titles = {LABELS: "the labels, nothing trained", f"probe_student_{VIEW}": f"probe, {VIEW} pixels"}
    for method in tried(of):
        what, size, epochs, *batch = method.split("_")
        count = int(epochs[1:])
        title = (
            f"{'Co-Reg' if what == 'coreg' else 'partial cross-entropy'}, {size} pixels, {count} epoch{'s' * (count > 1)}"
        )
        titles[method] = title + (f", batch {batch[0][1:]}" if batch else "")
    return titles
