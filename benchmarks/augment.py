"""Images per second of the augmentation, beside the same views made image by image with Pillow.

    python -m benchmarks.augment [--size 32] [--batch 256] [--seconds 10]

Both sides run on one thread and start and end at the same place: from uint8 images in memory to one normalised float32
batch. The Pillow side is what a data loader's worker does for every sample: crop with padding, flip, one of 14
operations, cutout, to array, normalise. Views of the baselines run beside torchvision's transforms of Pillow images.
Rates are medians over repetitions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision import transforms as T

from benchmarks.tables import as_markdown, environment
from benchmarks.turns import in_turns, ratio
from coreg.views.augment import Augmentation

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


# (function of an image and a magnitude, lowest magnitude, highest magnitude)
PIL_OPS: tuple[tuple[Callable[[Image.Image, float], Image.Image], float, float], ...] = (
    (lambda image, v: ImageOps.autocontrast(image), 0, 1),
    (lambda image, v: ImageEnhance.Brightness(image).enhance(v), 0.05, 0.95),
    (lambda image, v: ImageEnhance.Color(image).enhance(v), 0.05, 0.95),
    (lambda image, v: ImageEnhance.Contrast(image).enhance(v), 0.05, 0.95),
    (lambda image, v: ImageOps.equalize(image), 0, 1),
    (lambda image, v: image, 0, 1),
    (lambda image, v: ImageOps.posterize(image, int(v)), 4, 8),
    (lambda image, v: image.rotate(v), -30, 30),
    (lambda image, v: ImageEnhance.Sharpness(image).enhance(v), 0.05, 0.95),
    (lambda image, v: _affine(image, 1, v, 0, 0, 1, 0), -0.3, 0.3),
    (lambda image, v: _affine(image, 1, 0, 0, v, 1, 0), -0.3, 0.3),
    (lambda image, v: ImageOps.solarize(image, v), 0, 256),
    (lambda image, v: _affine(image, 1, 0, v * image.size[0], 0, 1, 0), -0.3, 0.3),
    (lambda image, v: _affine(image, 1, 0, 0, 0, 1, v * image.size[1]), -0.3, 0.3),
)


def pil_geometry(image: Image.Image, padding: int, rng: np.random.Generator) -> Image.Image:
    """Zero-padded random crop and horizontal flip of one image."""
    left, top = rng.integers(0, 2 * padding + 1, 2)
    width, height = image.size
    image = ImageOps.expand(image, padding, 0).crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def pil_strong(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One of the 14 operations and cutout, of one image."""
    apply, low, high = PIL_OPS[rng.integers(len(PIL_OPS))]
    image = apply(image, rng.uniform(low, high)).copy()
    width, height = image.size
    side = rng.uniform(0, 0.5) * width
    x, y = int(max(0, rng.uniform(0, width) - side / 2)), int(max(0, rng.uniform(0, height) - side / 2))
    colour = 123 if image.mode == "L" else (125, 123, 114)
    ImageDraw.Draw(image).rectangle((x, y, min(width, x + side), min(height, y + side)), colour)
    return image


def pil_batch(images: np.ndarray, padding: int, strong: bool, rng: np.random.Generator) -> torch.Tensor:
    """The views of a batch, uint8 (n, h, w, c) with c = 1 or 3 -> float32 (n, c, h, w), image by image."""
    views, channels = [], images.shape[3]
    for pixels in images:
        image = pil_geometry(Image.fromarray(pixels if channels == 3 else pixels[..., 0]), padding, rng)
        if strong:
            image = pil_strong(image, rng)
        array = np.array(image).reshape(images.shape[1:])
        view = torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div_(255)
        mean, std = torch.tensor(MEAN[:channels]), torch.tensor(STD[:channels])
        views.append(view.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1)))
    return torch.stack(views)


def torchvision_views(size: int, padding: int) -> dict[str, T.Compose]:
    """Kinds of `coreg.views.augment.VIEWS` as the baselines' own code composes them; CR's square is cut out of a tensor."""
    flip, cifar10 = T.RandomHorizontalFlip(), T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)
    reflect = [flip, T.RandomCrop(size, padding, padding_mode="reflect")]
    square = T.RandomErasing(1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    steps = {
        "pico_weak": [T.RandomResizedCrop(size, (0.2, 1.0)), flip, jitter, T.RandomGrayscale(0.2)],
        "cr_weak": reflect,
        "cr_strong": [*reflect, T.ToTensor(), square, T.ToPILImage(), cifar10],
        "clip_train": [T.RandomResizedCrop(size, interpolation=T.InterpolationMode.BICUBIC), flip],
    }
    return {kind: T.Compose([*step, T.ToTensor(), T.Normalize(MEAN, STD)]) for kind, step in steps.items()}


def waves(count: int, size: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth images with noise on them, uint8 (count, size, size, channels): noise alone has flat histograms."""
    y, x = np.mgrid[:size, :size] / size
    smooth = np.sin(rng.random((count, 1, 1, channels)) * 6 + 5 * x[..., None] + 3 * y[..., None])
    return np.clip(128 + 90 * smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


def measure(size: int, batch: int, seconds: float) -> list[dict[str, str]]:
    """One row for each kind of view, measured for so many seconds in all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng, padding = np.random.default_rng(0), size // 8
    pixels = waves(batch, size, 3, rng)
    images, rows = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.arange(batch)
    aug = Augmentation(size, padding, True, mean=MEAN, std=STD)
    sides = {
        "weak, Pillow": lambda i: pil_batch(pixels, padding, False, rng),
        "strong, Pillow": lambda i: pil_batch(pixels, padding, True, rng),
    }
    for kind, make in torchvision_views(size, padding).items():
        sides[f"{kind}, Pillow"] = lambda i, make=make: torch.stack([make(Image.fromarray(image)) for image in pixels])
    kinds = [name.removesuffix(", Pillow") for name in sides]
    for kind in kinds:
        sides[f"{kind}, ours"] = lambda i, kind=kind: aug.view(kind, images, rows, (0, kind, i))
    rounds = in_turns(sides, seconds, time.process_time)
    torch.set_num_threads(threads)
    table = []
    for kind in kinds:
        row = {"view": f"{kind}, {size} x {size}"}
        for side in ("Pillow", "ours"):
            taken = statistics.median(times[f"{kind}, {side}"] for times in rounds)
            row[f"{side}, images/s"] = f"{batch / taken:,.0f}"
        table.append(row | {"ratio": f"{ratio(rounds, f'{kind}, Pillow', f'{kind}, ours'):.1f}"})
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 0."""
    parser = argparse.ArgumentParser(description="images/s of the augmentation beside Pillow, one thread")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images, pixels")
    parser.add_argument("--batch", type=int, default=256, help="images in a batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long is measured")
    args = parser.parse_args(argv)
    print(f"{environment()}\n\n{as_markdown(measure(args.size, args.batch, args.seconds))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
