"""A store made from a store: the annotator's evidence mended by the features of its images (`coreg.weak.refine`).

    python -m coreg.annotate refine ann --output_dir ann2                 # the features of a view
    python -m coreg.annotate refine ann --features own --output_dir ann2  # the annotator's own features

The new store has two templates: the best class, and the second best where it has at least 0.3 of the best's probability,
otherwise the best again. Candidate rules and everything else work on it as on any store. Test images are judged by their
features alone. The annotator's features are kept; its evidence stays in the store that was refined, which is recorded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

import coreg
from coreg.annotate.health import write_report
from coreg.annotate.settings import RefineConfig, ViewConfig
from coreg.annotate.view import View, make_view
from coreg.data.images import TEST, TRAIN
from coreg.errors import UserError
from coreg.process import main_process_decides
from coreg.store.manifest import REFINED, make_manifest
from coreg.store.store import AnnotationStore
from coreg.store.writer import StoreWriter, continued
from coreg.weak.mixture import Subset
from coreg.weak.refine import JUDGED_IMAGES, Refinement, drawn, refine
from coreg.weak.rules import candidates_of
from coreg.weak.trust import view_fit

TEMPLATES = ("refined: best class", "refined: second class, or the best again")
_ENTRIES = 1 << 22  # of (n, C), in a block
SECOND = 0.3  # of the best's probability, from which the second best class is a candidate


def refine_store(
    source: AnnotationStore,
    output: Path,
    config: RefineConfig,
    view: ViewConfig,
    accelerator: Accelerator,
    part: np.ndarray | None = None,
) -> AnnotationStore:
    """Make the refined store, or find it finished; every process gets it.

    Args:
        source: what is refined. output: the new store's folder. config: which features, and how evidence is read.
        view: the network, where the features are not the annotator's own.
        part: int64, rows of the training images to learn from, all by default; the others keep their evidence.

    Raises:
        UserError: the source keeps no features, is refined already, has no readable training image, or `output` holds
            something else.
    """
    main_process_decides(accelerator, lambda: _check(source, config))
    seen, features = None, {"features": "own"}
    if config.features == "view":
        seen = make_view(source, view, accelerator)
        features = {"features": "view", "view": seen.root.name, "view_hash": seen.hash}
    chosen = {"weight": config.weight, "prior": config.prior, "coreg": coreg.__version__}
    if part is not None:
        features["part"] = {"images": len(part), "sha256": hashlib.sha256(part.tobytes()).hexdigest()}
    weights = hashlib.sha256("\n".join([source.hash, *map(str, (features | chosen).values())]).encode()).hexdigest()
    spec = f"{REFINED}{features.get('view', 'own features')}: {source.manifest['model']['spec']}"
    kept = {key: source.manifest.get(key) for key in ("data_root", "preprocessing", "versions", "features")}
    record = {
        "source": str(source.root.resolve()),
        "source_hash": source.hash,
        "model": source.manifest["model"],
    } | features
    model = {"spec": spec, "weights": f"sha256 {weights}"}
    size = source.manifest["block_size"]
    manifest = make_manifest(source.image_list(), source.class_names, TEMPLATES, model, size, **kept, refined=record)

    def work() -> None:
        continued(output, manifest)
        try:
            AnnotationStore.open(output)
        except UserError:  # not there, unfinished or damaged
            _write(source, seen, config, output, manifest, part)

    main_process_decides(accelerator, work)
    return AnnotationStore.open(output)


def _check(source: AnnotationStore, config: RefineConfig) -> None:
    if "refined" in source.manifest:
        raise UserError(f"{source.root} is refined already; refine {source.manifest['refined']['source']} instead")
    if config.features == "own":
        source.need_features("leave out --features own")
    if not len(source.rows_of(TRAIN)):
        raise UserError(f"{source.root} has no readable training image to refine")


def _write(
    source: AnnotationStore,
    seen: View | None,
    config: RefineConfig,
    output: Path,
    manifest: dict[str, Any],
    part: np.ndarray | None,
) -> None:
    """Refine and write, on one process."""
    own = source.features()
    features = own if seen is None else seen.features()
    readable = ~source.unreadable if seen is None else ~(source.unreadable | seen.unreadable)
    asked = source.split == TRAIN
    if part is not None:
        asked &= np.isin(np.arange(len(source)), part)
    train, test = np.flatnonzero(asked & readable), np.flatnonzero((source.split == TEST) & readable)
    if not len(train):
        raise UserError(f"{source.root} has no training image to refine whose features could be read")
    prior = None if config.prior == "auto" else config.prior
    refinement = refine(features, source.probs(), train, test, prior, config.weight)
    votes, changes = _changes(source, refinement, asked)
    judged = drawn(train, "judged")[:JUDGED_IMAGES]
    z, evidence = refinement.projection(Subset(features, train[judged])), source.probs()[train[judged]]
    manifest["refined"] |= changes | {"fit": view_fit(z, evidence, refinement.setting, train[judged])}

    def part_of_store(rows: slice) -> dict[str, np.ndarray]:
        kept = {} if own is None else {"features": own[rows]}
        return {"votes": votes[rows], "probs": refinement.part(rows)} | kept

    reasons = StoreWriter(source.root, source.manifest).unreadable()
    StoreWriter(output, manifest).write_all(source.image_list(), part_of_store, reasons)
    write_report(AnnotationStore.open(output), None)


def votes_of(probs: np.ndarray) -> np.ndarray:
    """The best class, and the second best if it is `SECOND` as probable, else the best again: (N, C) -> int16 (N, 2)."""
    order = np.argsort(-probs.astype(np.float32), axis=1, kind="stable")[:, :2]
    best, second = order[:, 0], order[:, -1]
    rows = np.arange(len(probs))
    near = probs[rows, second] >= SECOND * probs[rows, best].astype(np.float32)
    return np.stack([best, np.where(near, second, best)], axis=1).astype(np.int16)


def _changes(source: AnnotationStore, refinement: Refinement, asked: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """The new votes int16 (N, 2), and what the manifest says of how it was refined and what it changed.

    Accuracies are there where labels are known, for test images and the training images asked for, bool (N,). One block of
    rows is mended after another.
    """
    train = asked & ~source.unreadable
    labels = np.full(len(source), -1) if source.labels is None else source.labels
    best, sizes, holds = ({"before": [], "after": []} for _ in range(3))
    raw = source.drawn_sets() if source.drawn else source.votes()
    votes = np.empty((len(source), 2), dtype=np.int16)
    classes = len(source.class_names)
    step = max(1, _ENTRIES // classes)
    for rows in (slice(start, start + step) for start in range(0, len(source), step)):
        mended = refinement.part(rows)
        votes[rows] = votes_of(mended)
        for when, named, probs in (("before", raw, refinement.evidence[rows]), ("after", votes, mended)):
            sets = named[rows] if named.dtype == bool else candidates_of(named[rows], probs)
            best[when].append(probs.argmax(axis=1))
            sizes[when].append(sets.sum(axis=1))
            holds[when].append(sets[np.arange(len(sets)), labels[rows]])
    best, sizes, holds = ({when: np.concatenate(x) for when, x in parts.items()} for parts in (best, sizes, holds))
    compared = {
        "other_best_class": float((best["after"] != best["before"])[train].mean()),
        "shares": {when: (np.bincount(x[train], minlength=classes) / train.sum()).tolist() for when, x in best.items()},
        "mean_candidates": {when: float(size[train].mean()) for when, size in sizes.items()},
    }
    if source.labels is not None:
        accuracy, among = {"before": {}, "after": {}}, {"before": {}, "after": {}}
        for name, among_these in (("train", asked), ("test", source.split == 1)):
            rows = among_these & (labels >= 0)
            for when in ("before", "after") if rows.any() else ():
                accuracy[when][name] = float(((best[when] == labels) & ~source.unreadable)[rows].mean())
                among[when][name] = float(holds[when][rows].mean())
        compared |= {"accuracy": accuracy, "label_among_candidates": among}
    how = {
        "weight": refinement.setting.weight,
        "prior": refinement.setting.prior,
        "scores": {str(weight): score for weight, score in refinement.scores.items()},
        "temperature": refinement.temperature,
        "effective_classes": refinement.classes,
    }
    return votes, how | {"changed": compared}
