"""What `make partialclip` runs, in which order; its tables, from reports written by hand."""

from benchmarks import partialclip
from benchmarks.evidence_tables import Runs
from benchmarks.partialclip import STAGES, TUNERS, plan, tables, wanted
from benchmarks.partialclip_tables import filter_table, free_table, grid, tail_table
from coreg.learn.partial_options import NAMES
from coreg.report.record import write_report


def cells_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


# ---- the plan -----------------------------------------------------------------------------------------------------


def test_a_plan_has_every_method_and_tuner_seeds_outermost_and_each_job_once(tmp_path):
    jobs = plan(tmp_path, ["eurosat", "cifar10"], [0, 1], list(STAGES))
    runs = [job.name for job in jobs if job.command[0] == "baselines/pll.py"]
    assert runs == sorted(runs, key=lambda name: int(name[-1]))  # stable: all of seed 0 come first
    assert len({job.name for job in jobs}) == len({job.mark for job in jobs}) == len(jobs)
    for method in NAMES:
        for tuner in TUNERS:
            assert f"cifar10/{method}_{tuner}_text_none_adam-fps_0.5-1" in runs
        assert f"eurosat/{method}_linear_text_none_long-tail-0" in runs
    for q in ("0.1", "0.3", "0.5", "0.7"):
        assert f"eurosat/lws_linear_text_topk_long-fps_{q}-0" in runs
    assert "eurosat/records_linear_random_none_long-tail-0" in runs
    assert "eurosat/cr_dpll_lora_text_none_adam-annotations-0" in runs
    marks = set()
    for job in jobs:
        assert set(job.needs) <= marks, job.name
        marks.add(job.mark)


def test_the_commands_are_ones_that_the_programs_take(tmp_path):
    """Each script of the plan is asked for its settings once with every combination of options that the plan has."""
    asked = {}
    for job in plan(tmp_path, ["eurosat"], [0], list(STAGES)):
        script, *options = job.command
        if script == "baselines/pll.py":
            words = dict(zip(options[::2], options[1::2], strict=True))
            asked[tuple(words.get(name) for name in ("--method", "--optimizer", "--share", "--epochs"))] = options
    module = __import__("baselines.pll", fromlist=["read_settings"])
    assert len(asked) == 3 * len(NAMES) + 1
    for options in asked.values():
        job, images, method = module.read_settings(options)
        assert images.backbone == "annotator" and images.head == "cosine" and images.head_init in ("text", "random")
        assert method.weak_view == "plain" and job.epochs in (10, 100)
        assert job.prefilter_annotations == str(tmp_path / "eurosat" / "annotations")
        assert (job.share == 1) == job.annotations.endswith("tail-0")


def test_a_plan_of_a_missing_set_runs_nothing_and_says_so(tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / "data" / "eurosat" / split).mkdir(parents=True)
    words = ["--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--plan", "--seeds", "7"]
    assert partialclip.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("left out")] == [
        f"left out: CIFAR-10, because {tmp_path / 'data' / 'cifar10'} has no folders train/ and test/"
    ]
    weak = "python -m coreg.weak"
    assert any(f" eurosat/tail-7: {weak}" in line and "--imbalance 100 --seed 7" in line for line in lines)
    assert any(f" eurosat/fps_0.7-7: {weak}" in line and "--rule fps --q 0.7 --seed 7" in line for line in lines)
    assert not (tmp_path / "out").exists()


# ---- tables -------------------------------------------------------------------------------------------------------


def report_of(accuracy, few=None, prefilter=None):
    groups = {} if few is None else {"many": 0.9, "medium": 0.5, "few": few, "macro_f1": 0.4}
    return {
        "schema": 1, "method": "m", "dataset": "d", "seed": 0, "labels_used": 0,
        "annotator": {"name": "a", "zero_shot_accuracy": {"test": 0.5}},
        "accuracy": {"test": {"ensemble": accuracy, "interval": [0.0, 1.0], "n": 100}},
        "metrics": {"test": groups},
        "label_free": {"covering_rate": {"train": 0.8, "test": 0.1}, "approximated_accuracy": {"train": 0.7}},
    } | ({"weak_labels": {"prefilter": prefilter}} if prefilter else {})  # fmt: skip


