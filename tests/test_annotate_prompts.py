"""Templates and class names: the papers' list, and files that people write."""

import pytest

from coreg.annotate.prompts import TEMPLATES, prompts, read_class_names, read_templates
from coreg.errors import UserError


def refused(read, path):
    with pytest.raises(UserError) as raised:
        read(str(path))
    assert "\n" not in str(raised.value)
    return str(raised.value)


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
def test_bad_class_files_are_told_in_one_line(tmp_path, text, words):
    text = text.replace("\n\ufeff", "\n")
    (tmp_path / "classes.txt").write_text(text)
    assert words in refused(read_class_names, tmp_path / "classes.txt")


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
def test_bad_template_files_are_told_in_one_line(tmp_path, text, words):
    (tmp_path / "templates.txt").write_text(text)
    assert words in refused(read_templates, tmp_path / "templates.txt")


def test_files_that_cannot_be_read_are_told_in_one_line(tmp_path):
    assert "No such file" in refused(read_class_names, tmp_path / "missing.txt")
    assert "Is a directory" in refused(read_templates, tmp_path)
    (tmp_path / "latin.txt").write_bytes("Käfer\nHund\n".encode("latin-1"))
    assert "not UTF-8" in refused(read_class_names, tmp_path / "latin.txt")
    (tmp_path / "many.txt").write_text("\n".join(f"class {i}" for i in range(32768)))
    assert "32768 class names" in refused(read_class_names, tmp_path / "many.txt")
