"""A tiny CLIP trained on labelled images, as an annotator of other images of the same kind where no large model is at hand.

    python -m benchmarks.tiny_clip --images eurosat/train --classes classes.txt --skip 100 --per_class 100 --output_dir clip

Of every class the images after the first `--skip` by name are taken, so that the first ones stay unseen. Every image is
matched with its class among all class names in the words of a template that is drawn for each step: what is learned is a
vision-language model that annotates like a real one, only worse. Written as an open_clip folder (`--vlm local-dir:clip`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from coreg.annotate.prompts import TEMPLATES, prompts
from coreg.data.class_names import read_class_names
from coreg.data.decode import decode
from coreg.data.sources import open_images
from coreg.errors import UserError, exits_with_one_line

SIDE, MEAN, STD = 32, 0.4, 0.2
CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"layers": 4, "width": 64, "head_width": 32, "patch_size": 8, "image_size": SIDE},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 100, 1e-3, 0.1


def chosen_rows(labels: np.ndarray, skip: int, per_class: int) -> np.ndarray:
    """Sample indices, int64, of at most `per_class` images of every class, after its first `skip`."""
    of_class = [np.flatnonzero(labels == label)[skip : skip + per_class] for label in range(labels.max() + 1)]
    return np.concatenate(of_class) if of_class else np.zeros(0, dtype=np.int64)


def train(
    pixels: torch.Tensor, labels: torch.Tensor, names: Sequence[str], steps: int, seed: int, flip: bool = True
) -> CLIP:
    """Train on pixels uint8 (n, 3, SIDE, SIDE) with labels int64 (n,) in 0..C-1 of C class names.

    `flip`: half of a batch is mirrored.
    """
    torch.manual_seed(seed)
    model = CLIP(CONFIG["embed_dim"], CLIPVisionCfg(**CONFIG["vision_cfg"]), CLIPTextCfg(**CONFIG["text_cfg"]))
    texts = SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])(prompts(TEMPLATES, names))
    texts = texts.view(len(TEMPLATES), len(names), -1)
    images = (pixels.float() / 255 - MEAN) / STD
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="pre-training", unit="step"):
        rows = torch.randint(len(images), (BATCH_SIZE,))
        mirrored = torch.rand(BATCH_SIZE, 1, 1, 1) < 0.5
        batch = torch.where(mirrored, images[rows].flip(3), images[rows]) if flip else images[rows]
        text = model.encode_text(texts[torch.randint(len(texts), ())], normalize=True)
        logits = model.logit_scale.exp() * model.encode_image(batch, normalize=True) @ text.T
        loss = F.cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def save_clip(folder: Path, model: CLIP, config: dict, mean: float, std: float) -> str:
    """Write a model and its `model_cfg` as a new open_clip folder; returns its spelling for --vlm."""
    folder.mkdir(parents=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    config = {"model_cfg": config, "preprocess_cfg": {"mean": [mean] * 3, "std": [std] * 3, "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return f"local-dir:{folder}"


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Train and write; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="images with labels, as of annotate_vlm.py")
    parser.add_argument("--classes", required=True, help="text file, one class name a line")
    parser.add_argument("--skip", type=int, default=0, help="images of every class that are left alone, the first by name")
    parser.add_argument(
        "--per_class", type=int, default=100, help="images of every class that are taken, those after the skipped ones"
    )
    parser.add_argument("--steps", type=int, default=1000, help=f"training steps, each of {BATCH_SIZE} images")
    parser.add_argument("--no_flip", action="store_true", help="mirror no image: where left and right make another class")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder")
    args = parser.parse_args(argv)
    if args.skip < 0 or min(args.per_class, args.steps) < 1:
        raise UserError("--skip has to be 0 or more, --per_class and --steps at least 1")
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir} exists; name a new folder or remove it")
    names = read_class_names(args.classes)
    images = open_images(args.images, names)
    if images.labels is None:
        raise UserError(f"--images {args.images} has no labels; name its folders like the classes in {args.classes}")
    rows = chosen_rows(images.labels, args.skip, args.per_class)
    if not len(rows):
        raise UserError(f"no class of --images {args.images} has more than {args.skip} images; give a smaller --skip")
    failed: dict[int, str] = {}
    pixels, labels = decode(images, rows, SIDE, 3, 2, failed), torch.from_numpy(images.labels[rows])
    for row, why in failed.items():
        raise UserError(f"{images.paths[row]!r} cannot be read ({why}); {len(failed)} in all: repair or remove them")
    model = train(pixels, labels, names, args.steps, args.seed, not args.no_flip)
    print(f"trained on {len(rows)} images; use it with: --vlm {save_clip(args.output_dir, model, CONFIG, MEAN, STD)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
