"""The README of an export: what the networks name, what they were made from, how good they are, how to use them."""

from __future__ import annotations

import html
import json
import re
from typing import Any

from coreg.report.estimate import estimate_lines
from coreg.report.tags import THRESHOLDS
from coreg.report.trust import trust_lines
from coreg.webpage import percent

FRONT = """---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- coreg
- weak-supervision
metrics:
- {metric}
{base}---
"""

LIMITS = """
- The training images were labelled by a vision-language model, with mistakes, and what it gets wrong systematically the
  networks may have learned.
- Every image is given one of the classes above, whatever it shows. A low probability is a hint, no proof, that it shows
  something else (`coreg-predict --min_probability`).
- The numbers above hold for images like those named above.
- The probabilities are softmax(mean logits / temperature); `coreg.json` says what the temperature was fitted to."""

TAG_LIMITS = """
- Labels of the training images were incomplete, or came from a vision-language model with mistakes, and what is missing or
  wrong systematically the network may have learned.
- It knows the labels above and no others. An image may be given none.
- The numbers above hold for images like those named above, and for the thresholds above.
- A probability is the sigmoid of a logit, and how often it is right nobody has measured; `coreg.json` says where the
  thresholds come from."""

USE = """
    coreg-predict --model FOLDER --images photos --output predictions.csv

with the Python package coreg installed, where `FOLDER` holds this file (from the hub: `hf download USER/NAME --local-dir
FOLDER`). Each network is an ordinary timm model:

    import timm, coreg.nets
    model = timm.create_model("local-dir:FOLDER/net1", pretrained=True).eval()

Images are {resized} to {size}x{size} pixels, bilinear with antialiasing, {colour}, and normalised with the mean and
standard deviation in `coreg.json`. {predicts}
"""
CLASS = "The prediction is the mean of the networks' logits."
TAGS = (
    "The prediction is every label whose probability, the sigmoid of its logit, reaches its threshold; `--threshold 0.5`, "
    "or a file with a line `label,threshold` for each, takes others."
)

TUNED = """
Part of each network lies in `tuned.safetensors`, which timm does not read: what timm loads predicts otherwise. Use
coreg-predict, or a program that coreg-export writes.
"""


def escaped(text: str) -> str:
    """One line that Markdown and HTML show letter by letter, whatever it holds."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~:/@])", r"\\\1", html.escape(line))


def _base(report: dict[str, Any]) -> str:
    """The line of the front matter that names the network's starting weights; nothing for those that are not on the hub."""
    return f"base_model: {json.dumps(report['base_model'])}\n" if report.get("base_model") else ""


def public_name(spec: str) -> str:
    """`spec` with nothing but the last part of every absolute path: one's own folders are nobody else's business."""
    return re.sub(r'(^|[:"])/(?:[^/"]+/)*([^/"]+)/?', r"\1\2", spec)


def _accuracy_lines(report: dict[str, Any]) -> list[str]:
    achieved, before = report.get("accuracy", {}), report["annotator"].get("zero_shot_accuracy", {})
    if not achieved:
        return ["No true labels are known, so no accuracy can be given."]
    lines = ["| images | annotator | this model | 95 % interval | n |", "|---|---|---|---|---|"]
    for split, row in achieved.items():
        low, high = row["interval"]
        kind = "training (labels not used)" if split == "train" else "test"
        lines.append(
            f"| {kind} | {percent(before.get(split))} | {row['ensemble']:.1%} | {low:.1%} to {high:.1%} | {row['n']} |"
        )
    return lines


def _class_lines(report: dict[str, Any], class_names: list[str]) -> list[str]:
    rows = report.get("per_class_accuracy", {})
    if not rows:
        return [f"{number}. {escaped(name)}" for number, name in enumerate(class_names)]
    lines = [f"| class | annotator | this model | n ({report['per_class_split']}) |", "|---|---|---|---|"]
    for name in class_names:
        shares = [percent(rows[name].get(who), 0) for who in ("annotator", "ensemble")]
        lines.append(f"| {escaped(name)} | {shares[0]} | {shares[1]} | {rows[name]['n']} |")
    return lines


def _use_lines(report: dict[str, Any], settings: dict[str, Any], predicts: str) -> list[str]:
    """What is noticed of every model, and how each is used."""
    return [
        *(f"- Noticed at the end of training: {escaped(line)}." for line in report.get("warnings", [])),
        "",
        "## How to use it",
        USE.format(
            resized="resized and cropped at the centre" if settings.get("resize") == "crop" else "squashed",
            size=settings["image_size"],
            colour="grey" if settings["channels"] == 1 else "RGB",
            predicts=predicts,
        ),
        *([TUNED] if settings.get("tuning") else []),
        f"Made with coreg {escaped(report['versions'].get('coreg', ''))}.",
    ]


