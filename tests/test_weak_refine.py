"""Refinement against the same method written out in loops, closed forms and scikit-learn, and on sets that are odd."""

import functools
import math
import tracemalloc

import numpy as np
import pytest
import scipy.special
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.preprocessing import StandardScaler

from coreg.weak import mixture as module
from coreg.weak import refine as whole_module
from coreg.weak.mixture import Setting, balanced, fit_mixture, fit_projection, normalised
from coreg.weak.refine import choose, effective_classes, fit_two_halves, foretold, refine

HALF = Setting(0.5, "uniform")
softmax = functools.partial(scipy.special.softmax, axis=-1)


def responsibilities(mixture, z, probs):
    """q of every image, (N, C)."""
    return softmax(mixture.of_both(z, normalised(probs)) + mixture.balance)


def data(n=60, classes=3, width=4, seed=0, spread=0.6, wrong=0.35):
    """Clusters, and an annotator that is wrong for a share of the images."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    features = 2 * np.eye(classes, width)[labels] + spread * rng.normal(size=(n, width))
    named = np.where(rng.random(n) < wrong, rng.integers(0, classes, n), labels)
    return features, softmax(2 * np.eye(classes)[named] + 0.5 * rng.normal(size=(n, classes))), labels


def by_hand(z, P, w, prior, rounds, steps=2000):
    """One image, one class at a time, in plain Python but for the inverse."""
    n, C, d = len(z), len(P[0]), len(z[0])
    Q = [[p / sum(row) for p in row] for row in P]
    q, b = [list(row) for row in Q], [0.0] * C
    share = {"uniform": [1 / C] * C, "estimated": None}.get(
        prior, [(sum(row[c] for row in Q) + 0.5) / (n + 0.5 * C) for c in range(C)]
    )
    for _ in range(rounds):
        size = [sum(q[i][c] for i in range(n)) for c in range(C)]
        mu = [[sum(q[i][c] * z[i][t] for i in range(n)) / size[c] for t in range(d)] for c in range(C)]
        S = [[0.0] * d for _ in range(d)]
        for s in range(d):
            for t in range(d):
                S[s][t] = (
                    sum(z[i][s] * z[i][t] for i in range(n)) / n - sum(size[c] * mu[c][s] * mu[c][t] for c in range(C)) / n
                )
        trace = sum(S[t][t] for t in range(d))
        S = [[0.9 * S[s][t] + (0.1 * trace / d if s == t else 0.0) for t in range(d)] for s in range(d)]
        inverse = np.linalg.inv(np.array(S)).tolist()
        W = [[sum(inverse[s][t] * mu[c][t] for t in range(d)) for s in range(d)] for c in range(C)]
        confusion = [[sum(q[i][c] * Q[i][j] for i in range(n)) + 0.5 / C for j in range(C)] for c in range(C)]
        confusion = [[x / sum(row) for x in row] for row in confusion]
        score, view = [], []
        for i in range(n):
            row, seen = [], []
            for c in range(C):
                a = w * math.log(max(Q[i][c], 1e-4))
                a += (1 - w) * math.log(max(sum(confusion[c][j] * Q[i][j] for j in range(C)), 1e-6))
                seen.append(sum(z[i][t] * W[c][t] for t in range(d)) - 0.5 * sum(mu[c][t] * W[c][t] for t in range(d)))
                seen[-1] += math.log((size[c] + 0.5) / (n + 0.5 * C)) if prior == "estimated" else 0.0
                row.append(a + seen[-1])
            score.append(row)
            view.append(seen)

        def shares(score, b):
            rows = []
            for row in score:
                top = max(x + y for x, y in zip(row, b))
                e = [math.exp(x + y - top) for x, y in zip(row, b)]
                rows.append([x / sum(e) for x in e])
            return rows

        q = shares(score, b)
        for _ in range(steps if share else 0):
            mean = [sum(row[c] for row in q) / n for c in range(C)]
            b = [b[c] - math.log(mean[c] / share[c]) for c in range(C)]
            q = shares(score, b)
            if max(abs(mean[c] / share[c] - 1) for c in range(C)) < 1e-9:
                break
    return np.array(q), np.array(view)


@pytest.mark.parametrize(("w", "prior"), [(0.5, "uniform"), (1.0, "estimated"), (0.0, "annotator"), (0.5, "estimated")])
def test_the_mixture_is_the_recipe_written_out(monkeypatch, w, prior):
    monkeypatch.setattr(module, "BALANCED", 1e-10)
    monkeypatch.setattr(module, "MOST_STEPS", 2000)
    features, probs, _ = data(n=40)
    z = features - features.mean(axis=0)
    mixture = fit_mixture(z, 3 * probs, Setting(w, prior), rounds=4)
    q, view = by_hand(z.tolist(), probs.tolist(), w, prior, 4)
    np.testing.assert_allclose(responsibilities(mixture, z, 3 * probs), q, atol=1e-7)
    np.testing.assert_allclose(mixture.shares, q.mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(mixture.of_view(z), view, atol=1e-6)


def test_blocks_and_halved_precision_change_nothing_that_matters(monkeypatch):
    features, probs, _ = data(n=101)
    rows = np.arange(101)
    whole = refine(features, probs, rows[:80], rows[80:95], "uniform", 0.5)
    monkeypatch.setattr(module, "ENTRIES_AT_ONCE", 3 * 7)
    blocks = refine(features, probs, rows[:80], rows[80:95], "uniform", 0.5)
    np.testing.assert_allclose(blocks.mixture.weights, whole.mixture.weights, atol=1e-9)
    assert blocks.temperature == pytest.approx(whole.temperature) and blocks.classes == pytest.approx(whole.classes)
    np.testing.assert_allclose(blocks.probs, whole.probs, atol=1e-3)  # float16
    pieces = [blocks.part(slice(start, start + 10)) for start in range(0, 101, 10)]
    np.testing.assert_allclose(np.concatenate(pieces), blocks.probs, atol=1e-3)
    monkeypatch.setattr(module, "ENTRIES_IN_FLOAT64", 0)
    half = refine(features.astype(np.float16), probs.astype(np.float16), rows[:80], rows[80:95], "uniform", 0.5)
    np.testing.assert_allclose(half.probs.astype(float), whole.probs.astype(float), atol=2e-2)


@pytest.mark.parametrize("prior", ["uniform", "estimated"])
def test_a_mixture_is_fitted_to_a_part_of_very_many_images_and_mends_all(monkeypatch, prior):
    features, probs, labels = data(n=3000)
    rows, none = np.arange(3000), np.arange(0)
    all_of_them = refine(features, probs, rows, none, prior, 0.5)
    monkeypatch.setattr(whole_module, "ENTRIES_FITTED", 3 * 600)
    refinement = refine(features, probs, rows, none, prior, 0.5)
    part = np.sort(whole_module.drawn(rows, "fitted")[:600])
    if prior == "estimated":
        alone = refine(features[part], probs[part], np.arange(600), none, prior, 0.5)
        np.testing.assert_allclose(refinement.mixture.weights, alone.mixture.weights, atol=1e-6)
    # the share of a class in all images deviates by the error of a sample
    np.testing.assert_allclose(refinement.mixture.shares, all_of_them.mixture.shares, rtol=4 * (3 / 600) ** 0.5)
    right = [(p.probs.argmax(axis=1) == labels).mean() for p in (all_of_them, refinement)]
    assert right[0] > 0.9 and right[1] > right[0] - 0.01
    np.testing.assert_array_equal(refinement.probs, refine(features, probs, rows, none, prior, 0.5).probs)


def test_memory_beside_the_inputs_does_not_grow_with_the_table(monkeypatch):
    rng = np.random.default_rng(0)
    n, classes = 40_000, 200
    features = rng.normal(size=(n, 32)).astype(np.float16)
    probs = rng.random((n, classes), dtype=np.float32).astype(np.float16)  # 16 MB
    monkeypatch.setattr(module, "ENTRIES_IN_FLOAT64", 1000)
    monkeypatch.setattr(whole_module, "ENTRIES_FITTED", 1 << 18)
    monkeypatch.setattr(module, "ENTRIES_AT_ONCE", 1 << 15)
    monkeypatch.setattr(whole_module, "JUDGED_IMAGES", 200)
    tracemalloc.start()
    refinement = refine(features, probs, np.arange(0, n, 2), np.arange(1, n, 2), "uniform", 0.5)
    for start in range(0, n, 1000):
        refinement.part(slice(start, start + 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * probs.nbytes


def test_with_true_labels_the_classifier_is_linear_discriminant_analysis():
    features, _, labels = data(n=90)
    few = np.flatnonzero((labels != 0) | (np.arange(90) % 4 == 0))  # classes of 8, 30 and 30 images
    for rows, prior in ((np.arange(90), "uniform"), (few, "estimated")):
        z = features[rows] - features[rows].mean(axis=0)
        mixture = fit_mixture(z, np.eye(3)[labels[rows]], Setting(1.0, prior), rounds=1, shrinkage=0.0)
        size = np.bincount(labels[rows])
        ours = mixture.of_view(z) - np.log((size + 0.5) / size)  # half an image a class keeps each alive
        theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(z, labels[rows]).decision_function(z)
        np.testing.assert_allclose(ours - ours[:, :1], theirs - theirs[:, :1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gone", [0, 3])
def test_unequal_and_missing_classes_are_not_worse_than_the_annotator(gone):
    """Nine classes, the most frequent ten times as frequent as the rarest, or a third of the names without any image."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        sizes = np.full(9, 40)
        if gone:
            sizes[rng.permutation(9)[:gone]] = 0
        else:
            sizes = rng.permutation(np.geomspace(8, 80, 9).astype(int))
        labels = np.repeat(np.arange(9), sizes)
        features = np.eye(9)[labels] + 0.35 * rng.normal(size=(len(labels), 9))
        named = np.where(rng.random(len(labels)) < 0.2, rng.integers(0, 9, len(labels)), labels)
        probs = softmax(2 * np.eye(9)[named] + rng.normal(size=(len(labels), 9)))
        refinement = refine(features, probs, np.arange(len(labels)), np.arange(0))
        before, after = ((p.argmax(axis=1) == labels).mean() for p in (probs, refinement.probs))
        assert refinement.setting.prior == "estimated" and after >= before, (seed, before, after)
        true = np.bincount(labels, minlength=9) / len(labels)
        assert np.abs(refinement.mixture.shares - true).sum() < 0.9 * np.abs(normalised(probs).mean(axis=0) - true).sum()


