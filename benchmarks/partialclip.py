"""The questions of PartialCLIP, asked of a tiny CLIP: the tables of docs/partialclip.md.

    python -m benchmarks.partialclip --data data --output_dir runs/partialclip
    python -m benchmarks.partialclip --data data --plan                       # the commands, without running them

`--data` is a folder with eurosat/ and cifar10/, each with train/CLASS/ and test/CLASS/; a set that is not there is left out
with one line. The CLIP is trained on images of the set that nobody else sees, and its image tower is tuned on others.

Six stages: `rates`, two published schedules, to choose one by scores without labels; `methods`, every partial-label method
with every way to tune; `start`, heads that start at random instead of from text; `candidates`, from few to many candidates
an image, with and without the pre-filter; `tail`, every method on a long tail; `own`, candidate sets by the CLIP itself
instead of drawn ones. Seeds are the outermost loop, so that a plan that is cut short leaves whole tables of fewer seeds. A
seed draws the images, their candidate sets, and all that is random in training. What is finished is skipped, what was
stopped goes on. The tables of what is finished are written to OUTPUT_DIR/partialclip.md, and into a page that has a place
for them (--page), when the jobs end or are stopped.

Jobs are forks of this process, which has imported what they need: many take less time than their imports would.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.evidence_sets import ImageSet, write_lists
from benchmarks.evidence_tables import RAW, Runs, collect, views_table
from benchmarks.jobs import Job
from benchmarks.partialclip_tables import filter_table, free_table, grid, tail_table
from benchmarks.planned import carry_out, parsed, there
from coreg.errors import exits_with_one_line
from coreg.learn.partial_options import NAMES

# stage -> the title of its tables
STAGES = {
    "rates": "two schedules",
    "methods": "every method, every tuner",
    "start": "where the head starts",
    "candidates": "few and many candidates",
    "tail": "a long tail",
    "own": "the CLIP's own candidate sets",
}
# training images a class, of which --share takes some; the long tail begins with all of a class
_CHOSEN = {"annotator": "clip", "per_class": 250, "tested": 60, "clip": ("--per_class", "100")}
SETS = {"eurosat": ImageSet("EuroSAT", **_CHOSEN), "cifar10": ImageSet("CIFAR-10", **_CHOSEN)}
IMAGES = 500
TUNERS = ("linear", "adaptformer", "full", "lora", "vpt_deep")
FPS, OF_CLIP = "fps_", "annotations"  # folders of candidate sets
TUNER, MIDDLE = "linear", f"{FPS}0.5"  # where a stage asks about something else; frozen features are made once
Q = ("0.1", "0.3", "0.5", "0.7")  # of the paper's CIFAR-10
STARTS, PREFILTERS = ("text", "random"), ("none", "topk")
FILTERED = ("cc", "proden", "lws", "cr_dpll")
TAIL, TAIL_Q, IMBALANCE = "tail", "0.3", "100"  # as in its CIFAR-10-LT
STARTED = ("proden", "records")  # on the long tail
OWN = ("cc", "proden", "cr_dpll")
RECIPE = ("--recipe", "partialclip_cifar10", "--workers", "0", "--report_to", "none")
_ADAM = ("--optimizer", "adamw", "--lr", "0.0005", "--lr_floor", "0.0005", "--weight_decay", "0.00001")
# of the paper, which the recipe has; of its public code; and as long as the paper trains on its small sets
RATES = {
    "sgd": ("SGD, 0.01, cosine", ()),
    "adam": ("Adam, 0.0005", _ADAM),
    "long": ("Adam, 0.0005, 100 epochs", (*_ADAM, "--epochs", "100")),
}
SHORT = ("sgd", "adam")
RATE = "adam"  # by the scores without labels of stage `rates`
LONG = "long"  # where a stage asks about something else: 10 epochs are 80 steps here, and thousands in the paper
MODULES = ("annotate_vlm", "baselines.pll", "baselines.zero_shot", "open_clip")


def mark_of(store: Path) -> Path:
    """The file that is written last into a store."""
    return store / "errors.csv"


def preparation(root: Path, name: str) -> Iterator[Job]:
    """The CLIP and its annotations of a set."""
    here = root / name
    clip, store, classes = here / "clip", here / OF_CLIP, ("--classes", f"{here / 'classes.txt'}")
    others = ("--images", f"{here / 'others.csv'}", *classes, *SETS[name].clip, "--output_dir", f"{clip}")
    yield Job(f"{name}/clip", ("-m", "benchmarks.tiny_clip", *others), clip / "open_clip_config.json")
    words = ("--images", f"{here / 'images.csv'}", *classes, "--vlm", f"local-dir:{clip}", "--workers", "0")
    command = ("annotate_vlm.py", *words, "--output_dir", f"{store}")
    yield Job(f"{name}/{OF_CLIP}", command, mark_of(store), (clip / "open_clip_config.json",))
    judged = here / f"labels-{RAW}"
    words = ("--annotations", f"{store}", "--variant", "averaged", "--output_dir", f"{judged}")
    mark = judged / "averaged" / "report.json"
    yield Job(f"{name}/labels-{RAW}", ("baselines/zero_shot.py", *words), mark, (mark_of(store),))


def drawn(root: Path, name: str, store: str, seed: int) -> Job:
    """The job that draws the candidate sets `fps_Q` or `tail`."""
    here = root / name
    sets, q = here / f"{store}-{seed}", TAIL_Q if store == TAIL else store.removeprefix(FPS)
    words = ("--images", f"{here / 'images.csv'}", "--classes", f"{here / 'classes.txt'}", "--rule", "fps", "--q", q)
    words += ("--imbalance", IMBALANCE) if store == TAIL else ()
    command = ("-m", "coreg.weak", *words, "--seed", f"{seed}", "--output_dir", f"{sets}")
    return Job(f"{name}/{store}-{seed}", command, mark_of(sets))


@dataclass(frozen=True)
class Tuned:
    """How a tower is tuned.

    Attributes:
        start: of the head. prefilter: of the candidate sets. rate: of `RATES`.
    """

    method: str
    tuner: str = TUNER
    start: str = "text"
    prefilter: str = "none"
    rate: str = RATE

    def __str__(self) -> str:
        return "_".join(dataclasses.astuple(self))

    def job(self, root: Path, name: str, store: str, seed: int) -> Job:
        """The job that does it, on candidate sets of a set: `fps_Q` and `tail`, drawn by the seed, or `annotations`."""
        here, run = root / name, f"{name}/{self}-{store}-{seed}"
        judged = here / OF_CLIP
        sets = judged if store == OF_CLIP else here / f"{store}-{seed}"
        words = (*RECIPE, "--annotations", f"{sets}", "--prefilter_annotations", f"{judged}", *RATES[self.rate][1])
        words += ("--method", self.method, "--tuner", self.tuner, "--head_init", self.start, "--prefilter", self.prefilter)
        words += () if store == TAIL else ("--share", f"{IMAGES}")
        command = ("baselines/pll.py", *words, "--seed", f"{seed}", "--output_dir", f"{root / run}")
        return Job(run, command, root / run / "report.json", (mark_of(judged), mark_of(sets)))


def wanted(which: str) -> Iterator[tuple[str, Tuned]]:
    """Candidate sets and ways to tune of a stage; some are those of another stage as well."""
    if which == "rates":
        yield from ((MIDDLE, Tuned("cr_dpll", tuner, rate=rate)) for tuner in TUNERS for rate in SHORT)
    elif which == "methods":
        yield from ((MIDDLE, Tuned(method, rate=LONG)) for method in NAMES)
        yield from ((MIDDLE, Tuned(method, tuner)) for tuner in TUNERS for method in NAMES)
    elif which == "start":
        for start in STARTS:
            yield from ((MIDDLE, Tuned("cr_dpll", tuner, start)) for tuner in TUNERS)
            yield from ((MIDDLE, Tuned("proden", start=start, rate=rate)) for rate in (RATE, LONG))
            yield from ((TAIL, Tuned(method, start=start, rate=LONG)) for method in STARTED)
    elif which == "candidates":
        for q in Q:
            ways = (Tuned(method, prefilter=kept, rate=LONG) for method in FILTERED for kept in PREFILTERS)
            yield from ((f"{FPS}{q}", way) for way in ways)
    elif which == "tail":
        yield from ((TAIL, Tuned(method, rate=LONG)) for method in NAMES)
    else:
        yield from ((OF_CLIP, Tuned(method, tuner)) for method in OWN for tuner in TUNERS)


def plan(root: Path, names: Sequence[str], seeds: Sequence[int], stages: Sequence[str]) -> list[Job]:
    """All jobs in the order in which they are begun."""
    jobs = {job.name: job for name in names for job in preparation(root, name)}
    for seed in seeds:
        for name in names:
            for store, run in (one for which in stages for one in wanted(which)):
                if store != OF_CLIP:
                    job = drawn(root, name, store, seed)
                    jobs[job.name] = job
                job = run.job(root, name, store, seed)
                jobs[job.name] = job
    return list(jobs.values())


def tables(root: Path, names: Sequence[str], seeds: Sequence[int], stages: Sequence[str]) -> str:
    """The Markdown tables of what is finished, a section for each set."""
    parts = [views_table(root, {name: SETS[name].title for name in names}, {"the CLIP's own labels": RAW})]
    for name in names:
        made = {which: text for which in stages for text in [of_stage(root, name, seeds, which)] if text}
        parts += [f"### {SETS[name].title}: {STAGES[which]}\n\n{text}" for which, text in made.items()]
    return both(*parts) + "\n"


def of_stage(root: Path, name: str, seeds: Sequence[int], which: str) -> str:
    """The tables of a stage of a set."""

    def runs(store: str, *words: str, **how: str) -> Runs:
        return collect(root, name, str(Tuned(*words, **how)), store, seeds)

    if which == "rates":
        rates = {
            f"{tuner}, {RATES[rate][0]}": runs(MIDDLE, "cr_dpll", tuner, rate=rate) for tuner in TUNERS for rate in SHORT
        }
        return free_table("CR-DPLL", rates)
    if which == "start":
        ways = {f"CR-DPLL, {tuner}": ("cr_dpll", tuner, RATE) for tuner in TUNERS}
        ways |= {f"PRODEN, {TUNER}": ("proden", TUNER, RATE), f"PRODEN, {TUNER}, 100 epochs": ("proden", TUNER, LONG)}
        starts = {
            title: {start: runs(MIDDLE, method, tuner, start, rate=rate) for start in STARTS}
            for title, (method, tuner, rate) in ways.items()
        }
        tail = {
            f"{NAMES[method]}, {start}": runs(TAIL, method, start=start, rate=LONG)
            for method in STARTED
            for start in STARTS
        }
        return both(grid("method", starts), tail_table(f"long tail, {TUNER}", tail))
    if which == "candidates":
        lines = {
            f"{NAMES[method]}{'' if kept == 'none' else ', pre-filter'}": {
                f"q {q}": runs(f"{FPS}{q}", method, prefilter=kept, rate=LONG) for q in Q
            }
            for method in FILTERED
            for kept in PREFILTERS
        }
        filtered = {f"q {q}": runs(f"{FPS}{q}", FILTERED[0], prefilter=PREFILTERS[1], rate=LONG) for q in Q}
        return both(grid("method", lines), filter_table("pre-filter", filtered))
    if which == "tail":
        return tail_table("method", {title: runs(TAIL, method, rate=LONG) for method, title in NAMES.items()})
    store, methods = (MIDDLE, NAMES) if which == "methods" else (OF_CLIP, OWN)
    lines = {NAMES[method]: {tuner: runs(store, method, tuner) for tuner in TUNERS} for method in methods}
    if which == "methods":
        for method in methods:
            lines[NAMES[method]][f"{TUNER}, 100 epochs"] = runs(store, method, rate=LONG)
    return grid("method", lines)


def both(*parts: str) -> str:
    """Those that are not empty, one after the other."""
    return "\n\n".join(part for part in parts if part)


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left, write the tables; exit status 1 if a job failed."""
    args = parsed(argv, __doc__, "partialclip", "eurosat/ and cifar10/", tuple(SETS), tuple(STAGES))
    names = there(args.data, {name: SETS[name].title for name in args.sets})

    def before() -> None:
        for name in names:
            write_lists(args.data / name, args.output_dir / name, SETS[name])
        for module in MODULES:
            importlib.import_module(module)

    jobs = plan(args.output_dir, names, args.seeds, args.stages)
    made = partial(tables, args.output_dir, names, args.seeds, args.stages)
    return carry_out(args, jobs, "partialclip", before, made, forked=True)


if __name__ == "__main__":
    sys.exit(main())
