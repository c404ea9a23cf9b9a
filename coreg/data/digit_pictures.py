"""Pictures that show several of scikit-learn's handwritten digits: a demo of images with several labels, no download."""

from __future__ import annotations

import numpy as np
import torch

from coreg.data.digits import DIGIT_NAMES, load_digits_images
from coreg.data.images import HELD_OUT, TEST, TRAIN
from coreg.data.keyed import keyed_generator, keyed_uniform

PICTURES = {TRAIN: 1200, HELD_OUT: 300, TEST: 400}  # how many pictures there are of each split
CELL = 10  # pixels a side of the four cells of a picture, in each of which a digit of 8 pixels may lie anywhere


def load_digit_pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures of two to four digits, drawn by key: each lies somewhere in one of four cells, 2x2, and others stay empty.

    No digit is in pictures of two splits: those of test pictures are the test images, and a fifth of the training images
    is in pictures that are held out alone.

    Returns:
        images uint8 (1900, 20, 20), as of `load_digits_images`; tags int8 (1900, 10), +1 where such a digit is shown,
        else -1; split uint8 (1900,), 0 = train, 1 = test, 2 = held out.
    """
    digits, labels, digit_split = load_digits_images()
    train = keyed_generator("digit pictures", "held out").permutation(np.flatnonzero(digit_split == TRAIN))
    count = len(train) // 5
    sources = {TRAIN: train[count:], HELD_OUT: train[:count], TEST: np.flatnonzero(digit_split == TEST)}
    split = np.concatenate([np.full(count, kind, np.uint8) for kind, count in PICTURES.items()])
    images = np.zeros((len(split), 2 * CELL, 2 * CELL), dtype=np.uint8)
    tags = np.full((len(split), len(DIGIT_NAMES)), -1, dtype=np.int8)
    # of each picture: how many digits it shows, and of each cell its rank, its digit, and where the digit lies
    draws = keyed_uniform(("digit pictures",), torch.arange(len(split)), 17).double().numpy()
    for picture, draw in enumerate(draws):
        shown = draw[1:5].argsort()[: 2 + int(3 * draw[0])]
        for cell in shown.tolist():
            which, right, down = draw[5 + 3 * cell : 8 + 3 * cell]
            digit = sources[int(split[picture])][int(which * len(sources[int(split[picture])]))]
            left = cell % 2 * CELL + int(right * (CELL - 7))
            top = cell // 2 * CELL + int(down * (CELL - 7))
            images[picture, top : top + 8, left : left + 8] = digits[digit]
            tags[picture, labels[digit]] = 1
    return images, tags, split