def test_the_projection_is_pca_of_standardised_features(monkeypatch):
    monkeypatch.setattr(module, "LEAST_DIMENSIONS", 3)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 5
    ours = fit_projection(features, 2)(features)
    theirs = PCA(3).fit_transform(StandardScaler().fit_transform(features))
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-8)
    # as many axes as the means of the classes can span, at most a tenth of the images and all features
    axes = [fit_projection(features[:n], classes).axes.shape[1] for n, classes in ((200, 5), (200, 9), (35, 9))]
    assert axes == [4, 6, 3]
    # a feature that does not vary counts for nothing
    constant = np.concatenate([features, np.full((200, 1), 7.0)], axis=1)
    np.testing.assert_allclose(fit_projection(constant, 2)(constant), ours, atol=1e-8)


def test_balancing_meets_the_prior_and_leaves_hopeless_classes_alone():
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(500, 4)) + [4, 0, 0, -3]
    logits -= logits.max(axis=1, keepdims=True)
    for prior in ([0.25] * 4, [0.4, 0.3, 0.2, 0.1]):
        b = balanced(logits, np.array(prior), np.zeros(4))
        np.testing.assert_allclose(softmax(logits + b).mean(axis=0), prior, atol=2e-3)
    # within the slack nothing moves, outside of it a share moves to its edge
    shares = softmax(logits.copy()).mean(axis=0)
    free = balanced(logits, np.full(4, 0.25), np.zeros(4), slack=5.0)
    np.testing.assert_allclose(softmax(logits + free).mean(axis=0), shares, atol=1e-9)
    held = softmax(logits + balanced(logits, np.full(4, 0.25), np.zeros(4), slack=0.2)).mean(axis=0)
    assert held.max() == pytest.approx(0.3, abs=1e-3) and held.min() > 0.2 - 1e-3
    logits[:, 3] = -1e5
    mended = softmax(logits + balanced(logits, np.full(4, 0.25), np.zeros(4)))
    assert np.isfinite(mended).all() and mended[:, 3].max() == 0


