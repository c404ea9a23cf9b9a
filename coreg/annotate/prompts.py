"""Prompt templates: the sentences around class names that the text side of an annotator is made of."""

from __future__ import annotations

from collections.abc import Sequence

from coreg.data.class_names import distinct, lines_of
from coreg.errors import UserError

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
