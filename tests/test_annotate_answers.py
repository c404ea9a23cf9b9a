"""Parsing of chat models' answers: strict, and abstaining wherever a person would not be sure."""

import pytest

from coreg.annotate.answers import AnswerParser, plain
from coreg.store.blocks import pack_answers, unpack_answers

NAMES = ["cat", "dog", "fire truck", "truck", "T-shirt/top", "lawn_mower", "number 1", "number 10", "猫", "apple"]


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("cat", "cat"),
        ("  Cat.\n", "cat"),
        ("A dog", "dog"),
        ("**The Fire-Truck!**", "fire truck"),
        ("The image shows a fire truck.", "fire truck"),  # and not the truck inside
        ("It is a truck", "truck"),
        ("t shirt top", "T-shirt/top"),
        ("Lawn Mower", "lawn_mower"),
        ("lawn_mower", "lawn_mower"),
        ("number 10", "number 10"),
        ("The answer is: number 1.", "number 1"),
        ("The answer is 'number 10', because", "number 10"),
        ("这是猫。", "猫"),
        ("apples", "apple"),  # nearly
        ("Apple; apple", "apple"),
        ("cat cat cat", "cat"),
    ],
)
def test_answers_that_name_a_class(answer, name):
    assert AnswerParser(NAMES)(answer) == NAMES.index(name)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "...",
        "\u0000\ufffd",
        "cat or dog",
        "a truck, not a fire truck",
        "not a cat",
        "This isn't a dog",
        "There is no cat in the image",
        "none of them",
        "category",  # holds "cat", but not as a word
        "hotdog",
        "I am sorry, I cannot see the image.",
        "bird",
        "number",
        "number 11",
        "number 2",
        "hat",
        "lawn mover b",
        "the",
        "cut",  # three letters: one slip is too many
        "something that goes on and on about an appple tree and its uses",
    ],
)
def test_answers_that_are_no_vote(answer):
    assert AnswerParser(NAMES)(answer) == -1


def test_names_that_look_alike_are_kept_apart_by_none():
    parse = AnswerParser(["a b", "a_b", "ab", "!?", "the"])
    assert [parse(text) for text in ("a b", "A-B", "ab", "!?", "the")] == [-1, -1, 2, -1, 4]
    assert AnswerParser(["!", "?"])("anything") == -1
    near = AnswerParser(["strawberries", "strawberry a"])
    assert near("strawberrie") == -1 or near("strawberrie") == 0


def test_every_name_is_its_own_answer():
    names = ["German Traffic Sign: Caution!", "Curve (to the left)", "Curve (to the right)", "No entry", "Stop", "Ümläut ß"]
    parse = AnswerParser(names)
    for index, name in enumerate(names):
        for answer in (name, name.upper(), f"{name}.", f"A {name}", plain(name)):
            assert parse(answer) == index, answer


def test_answers_are_packed_without_loss():
    answers = [["a\nb", ""], ['"quoted", comma', "猫\\n"], ["\u2028", "x" * 1000]]
    assert unpack_answers(pack_answers(answers)) == answers and pack_answers(answers).dtype == "uint8"
    assert unpack_answers(pack_answers([])) == []