def test_a_class_that_the_annotator_never_names_comes_back():
    features, _, labels = data(n=150, wrong=0.0, spread=0.3)
    named = np.where(labels == 2, 1, labels)
    probs = 0.94 * np.eye(3)[named] + 0.02
    mended = refine(features, probs, np.arange(150), np.arange(0), prior="uniform").probs.argmax(axis=1)
    assert (named == labels).mean() < 0.7 and (mended == labels).mean() > 0.95


def test_the_score_is_the_mean_over_folds_written_out():
    features, probs, _ = data(n=30)
    z = features - features.mean(axis=0)
    parts, total = np.arange(30) % 3, 0.0
    for i in range(30):
        mixture = fit_mixture(z[parts != parts[i]], probs[parts != parts[i]], HALF)
        p = softmax(mixture.of_view(z[i : i + 1]))[0]
        Q = probs[i] / probs[i].sum()
        total += math.log(sum(p[c] * sum(mixture.confusion[c, j] * Q[j] for j in range(3)) for c in range(3)))
    assert foretold(z, probs, HALF, parts) == pytest.approx(total / 30, abs=1e-9)
    alone = [foretold(z, probs, HALF, np.where(parts == part, part, -1)) for part in range(3)]
    assert np.mean(alone) == pytest.approx(total / 30, abs=1e-9)


