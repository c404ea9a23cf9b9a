"""How sure a prediction is: one temperature for all classes, fitted without the labels of test images.

A network's softmax says how far its logits lie apart, not how often it is right. Dividing the logits by a temperature T
(Guo et al., "On Calibration of Modern Neural Networks", ICML 2017) changes no prediction, only how sure it claims to be.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coreg.weak.temperature import fit_temperature, negative_log_likelihood


def _fitted(logits: np.ndarray, classes: np.ndarray, images: int, to: str) -> dict[str, Any]:
    temperature = fit_temperature(logits, classes)
    return {
        "temperature": temperature,
        "calibration": {
            "fitted_to": to,
            "images": images,
            "negative_log_likelihood": negative_log_likelihood(logits, classes, temperature),
            "negative_log_likelihood_at_1": negative_log_likelihood(logits, classes, 1.0),
        },
    }


def fit_to_agreement(nets: list[np.ndarray]) -> dict[str, Any]:
    """Temperature without any label: so that a network's probability of a class is how often the other one names it.

    The objective is the mean of -log softmax(z_a / T)[argmax z_b] over the images and both orders of the networks a, b.
    What both networks get wrong in the same way counts as right, so the probabilities are too high where the annotator
    misled both; two networks' mean logits, which T is applied to, lie closer together than one's, which errs the other
    way. With one network there is nobody to agree with, and T is 1.

    Args:
        nets: float (n, C) logits of each network; different random views of the same images, so that no network merely
            meets again what it has learned by heart.

    Returns:
        `temperature`, and under `calibration` what it was fitted to, on how many images, and the objective at T and at 1.
    """
    if len(nets) != 2:
        return {"temperature": 1.0, "calibration": {"fitted_to": "nothing: there is one network alone"}}
    first, second = nets
    classes = np.concatenate([second.argmax(axis=1), first.argmax(axis=1)])
    what = "agreement of the two networks on weak views of the training images; no label was used"
    return _fitted(np.concatenate([first, second]), classes, len(first), what)


def fit_to_labels(mean_logits: np.ndarray, classes: np.ndarray, source: str) -> dict[str, Any]:
    """Temperature from labels that a person gave to images that training has not seen: the probability of being right.

    Args:
        mean_logits: float (n, C), mean over the networks. classes: int64 (n,). source: where the labels are from.

    Returns:
        As `fit_to_agreement`.
    """
    return _fitted(mean_logits, classes, len(classes), f"labels of {source}")
