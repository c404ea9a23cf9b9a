"""Train the demo's annotator anew: `python -m coreg.demo.pretrain --seed 0 --output DIR [--steps N]`.

A four-layer vision transformer and a two-layer text transformer learn by CLIP's contrastive loss (Radford et al. 2021) to
match rendered digits (`coreg.demo.glyphs`) with their captions. No real image takes part.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from tqdm import tqdm

from coreg.demo.annotator import local_dir, save_compact
from coreg.demo.glyphs import IMAGE_SIZE, GlyphStream, all_captions
from coreg.errors import UserError, exits_with_one_line
from coreg.files import making_folder

STEPS = 500
BATCH_SIZE = 192
LEARNING_RATE = 2e-3
WARM_UP_STEPS = 100
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.98)
GRADIENT_NORM = 1.0
MAX_LOG_SCALE = math.log(100)  # CLIP's own limit of the inverse temperature
PIXEL_MEAN, PIXEL_STD = 0.3, 0.35

# What open_clip builds, and how it must prepare images; the vocabulary is that of CLIP's tokenizer.
CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"layers": 4, "width": 64, "head_width": 32, "patch_size": 8, "image_size": IMAGE_SIZE},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [PIXEL_MEAN] * 3,
        "std": [PIXEL_STD] * 3,
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}


class CompactTokenizer:
    """CLIP's tokenizer, renumbered to the token ids that a list of texts needs.

    token_ids: int64 (V,), sorted, so that the end-of-text token keeps the largest number, by which CLIP finds it.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._full = SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])
        self.token_ids = self._full(list(texts)).unique()

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """int64 (n, context_length), numbers in 0..V-1."""
        return torch.searchsorted(self.token_ids, self._full(list(texts)))


def compact_model(vocabulary: int) -> CLIP:
    """The annotator with a token table of `vocabulary` rows, randomly initialised."""
    config = copy.deepcopy(CONFIG["model_cfg"])
    text = CLIPTextCfg(**(config["text_cfg"] | {"vocab_size": vocabulary}))
    return CLIP(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), text)


def pretrain(seed: int, steps: int, batch_size: int) -> tuple[CLIP, torch.Tensor, list[float]]:
    """Train an annotator.

    Args:
        seed: of the initial weights and of the stream of glyphs.
        steps: optimisation steps; the learning rate falls to zero over them (cosine, after a linear warm-up).
        batch_size: image-caption pairs a step.

    Returns:
        the compact model; token ids int64 (V,) of its token table's rows; the loss of every step.

    Raises:
        UserError: where matplotlib, whose fonts are drawn, is not installed or brings others.
    """
    stream = GlyphStream(seed, batch_size)
    tokenizer = CompactTokenizer(all_captions())
    torch.manual_seed(seed)
    model = compact_model(len(tokenizer.token_ids)).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=BETAS,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * t / steps))
    )
    loss_function = ClipLoss()
    losses = []
    with tqdm(range(steps), desc="pre-training", unit="step") as bar:
        for _ in bar:
            batch = stream.batch()
            images = ((batch.images - PIXEL_MEAN) / PIXEL_STD).expand(-1, 3, -1, -1)
            loss = loss_function(*model(images, tokenizer(batch.captions)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOG_SCALE)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    return model.eval(), tokenizer.token_ids, losses


@exits_with_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: train, write the folder in one rename, say how to use it."""
    parser = argparse.ArgumentParser(prog="python -m coreg.demo.pretrain", description="Train the demo's annotator anew.")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the glyphs (default: 0)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the compact model")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimisation steps (default: {STEPS})")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        raise UserError(f"--steps is {options.steps}; expected at least 1; try --steps {STEPS}")
    if options.output.exists():
        raise UserError(f"--output {options.output} exists; expected a new folder; name another one or remove it")
    # Begun before the training, so that a folder that cannot be written is noticed now and not in a few minutes.
    with making_folder(options.output, "name another --output, a folder of yours") as unfinished:
        model, token_ids, losses = pretrain(options.seed, options.steps, BATCH_SIZE)
        save_compact(unfinished, CONFIG, model.state_dict(), token_ids)
    print(f"wrote {options.output} (last loss {losses[-1]:.3f})")
    print(f"use it with: --vlm local-dir:{local_dir(options.output)}")
    return 0


if __name__ == "__main__":
    main()
