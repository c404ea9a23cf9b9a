"""What the tuning scripts have in common: labelled images, their features, and what is predicted of all images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coreg.adapt.learner import IGNORED, ClipBatch, ClipLearner
from coreg.adapt.settings import TuningJob, ViewOptions
from coreg.adapt.views import Photos, RandomView
from coreg.annotate import annotators
from coreg.annotate.annotators import Towers
from coreg.annotate.models import ModelSpec, resolve
from coreg.data.decode import decode_annotated
from coreg.errors import UserError
from coreg.learn.collective import gather_rows, my_slice
from coreg.process import all_or_none, main_process_decides
from coreg.run.loop import Run
from coreg.run.results import Predictions
from coreg.weak.rules import candidate_sets

SPLITS = ("train", "test")
SHOWN = 64  # side in pixels of the images on a run's page


@dataclass
class Labelled:
    """The images whose labels are given away, and all that are judged at the end."""

    rows: np.ndarray  # int64 (n,), of the store
    classes: np.ndarray  # int64 (n,), their labels
    samples: dict[str, np.ndarray]  # for `train` and `test` the rows that could be read
    model: ModelSpec  # what is tuned
    same: bool  # whether it is the model that made the store, unchanged

    @classmethod
    def of(cls, run: Run) -> Labelled:
        """Read what `run` is about; it belongs to the run's identity which weights are tuned.

        Raises:
            UserError: the model does not exist, or there is no label to learn from.
        """
        store, annotator = run.store, run.store.manifest["model"]
        if not run.job.vlm:
            all_or_none(run.accelerator, lambda: store.need_annotator("name the model to tune with --vlm"))
        model = main_process_decides(run.accelerator, lambda: resolve(run.job.vlm or annotator["spec"]))
        run.identity["tuned"] = {"spec": model.spec, "weights": model.weights}
        rows = np.flatnonzero(run.known >= 0)
        if not len(rows):
            raise UserError(
                f"no training image of {store.root} has a label; give --labels FILE with a column path,label",
                silent=not run.accelerator.is_main_process,
            )
        counts = np.bincount(run.known[rows], minlength=len(store.class_names))
        if (counts == 0).any():
            missing = [name for name, count in zip(store.class_names, counts) if not count]
            run.accelerator.print(f"note: {len(missing)} classes have no labelled image, such as {missing[0]!r}")
        samples = {name: store.rows_of(split) for split, name in enumerate(SPLITS)}
        same = (model.spec, model.weights) == (annotator["spec"], annotator["weights"])
        return cls(rows, run.known[rows], samples, model, same)

    def predictions(
        self, run: Run, logits: dict[str, np.ndarray], classes: dict[str, np.ndarray] | None = None
    ) -> Predictions:
        """What a tuned model predicts, for `coreg.run.results.finish`.

        Args:
            logits: (n, C) of each split that has images. classes: int64 (n,), -1 for none, where they are not the largest.
        """
        store, train = run.store, self.samples["train"]
        images = store.images()
        return Predictions(
            samples=self.samples,
            logits={split: {"ensemble": rows} for split, rows in logits.items()},
            known=run.known[train],
            candidates=candidate_sets(store, run.job.candidates)[train],
            pixels=lambda rows: decode_annotated(images, train[rows], SHOWN, 3, run.job.workers).numpy(),
            classes=classes or {},
        )

    def method(self, name: str, job: TuningJob) -> str:
        """What the report calls the method."""
        labels = "1 label" if len(self.rows) == 1 else f"{len(self.rows)} labels"
        if not job.labels:
            labels = "1 shot" if job.shots == 1 else f"{job.shots} shots"
        return f"{name} ({labels})"


def load_towers(model: ModelSpec, run: Run, precision: str = "fp32") -> Towers:
    """The CLIP model to tune, frozen, on the device.

    Raises:
        UserError: it cannot be had, or is a chat model or a finished run.
    """
    if model.kind in ("chat", "run"):
        kind = "a chat model" if model.kind == "chat" else "a finished run"
        raise UserError(
            f"{model.spec} is {kind}, and this needs a model of the CLIP family; name one with --vlm",
            silent=not run.accelerator.is_main_process,
        )
    towers = annotators.load_towers(model, run.accelerator.device, precision)
    if run.job.dtype == "float64":
        towers.network.double()
    return towers


class ClipImages:
    """The images of a store as a CLIP model's image tower sees them, or their features where it is frozen."""

    def __init__(self, run: Run, labelled: Labelled, towers: Towers, view: ViewOptions, frozen: bool) -> None:
        """Compute the features that are used again and again.

        What the frozen model that made the store says of whole images is in the store. Random views are encoded here
        where they are to be reused (`view.views`).

        Raises:
            UserError: features are to be reused of a tower that is trained.
        """
        if view.views and not frozen:
            raise UserError("--views keeps features, and here the image tower is trained; leave it at 0")
        job, self.device, self.dtype = run.job, run.accelerator.device, getattr(torch, run.job.dtype)
        self.accelerator = run.accelerator
        self.towers, self.labelled, self.step = towers, labelled, 4 * job.batch_size
        self.read_as = next(weight.dtype for weight in towers.network.parameters())
        size = towers.preprocess(Image.new("RGB", (64, 64))).shape[-1]
        random = RandomView(view.crop, view.flip, size)
        # training reads no image where all features are in the store
        self._open = lambda: Photos(run.store.images(), towers.preprocess, random, job.seed, job.workers)
        self.stored = run.store.features() if frozen and labelled.same else None
        self.kept: list[Tensor] = []
        if frozen and not random.random:
            self.kept = [self.features(labelled.rows)]
        elif frozen:
            self.kept = [self._encode(labelled.rows, number) for number in range(view.views)]
        if not self.kept:
            all_or_none(run.accelerator, lambda: self.photos.read(labelled.rows[my_slice(len(labelled.rows))]))

    def batch(self, places: np.ndarray, epoch: int) -> ClipBatch:
        """This process's share of the labelled images at `places`, int64 (n,), as they are seen in an epoch."""
        my_places, classes = places[my_slice(len(places))], self.labelled.classes[places[my_slice(len(places))]]
        if not len(my_places):
            my_places, classes = places[:1], np.array([IGNORED])
        if self.kept:
            images = self.kept[epoch % len(self.kept)][torch.from_numpy(my_places).to(self.device, non_blocking=True)]
        else:
            images = self._pixels(self.photos.views(self.labelled.rows[my_places], epoch))
        return ClipBatch(images, bool(self.kept), torch.from_numpy(classes).to(self.device, non_blocking=True), len(places))

    def features(self, rows: np.ndarray) -> Tensor:
        """Features (n, E) of length 1 of whole images, on every process."""
        if self.stored is None:
            return self._encode(rows, None)
        stored = torch.from_numpy(self.stored[rows]).to(self.device, self.dtype)
        return torch.nn.functional.normalize(stored, dim=-1)

    def sample(self, count: int) -> tuple[Tensor, bool]:
        """The first few labelled images, pixels or features, and whether they are features; the same on every process."""
        rows = self.labelled.rows[:count]
        return (self._pixels(self.photos.plain(rows)), False) if self.stored is None else (self.features(rows), True)

    @cached_property
    def photos(self) -> Photos:
        """The images themselves."""
        return self._open()

    def _pixels(self, prepared: list[Tensor]) -> Tensor:
        return torch.stack(prepared).to(self.device, self.read_as, non_blocking=True)

    @torch.no_grad()
    def _encode(self, rows: np.ndarray, number: int | None) -> Tensor:
        """Features of random view `number`, or of whole images; every process does its share."""
        my_rows = rows[my_slice(len(rows))]

        def encode_my_rows() -> list[Tensor]:
            try:
                return encode()
            except UserError:
                self.photos.read(my_rows)  # tells how many there are
                raise

        def encode() -> list[Tensor]:
            parts = []
            # a process without rows reads one all the same, so that all know the features' length
            for start in range(0, max(len(my_rows), 1), self.step):
                some = my_rows[start : start + self.step] if len(my_rows) else rows[:1]
                seen = self.photos.plain(some) if number is None else self.photos.views(some, number)
                parts.append(torch.nn.functional.normalize(self.towers.image(self._pixels(seen)).to(self.dtype), dim=-1))
            return parts

        return gather_rows(torch.cat(all_or_none(self.accelerator, encode_my_rows))[: len(my_rows)], len(rows))


@torch.no_grad()
def predict(learner: ClipLearner, images: ClipImages, labelled: Labelled) -> dict[str, np.ndarray]:
    """Logits (n, C) of every split that has images."""
    learner.train(False)
    samples = {split: rows for split, rows in labelled.samples.items() if len(rows)}
    return {split: learner.logits(images.features(rows), encoded=True).cpu().numpy() for split, rows in samples.items()}
