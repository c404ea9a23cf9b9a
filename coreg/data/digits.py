"""scikit-learn's handwritten digits for the demo: 1,797 real pen-written images of 8x8 pixels, no download.

The data ship inside scikit-learn (UCI "Optical Recognition of Handwritten Digits", Alpaydin and Kaynak 1998):
32x32 scans counted down to 8x8 cells of 0..16 dark pixels.
"""

from __future__ import annotations

import numpy as np

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_IMAGES = 360


def load_digits_images(split_seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Load the digits with a fixed, stratified split.

    Args:
        split_seed: which 360 of the 1,797 images are kept for testing.

    Returns:
        images uint8 (1797, 8, 8), 0 = paper and 255 = full ink;
        labels int64 (1797,) in 0..9, indices into `DIGIT_NAMES`;
        split uint8 (1797,), 0 = train (1,437 images) and 1 = test (360 images).
    """
    # here and not above: what the digits are called is asked before anything slow is imported
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    # A cell counts 0..16 ink pixels; 16 would be 256, one more than a byte holds.
    images = np.clip(np.round(16 * bunch.images), 0, 255).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    _, test_rows = train_test_split(np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=split_seed)
    split = np.zeros(len(labels), dtype=np.uint8)
    split[test_rows] = 1
    return images, labels, split
