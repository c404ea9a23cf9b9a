"""The digits of the demo against scikit-learn's own arrays."""

import numpy as np
from sklearn.datasets import load_digits

from coreg.data.digits import DIGIT_NAMES, load_digits_images


def test_images_are_the_scans_in_bytes():
    images, labels, split = load_digits_images()
    raw = load_digits()
    assert images.shape == (1797, 8, 8) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and (labels == raw.target).all()
    assert split.shape == (1797,) and split.dtype == np.uint8
    expected = np.empty_like(images)
    for row, image in enumerate(raw.images):
        for y in range(8):
            for x in range(8):
                expected[row, y, x] = min(255, 16 * int(image[y, x]))
    assert (images == expected).all()
    assert images.min() == 0 and images.max() == 255


def test_split_is_stratified():
    _, labels, split = load_digits_images()
    assert (split == 0).sum() == 1437 and (split == 1).sum() == 360
    share = 360 / 1797
    for digit in range(10):
        of_class = labels == digit
        assert abs((of_class & (split == 1)).sum() - share * of_class.sum()) < 1


def test_split_follows_its_seed_only():
    first, again, other = (load_digits_images(split_seed=seed)[2] for seed in (0, 0, 1))
    assert (load_digits_images()[2] == first).all() and (first == again).all()
    assert (first != other).any() and (other == 1).sum() == 360


def test_names_are_the_number_words():
    assert DIGIT_NAMES[0] == "zero" and DIGIT_NAMES[7] == "seven" and len(set(DIGIT_NAMES)) == 10
