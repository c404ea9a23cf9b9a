"""Whom to trust, in words: what `coreg.weak.trust` gives without labels, for the end of a run, its page and its card."""

from __future__ import annotations

from typing import Any

ADVICE = {
    "student": "{method}",
    "view": "the refined labels, and for new images a probe on them (baselines/probe.py --refine {refine}), not {method}",
    "annotator": "the annotator itself, not {method}",
}
KINDS = {"test": "test images", "train": "training images that they have not seen, unlike the networks"}


def trust_lines(report: dict[str, Any]) -> list[str]:
    """Sentences, the recommendation first; none where nothing could be judged."""
    trust = report.get("trust")
    if not trust or trust["most"] not in ADVICE:
        return []
    method, fit, agreement = report["method"], trust["fit"], trust["agreement"]
    refine = "own" if trust["kind"] == "own" else "view"
    advice = ADVICE[trust["most"]].format(method=method, refine=refine)
    lines = [f"To be trusted most, judged without labels: {advice}."]
    if fit["hopeless"]:
        return [*lines, f"There is no referee: {cannot_tell(trust['features'], fit)}."]
    lines.append(
        f"Classifiers of frozen features ({trust['features']}), each fitted to a part of the evidence and reading "
        f"{trust['images']} {KINDS.get(trust['split'], 'images')}, agree with the annotator on "
        f"{agreement['annotator']:.1%}, with {method} on {agreement['student']:.1%} and with each other on "
        f"{agreement['view']:.1%}."
    )
    if trust.get("doubted"):
        lines.append(
            f"They are not believed: of the images that the annotator is surest of they agree with it on "
            f"{trust['surest']['annotator']:.1%} and with each other on {trust['surest']['view']:.1%}. Larger images or a "
            f"better network judge better."
        )
    if trust["kind"] == "own" and trust["most"] != "student":
        lines.append(
            "These features are the annotator's own and side with it; a network that is not the annotator judges better "
            "(--refine view, or a pretrained backbone)."
        )
    if report.get("accuracy"):
        lines.append("Where true labels are known, accuracies say more than this.")
    return lines


def cannot_tell(features: str, fit: dict[str, Any]) -> str:
    """That frozen features do not tell the classes apart, and by which numbers (`coreg.weak.trust.OwnFit`)."""
    return (
        f"{features} cannot tell the classes apart (out-of-fold score {fit['score']:.3f}, and {fit['shuffled']:.3f} where "
        f"evidence is shuffled)"
    )


def reads_alone(fit: dict[str, Any]) -> str:
    """How well frozen features read images without the annotator's evidence of them (`coreg.weak.trust.view_fit`)."""
    return (
        f"two fits agree with each other on {fit['itself']:.1%} and with the annotator on {fit['annotator']:.1%} of the "
        f"images"
    )
