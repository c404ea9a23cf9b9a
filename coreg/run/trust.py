"""What a run's report says of whom to trust (`coreg.weak.trust`): which frozen features judge, and on which images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from coreg.annotate.view import View
from coreg.errors import UserError
from coreg.process import main_process_decides
from coreg.run.loop import Run
from coreg.run.task import Task, pooled
from coreg.run.training import build_networks
from coreg.store.store import AnnotationStore
from coreg.weak.refine import drawn
from coreg.weak.trust import verdict

Features = Literal["view", "weights", "own"]
FEWEST = 100  # test images from which on they are judged, otherwise training images are
MOST, MOST_A_CLASS = 2000, 20  # images to fit referees to, and as many to judge; of many classes
ENTRIES = 1 << 21  # of (N, C), at most, where that is more than `MOST` images


def trust(run: Run, task: Task, predicted: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Who is to be trusted most and the numbers that say so, the same on all processes, which all have to call it.

    Args:
        predicted: for `train` and, where there are some, `test`, the student's classes int64 (n,).

    Returns:
        None where nothing can be said: candidate sets that were drawn from the truth, no features, or no images.
    """
    kind = main_process_decides(task.accelerator, lambda: _features_of(run, task))
    if kind is None:
        return None
    splits = task.splits
    if "test" in splits and len(task.test.samples) < FEWEST:
        del splits["test"]
    classes = len(task.store.class_names)
    most = max(MOST, min(MOST_A_CLASS * classes, ENTRIES // classes))
    rows = {split: np.sort(drawn(images.samples.numpy(), "trust")[:most]) for split, images in splits.items()}
    features = {}
    if kind == "weights":
        (net,) = build_networks(task.accelerator, task.job, task.image_options, classes, 1, count=1)
        net.to(task.accelerator.device, task.data.dtype)
        size = 4 * task.job.batch_size
        features = {split: pooled(net, images, rows[split], size).cpu().numpy() for split, images in splits.items()}

    def decide() -> dict[str, Any]:
        source = run.annotated.unrefined()
        samples = {split: images.samples.numpy()[rows[split]] for split, images in splits.items()}
        if kind != "weights":
            every = source.features() if kind == "own" else _view(task, source).features()
            features.update({split: every[chosen] for split, chosen in samples.items()})
        probs = source.probs()
        evidence = {split: probs[chosen] for split, chosen in samples.items()}
        judged = "test" if "test" in samples else "train"
        weights = Path(task.image_options.backbone.removeprefix("local-dir:")).name  # where it lies is nobody's business
        name = {"view": task.store.manifest.get("refined", {}).get("view"), "weights": weights}.get(kind)
        return {"features": name or "the annotator’s own", "kind": kind, "split": judged} | verdict(
            features, evidence, samples["train"], predicted[judged][rows[judged]], "refined" in task.store.manifest
        )

    return main_process_decides(task.accelerator, decide)


def _features_of(run: Run, task: Task) -> Features | None:
    """Whose features judge: the view's that evidence was refined by, pretrained starting weights', the annotator's own."""
    source = run.annotated.unrefined()
    if source is None or source.manifest["model"]["spec"].startswith("synthetic:") or len(task.data.samples) < 3:
        return None
    try:
        if _view(task, source) is not None:
            return "view"
    except UserError:  # it is gone, or another one lies there
        pass
    # the tower of the annotator itself sees what its own features say
    other = not run.folder.tower.is_dir()
    if other and (task.image_options.pretrained or task.image_options.backbone.startswith("local-dir:")):
        return "weights"
    return None if source.manifest["features"] is None else "own"


def _view(task: Task, source: AnnotationStore) -> View | None:
    """The view that evidence was refined by."""
    name = task.store.manifest.get("refined", {}).get("view")
    return None if name is None else View.open(source.root / "views" / name, source)
