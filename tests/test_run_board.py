"""What TensorBoard finds in a finished run, read back from its event files."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from conftest import SMALL_JOB
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import train_coreg
from coreg.data.decode import decode
from coreg.run import checkpoint
from coreg.store.store import AnnotationStore


def run(store, output, *more):
    train_coreg.main(["--annotations", str(store), "--output_dir", str(output), *SMALL_JOB, *more])
    return checkpoint.load(output / "checkpoints", checkpoint.latest(output / "checkpoints"))


@pytest.fixture(scope="module")
def finished(small_store, tmp_path_factory):
    """Run folder, its last state, and everything in its event files."""
    output = tmp_path_factory.mktemp("board") / "run"
    state = run(small_store, output)
    events = EventAccumulator(
        str(output / "tensorboard"), size_guidance=dict.fromkeys(("images", "scalars", "histograms"), 0)
    )
    return output, state, events.Reload()


def test_curves_are_those_of_the_run_in_groups(finished):
    _, state, events = finished
    for epoch, curves in enumerate(state["curves"], start=1):
        for name, value in curves.items():
            by_epoch = {event.step: event.value for event in events.Scalars(name)}
            assert by_epoch[epoch] == pytest.approx(value, rel=1e-6)
    groups = {tag.split("/")[0] for tag in events.Tags()["scalars"]}
    assert groups == {"accuracy", "division", "final", "gmm", "loss", "lr", "prototypes", "pseudo_labels", "time", "truth"}
    assert {"loss/net1/total", "loss/net2/trusted", "pseudo_labels/b", "accuracy/test/ensemble"} <= set(
        events.Tags()["scalars"]
    )


def test_losses_and_weights_of_every_division_are_spread_out(finished):
    _, state, events = finished
    for number in (1, 2):
        for name, values in (
            ("loss", state["divisions"]["losses"][number - 1][-1].numpy()),
            ("weight", state["divisions"]["weights"][number - 1].numpy()),
        ):
            by_epoch = {e.step: e.histogram_value for e in events.Histograms(f"division/{name}_net{number}")}
            assert set(by_epoch) == {2, 3}  # the first epoch is warm-up
            assert by_epoch[3].num == 97 and by_epoch[3].sum == pytest.approx(values.sum())


def test_views_stand_beside_the_image_they_come_from(finished, small_store):
    _, _, events = finished
    tag = "views/plain, weak, weak, strong, strong"
    assert [event.step for event in events.Images(tag)] == [1, 2]
    grid = np.asarray(Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)), dtype=int)
    assert grid.shape == (8 * 50, 5 * 50, 3)
    store = AnnotationStore.open(small_store)
    train = np.flatnonzero(store.split == 0)
    for place, row in enumerate(np.linspace(0, 96, 8).astype(int)):
        image = decode(store.images(), train[[row]], 12, 3, 0)[0].numpy().astype(int)
        cells = [grid[50 * place + 1 : 50 * place + 49, 50 * k + 1 : 50 * k + 49] for k in range(5)]
        enlarged = np.kron(image.transpose(1, 2, 0), np.ones((4, 4, 1), int))
        assert abs(cells[0] - enlarged).max() <= 1
        assert all((a != b).any() for k, a in enumerate(cells) for b in cells[:k])


def test_the_map_of_features_has_labels_and_pictures(finished):
    output, *_ = finished
    folder = output / "tensorboard" / "00003" / "features"
    with (folder / "metadata.tsv").open() as file:
        metadata = list(csv.DictReader(file, delimiter="\t"))
    labels = {row["path"]: row for row in csv.DictReader((output / "labels.csv").open())}
    assert [row["label"] for row in metadata] == [row["label"] for row in labels.values()]
    assert [row["annotator"] for row in metadata] == [row["annotator_label"] for row in labels.values()]
    assert [row["truth"] for row in metadata] == [path.split("/")[1] for path in labels]
    assert np.loadtxt(folder / "tensors.tsv").shape == (97, 8)
    assert Image.open(folder / "sprite.png").size == (10 * 32, 10 * 32)


def test_settings_stand_beside_what_they_led_to(finished):
    output, _, events = finished
    report = json.loads((output / "report.json").read_text())
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["batch_size"].number_value == 13 and settings["preset"].string_value == "reference"
    assert "output_dir" not in settings and "workers" not in settings
    final = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.startswith("final/")}
    for split in ("train", "test"):
        assert final[f"final/accuracy_{split}"] == pytest.approx(report["accuracy"][split]["ensemble"])
    assert "final/annotator_test" not in final  # synthetic candidate sets: nobody annotated
    assert final["final/labels_worth_a_look"] == report["needs_review"]
    # one run in the list, not one more for its settings
    assert [path.name for path in (output / "tensorboard").rglob("events*")] == [
        path.name for path in (output / "tensorboard").glob("events*")
    ]


def test_without_tensorboard_the_run_is_the_same(finished, small_store, tmp_path):
    _, state, _ = finished
    silent = run(small_store, tmp_path / "run", "--report_to", "none")
    assert not (tmp_path / "run" / "tensorboard").exists()
    for ours, theirs in zip(state["learners"], silent["learners"]):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "run" / "report.html").exists()
