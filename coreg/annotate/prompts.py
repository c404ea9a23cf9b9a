"""Prompt templates: the sentences around class names that the text side of an annotator is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coreg.data.class_names import distinct, lines_of
from coreg.errors import UserError
from coreg.plaintext import did_you_mean
from coreg.records import Each, RecordError, read_record

# The papers' 27 templates, a selection of CLIP's 80 for ImageNet. The order matters: index 0 is the single template.
TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)

PHOTO, CLASSNAME = "a photo of a {}.", "{}"  # PartialCLIP's, for heads that begin with texts


def plain_names(class_names: Sequence[str]) -> list[str]:
    """Class names as PartialCLIP writes them into its prompts; an annotator is given them as they are."""
    return [name.replace("_", " ") for name in class_names]


def prompts(templates: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """All T*C texts, template by template: text t*C + c says class c in the words of template t."""
    return [template.replace("{}", name) for template in templates for name in class_names]


def read_templates(path: str) -> list[str]:
    """Read prompt templates, one a line, each with exactly one `{}` where the class name goes. Blank lines do not count.

    Raises:
        UserError: the file cannot be read, is empty, holds a template twice, or a line without exactly one `{}`.
    """
    templates = lines_of(path, "templates", "one template a line, such as: a photo of a {}")
    for number, template in templates:
        if template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
            raise UserError(
                f"{path} line {number} is {template!r}; a template needs exactly one {{}} where the class name goes, "
                f"such as: a photo of a {{}}"
            )
    return distinct(path, templates, "template")


def read_descriptions(path: str, class_names: Sequence[str]) -> dict[str, list[str]]:
    """Read a JSON file with a list of texts for every class name, {class name: texts}, in the order of the names.

    Raises:
        UserError: it cannot be read, lacks a class or has one that there is not, or a class has no text, an empty one, or
            the same one twice.
    """
    example = f'write {{"{class_names[0]}": ["a text", "another one"], …}} with a text at least for every class name'
    try:
        texts = read_record(Path(path), Each([str]))
    except RecordError as error:
        raise UserError(f"--descriptions {path} is not class names with lists of texts ({error}); {example}") from None
    for name in texts:
        if name not in class_names:
            near = did_you_mean(name, class_names)
            raise UserError(f"--descriptions {path} describes {name!r}, which is no class name{near}; {example}")
    missing = [name for name in class_names if name not in texts]
    if missing:
        more = f" and {len(missing) - 1} more of the {len(class_names)} classes" if len(missing) > 1 else ""
        raise UserError(f"--descriptions {path} does not describe {missing[0]!r}{more}; {example}")
    for name, some in texts.items():
        if not some or not all(text.strip() for text in some):
            raise UserError(f"--descriptions {path} has {'an empty' if some else 'no'} text for {name!r}; {example}")
        if len(set(some)) < len(some):
            raise UserError(f"--descriptions {path} has a text of {name!r} twice; write every one once")
    return {name: texts[name] for name in class_names}
