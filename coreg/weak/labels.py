"""What is known of the labels that a network is to learn, wherever it comes from: an annotator, a person, or chance."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from coreg.data.images import HELD_OUT, TRAIN
from coreg.errors import UserError
from coreg.files import write_atomically
from coreg.plaintext import one_line, printable
from coreg.records import Number, RecordError, parse_record
from coreg.scripts import launched
from coreg.store.manifest import DRAWN
from coreg.store.store import AnnotationStore
from coreg.weak.noise import flip, hierarchical, instance, noise_report, pico, uniform, uss
from coreg.weak.prefilter import likely_classes
from coreg.weak.rules import candidate_sets, mean_candidates, partial_accuracy

GENERATORS = {
    "flip": flip,
    "pico": pico,
    "fps": uniform,
    "uniform": uniform,
    "uss": uss,
    "hierarchical": hierarchical,
    "instance": instance,
}
HEAD = {"classes": Number(1, 1e9), "source": dict, "hash": str}
ARRAYS = {"table": np.uint8, "samples": np.int64, "certain": np.bool_, "usable": np.bool_, "truth": np.int64}


@dataclass(frozen=True)
class WeakLabels:
    """Candidate sets of N images of C classes."""

    table: np.ndarray  # bool (N, C), the candidate sets; no row is empty
    samples: np.ndarray  # int64 (N,), rows of the image list, in any order and number: a long tail is a choice of rows
    certain: np.ndarray  # bool (N,), sets of one class that a person gave; they are never doubted
    usable: np.ndarray  # bool (N,), False where nothing is known: every class is a candidate, there is nothing to learn
    truth: np.ndarray  # int64 (N,), true classes, -1 where unknown; for reports alone
    source: dict[str, Any]  # plain values: a store's hash, its annotator and the candidate rule, or how sets were drawn

    @classmethod
    def from_store(
        cls, store: AnnotationStore, rule: str = "union", known: np.ndarray | None = None, samples: np.ndarray | None = None
    ) -> WeakLabels:
        """The candidate sets of a store.

        Args:
            store: of an annotator's evidence, or of sets that were drawn.
            rule: as of `candidate_sets`.
            known: int64 over all rows of the store, classes that a person gave, -1 elsewhere.
            samples: rows of the store, all by default.

        Raises:
            UserError: the rule cannot be understood or does not go with the store.
        """
        samples = np.arange(len(store)) if samples is None else samples
        table, unknown = candidate_sets(store, rule)[samples], np.full(len(store), -1)
        known = (unknown if known is None else known)[samples]
        certain = known >= 0
        table[certain] = known[certain, None] == np.arange(table.shape[1])
        spec = store.manifest["model"]["spec"]
        made = {"generator": spec.removeprefix(DRAWN)} if store.drawn else {"annotator": spec, "rule": rule}
        return cls(
            table=table,
            samples=samples,
            certain=certain,
            usable=certain | (store.drawn or (store.votes()[samples] >= 0).any(axis=1)),
            truth=(unknown if store.labels is None else store.labels)[samples],
            source=made | {"store": store.hash},
        )

    @classmethod
    def from_truth(
        cls, truth: np.ndarray, classes: int | np.ndarray, generator: str, seed: int, **numbers: float
    ) -> WeakLabels:
        """Candidate sets drawn from true labels, one image list row each; the same seed gives the same sets anywhere.

        Args:
            truth: int64 (N,), true classes in [0, C).
            classes: C; for `hierarchical` int64 (C,), the super-class of each class; for `instance` float (N, C), the
                probabilities of a classifier.
            generator: one of `GENERATORS`; `numbers` are its own (see `coreg.weak.noise`).

        Raises:
            UserError: a number out of range.
        """
        table = GENERATORS[generator](truth, classes, **numbers, seed=seed)
        everything = np.ones(len(table), dtype=bool)
        written = ",".join(f"{name}={value}" for name, value in (numbers | {"seed": seed}).items())
        source = {"generator": f"{generator}({written})"}
        return cls(table, np.arange(len(table)), ~everything, everything, truth.astype(np.int64), source)

    def revealed(self) -> WeakLabels:
        """The true labels in the place of candidate sets, as if a person had given them all; unknown ones teach nothing."""
        known = self.truth >= 0
        table = (self.truth[:, None] == np.arange(self.table.shape[1])) | ~known[:, None]
        return dataclasses.replace(self, table=table, certain=known, usable=known, source=self.source | {"revealed": True})

    def keep_likely(self, probs: np.ndarray, prefilter: str) -> WeakLabels:
        """Without the candidates that a zero-shot classifier finds unlikely; samples whose set becomes empty are left out.

        Sets that a person gave stay, and so do those of images of which nothing is known.

        Args:
            probs: float (N, C), of the classifier. prefilter: as of `likely_classes`.

        Returns:
            The rest, whose source has the number of samples before and of those `dropped`, and the mean size and the
            share with the truth of the sets, before and after.

        Raises:
            UserError: the pre-filter cannot be understood, needs labelled images, or leaves fewer than 2 samples.
        """
        table = self.table & (likely_classes(probs, prefilter, self.known) | (self.certain | ~self.usable)[:, None])
        kept = np.flatnonzero(table.any(axis=1))
        if len(kept) < 2:
            raise UserError(
                f"--prefilter {prefilter} leaves {len(kept)} of {len(table)} images a candidate; write a wider one, such "
                f"as topk, or name another --prefilter_annotations"
            )
        rest = {name: getattr(self, name)[kept] for name in ("samples", "certain", "usable", "truth")}
        rest |= {"table": table[kept]}
        sizes, covered = (
            {"before": of(self.table, self.truth), "after": of(rest["table"], rest["truth"])}
            for of in (lambda table, truth: mean_candidates(table), partial_accuracy)
        )
        filtered = {"rule": prefilter, "images": len(table), "dropped": len(table) - len(kept)}
        filtered |= {"mean_candidates": sizes, "partial_accuracy": covered}
        return dataclasses.replace(self, **rest, source=self.source | {"prefilter": filtered})

    @cached_property
    def known(self) -> np.ndarray:
        """int64 (N,): classes that a person gave, -1 elsewhere."""
        return np.where(self.certain, self.table.argmax(axis=1), -1)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of everything in it."""
        digest = hashlib.sha256(json.dumps([self.table.shape, self.source], sort_keys=True).encode())
        for name, array in self._arrays().items():
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()

    def _arrays(self) -> dict[str, np.ndarray]:
        packed = {"table": np.packbits(self.table, axis=1)}
        return {name: packed.get(name, getattr(self, name)) for name in ARRAYS}

    def save(self, path: Path) -> None:
        """Write one safetensors file, a bit a candidate, with the source in its header; whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        head = {"classes": self.table.shape[1], "source": self.source, "hash": self.hash}
        write_atomically(path, save(self._arrays(), metadata={"coreg": json.dumps(head, sort_keys=True)}))

    @classmethod
    def read(cls, path: Path) -> WeakLabels:
        """What `save` wrote.

        Raises:
            UserError: it is missing, or is not what was written.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                head = parse_record((file.metadata() or {}).get("coreg", "null"), HEAD)
                arrays = {name: file.get_tensor(name) for name in ARRAYS}
            n, n_classes = len(arrays["samples"]), int(head["classes"])
            for name, kind in ARRAYS.items():
                shape = (n, -(-n_classes // 8)) if name == "table" else (n,)
                if (arrays[name].dtype, arrays[name].shape) != (kind, shape):
                    raise RecordError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
            arrays["table"] = np.unpackbits(arrays["table"], axis=1, count=n_classes).view(bool)
            weak = cls(**arrays, source=head["source"])
            if weak.hash != head["hash"]:
                raise RecordError("its hash does not match")
        except Exception as error:  # safetensors lets many kinds through
            reason = one_line(error)
            raise UserError(f"{path} does not hold the weak labels of a run: {reason}; train again to have them") from None
        return weak


def next_command(store: AnnotationStore) -> str:
    """What to type to train on the store."""
    return f"{launched('train_coreg.py')} --annotations {shlex.quote(str(store.root))} --output_dir runs/mine"


def drawn_summary(store: AnnotationStore) -> str:
    """What a store of drawn sets holds, how noisy they really are, and the next command to type, in a few lines."""
    sets, labels = store.drawn_sets(), np.full(len(store), -1) if store.labels is None else store.labels
    lines = [f"{store.root}: {len(store)} images, {len(store.class_names)} classes, {store.manifest['model']['spec']}"]
    for index, split in enumerate(("train", "test")):
        rows = np.flatnonzero((store.split == index) & (labels >= 0))
        if len(rows):
            lines.append(f"  {split:5} {noise_report(sets[rows], labels[rows])}")
    if (store.split == HELD_OUT).any():
        counts = np.sort(np.bincount(labels[(store.split == TRAIN) & (labels >= 0)], minlength=len(store.class_names)))
        held_out = f"{(store.split == HELD_OUT).sum()} held out; training images of a class: "
        lines.append(f"  {(store.split == TRAIN).sum()} training images, {held_out}{counts[-1]} to {counts[0]}")
    lines.append(f"next: {next_command(store)}")
    return printable("\n".join(lines), lines=True)
