"""Candidate rules against loops written out, and their statistics against hand-worked cases."""

import numpy as np
import pytest
from runs import zero_shot_accuracy

from coreg.errors import UserError
from coreg.weak.rules import (
    candidate_sets,
    mean_candidates,
    partial_accuracy,
    vote_counts,
)


class Evidence:
    """What the rules read of a store."""

    drawn = False

    def __init__(self, votes, probs, labels=None, split=None, unreadable=None):
        self._votes, self._probs = np.asarray(votes, np.int16), np.asarray(probs, np.float16)
        self.class_names = [str(i) for i in range(self._probs.shape[1])]
        self.labels = None if labels is None else np.asarray(labels)
        self.split = np.zeros(len(votes), np.uint8) if split is None else np.asarray(split, np.uint8)
        self.unreadable = np.zeros(len(votes), bool) if unreadable is None else np.asarray(unreadable)

    def need_annotator(self, remedy):
        pass

    def votes(self):
        return self._votes.copy()

    def probs(self):
        return self._probs.copy()


def random_evidence(count=200, templates=9, classes=7, seed=0):
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.full(classes, 0.4), count)
    votes = np.stack([generator.choice(classes, templates, p=row) for row in probs])
    votes[generator.random(votes.shape) < 0.2] = -1
    votes[3] = -1
    votes[4, 1:] = -1
    return Evidence(votes, probs)


def expected(rule, votes, probs):
    """One row at a time, straight from the rule's definition."""
    classes = len(probs)
    if (votes < 0).all():
        return set(range(classes))
    named = [int(v) for v in votes if v >= 0]
    probs = probs.astype(np.float32)
    by_probability = sorted(range(classes), key=lambda c: (-probs[c], c))
    name, _, value = rule.partition(":")
    if name == "union":
        return set(named)
    if name == "votes":
        chosen = {c for c in named if named.count(c) >= int(value)}
        return chosen or {max(range(classes), key=lambda c: (named.count(c), probs[c], -c))}
    if name == "topk":
        return set(by_probability[: int(value)])
    if name == "prob":
        return {c for c in range(classes) if probs[c] >= float(value)} | {by_probability[0]}
    if name == "ratio":
        return {c for c in range(classes) if probs[c] >= np.float32(float(value)) * probs.max()}
    total, chosen = 0.0, set()
    for c in by_probability:
        if total >= float(value) * probs.astype(float).sum() - 1e-9:
            break
        chosen.add(c)
        total += float(probs[c])
    return chosen


RULES = ["union", "votes:1", "votes:3", "votes:99", "topk:1", "topk:3", "topk:99", "prob:0.2", "prob:1", "ratio:0.5"]
RULES += ["ratio:1", "ratio:0.01", "cumulative:0.3", "cumulative:0.9", "cumulative:1"]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_does_what_its_definition_says(rule):
    evidence = random_evidence()
    candidates = candidate_sets(evidence, rule)
    assert candidates.dtype == bool and candidates.shape == (200, 7) and candidates.any(axis=1).all()
    for row, votes, probs in zip(candidates, evidence.votes(), evidence.probs()):
        assert set(np.flatnonzero(row)) == expected(rule, votes, probs)


def test_rules_that_say_the_same_agree():
    evidence = random_evidence(seed=1)
    votes = evidence.votes()
    assert (candidate_sets(evidence) == candidate_sets(evidence, "votes:1")).all()
    some = (votes >= 0).any(axis=1)
    assert (candidate_sets(evidence, "topk:1").sum(axis=1)[some] == 1).all()
    assert candidate_sets(evidence)[3].all()  # every template abstained
    counts = vote_counts(votes, 7)
    assert (counts.sum(axis=1) == (votes >= 0).sum(axis=1)).all() and counts.shape == (200, 7)


def test_uniform_probabilities_and_two_classes():
    evidence = Evidence([[0, 1], [1, 1], [-1, -1]], [[0.5, 0.5]] * 3)
    assert candidate_sets(evidence, "topk:1").tolist() == [[True, False], [True, False], [True, True]]
    assert candidate_sets(evidence, "cumulative:0.5").tolist() == [[True, False], [True, False], [True, True]]
    assert candidate_sets(evidence, "ratio:1").all()
    assert candidate_sets(evidence, "votes:2").tolist() == [[True, False], [False, True], [True, True]]


UNCLEAR = (
    "Union union:2 vote:2 votes votes: votes:0 votes:1.5 topk:-1 prob:0 prob:1.5 prob:x ratio:nan ratio:inf cumulative:-1"
)


@pytest.mark.parametrize("rule", ["", "topk:2:3", *UNCLEAR.split()])
def test_rules_that_cannot_be_understood_are_one_line(rule):
    with pytest.raises(UserError) as raised:
        candidate_sets(random_evidence(), rule)
    assert "\n" not in str(raised.value) and repr(rule) in str(raised.value)


def test_statistics_by_hand():
    evidence = Evidence(
        votes=[[0, 1], [1, 1], [2, 0], [-1, -1], [0, 0]],
        probs=[[0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.5, 0.1, 0.4], [1 / 3] * 3, [0.9, 0.05, 0.05]],
        labels=[1, 0, 2, 0, -1],
        split=[0, 0, 0, 1, 0],
        unreadable=[False, False, False, True, False],
    )
    candidates = candidate_sets(evidence)
    assert mean_candidates(candidates) == (2 + 1 + 2 + 3 + 1) / 5
    assert partial_accuracy(candidates, evidence.labels) == 3 / 4
    assert partial_accuracy(candidates, np.full(5, -1)) is None
    # what other tests count by: an unreadable image is wrong, whatever its label
    assert zero_shot_accuracy(evidence) == zero_shot_accuracy(evidence, True) == {"train": 1 / 3, "test": 0.0}
    evidence.split[3] = 0
    assert zero_shot_accuracy(evidence) == {"train": 1 / 4}


@pytest.mark.parametrize("rule", [*RULES, "cumulative:1e-12", "ratio:1e-12", "prob:1e-12"])
def test_odd_probabilities_never_give_an_empty_set(rule):
    """Uniform, one-hot, zero and NaN rows; where the probabilities say nothing and decide, every class may be the one."""
    rows = [[0.25] * 4, [1, 0, 0, 0], [6e-8] * 4, [0] * 4, [np.nan] * 4]
    candidates = candidate_sets(Evidence([[0, 1]] * 5, rows), rule)
    assert candidates.any(axis=1).all()
    if rule.startswith(("ratio", "cumulative")):
        assert candidates[3:].all()
    if rule == "cumulative:1e-12":
        assert candidates[:3].tolist() == [[True, False, False, False]] * 3
