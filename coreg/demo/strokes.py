"""Digits as pen strokes: parametric skeletons, jittered, and drawn as ink in one batched tensor operation.

The skeletons were written down by hand from how people write digits (1 with or without flag and base, 7 with or without
crossbar, open and closed 4, 9 with straight, hooked or short tail, ...); no target image was traced or fitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

RING_STEPS = 8  # control points on an ellipse, less one
CURVE_STEPS = 3  # straight pieces between two control points of a curve

# A skeleton is a string of strokes parted by "|"; numbers are hundredths of a digit's height, y downwards:
#   curve x,y x,y ...    smooth through all points        line x,y x,y ...    straight from point to point
#   ring cx,cy rx,ry start,sweep    an ellipse's arc, degrees clockwise, 0 = right (over 360: ends overlap)
Alphabet = dict[int, tuple[str, ...]]

# Plain hand: one movement where possible, straight stems, no ornaments.
PLAIN: Alphabet = {
    0: ("ring 30,50 30,50 -90,380", "ring 30,50 22,50 -60,350"),
    1: ("line 30,0 30,100", "line 42,0 22,100", "line 14,20 34,0 30,100"),
    2: ("curve 2,25 12,5 35,0 55,13 52,38 28,72 0,100 | line 0,100 60,100",),
    3: ("curve 2,12 25,0 50,10 48,35 20,47 50,56 57,80 32,100 0,90",),
    4: (
        "line 8,0 0,55 60,55 | line 46,10 42,100",
        "curve 10,0 3,30 8,55 35,58 55,45 | line 55,0 50,100",
    ),
    5: (
        "line 55,0 10,0 6,42 | curve 6,42 30,36 55,52 55,80 30,100 0,92",
        "curve 55,2 25,2 10,20 25,42 50,60 45,88 20,100 0,90",
    ),
    6: ("curve 45,0 15,25 0,65 12,95 40,98 55,75 38,55 12,62 2,80",),
    7: ("line 0,0 58,0 20,100", "curve 0,5 30,0 58,2 38,40 25,100"),
    8: (
        "curve 50,12 28,0 5,15 15,38 45,58 56,82 30,100 3,82 15,58 45,36 53,15",
        "curve 42,8 26,0 12,16 22,42 38,66 40,90 24,100 10,86 18,62 36,38 44,14",
        "ring 30,24 16,24 -90,380 | ring 30,74 20,26 -90,380",
    ),
    9: (
        "ring 28,28 26,27 -20,-360 | line 54,15 48,100",
        "ring 28,24 26,23 0,-370 | curve 54,20 52,60 40,100",
        "curve 54,10 28,0 5,18 12,42 38,45 53,18 54,55 45,88 20,100 2,88",
    ),
}

# Ornate hand: flags, bases, crossbars, closed bowls, hooked tails, loops.
ORNATE: Alphabet = {
    0: ("ring 30,50 34,48 -110,400", "ring 30,50 26,50 -80,330"),
    1: ("line 2,32 35,0 35,100", "line 10,25 34,0 32,100 | line 5,100 60,100"),
    2: (
        "curve 5,20 30,0 55,20 40,55 10,92 0,85 12,75 35,95 62,92",
        "line 2,8 55,4 2,98 60,96",
    ),
    3: (
        "line 3,0 52,0 25,40 | curve 25,40 50,48 57,75 35,98 0,92",
        "curve 5,10 35,0 50,20 30,42 15,45 | curve 15,45 50,50 58,80 30,100 5,98 0,85",
    ),
    4: ("line 42,100 44,0 0,65 62,65", "line 30,0 0,60 60,60 | line 40,35 36,100"),
    5: ("line 8,4 4,45 | line 8,2 60,0 | curve 4,45 32,38 52,58 48,86 22,100 0,86",),
    6: (
        "curve 35,0 10,20 0,60 4,80 | ring 28,74 27,26 180,370",
        "curve 50,8 35,0 8,22 0,65 25,100 52,82 40,60 10,66",
    ),
    7: (
        "line 0,2 58,0 22,100 | line 12,50 58,48",
        "line 2,18 4,2 | curve 4,4 30,8 58,2 36,45 28,100 | line 12,50 58,50",
    ),
    8: (
        "ring 30,24 22,24 -90,380 | ring 30,74 28,26 -90,380",
        "curve 55,5 20,2 8,25 35,50 50,75 25,100 2,80 25,50 50,25 50,8",
        "curve 60,0 30,5 14,22 30,45 38,70 26,98 8,90 14,68 34,48 50,30 58,6",
        "curve 30,0 48,12 34,40 12,66 10,90 30,100 48,88 44,66 22,40 12,14 30,0",
    ),
    9: (
        "ring 30,27 26,27 0,-370 | curve 56,25 55,70 38,98 5,92",
        "ring 30,30 26,30 -40,-330 | curve 55,20 58,65 45,95 20,100 5,85",
        "curve 52,12 25,0 4,20 15,46 42,40 54,14 52,60 38,96 8,98",
        "ring 27,26 24,25 -10,-340 | curve 52,18 57,62 46,92 22,100 4,92 6,74",
    ),
}

# Seven-segment display; segments named as in data sheets: a = top, then clockwise, g = middle.
_SEGMENT = {
    "a": "line 8,0 52,0",
    "b": "line 60,6 60,44",
    "c": "line 60,56 60,94",
    "d": "line 8,100 52,100",
    "e": "line 0,56 0,94",
    "f": "line 0,6 0,44",
    "g": "line 8,50 52,50",
}
_LIT = {
    0: ("abcdef",),
    1: ("bc",),
    2: ("abged",),
    3: ("abgcd",),
    4: ("fgbc",),
    5: ("afgcd",),
    6: ("afgedc", "fgedc"),
    7: ("abc", "fabc"),
    8: ("abcdefg",),
    9: ("abfgcd", "abfgc"),
}
SEGMENTS: Alphabet = {
    digit: tuple(" | ".join(_SEGMENT[name] for name in lit) for lit in variants) for digit, variants in _LIT.items()
}


def _strokes(skeleton: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """Parse a skeleton into (kind, control points in heights); a ring becomes a curve."""
    strokes = []
    for text in skeleton.split("|"):
        kind, *numbers = text.split()
        pairs = [(float(x) / 100, float(y) / 100) for x, y in (pair.split(",") for pair in numbers)]
        if kind == "ring":
            (cx, cy), (rx, ry), (start, sweep) = pairs
            angles = [math.radians(100 * (start + sweep * i / RING_STEPS)) for i in range(RING_STEPS + 1)]
            kind, pairs = "curve", [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]
        strokes.append((kind, pairs))
    return strokes


def _curve_row(position: float, points: int) -> list[float]:
    """Weights of `points` control points at `position` in [0, points - 1] of a Catmull-Rom spline."""
    start = min(int(position), points - 2)
    t = position - start
    basis = (
        (-t + 2 * t**2 - t**3) / 2,
        (2 - 5 * t**2 + 3 * t**3) / 2,
        (t + 4 * t**2 - 3 * t**3) / 2,
        (-(t**2) + t**3) / 2,
    )
    row = [0.0] * points
    # Beyond its ends the spline repeats the first and the last control point.
    for offset, weight in zip((-1, 0, 1, 2), basis):
        row[min(max(start + offset, 0), points - 1)] += weight
    return row


def _line_row(position: float, points: int) -> list[float]:
    """Weights of `points` control points at `position` in [0, points - 1] along a polyline."""
    start = min(int(position), points - 2)
    row = [0.0] * points
    row[start] += 1 - (position - start)
    row[start + 1] += position - start
    return row


@dataclass(frozen=True)
class StrokeBank:
    """Skeletons as tensors, K of them: a point on the pen's path is a fixed linear function of the control points."""

    control: torch.Tensor  # float32 (K, P, 2), zero-padded
    path: torch.Tensor  # float32 (K, S, P), maps control points to S path points
    pen_down: torch.Tensor  # bool (K, S - 1), whether path point i is joined to i + 1
    digit: torch.Tensor  # int64 (K,)


