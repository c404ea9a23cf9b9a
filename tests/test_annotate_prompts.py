"""Templates and class names: the papers' list, and files that people write."""

import pytest
from runs import error_of

from coreg.annotate.prompts import TEMPLATES, prompts, read_templates
from coreg.data.class_names import read_class_names


def test_the_papers_templates_are_27_in_order():
    assert len(TEMPLATES) == 27 == len(set(TEMPLATES))
    assert TEMPLATES[0] == "a photo of a {}" and TEMPLATES[-1] == "a photo of a small {}"
    assert TEMPLATES[9] == "a close-up photo of a {}" and TEMPLATES[16] == "a rendition of the {}"
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    assert sum(template.startswith(("a photo of", "the photo of")) for template in TEMPLATES) == 16


def test_prompts_are_ordered_template_by_template():
    assert prompts(["a {}", "{}!"], ["cat", "dog", "{0}"]) == ["a cat", "a dog", "a {0}", "cat!", "dog!", "{0}!"]


def test_files_are_read_with_bom_windows_lines_and_blank_lines(tmp_path):
    file = tmp_path / "x.txt"
    file.write_bytes("\ufeffT-shirt/top\r\n\r\n  Ankle boot \r\n猫\n".encode())
    assert read_class_names(str(file)) == ["T-shirt/top", "Ankle boot", "猫"]
    file.write_bytes("\ufeffa photo of a {}\r\n\r\nein {}.".encode())
    assert read_templates(str(file)) == ["a photo of a {}", "ein {}."]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no class names"),
        (" \n\t\n\ufeff", "holds no class names"),
        ("cat\n", "one class name, 'cat'; write at least two"),
        ("cat\ndog\nCat\n", "line 3 repeats the class name 'Cat' of line 1"),
        ("cat\ndog\x00\n", "line 2 holds control characters"),
    ],
)
def test_bad_class_files_are_one_line(tmp_path, text, words):
    text = text.replace("\n\ufeff", "\n")
    (tmp_path / "classes.txt").write_text(text)
    assert words in error_of(read_class_names, str(tmp_path / "classes.txt"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no templates"),
        ("a photo of a {}\na photo\n", "line 2 is 'a photo'; a template needs exactly one {}"),
        ("{} and {}\n", "exactly one {}"),
        ("a {name}\n", "exactly one {}"),
        ("a {} in {braces}\n", "exactly one {}"),
        ("a {}\n\nA {}\n", "line 3 repeats the template 'A {}' of line 1"),
    ],
)
def test_bad_template_files_are_one_line(tmp_path, text, words):
    (tmp_path / "templates.txt").write_text(text)
    assert words in error_of(read_templates, str(tmp_path / "templates.txt"))


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    assert "No such file" in error_of(read_class_names, str(tmp_path / "missing.txt"))
    assert "Is a directory" in error_of(read_templates, str(tmp_path))
    (tmp_path / "latin.txt").write_bytes("Käfer\nHund\n".encode("latin-1"))
    assert "not UTF-8" in error_of(read_class_names, str(tmp_path / "latin.txt"))
    (tmp_path / "many.txt").write_text("\n".join(f"class {i}" for i in range(32768)))
    assert "32768 class names" in error_of(read_class_names, str(tmp_path / "many.txt"))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ["0: cat", "1: dog"],
            "line 1 is '0: cat', which has a number; write one class name a line and nothing else, here: cat",
        ),
        (["1, cat", "2, dog"], "which has a number"),
        (["0 cat", "1 dog"], "which has a number"),
        (["1. cat", "2. dog"], "which has a number"),
        (["1) cat", "2) dog"], "which has a number"),
        (
            ["cat,0", "dog,1"],
            "line 1 is 'cat,0', which has a number; write one class name a line and nothing else, here: cat",
        ),
        (["0\tcat", "1\tdog"], "several columns"),
        (["n02\ttench, fish", "n03\tshark"], "here: tench, fish"),
        (["label,name", "a,cat", "b,dog"], "begins with 'label,name', the header of a table"),
        (["Class ID;Class_Name", "a;cat"], "the header of a table"),
        (['"cat"', '"dog"'], "line 1 is '\"cat\"', in quotes; write one class name a line and nothing else, here: cat"),
        (["cat", "'dog',"], "line 2 is \"'dog',\", in quotes"),
        (["# animals", "cat", "dog"], "line 1 is '# animals', and a remark would be a class; remove it"),
        (["cat", "// more", "dog"], "line 2 is '// more', and a remark"),
        (["- cat", "- dog"], "line 1 is '- cat', an item of a list"),
        (
            ["caf\u00e9", "cafe\u0301"],
            "line 2 repeats the class name 'cafe\u0301' of line 1, but for Unicode form or invisible",
        ),
        (["cat", "dog", "c\u200bat"], "line 3 repeats the class name 'c\\u200bat' of line 1, but for Unicode form"),
        (["no cat", "no\u00a0cat"], "of line 1, but for Unicode form"),
        (["item \u2460", "item 1"], "of line 1, but for Unicode form"),
        (["re\u00addo", "RedO"], "of line 1, but for Unicode form"),
    ],
)
def test_what_is_more_than_names_is_refused(tmp_path, lines, words):
    (tmp_path / "classes.txt").write_text("\n".join(lines), encoding="utf-8")
    assert words in error_of(read_class_names, str(tmp_path / "classes.txt"))


@pytest.mark.parametrize(
    "names",
    [
        ["1 person", "2 people", "3 people"],
        ["2 door", "4 door"],
        ["3 series", "5 series", "0 series"],
        ["tench, Tinca tinca", "great white shark, white shark, man-eater", "cock"],
        ["speed limit: 20", "speed limit: 30"],
        ["rock 'n' roll", "'n' roll", 'a 5" disk'],
        ["C#", "C", "F#"],
        ["name", "label"],
        ["zero", "one - two"],
        ["cat", "cats", "\u732b", "\u732b\u732b"],
        ["T-shirt/top", "Tshirt top"],
        ["10:30", "11:45"],
    ],
)
def test_odd_names_are_names(tmp_path, names):
    (tmp_path / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    assert read_class_names(str(tmp_path / "classes.txt")) == names
