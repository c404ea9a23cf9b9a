"""A view that knows nothing of ImageNet: a small network trained on the images of a store themselves, without any label.

    python -m benchmarks.unlabelled ann --size 32 --output_dir own
    python -m coreg.annotate.view ann --backbone local-dir:own --image_size 32 --recipe ...

Contrast of two views of every training image (Chen et al., "A Simple Framework for Contrastive Learning of Visual
Representations", ICML 2020): resized crop, mirror image, colour jitter and grey, keyed as all views here. Minutes on a CPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import coreg.nets  # noqa: F401  registers the architecture
from coreg.data.decode import decode_annotated
from coreg.errors import UserError, exits_with_one_line
from coreg.files import making_folder
from coreg.store.store import AnnotationStore
from coreg.views.augment import Augmentation

ARCHITECTURE = "preact_resnet_tiny"
MEAN, STD = 0.5, 0.25
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, TEMPERATURE, PROJECTION = 128, 2e-3, 1e-4, 0.2, 64


def contrast(first: Tensor, second: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """NT-Xent: minus log of the softmax, over all other views of a batch, at the other view of the same image; the mean.

    Args:
        first, second: (n, D), row i of each a view of image i.
    """
    z = F.normalize(torch.cat([first, second]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z)).roll(len(first))
    return F.cross_entropy(logits, partner)


def train(pixels: Tensor, epochs: int, flip: bool, seed: int) -> nn.Module:
    """Train on pixels uint8 (n, c, S, S); gives the network without its projection, in evaluation mode."""
    torch.manual_seed(seed)
    channels, size = pixels.shape[1:3]
    network = timm.create_model(ARCHITECTURE, num_classes=0, in_chans=channels)
    head = nn.Sequential(nn.Linear(network.num_features, 128), nn.ReLU(), nn.Linear(128, PROJECTION))
    views = Augmentation(size, 0, flip, mean=(MEAN,) * channels, std=(STD,) * channels)
    both = nn.Sequential(network, head).train()
    optimizer = torch.optim.AdamW(both.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = max(1, len(pixels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in tqdm(range(epochs), desc="contrast", unit="epoch"):
        for rows in torch.randperm(len(pixels)).tensor_split(steps):
            pair = [views.view("pico_weak", pixels[rows], rows, (seed, "contrast", epoch, number)) for number in (0, 1)]
            loss = contrast(*both(torch.cat(pair)).chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if not math.isfinite(loss.item()):
        raise UserError("training became no numbers; take fewer --epochs")
    network.pretrained_cfg = {**network.pretrained_cfg, "mean": (MEAN,) * channels, "std": (STD,) * channels}
    return network.eval()


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Train and write; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="annotation store, whose training images are taken and nothing else")
    parser.add_argument("--size", type=int, default=32, help="side in pixels")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1 for grey images")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--no_flip", action="store_true", help="mirror no image: where left and right make another class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder")
    args = parser.parse_args(argv)
    if min(args.size, args.epochs) < 1:
        raise UserError("--size and --epochs have to be at least 1")
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir} exists; name a new folder or remove it")
    store = AnnotationStore.open(args.store)
    rows = np.flatnonzero((store.split == 0) & ~store.unreadable)
    if len(rows) < 2:
        raise UserError(f"{store.root} has {len(rows)} readable training images; annotate at least two")
    pixels = decode_annotated(store.images(), rows, args.size, args.channels, 2)
    network = train(pixels, args.epochs, not args.no_flip, args.seed)
    with making_folder(args.output_dir, "give another --output_dir") as folder:
        save_for_hf(network, folder, safe_serialization=True)
    print(f"trained on {len(rows)} images; use it with: --backbone local-dir:{args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
