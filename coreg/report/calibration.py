"""How sure a prediction is: one temperature for all classes, fitted without the labels of test images.

A network's softmax says how far its logits lie apart, not how often it is right. Dividing the logits by a temperature T
(Guo et al., "On Calibration of Modern Neural Networks", ICML 2017) changes no prediction, only how sure it claims to be.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# outside of these every prediction is certain, or none says anything
COLDEST, HOTTEST = 0.05, 20.0


def negative_log_likelihood(logits: np.ndarray, classes: np.ndarray, temperature: float) -> float:
    """Mean of -log softmax(logits / T)[class] over the rows.

    Args:
        logits: float (n, C). classes: int64 (n,).
    """
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(len(scaled)), classes]).mean())


def fit_temperature(logits: np.ndarray, classes: np.ndarray) -> float:
    """The T in [0.05, 20] with the smallest `negative_log_likelihood`.

    The objective is convex in 1 / T and its slope is the mean of E_p[z] - z_class, so that bisection finds where the slope
    changes sign. Rows that are all right and far apart drive T to 0.05, rows that say nothing to 20.

    Args:
        logits: float (n, C), n at least 1. classes: int64 (n,).
    """
    z = logits.astype(np.float64)
    z = z - z.max(axis=1, keepdims=True)
    wanted = z[np.arange(len(z)), classes]
    low, high = np.log(COLDEST), np.log(HOTTEST)
    for _ in range(40):
        middle = (low + high) / 2
        p = np.exp(z / np.exp(middle))
        # the slope with respect to 1 / T: positive where the predictions are too sure, and T has to grow
        slope = ((p * z).sum(axis=1) / p.sum(axis=1) - wanted).mean()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


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
