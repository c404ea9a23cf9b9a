"""The stream of rendered glyphs: seeded, in range, and each image shows what its caption says."""

import sys

import pytest
import torch

from coreg.data.digits import DIGIT_NAMES
from coreg.demo.glyphs import SOURCES, GlyphStream, all_captions
from coreg.errors import UserError


@pytest.fixture(scope="module")
def batches(fonts):
    stream = GlyphStream(seed=0, batch_size=64)
    return [stream.batch() for _ in range(6)]


def test_shapes_and_range(batches):
    for batch in batches:
        assert batch.images.shape == (64, 1, 32, 32) and batch.images.dtype == torch.float32
        assert batch.images.min() >= 0 and batch.images.max() <= 1
        assert batch.digit.dtype == torch.int64 and batch.source.dtype == torch.int64
        assert len(batch.captions) == 64
        # Something is written in every image, and not everything is ink.
        assert batch.images.amax((1, 2, 3)).min() > 0.3 and batch.images.mean((1, 2, 3)).max() < 0.95


def test_all_digits_and_sources_occur(batches):
    pairs = {pair for b in batches for pair in zip(b.digit.tolist(), b.source.tolist())}
    assert {d for d, _ in pairs} == set(range(10)) and {s for _, s in pairs} == set(range(len(SOURCES)))


def test_captions_name_the_digit_and_fit_the_source(batches):
    styles = list(SOURCES.values())
    for batch in batches:
        for caption, digit, source in zip(batch.captions, batch.digit.tolist(), batch.source.tolist()):
            words = caption.split()
            assert [word for word in words if word in DIGIT_NAMES] == [DIGIT_NAMES[digit]]
            assert caption.replace(DIGIT_NAMES[digit], "{}") in styles[source].captions
    # Every wording of every source is used.
    assert {caption for b in batches for caption in b.captions} <= set(all_captions())
    used = {w for b in batches for c in b.captions for w in (c.replace(n, "{}") for n in DIGIT_NAMES) if "{}" in w}
    assert used == {caption for style in styles for caption in style.captions}


def test_stream_follows_its_seed(fonts):
    first, again, other = (GlyphStream(seed=seed, batch_size=16) for seed in (3, 3, 4))
    for _ in range(2):
        a, b, c = first.batch(), again.batch(), other.batch()
        assert torch.equal(a.images, b.images) and a.captions == b.captions
        assert torch.equal(a.digit, b.digit) and torch.equal(a.source, b.source)
        assert not torch.equal(a.images, c.images)


def test_consecutive_batches_differ(batches):
    assert not torch.equal(batches[0].images, batches[1].images)


def test_digits_are_recognisable(fonts):
    # Nearest class mean within a source: far above the 10 % of guessing, so images carry their label.
    stream = GlyphStream(seed=1, batch_size=512)
    parts = [stream.batch() for _ in range(6)]
    images = torch.cat([p.images.flatten(1) for p in parts])
    digit, source = torch.cat([p.digit for p in parts]), torch.cat([p.source for p in parts])
    train = torch.arange(len(digit)) < 2048
    for k in range(len(SOURCES)):
        fit, held = train & (source == k), ~train & (source == k)
        means = torch.stack([images[fit & (digit == d)].mean(0) for d in range(10)])
        hits = torch.cdist(images[held], means).argmin(1) == digit[held]
        assert hits.float().mean() > 0.4, list(SOURCES)[k]


def test_font_glyphs_fill_their_canvas(fonts):
    bank = fonts
    assert bank.images.shape[1:] == (1, 48, 48) and bank.images.min() == 0 and bank.images.max() == 1
    for image in bank.images[::7, 0]:
        ys, xs = (image > 0.1).nonzero(as_tuple=True)
        height, width = ys.max() - ys.min() + 1, xs.max() - xs.min() + 1
        assert abs(int(max(height, width)) - 40) <= 2
        assert abs(int(ys.min() + ys.max()) - 47) <= 2 and abs(int(xs.min() + xs.max()) - 47) <= 2
    for source in SOURCES.values():
        if isinstance(source.shapes, str):
            assert set(bank.digit[bank.kind(source.shapes)].tolist()) == set(range(10))


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'coreg\[dev\]'") as caught:
        GlyphStream(seed=0, batch_size=4)
    assert "\n" not in str(caught.value)


def test_fonts_that_this_matplotlib_does_not_bring_are_named(monkeypatch, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"needs the font DejaVuSans\.ttf.* pip install 'matplotlib>=3\.11'"):
        GlyphStream(seed=0, batch_size=4)