def runs_of(*reports):
    return Runs(dict(enumerate(reports)), [])


def test_a_grid_has_means_spreads_and_the_fewest_seeds_of_a_row():
    two, one = runs_of(report_of(0.7), report_of(0.72)), runs_of(report_of(0.6))
    table = grid(
        "method", {"A": {"x": two, "y": one}, "B": {"x": runs_of(), "y": runs_of()}, "C": {"x": two, "y": runs_of()}}
    )
    assert cells_of(table)[0] == ["method", "x", "y", "seeds"]
    # sd of 70 and 72: 2 / sqrt(2); B has nothing
    assert cells_of(table)[2:] == [["A", "71.0 ± 1.4", "60.0", "1"], ["C", "71.0 ± 1.4", "–", "2"]]
    assert grid("method", {"B": {"x": runs_of()}}) == ""


def test_a_tail_has_its_groups_of_classes():
    table = tail_table("m", {"A": runs_of(report_of(0.5, few=0.1), report_of(0.5, few=0.3)), "B": runs_of()})
    head = ["m", "all", "many", "medium", "few", "macro F1", "seeds"]
    row = ["A", "50.0 ± 0.0", "90.0 ± 0.0", "50.0 ± 0.0", "20.0 ± 14.1", "40.0 ± 0.0", "2"]
    assert [cells_of(table)[0], cells_of(table)[2]] == [head, row]


def test_a_pre_filter_has_sizes_and_truths_and_what_is_left_out():
    done = {"rule": "topk", "images": 80, "dropped": 4, "mean_candidates": {"before": 5.5, "after": 3.2}}
    first = report_of(0.5, prefilter=done | {"partial_accuracy": {"before": 1.0, "after": 0.9}})
    second = report_of(0.5, prefilter=done | {"partial_accuracy": {"before": 1.0, "after": 0.96}, "dropped": 0})
    table = filter_table("q", {"0.5": runs_of(first, second), "0.7": runs_of(report_of(0.5))})
    head = ["q", "candidates before", "truth in before", "candidates after", "truth in after", "left out"]
    assert cells_of(table)[0] == head
    assert cells_of(table)[2:] == [["0.5", "5.50", "100.0 ± 0.0", "3.20", "93.0 ± 4.2", "2.5"]]


def test_scores_without_labels_are_those_of_training_images():
    assert cells_of(free_table("m", {"A": runs_of(report_of(0.5))}))[2] == ["A", "80.0", "70.0", "50.0", "1"]


def test_finished_runs_of_a_plan_are_in_the_tables(tmp_path, capsys):
    for number, (store, run) in enumerate(one for which in STAGES for one in wanted(which)):
        place = tmp_path / "out" / "eurosat" / f"{run}-{store}-0"
        place.mkdir(parents=True, exist_ok=True)
        write_report(place / "report.json", report_of(number / 1000, few=0.25))
    made = tables(tmp_path / "out", ["eurosat"], [0], list(STAGES))
    assert [line for line in made.splitlines() if line.startswith("###")] == [
        f"### EuroSAT: {title}" for which, title in STAGES.items()
    ]
    assert "–" not in made.replace("pre-filter", "")
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- partialclip -->\n<!-- end of partialclip -->\nAfter.\n")
    for split in ("train", "test"):
        (tmp_path / "data" / "eurosat" / split).mkdir(parents=True)
    words = ["--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--seeds", "0", "--tables"]
    assert partialclip.main([*words, "--page", str(page)]) == 0
    assert made.strip() in page.read_text() and page.read_text().endswith("<!-- end of partialclip -->\nAfter.\n")
