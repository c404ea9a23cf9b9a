"""Images per second of the augmentation, beside the same views made image by image with Pillow.

    python benchmarks/augment.py [--size 32] [--batch 256] [--seconds 5]

Both sides run on one thread and start and end at the same place: from uint8 images in memory to one normalised float32
batch. The Pillow side is what a data loader's worker does for every sample: crop with padding, flip, one of 14
operations, cutout, to array, normalise. Rates are medians over repetitions.
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

from coreg.data.augment import Augmentation

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
    ImageDraw.Draw(image).rectangle((x, y, min(width, x + side), min(height, y + side)), (125, 123, 114))
    return image


def pil_batch(images: np.ndarray, padding: int, strong: bool, rng: np.random.Generator) -> torch.Tensor:
    """The views of a batch, uint8 (n, h, w, 3) -> float32 (n, 3, h, w), image by image."""
    views = []
    for pixels in images:
        image = pil_geometry(Image.fromarray(pixels), padding, rng)
        if strong:
            image = pil_strong(image, rng)
        view = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        views.append(view.sub_(torch.tensor(MEAN).view(-1, 1, 1)).div_(torch.tensor(STD).view(-1, 1, 1)))
    return torch.stack(views)


def images_per_second(make: Callable[[int], torch.Tensor], count: int, seconds: float) -> float:
    """Median rate of `make(repetition)`, which makes `count` images, over about `seconds` seconds."""
    for repetition in range(3):
        make(repetition)
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        make(len(times))
        times.append(time.perf_counter() - start)
    return count / statistics.median(times)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 0."""
    parser = argparse.ArgumentParser(description="images/s of the augmentation beside Pillow, one thread")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images, pixels")
    parser.add_argument("--batch", type=int, default=256, help="images in a batch")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each of the four rates is measured")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    padding = args.size // 8
    # Smooth images with noise on them: noise alone has flat histograms, which no photograph has.
    y, x = np.mgrid[: args.size, : args.size] / args.size
    waves = np.sin(rng.random((args.batch, 1, 1, 3)) * 6 + 5 * x[..., None] + 3 * y[..., None])
    pixels = np.clip(128 + 90 * waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    rows = torch.arange(args.batch)
    aug = Augmentation(args.size, padding, True, mean=MEAN, std=STD)
    print(f"{args.size} x {args.size} RGB, batch {args.batch}, one thread, images/s")
    print(f"{'view':8}{'Pillow':>12}{'coreg':>12}{'ratio':>8}")
    sides = {
        "weak": (lambda i: pil_batch(pixels, padding, False, rng), lambda i: aug.weak(images, rows, (0, "weak", i))),
        "strong": (lambda i: pil_batch(pixels, padding, True, rng), lambda i: aug.strong(images, rows, (0, "strong", i))),
    }
    for name, makers in sides.items():
        pillow, ours = (images_per_second(make, args.batch, args.seconds) for make in makers)
        print(f"{name:8}{pillow:12,.0f}{ours:12,.0f}{ours / pillow:8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