def stroke_bank(alphabet: Alphabet) -> StrokeBank:
    """Compile an alphabet of K skeletons."""
    compiled: list[tuple[int, list[tuple[float, float]], list[tuple[int, list[float]]], list[bool]]] = []
    for digit, skeletons in alphabet.items():
        for skeleton in skeletons:
            control: list[tuple[float, float]] = []
            rows: list[tuple[int, list[float]]] = []
            joined: list[bool] = []
            for kind, points in _strokes(skeleton):
                steps = (len(points) - 1) * (CURVE_STEPS if kind == "curve" else 1)
                weights = _curve_row if kind == "curve" else _line_row
                for step in range(steps + 1):
                    rows.append((len(control), weights(step * (len(points) - 1) / steps, len(points))))
                    joined.append(step < steps)
                control.extend(points)
            compiled.append((digit, control, rows, joined))
    most_points = max(len(control) for _, control, _, _ in compiled)
    most_rows = max(len(rows) for _, _, rows, _ in compiled)
    bank = StrokeBank(
        control=torch.zeros(len(compiled), most_points, 2),
        path=torch.zeros(len(compiled), most_rows, most_points),
        pen_down=torch.zeros(len(compiled), most_rows - 1, dtype=torch.bool),
        digit=torch.tensor([digit for digit, _, _, _ in compiled]),
    )
    for k, (_, control, rows, joined) in enumerate(compiled):
        bank.control[k, : len(control)] = torch.tensor(control)
        for s, (first, weights) in enumerate(rows):
            bank.path[k, s, first : first + len(weights)] = torch.tensor(weights)
            if s < most_rows - 1:
                bank.pen_down[k, s] = joined[s]
    return bank


