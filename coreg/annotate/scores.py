"""From features of images and of texts to votes and probabilities, as models of the CLIP family judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coreg.annotate.prompts import prompts
from coreg.nets.heads import class_features
from coreg.store.store import AnnotationStore

SCORES_AT_ONCE = 1 << 24  # logits of a batch that are held at the same time: 64 MB of float32


def judging_texts(
    encode: Callable[[list[str]], Tensor],
    templates: Sequence[str],
    class_names: Sequence[str],
    descriptions: Mapping[str, Sequence[str]] | None = None,
) -> Tensor:
    """The text features that images are compared with, float32 (T*C, D) of length 1, template by template.

    Under template t a class is the text that has its name in the template, feature n_tc. With descriptions it is
    (n_tc + d_c) / |n_tc + d_c|, where d_c is the mean of the features of the class's descriptions, brought to length 1:
    name and descriptions count alike, and the templates still differ.

    Args:
        encode: texts -> features (m, D) of length 1. descriptions: class name -> texts of the class.
    """
    text = encode(prompts(templates, class_names))
    if descriptions is None:
        return text
    texts, classes = description_texts(class_names, descriptions)
    # on the CPU: sums by index are in no order on a GPU, and every process is to have the same bits
    means = class_features(encode(texts).cpu(), classes, len(class_names)).to(text.device)
    described = F.normalize(means, dim=1)
    return F.normalize(text.view(len(templates), len(class_names), -1) + described, dim=2).flatten(0, 1)


def description_texts(class_names: Sequence[str], descriptions: Mapping[str, Sequence[str]]) -> tuple[list[str], Tensor]:
    """All descriptions, class by class, and int64 (m,) of which class each is."""
    texts = [text for name in class_names for text in descriptions[name]]
    return texts, torch.tensor([number for number, name in enumerate(class_names) for _ in descriptions[name]])


class TextSide:
    """A text side that is encoded: T templates of C classes, and how the model makes probabilities of cosines.

    Templates are judged one by one, as in the papers' multi-template union: x_t = s * r . E_t with image feature r and
    text features E_t of length 1; template t votes argmax x_t, and the mean over t of p_t = softmax(x_t) is the averaged
    probability (an average of probabilities, not CLIP's average of text embeddings). s is the model's own exp(logit_scale),
    about 100 for trained CLIP models, where the papers' code has the constant 100. Models trained with a sigmoid (SigLIP)
    are scored their own way: p_t is sigmoid(x_t + bias), divided by its sum over the classes because the store's
    probabilities sum to 1; the vote is the same argmax. Another temperature than 1 makes of p_t the normalised p_t^(1/T).
    """

    def __init__(self, text: Tensor, classes: int, scale: float, bias: float | None, temperature: float = 1.0) -> None:
        """Begin with what is encoded.

        Args:
            text: float32 (T*C, D) of length 1, template by template. classes: C. scale, bias: the model's own, see above;
                no bias where it was not trained with a sigmoid.
        """
        self.text, self.shape = text, (len(text) // classes, classes)
        self.scale, self.bias, self.temperature = scale, bias, temperature
        self.features = text.shape[1]

    @torch.inference_mode()
    def score(self, features: Tensor | np.ndarray) -> dict[str, Tensor]:
        """Votes int16 (n, T) and probabilities float16 (n, C), computed in float32, of images by their features (n, D)."""
        votes, probs = self.judge(features)
        return {"votes": votes, "probs": probs.half()}

    @torch.inference_mode()
    def judge(self, features: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """As `score`, with probabilities in float32."""
        features = torch.as_tensor(features).to(self.text.device).float()
        templates, classes = self.shape
        votes = torch.empty(len(features), templates, dtype=torch.int16, device=self.text.device)
        probs = torch.zeros(len(features), classes, device=self.text.device)
        step = max(1, SCORES_AT_ONCE // (max(1, len(features)) * classes))
        scale = self.scale if self.bias is not None else self.scale / self.temperature
        for start in range(0, templates, step):
            text = self.text[start * classes : (start + step) * classes]
            logits = (scale * features @ text.T).view(len(features), -1, classes)
            votes[:, start : start + step] = logits.argmax(dim=2).to(torch.int16)
            if self.bias is not None:  # the logarithm keeps classes apart whose sigmoids are all nearly zero
                logits = F.logsigmoid(logits + self.bias) / self.temperature
            probs += logits.softmax(dim=2).sum(dim=1)
        return votes, probs / templates


def kept_side(
    store: AnnotationStore,
    templates: Sequence[str],
    class_names: Sequence[str],
    descriptions: Mapping[str, Sequence[str]] | None,
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
) -> TextSide | None:
    """A text side from what the store keeps; None where it keeps nothing, or not all of these texts. No model is loaded."""
    kept = store.kept_texts()
    if kept is None:
        return None

    def encode(texts: list[str]) -> torch.Tensor:
        return torch.from_numpy(kept.of(texts)).to(device)

    try:
        text = judging_texts(encode, templates, class_names, descriptions)
    except KeyError:
        return None
    return TextSide(text, len(class_names), kept.scale, kept.bias, temperature)


def class_embeddings(side: TextSide) -> np.ndarray:
    """One text feature a class, float32 (C, D) of length 1: the mean over the templates of features of length 1."""
    templates, classes = side.shape
    text = side.text.view(templates, classes, -1).mean(dim=0)
    return F.normalize(text, dim=1).cpu().numpy()