def test_of_very_many_entries_one_fold_chooses_the_weight(monkeypatch):
    features, probs, _ = data(n=600)
    z, tried = features - features.mean(axis=0), []
    monkeypatch.setattr(whole_module, "foretold", lambda z, probs, setting, parts: tried.append(parts) or setting.weight)
    choose(z, probs, np.arange(600), "uniform")
    monkeypatch.setattr(whole_module, "ENTRIES_IN_ALL_FOLDS", 1799)
    choose(z, probs, np.arange(600), "uniform")
    assert [sorted(set(parts.tolist())) for parts in tried] == 3 * [[0, 1, 2, 3, 4]] + 3 * [[-1, 0]]
    np.testing.assert_array_equal(tried[0] == 0, tried[-1] == 0)


def test_classes_are_balanced_only_where_they_come_out_nearly_equal():
    features, probs, labels = data(n=600)
    ids = np.arange(600)
    z = fit_projection(features, 3)(features)
    setting, scores = choose(z, probs, ids)
    assert setting.prior == "uniform" and setting.weight == max(scores, key=scores.get) and set(scores) == {0, 0.5, 1}
    # one class ten times rarer: never worse than the annotator, and far better than when classes were made equal
    kept = np.flatnonzero((labels != 0) | (ids % 30 == 0))
    rare = refine(features[kept], probs[kept], np.arange(len(kept)), kept[:0])
    forced = refine(features[kept], probs[kept], np.arange(len(kept)), kept[:0], prior="uniform")
    accuracy = [(p.argmax(axis=1) == labels[kept]).mean() for p in (probs[kept], rare.probs, forced.probs)]
    assert rare.setting.prior == "estimated" and accuracy[1] > accuracy[0] + 0.1 and accuracy[1] > accuracy[2] + 0.05
    assert choose(z, probs, ids, "annotator", 0.25) == (Setting(0.25, "annotator"), {})
    assert effective_classes(np.array([0.5, 0.5, 0.0])) == pytest.approx(2) and effective_classes(np.ones(1)) == 1


def test_refining_corrects_the_annotator_and_is_less_sure_than_the_mixture():
    features, probs, labels = data(n=600, spread=0.9)
    train, test = np.arange(400), np.arange(400, 600)
    refinement = refine(features, probs, train, test)
    before, after = ((p.argmax(axis=1) == labels) for p in (probs, refinement.probs))
    assert after[train].mean() > before[train].mean() + 0.05 and after[test].mean() > before[test].mean() + 0.05
    sure = responsibilities(refinement.mixture, refinement.projection(features[train]), probs[train]).max(axis=1).mean()
    assert refinement.temperature >= 1 and refinement.probs[train].max(axis=1).mean() <= sure + 1e-3
    np.testing.assert_allclose(refinement.probs.astype(float).sum(axis=1), 1, atol=5e-3)