def draw_strokes(
    bank: StrokeBank,
    rows: torch.Tensor,
    jitter: torch.Tensor,
    transform: torch.Tensor,
    width: torch.Tensor,
    size: torch.Tensor,
    shift: torch.Tensor,
    resolution: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draw skeletons as ink on paper.

    Args:
        bank: compiled alphabet of K skeletons.
        rows: int64 (n,), which skeleton.
        jitter: float32 (n,), standard deviation of every control point's displacement, in heights of a digit.
        transform: float32 (n, 2, 2), applied to the centred skeleton before it is fitted into the frame.
        width: float32 (n,), pen width in frames.
        size: float32 (n,), longer side of the digit's inked box in frames.
        shift: float32 (n, 2), displacement of the digit's centre to the right and downwards, in frames.
        resolution: pixels per side.
        generator: source of the displacements.

    Returns:
        float32 (n, 1, resolution, resolution) in [0, 1], 1 = ink.
    """
    control = bank.control[rows]
    control = control + torch.randn(control.shape, generator=generator) * jitter.view(-1, 1, 1)
    points = (bank.path[rows] @ control) @ transform.transpose(1, 2)
    # Padding repeats no point: it would pull the bounding box to the origin.
    used = (bank.path[rows] != 0).any(-1, keepdim=True)
    low = points.masked_fill(~used, math.inf).amin(1, keepdim=True)
    high = points.masked_fill(~used, -math.inf).amax(1, keepdim=True)
    scale = (size - width).view(-1, 1, 1) / (high - low).amax(-1, keepdim=True)
    points = (points - (low + high) / 2) * scale + 0.5 + shift.unsqueeze(1)
    axis = (torch.arange(resolution) + 0.5) / resolution
    pixel = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 1, 2)
    start, end = points[:, None, :-1], points[:, None, 1:]
    along = end - start
    t = ((pixel - start) * along).sum(-1) / along.square().sum(-1).clamp_min(1e-12)
    distance = (pixel - start - t.clamp(0, 1).unsqueeze(-1) * along).square().sum(-1)
    distance = distance.masked_fill(~bank.pen_down[rows].unsqueeze(1), math.inf).amin(-1).sqrt()
    # Ink fades over one pixel at the rim.
    ink = ((width.view(-1, 1) / 2 - distance) * resolution + 0.5).clamp(0, 1)
    return ink.view(-1, 1, resolution, resolution)
