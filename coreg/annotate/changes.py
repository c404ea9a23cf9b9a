"""What a refinement did to a store, for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coreg.plaintext import printable
from coreg.report.trust import cannot_tell, reads_alone

EVIDENCE = {1.0: "as a prior", 0.0: "through a confusion matrix"}
BALANCE = {
    "uniform": "balanced to equal sizes",
    "annotator": "balanced to the annotator's shares",
    "estimated": "as large as they are estimated",
    "none": "left as they come out",  # of stores that an older version refined
}
SHOWN = 3  # classes of which it is shown how much oftener, or more seldom, they are named


def shares_that_moved(names: Sequence[str], before: Sequence[float], after: Sequence[float]) -> list[str]:
    """The classes whose shares of the training images changed most, at least by a tenth of the smaller one, in words."""
    order = sorted(range(len(names)), key=lambda c: (-abs(before[c] - after[c]), c))[:SHOWN]
    moved = [c for c in order if abs(before[c] - after[c]) > 0.1 * min(before[c], after[c])]
    return [f"{names[c]} {before[c]:.1%}, {after[c]:.1%}" for c in moved]


def before_and_after(manifest: dict[str, Any]) -> list[str]:
    """What a refinement did, in lines of text; empty for a store that is none."""
    refined = manifest.get("refined")
    if not refined:
        return []
    changed, features = refined["changed"], refined.get("view", "the annotator's own features")
    sizes = changed["mean_candidates"]
    lines = [
        printable(f"refined by {features} from {refined['source']} ({refined['model']['spec']}), before and after:"),
        f"  another best class     {changed['other_best_class']:.1%} of the training images",
        f"  mean candidates        {sizes['before']:.2f}, {sizes['after']:.2f}",
    ]
    for key, name in (("accuracy", "best class right"), ("label_among_candidates", "label among candidates")):
        for split, before in changed.get(key, {}).get("before", {}).items():
            lines.append(f"  {name}, {split:<5}  {before:.1%}, {changed[key]['after'][split]:.1%}")
    if "shares" in changed:
        moved = shares_that_moved(manifest["class_names"], changed["shares"]["before"], changed["shares"]["after"])
        lines += [printable(f"  named more or less     {'; '.join(moved)}")] if moved else []
    evidence = EVIDENCE.get(refined["weight"], f"as a prior (weight {refined['weight']:g}) and through a confusion matrix")
    if fit := refined.get("fit"):
        lines.append(f"  without evidence       {reads_alone(fit)}")
        if fit["hopeless"]:
            lines.append(printable(f"  ! do not train on it: {cannot_tell(features, fit)}"))
        elif not fit["mends"]:
            lines.append("  ! not good enough to mend the evidence with: the annotator's own may be better")
    lines.append(
        f"  evidence read {evidence}, classes {BALANCE[refined['prior']]}, temperature {refined['temperature']:.2f}"
    )
    return lines
