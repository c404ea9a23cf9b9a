"""How far an image is from the images that training has seen: far ones are of none of the classes.

The distance of an image's last features to the nearest class mean, in the classes' common covariance, mean over the
networks (Lee et al., "A simple unified framework for detecting out-of-distribution samples and adversarial attacks",
NeurIPS 2018, of the last features alone). Means and covariance lie in distances.safetensors of an export folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn

from coreg.data.decode import decode
from coreg.data.images import TEST, ImageList
from coreg.data.labels import csv_lines
from coreg.errors import UserError

FILE = "distances.safetensors"
MOST = 20_000  # training images whose features are kept in memory
KEPT = 0.95  # of images of the classes, by a distance that is chosen, where no other share is asked for
FEWEST = 20  # held-out images; with 18 no distance keeps 95 % of others
BATCH = 256


@torch.no_grad()
def last_features(net: nn.Module, images: Tensor) -> Tensor:
    """What the classifier of a timm model is given, float (n, d), of normalised images (n, c, H, W)."""
    return net.forward_head(net.forward_features(images), pre_logits=True).flatten(1)


class Distances(nn.Module):
    """Features of each network, float (n, d), to distances float (n,)."""

    def __init__(self, means: Sequence[Tensor], roots: Sequence[Tensor]) -> None:
        """`means`: (K, d) of each network. `roots`: (d, d), lower triangular, times their transpose the precision."""
        super().__init__()
        for number, (mean, root) in enumerate(zip(means, roots), start=1):
            self.register_buffer(f"net{number}_means", mean)
            self.register_buffer(f"net{number}_root", root)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        each = []
        for number, rows in enumerate(features, start=1):
            root = getattr(self, f"net{number}_root")
            each.append(torch.cdist(rows @ root, getattr(self, f"net{number}_means") @ root).min(dim=1).values)
        return torch.stack(each).mean(dim=0)


def fit_distances(features: Sequence[np.ndarray], classes: np.ndarray) -> Distances:
    """Means of the classes that occur, and their common covariance, shrunk (Ledoit and Wolf, 2004), of each network.

    Args:
        features: float (n, d) of each network. classes: int (n,), as the networks name the images.

    Raises:
        UserError: the features of all images of a class are the same.
    """
    there, place = np.unique(classes, return_inverse=True)
    means, roots = [], []
    for rows in features:
        mean = np.stack([rows[classes == c].mean(axis=0) for c in there])
        try:
            root = np.linalg.cholesky(LedoitWolf().fit(rows - mean[place]).precision_)
        except np.linalg.LinAlgError:
            root = np.full((1, 1), np.nan)
        if not np.isfinite(root).all():
            raise UserError(
                "the features of the training images do not differ within classes; there is no distance to measure"
            )
        means.append(torch.from_numpy(mean.astype(np.float32)))
        roots.append(torch.from_numpy(root.astype(np.float32)))
    return Distances(means, roots)


def as_bytes(distances: Distances) -> bytes:
    """The content of distances.safetensors."""
    return save({name: value.contiguous() for name, value in distances.state_dict().items()})


def from_bytes(content: bytes, nets: int) -> Distances:
    """What `as_bytes` gave, of so many networks; raises whatever a damaged file makes safetensors raise."""
    tensors, numbers = load(content), range(1, nets + 1)
    return Distances(*([tensors[f"net{number}_{name}"] for number in numbers] for name in ("means", "root")))


def largest(distances: np.ndarray, share: float) -> float:
    """The distance within which new images like those of `distances` (n,) lie with a probability of `share`.

    The ceil((n + 1) share)-th smallest (Bates et al., "Testing for outliers with conformal p-values", 2023); infinite where
    n is too small for that.
    """
    rank = math.ceil((len(distances) + 1) * share)
    return float(np.sort(distances)[rank - 1]) if rank <= len(distances) else math.inf


# ---- of a finished run ----------------------------------------------------------------------------------------------


def rows_of_run(images: ImageList, run: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows of the images that the means are of, of those that the distance is chosen on, and in words which these are.

    The latter are the test images; where these are fewer than `FEWEST`, every fifth training image, then in no mean.

    Raises:
        UserError: too few of the images that the run was trained on are there.
    """
    lines = csv_lines(str(run / "labels.csv"), ("path",), "it names the training images; repeat the training of that run")
    named = {line["path"] for _, line in lines}
    trained = np.array([row for row, path in enumerate(images.paths) if path in named], dtype=np.int64)
    if len(trained) < 5 * FEWEST:
        raise UserError(
            f"{len(trained)} of the {len(named)} training images of {run} are in {images.spec}, and distances need "
            f"{5 * FEWEST} at least; say with --images where they are"
        )
    trained = trained[np.unique(np.linspace(0, len(trained) - 1, MOST).astype(int))]
    test = np.flatnonzero(images.split == TEST)
    if len(test) >= FEWEST:
        return trained, test, f"{len(test)} test images"
    fifth = np.arange(len(trained)) % 5 == 4
    return (
        trained[~fifth],
        trained[fifth],
        f"{int(fifth.sum())} training images, which the networks know: new ones are farther",
    )


def readable_pixels(images: ImageList, rows: np.ndarray, settings: dict[str, Any]) -> tuple[Tensor, np.ndarray]:
    """The readable ones of `rows` as an export's networks take images, uint8 (n, c, H, W), and their numbers."""
    failed: dict[int, str] = {}
    size, channels, resize = settings["image_size"], settings["channels"], settings.get("resize") or "squash"
    pixels = decode(images, rows, size, channels, 2, failed, resize)
    readable = ~np.isin(rows, list(failed))
    return pixels[torch.from_numpy(readable)], rows[readable]


def measure_run(
    nets: Sequence[nn.Module],
    normalised: Callable[[Tensor], Tensor],
    settings: dict[str, Any],
    images: ImageList,
    run: Path,
) -> tuple[bytes, dict[str, Any]]:
    """The content of distances.safetensors for the networks of a run, and what coreg.json says of it.

    Args:
        nets: on the CPU, in evaluation mode. normalised: uint8 (n, c, H, W) to what the networks take. settings: of the
            export. images: of the run. run: its folder.

    Raises:
        UserError: too few images can be read, or their features do not differ.
    """
    rows, held, which = rows_of_run(images, run)

    def features(wanted: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        each, logits = [[] for _ in nets], []
        for start in range(0, len(wanted), BATCH):
            x = normalised(readable_pixels(images, wanted[start : start + BATCH], settings)[0])
            with torch.no_grad():
                logits.append(sum(net(x) for net in nets).numpy())
            for kept, net in zip(each, nets):
                kept.append(last_features(net, x).numpy())
        return [np.concatenate(kept) for kept in each], np.concatenate(logits).argmax(axis=1)

    fitted = fit_distances(*features(rows))
    apart = fitted([torch.from_numpy(kept) for kept in features(held)[0]]).numpy()
    farthest = largest(apart, KEPT)
    if not math.isfinite(farthest):
        raise UserError(
            f"{len(apart)} of the {len(held)} held-out images of {run} can be read; at least {FEWEST} are needed"
        )
    return as_bytes(fitted), {"farthest": farthest, "kept": KEPT, "images": len(apart), "chosen_on": which}