def test_other_rows_are_classified_by_the_view_alone():
    features, probs, _ = data(n=200)
    train, test = np.arange(150), np.arange(150, 190)
    first = refine(features, probs, train, test)
    other = probs.copy()
    other[test] = other[test][:, ::-1]
    second = refine(features, other, train, test)
    np.testing.assert_array_equal(first.probs[:190], second.probs[:190])
    np.testing.assert_array_equal(second.probs[190:], other[190:].astype(np.float16))  # in neither: kept
    logits = first.mixture.of_view(first.projection(features[test])) / first.temperature
    np.testing.assert_allclose(first.probs[test], softmax(logits), atol=1e-3)


def test_the_order_of_images_and_of_classes_does_not_matter():
    features, probs, _ = data(n=90)
    ids, order = np.arange(90) * 7, np.random.default_rng(1).permutation(90)
    z = fit_projection(features, 3)(features)
    setting, scores = choose(z, probs, ids)
    again, others = choose(z[order], probs[order], ids[order])
    assert setting == again and scores == {w: pytest.approx(score, abs=1e-7) for w, score in others.items()}
    assert fit_two_halves(z[order], probs[order], HALF, ids[order]) == pytest.approx(fit_two_halves(z, probs, HALF, ids))
    q, classes = responsibilities(fit_mixture(z, probs, HALF), z, probs), np.array([2, 0, 1])
    again = responsibilities(fit_mixture(z[order], probs[order], HALF), z[order], probs[order])
    np.testing.assert_allclose(again, q[order], atol=1e-6)
    renamed = probs[:, classes]
    np.testing.assert_allclose(responsibilities(fit_mixture(z, renamed, HALF), z, renamed), q[:, classes], atol=1e-6)


def test_classes_whose_means_do_not_fit_into_64_axes_are_mended():
    rng, n = np.random.default_rng(0), 1320
    labels = np.arange(n) % 110
    features = 5 * np.eye(110)[labels] + rng.normal(size=(n, 110))
    named = np.where(rng.random(n) < 0.4, rng.integers(0, 110, n), labels)
    probs = softmax(5 * np.eye(110)[named] + rng.normal(size=(n, 110)))
    right = (refine(features, probs, np.arange(n), np.arange(0), "uniform", 0.5).probs.argmax(axis=1) == labels).mean()
    assert right > (named == labels).mean() + 0.25


def test_odd_sets():
    features, probs, labels = data(n=60)
    everything, none = np.arange(60), np.arange(0)
    odd = {
        "one image": (features[:1], probs[:1]),
        "two images": (features[:2], probs[:2]),
        "fewer images than features": (np.tile(features[:7], (1, 5)), probs[:7]),
        "no feature varies": (np.ones((60, 4)), probs),
        "no features": (np.zeros((60, 4)), probs),
        "half precision": (features.astype(np.float16), probs.astype(np.float16)),
        "one class": (features, np.ones((60, 1))),
        "a class that nobody names": (features, np.concatenate([probs, np.zeros((60, 1))], axis=1)),
        "certain annotator": (features, np.eye(3)[labels]),
        "no spread within classes": (np.eye(3)[labels], np.eye(3)[labels]),
    }
    for name, (f, p) in odd.items():
        refinement = refine(f, p, everything[: len(f)], none)
        assert np.isfinite(refinement.probs).all() and refinement.probs.shape == p.shape, name
        np.testing.assert_allclose(refinement.probs.astype(float).sum(axis=1), 1, atol=5e-3, err_msg=name)
    with pytest.raises(ValueError, match="no training rows"):
        refine(features, probs, none, everything)


def test_where_the_annotator_says_nothing_the_features_decide():
    features, probs, labels = data(n=300, spread=0.3, wrong=0.2)
    probs = probs.copy()
    probs[:50], probs[50:60] = 1 / 3, 0  # every template abstained; rounded to nothing
    mended = refine(features, probs, np.arange(300), np.arange(0)).probs
    assert (mended[:60].argmax(axis=1) == labels[:60]).mean() > 0.95
    np.testing.assert_array_equal(normalised(np.zeros((1, 4))), np.full((1, 4), 0.25))
