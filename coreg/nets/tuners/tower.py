"""What a tuner has to know of a network: its blocks, which of them are chosen, its width."""

from __future__ import annotations

import re
from dataclasses import dataclass

from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn

from coreg.errors import UserError


@dataclass
class TunerOptions:
    """What the tuners are given, the same for all that are chosen."""

    n_classes: int
    bottleneck: int = 0  # width of adapters and rank of LoRA; 0: by the number of classes, see `default_bottleneck`
    prompt_tokens: int = 10  # of the prompts, before each block that has some
    mask_ratio: float = 0.0  # share of the entries that train in mask tuning; 0: see `default_mask_ratio`


def parse_blocks(text: str, depth: int) -> range:
    """Numbers of the blocks that `--blocks` means: `all`, `last:N`, or `A-B`, from block A to block B, counted from 0.

    Raises:
        UserError: it means none of these, or blocks that are not there.
    """
    there = f"this network has blocks 0 to {depth - 1}; write all, last:N, or the first and the last, such as 2-{depth - 1}"
    if text == "all":
        return range(depth)
    if match := re.fullmatch(r"last:([0-9]{1,4})", text):
        start, end = depth - int(match[1]), depth
    elif match := re.fullmatch(r"([0-9]{1,4})-([0-9]{1,4})", text):
        start, end = int(match[1]), int(match[2]) + 1
    else:
        raise UserError(f"--blocks {text} means nothing; {there}")
    if not 0 <= start < end <= depth:
        raise UserError(f"--blocks {text} does not fit; {there}")
    return range(start, end)


class Tower:
    """A network as tuners see it."""

    def __init__(self, network: nn.Module, blocks: str) -> None:
        """Choose blocks.

        Raises:
            UserError: `blocks` does not fit; a network that is no transformer has no blocks to choose from.
        """
        self.network, self.kind = network, type(network).__name__
        self.every = list(getattr(network, "blocks", []))
        self.depth = len(self.every)
        if not self.every and blocks != "all":
            raise UserError(f"--blocks {blocks} chooses transformer blocks, and {self.kind} has none; write --blocks all")
        self.chosen = {i: self.every[i] for i in parse_blocks(blocks, self.depth)} if self.every else {}

    @property
    def width(self) -> int:
        """Of the tokens, D."""
        return self.network.embed_dim

    def parts(self) -> list[nn.Module]:
        """The chosen blocks, or the whole network where it has none."""
        return list(self.chosen.values()) or [self.network]

    def transformer(self, tuner: str) -> dict[int, nn.Module]:
        """The chosen blocks, each x + attention(norm1(x)), then x + mlp(norm2(x)).

        Raises:
            UserError: they are of another kind.
        """
        blocks = self.every
        if not blocks or not all(isinstance(block, Block | EvaBlock) for block in blocks):
            kind = f" of {type(blocks[0]).__name__}" if blocks else ""
            raise UserError(
                f"--tuner {tuner} goes into pre-norm vision transformers, and the backbone is a {self.kind}{kind}; "
                "choose full, bias or linear, or a vit, such as vit_base_patch16_clip_224"
            )
        return self.chosen