def model_card(report: dict[str, Any], settings: dict[str, Any], which: str = "") -> str:
    """Markdown with the hub's front matter; everything that came from outside is escaped, and no path is in it.

    Args:
        report: as `coreg.report.report.build_report` gives it. settings: the export's `coreg.json`.
        which: a sentence about the networks, where they are not those of the last epoch.
    """
    names, annotator = settings["class_names"], report["annotator"]
    known = report["labels_used"]
    labels = "No label was used in training." if not known else f"{known} labels that a person gave were used in training."
    mended = f", refined to {report['refined']['mean_candidates']:.2f}" if "refined" in report else ""
    title = f"{len(names)} classes from {escaped(public_name(report['dataset']))}"
    nets = f"{settings['nets']} networks" if settings["nets"] > 1 else "One network"
    lines = [
        FRONT.format(metric="accuracy", base=_base(report)),
        f"# {title}",
        "",
        f"{nets} of {report['parameters'] / 1e6:.2f} M parameters, trained with {escaped(report['method'])} on "
        f"{report['images']['train']} images that {escaped(public_name(annotator['name']))} annotated with "
        f"{annotator['mean_candidates']:.2f} candidate classes each{mended}. {labels}",
        *([which] if which else []),
        *([f"What it predicts: {escaped(report['prediction'])}."] if "prediction" in report else []),
        "",
        "## How good it is",
        "",
        *_accuracy_lines(report),
        "",
        *([escaped(" ".join(estimated)), ""] if (estimated := estimate_lines(report)) else []),
        *([escaped(" ".join(verdict)), ""] if (verdict := trust_lines(report)) else []),
        "## Classes",
        "",
        *_class_lines(report, names),
        "",
        "## Limits",
        LIMITS,
        *_use_lines(report, settings, CLASS),
    ]
    return "\n".join(lines) + "\n"


# ---- several labels an image ----------------------------------------------------------------------------------------


def tag_card(report: dict[str, Any], settings: dict[str, Any]) -> str:
    """`model_card` of a network that gives images several labels.

    Args:
        report: as `coreg.run.tags.finish_tags` gives it. settings: the export's `coreg.json`.
    """
    names, observed = settings["class_names"], report["labels_used"]
    shown = f"{observed} observed labels were used in training." if observed else "No label was used in training."
    lines = [
        FRONT.replace("- image-classification\n- coreg", "- multi-label-image-classification\n- coreg").format(
            metric="mean_average_precision", base=_base(report)
        ),
        f"# {len(names)} labels from {escaped(public_name(report['dataset']))}, several an image",
        "",
        f"One network of {report['parameters'] / 1e6:.2f} M parameters, trained with {escaped(report['method'])} on "
        f"{report['images']['train']} images, annotated by {escaped(public_name(report['annotator']['name']))}. {shown}",
        "",
        "## How good it is",
        "",
        *_tag_lines(report),
        "",
        "## Labels",
        "",
        f"Thresholds: {THRESHOLDS[report['thresholds_from']]}.",
        "",
        *_label_lines(report, settings),
        "",
        "## Limits",
        TAG_LIMITS,
        *_use_lines(report, settings, TAGS),
    ]
    return "\n".join(lines) + "\n"


def _tag_lines(report: dict[str, Any]) -> list[str]:
    if not report["tags"]:
        return ["No true labels are known, so nothing can be measured."]
    lines = ["| images | annotator mAP | mAP | CF1 | OF1 | n |", "|---|---|---|---|---|---|"]
    for split, row in report["tags"].items():
        kind = {"train": "training (labels not used, or in part)", "validation": "validation"}.get(split, split)
        before = f"{row['annotator']:.1%}" if "annotator" in row else "–"
        lines.append(f"| {kind} | {before} | {row['mAP']:.1%} | {row['CF1']:.1%} | {row['OF1']:.1%} | {row['images']} |")
    return lines


def _label_lines(report: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    names, at = settings["class_names"], settings["thresholds"]
    judged = report["tags"].get(report["per_class_split"])
    each = judged["average_precision"] if judged else [None] * len(names)
    head = f"average precision ({report['per_class_split']})" if judged else "average precision"
    lines = [f"| label | threshold | {head} |", "|---|---|---|"]
    for name, threshold, value in zip(names, at, each):
        lines.append(f"| {escaped(name)} | {threshold:.3f} | {'–' if value is None else f'{value:.0%}'} |")
    return lines
