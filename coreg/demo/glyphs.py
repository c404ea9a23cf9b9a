"""A stream of rendered digits with captions: what the demo's annotator is trained on, in place of photographs from the web.

As on the web, what an image looks like and how people write about it go together: every *source* below (a book page, a
calculator, a scribble, ...) has its own shapes, its own geometry and its own wording, but all say the same ten English
number words. There is no wording that all sources share: it would tie them together, and prompts of different sources would
agree where a noisy annotator should hesitate. No real image and no label of the target data set enters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from coreg.data.digits import DIGIT_NAMES
from coreg.demo.strokes import ORNATE, PLAIN, SEGMENTS, Alphabet, StrokeBank, draw_strokes, stroke_bank
from coreg.errors import UserError

IMAGE_SIZE = 32  # what the annotator sees
CELLS = 8  # every image passes through this many cells a side: the annotator must read coarse scans
CANVAS = 48  # resolution of a font's glyph
NOISE = 0.04  # standard deviation of a cell, in full ink
GLYPH = 40  # longer side of a glyph on its canvas: 5/6, as for strokes

# Fonts that ship with matplotlib, by the kinds of source that use them.
FONTS = {
    "DejaVuSans.ttf": "sans",
    "DejaVuSans-Bold.ttf": "sans bold",
    "DejaVuSans-Oblique.ttf": "italic",
    "DejaVuSans-BoldOblique.ttf": "italic bold",
    "DejaVuSansMono.ttf": "mono",
    "DejaVuSansMono-Bold.ttf": "mono bold",
    "DejaVuSansMono-Oblique.ttf": "mono",
    "DejaVuSerif.ttf": "serif",
    "DejaVuSerif-Bold.ttf": "serif bold",
    "DejaVuSerif-Italic.ttf": "italic",
    "DejaVuSerif-BoldItalic.ttf": "italic bold",
    "STIXGeneral.ttf": "serif",
    "STIXGeneralBol.ttf": "serif bold",
    "STIXGeneralItalic.ttf": "italic",
    "STIXGeneralBolIta.ttf": "italic bold",
    "cmr10.ttf": "serif",
    "cmb10.ttf": "serif bold",
    "cmss10.ttf": "sans",
    "cmti10.ttf": "italic",
    "cmtt10.ttf": "mono",
}
FONT_POINTS = 64
FONT_STROKES = (0, 2, 4)  # extra outline in pixels at FONT_POINTS


@dataclass(frozen=True)
class Source:
    """One kind of picture: its shapes, its wording, and how it is rendered."""

    shapes: str | Alphabet  # a kind of font, or an alphabet of strokes
    captions: tuple[str, ...]  # how such a picture is described; `{}` is the number word
    rotation: float = 0.08  # standard deviation, radians
    slant: float = 0.0  # mean
    slant_spread: float = 0.08  # standard deviation
    warp: float = 0.04  # standard deviation, half frames for a font's grid, heights of a digit for strokes
    blurred: float = 0.3  # share of blurred images
    contrast: tuple[float, float] = (0.6, 1.1)  # range
    aspect: float = 0.0  # mean log of width over height
    pen: tuple[float, float] = (0.08, 0.14)  # range of the pen's width, frames


SOURCES = {
    "print": Source(
        "sans",
        (
            "a photo of the number {}",
            "a picture of the number {}",
            "a sign with the number {}",
            "the number {}",
        ),
        rotation=0.04,
        slant_spread=0.04,
        warp=0.02,
        blurred=0.2,
        contrast=(0.7, 1.15),
    ),
    "book": Source(
        "serif",
        (
            "a scan of the printed digit {}",
            "the printed digit {} in a book",
            "a book page with the digit {}",
            "a printed {}",
        ),
        rotation=0.03,
        slant_spread=0.03,
        warp=0.02,
    ),
    "typewriter": Source(
        "mono",
        (
            "a typewritten {}",
            "a receipt with a typed {}",
            "a {} typed on a typewriter",
            "the typed figure {}",
        ),
        rotation=0.03,
        slant_spread=0.03,
        warp=0.02,
        aspect=-0.2,
    ),
    "italic": Source(
        "italic",
        (
            "the numeral {} in italics",
            "an elegant slanted {}",
            "an italic {}",
            "a slanted numeral {}",
        ),
        rotation=0.04,
        slant=0.2,
        slant_spread=0.06,
        warp=0.03,
    ),
    "poster": Source(
        "bold",
        (
            "a bold {} on a poster",
            "a poster with a big bold {}",
            "a heavy black {}",
            "a thick bold {}",
        ),
        slant=-0.1,
        slant_spread=0.1,
        warp=0.04,
        contrast=(0.8, 1.15),
        aspect=0.2,
    ),
    "display": Source(
        SEGMENTS,
        (
            "a calculator showing a {}",
            "a digital clock showing a {}",
            "a {} on a digital display",
            "the display shows {}",
        ),
        rotation=0.04,
        slant=0.1,
        slant_spread=0.04,
        warp=0.01,
        pen=(0.07, 0.13),
    ),
    "pen": Source(
        PLAIN,
        (
            "a handwritten {}",
            "a {} written with a pen",
            "handwriting of the digit {}",
            "a pen drawing of the number {}",
        ),
        rotation=0.12,
        slant_spread=0.18,
        warp=0.03,
    ),
    "scribble": Source(
        ORNATE,
        (
            "a scribbled {}",
            "a child's drawing of a {}",
            "a wobbly {} drawn with a marker",
            "a sketch of a {}",
        ),
        rotation=0.18,
        slant_spread=0.25,
        warp=0.05,
        pen=(0.1, 0.2),
    ),
}


class GlyphBatch(NamedTuple):
    """images float32 (B, 1, 32, 32) in [0, 1], 1 = ink; captions, one an image; digit int64 (B,); source int64 (B,)."""

    images: torch.Tensor
    captions: list[str]
    digit: torch.Tensor
    source: torch.Tensor


def all_captions() -> list[str]:
    """Every caption the stream can give, e.g. to know its vocabulary beforehand."""
    wordings = [caption for source in SOURCES.values() for caption in source.captions]
    return [wording.format(name) for wording in wordings for name in DIGIT_NAMES]


class GlyphStream:
    """Endless batches; the same seed gives the same batches.

    Raises:
        UserError: where matplotlib, whose fonts are drawn, is not installed or brings others.
    """

    def __init__(self, seed: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.fonts = font_bank()
        self.strokes = [None if isinstance(s.shapes, str) else stroke_bank(s.shapes) for s in SOURCES.values()]

    def batch(self) -> GlyphBatch:
        """The next batch: digits and sources are drawn uniformly and independently."""
        digit = torch.randint(10, (self.batch_size,), generator=self.generator)
        source = torch.randint(len(SOURCES), (self.batch_size,), generator=self.generator)
        ink = torch.empty(self.batch_size, 1, IMAGE_SIZE, IMAGE_SIZE)
        for k, style in enumerate(SOURCES.values()):
            rows = (source == k).nonzero()[:, 0]
            if len(rows):
                ink[rows] = self._draw(style, self.strokes[k], digit[rows])
        images = self._scan(ink, source)
        return GlyphBatch(images, self._captions(digit, source), digit, source)

    def _draw(self, style: Source, strokes: StrokeBank | None, digit: torch.Tensor) -> torch.Tensor:
        """Ink on paper, float32 (n, 1, 32, 32), for the n digits of one source."""
        n = len(digit)
        size = self._uniform(n, 0.78, 1.1)
        shift = torch.stack([self._uniform(n, -0.04, 0.04), self._uniform(n, -0.04, 0.04)], 1)
        shape = _shape(
            self._normal(n, 0, style.rotation),
            self._normal(n, style.slant, style.slant_spread),
            self._normal(n, style.aspect, 0.12),
        )
        if strokes is not None:
            variant = self._one_of(strokes.digit == digit.view(-1, 1))
            warp, width = torch.full((n,), style.warp), self._uniform(n, *style.pen)
            return draw_strokes(strokes, variant, warp, shape, width, size, shift, IMAGE_SIZE, self.generator)
        glyphs = self.fonts.images[self._one_of((self.fonts.digit == digit.view(-1, 1)) & self.fonts.kind(style.shapes))]
        # affine_grid wants the map from the frame back to the glyph's canvas, both as [-1, 1]^2.
        back = torch.linalg.inv(shape) * (GLYPH / CANVAS / size).view(-1, 1, 1)
        affine = torch.cat([back, -back @ (2 * shift).unsqueeze(-1)], -1)
        grid = F.affine_grid(affine, [n, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
        bumps = torch.randn(n, 2, 4, 4, generator=self.generator) * style.warp
        bumps = F.interpolate(bumps, size=grid.shape[1:3], mode="bicubic", align_corners=True)
        return F.grid_sample(glyphs, grid + bumps.permute(0, 2, 3, 1), align_corners=False)

    def _scan(self, ink: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Blur some, count the ink in coarse cells, set contrast, add noise, enlarge again: (B, 1, 32, 32) to the same."""
        n, styles = len(ink), list(SOURCES.values())
        blurred = torch.rand(n, generator=self.generator) < torch.tensor([s.blurred for s in styles])[source]
        soft = F.avg_pool2d(F.avg_pool2d(ink, 5, 1, 2), 3, 1, 1)
        cells = F.adaptive_avg_pool2d(torch.where(blurred.view(-1, 1, 1, 1), soft, ink), CELLS)
        low, high = torch.tensor([s.contrast for s in styles])[source].unbind(1)
        contrast = low + (high - low) * torch.rand(n, generator=self.generator)
        cells = cells / (cells.amax((2, 3), keepdim=True) + 1e-3) * contrast.view(-1, 1, 1, 1)
        cells = (cells + NOISE * torch.randn(cells.shape, generator=self.generator)).clamp(0, 1)
        return F.interpolate(cells, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)

    def _captions(self, digit: torch.Tensor, source: torch.Tensor) -> list[str]:
        wordings = [style.captions for style in SOURCES.values()]
        draws = self._uniform(len(digit), 0, 1).tolist()
        return [
            wordings[k][int(draw * len(wordings[k]))].format(DIGIT_NAMES[d])
            for d, k, draw in zip(digit.tolist(), source.tolist(), draws)
        ]

    def _uniform(self, n: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=self.generator)

    def _normal(self, n: int, mean: float, spread: float) -> torch.Tensor:
        return mean + spread * torch.randn(n, generator=self.generator)

    def _one_of(self, allowed: torch.Tensor) -> torch.Tensor:
        """One allowed column, int64 (n,), for every row of a bool (n, K) table."""
        return torch.multinomial(allowed.float(), 1, generator=self.generator)[:, 0]


