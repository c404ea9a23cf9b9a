"""The digits of the demo against scikit-learn's own arrays."""

import numpy as np
from sklearn.datasets import load_digits

from coreg.data.digit_pictures import load_digit_pictures
from coreg.data.digits import DIGIT_NAMES, load_digits_images
from coreg.data.sources import open_images


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


def test_pictures_show_two_to_four_digits_of_their_own_split():
    digits, labels, digit_split = load_digits_images()
    images, tags, split = load_digit_pictures()
    assert images.shape == (1900, 20, 20) and np.bincount(split).tolist() == [1200, 400, 300]
    of_bytes = {digits[row].tobytes(): row for row in range(len(digits))}
    used, counts = {kind: set() for kind in (0, 1, 2)}, []
    for picture in range(0, len(images), 3):
        shown = []
        for down in (0, 10):
            for right in (0, 10):
                cell = images[picture, down : down + 10, right : right + 10]
                # at which of the nine places a whole digit lies and nothing beside it
                windows = [cell[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
                shown += list({of_bytes.get(w.tobytes()) for w in windows if w.sum() == cell.sum()} - {None})
        assert set(np.flatnonzero(tags[picture] == 1)) == set(labels[shown])
        used[split[picture]] |= set(shown)
        counts.append(len(shown))
    assert set(counts) == {2, 3, 4} and (np.abs(tags) == 1).all()
    # some are rare, none is in two splits, and those of test pictures are test images
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2]
    assert (digit_split[list(used[1])] == 1).all() and (digit_split[list(used[0] | used[2])] == 0).all()
    np.testing.assert_array_equal(load_digit_pictures()[0], images)


def test_pictures_are_an_image_list_in_the_classes_asked_for():
    images = open_images("builtin:digit-pictures", ["nine", "cat", "one"])
    _, tags, _ = load_digit_pictures()
    np.testing.assert_array_equal(images.tags[:, [0, 2]], tags[:, [9, 1]])
    assert not images.tags[:, 1].any() and images.labels is None and images.load(0).size == (20, 20)
