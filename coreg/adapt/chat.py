"""Conversations to learn from: an image, the annotation's own question, and the right class name as the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coreg.adapt.learner import IGNORED, ChatBatch
from coreg.adapt.tuning import Labelled
from coreg.adapt.views import Photos, RandomView
from coreg.annotate.chat import ChatAnnotator
from coreg.errors import UserError
from coreg.learn.collective import gather_rows, my_slice
from coreg.process import all_or_none
from coreg.run.loop import Run


def join(items: Sequence[dict[str, Any]], answers: Sequence[list[int]]) -> tuple[dict[str, Tensor], Tensor]:
    """Questions with their answers after them as one batch, padded at the end.

    Args:
        items: n results of `ChatAnnotator.preprocess`, of which the first question is taken. answers: their tokens.

    Returns:
        what the model's forward takes; labels int64 (n, L), `IGNORED` but for the answers' tokens.

    Raises:
        UserError: the model prepares the images in tensors of different shapes.
    """
    texts = [item["text"][0] for item in items]
    starts = [len(text["input_ids"]) for text in texts]
    longest = max(start + len(answer) for start, answer in zip(starts, answers))
    labels = torch.full((len(items), longest), IGNORED)
    inputs = {name: value.new_zeros(len(items), longest) for name, value in texts[0].items()}
    inputs["attention_mask"] = torch.zeros(len(items), longest, dtype=torch.int64)
    for row, (text, start, answer) in enumerate(zip(texts, starts, answers)):
        for name, value in text.items():
            inputs[name][row, :start] = value
        stop = start + len(answer)
        inputs["input_ids"][row, start:stop] = labels[row, start:stop] = torch.tensor(answer)
        inputs["attention_mask"][row, :stop] = 1
    pixels = {name: [item["pixels"][name] for item in items] for name in items[0]["pixels"]}
    if any(len({part.shape[1:] for part in parts}) > 1 for parts in pixels.values()):
        raise UserError("this model makes tensors of different shapes of these images; train with --batch_size 1")
    return inputs | {name: torch.cat(parts) for name, parts in pixels.items()}, labels


class ChatImages:
    """The images of a store as a chat model is asked about them."""

    def __init__(self, run: Run, labelled: Labelled, annotator: ChatAnnotator, view: RandomView) -> None:
        self.labelled, self.annotator, self.step = labelled, annotator, run.job.batch_size
        # one thread: fast tokenizers, a part of the preprocessing, do not work in several at once
        self.photos = Photos(run.store.images(), annotator.preprocess, view, run.job.seed, workers=1)
        self.accelerator = run.accelerator
        all_or_none(run.accelerator, lambda: self.photos.read(labelled.rows[my_slice(len(labelled.rows))]))
        end = annotator.ends[-1:].tolist()
        self.answers = [name + end for name in annotator.names]

    def batch(self, places: np.ndarray, epoch: int) -> ChatBatch:
        """This process's share of the labelled images at `places`, int64 (n,), as they are seen in an epoch."""
        my_places = places[my_slice(len(places))]
        some = my_places if len(my_places) else places[:1]
        seen = self.photos.views(self.labelled.rows[some], epoch)
        inputs, labels = join(seen, [self.answers[index] for index in self.labelled.classes[some]])
        if not len(my_places):
            labels.fill_(IGNORED)
        tokens = sum(len(self.answers[index]) for index in self.labelled.classes[places])
        device, dtype = self.annotator.device, self.annotator.dtype
        sent = {k: v.to(device, dtype if v.is_floating_point() else None, non_blocking=True) for k, v in inputs.items()}
        return ChatBatch(sent, labels.to(device, non_blocking=True), len(places), tokens)

    def predict(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Log probabilities (n, C) and named classes int64 (n,), -1 for none, of every split that has images."""
        logits, named = {}, {}
        for split, rows in self.labelled.samples.items():
            if len(rows):
                my_rows = rows[my_slice(len(rows))]
                # a process without rows asks about one all the same, so that all results have their shapes
                some = my_rows if len(my_rows) else rows[:1]
                parts = all_or_none(
                    self.accelerator,
                    lambda some=some: [self._ask(some[at : at + self.step]) for at in range(0, len(some), self.step)],
                )
                votes, probs = (torch.cat(part)[: len(my_rows)] for part in zip(*parts))
                logits[split] = gather_rows(probs, len(rows)).clamp_min(1e-8).log().cpu().numpy()
                named[split] = gather_rows(votes, len(rows)).cpu().numpy()
        return logits, named

    def _ask(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        evidence = self.annotator.annotate(self.annotator.collate(self.photos.plain(rows)))
        device = self.annotator.device
        return evidence["votes"][:, 0].long().to(device), evidence["probs"].float().to(device)