def _shape(angle: torch.Tensor, slant: torch.Tensor, aspect: torch.Tensor) -> torch.Tensor:
    """float32 (n, 2, 2) maps (x, y), y downwards: widen by exp(aspect), slant to the right, turn clockwise by angle."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    lean = torch.stack([one, -slant, zero, one], 1).view(-1, 2, 2)
    widen = torch.stack([aspect.exp(), zero, zero, one], 1).view(-1, 2, 2)
    return turn @ lean @ widen


@dataclass(frozen=True)
class FontBank:
    """Glyphs of all fonts: images float32 (K, 1, 48, 48) in [0, 1], digit int64 (K,), kinds of the font, K strings."""

    images: torch.Tensor
    digit: torch.Tensor
    kinds: list[str]

    def kind(self, name: str) -> torch.Tensor:
        """bool (K,), which glyphs belong to fonts of this kind."""
        return torch.tensor([name in kinds.split() for kinds in self.kinds])


def font_bank() -> FontBank:
    """Draw the ten digits in every font and thickness.

    Raises:
        UserError: where matplotlib, whose font files are used, is not installed or brings others.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "rendering glyphs needs the fonts of matplotlib, which is not installed; type: pip install 'coreg[dev]'"
        ) from None
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    missing = [name for name in FONTS if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"rendering glyphs needs the font {missing[0]}, which matplotlib {matplotlib.__version__} does not bring; "
            f"type: pip install 'matplotlib>=3.11' (Python 3.11 or newer)"
        )
    images, digits, kinds = [], [], []
    for name, kind in FONTS.items():
        font = ImageFont.truetype(folder / name, FONT_POINTS)
        for digit in range(10):
            for stroke in FONT_STROKES:
                images.append(_glyph(font, str(digit), stroke))
                digits.append(digit)
                kinds.append(kind)
    return FontBank(torch.from_numpy(np.stack(images)).unsqueeze(1) / 255, torch.tensor(digits), kinds)


def _glyph(font: ImageFont.FreeTypeFont, text: str, stroke: int) -> np.ndarray:
    """uint8 (48, 48): the glyph, its longer side scaled to 40 pixels, centred."""
    paper = Image.new("L", (3 * FONT_POINTS, 3 * FONT_POINTS))
    ImageDraw.Draw(paper).text((FONT_POINTS, FONT_POINTS), text, font=font, fill=255, stroke_width=stroke)
    glyph = paper.crop(paper.getbbox())
    scale = GLYPH / max(glyph.size)
    glyph = glyph.resize([max(1, round(scale * side)) for side in glyph.size], Image.Resampling.BICUBIC)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(glyph, ((CANVAS - glyph.width) // 2, (CANVAS - glyph.height) // 2))
    return np.asarray(canvas)
