"""A worse annotator: in a share of the images everything that it saw is moved on to the next class.

    python -m benchmarks.spoil ann --share 0.2 --output_dir worse

Which images is drawn by key, a smaller share within a larger one. Features stay as they are: it is the judgement that is
spoiled, not the sight. Such mistakes are the hardest to see: they are the same for every image of a class.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coreg.annotate.summary import summary
from coreg.errors import UserError, exits_with_one_line
from coreg.store.store import AnnotationStore, StoreWriter, make_manifest
from coreg.weak.noise import uniforms


def moved_on(votes: np.ndarray, probs: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Votes (N, T) and probabilities (N, C), those of `rows`, bool (N,), moved from class c to c + 1, the last to 0.

    A template that abstained, -1, still does.
    """
    n_classes = probs.shape[1]
    next_class = np.where(votes < 0, votes, (votes + 1) % n_classes)
    columns = rows[:, None]
    return np.where(columns, next_class, votes).astype(votes.dtype), np.where(columns, np.roll(probs, 1, axis=1), probs)


def spoil(source: AnnotationStore, share: float, output: Path) -> AnnotationStore:
    """Write the worse store.

    Raises:
        UserError: the folder holds something else or cannot be written.
    """
    images = source.image_list()
    rows = uniforms(0, "spoiled", np.arange(len(source)), 1)[:, 0] < share
    votes, probs = moved_on(source.votes(), source.probs(), rows)
    spoiled = hashlib.sha256(f"{source.hash} {share}".encode()).hexdigest()
    model = {"spec": f"spoiled {share:g}: {source.manifest['model']['spec']}", "weights": f"sha256 {spoiled}"}
    kept = {key: source.manifest.get(key) for key in ("data_root", "preprocessing", "versions", "features")}
    size = source.manifest["block_size"]
    writer = StoreWriter(output, make_manifest(images, source.class_names, source.templates, model, size, **kept))
    tensors = {"votes": votes, "probs": probs}
    if (features := source.features()) is not None:
        tensors["features"] = features
    failed = StoreWriter(source.root, source.manifest).unreadable()
    writer.write_all(images, lambda rows: {name: table[rows] for name, table in tensors.items()}, failed)
    return AnnotationStore.open(output)


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Spoil and say what came out; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="annotation store")
    parser.add_argument("--share", type=float, required=True, help="of the images, 0 to 1")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the new annotation store")
    args = parser.parse_args(argv)
    if not 0 <= args.share <= 1:
        raise UserError(f"--share is {args.share:g}; write a share from 0 to 1")
    print(summary(spoil(AnnotationStore.open(args.store), args.share, args.output_dir)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
