"""Every recipe: that it can be used, that its values are the published ones, and that its commands are typed correctly."""

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import script

import train_coreg
from annotate_vlm import AnnotateConfig
from coreg.config import parse, read_recipe
from coreg.data.class_names import read_class_names
from coreg.data.sources import TORCHVISION
from coreg.errors import UserError
from coreg.learn.dividemix_options import DivideMixOptions
from coreg.learn.options import CoRegOptions
from coreg.nets.model import Model, create_backbone, parse_backbone_args
from coreg.network_options import ImageConfig
from coreg.recipes import FOLDER, listing
from coreg.recipes.__main__ import main
from coreg.settings import JobConfig
from coreg.views.augment import RANDAUGMENT
from coreg.weak.__main__ import WeakConfig, read_superclasses

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
OTHERS = (JobConfig, ImageConfig, CoRegOptions)
TOWERS = [name for name in NAMES if name.startswith("partialclip_")]
PAPERS = [name for name in NAMES if name not in ("annotator", "digits", "digit_pictures", "folder", *TOWERS)]
STUDENTS = [name for name in NAMES if name not in TOWERS and name != "digit_pictures"]  # which is of spml.py
ROOT = FOLDER.parent.parent
pll, spml = script("pll"), script("spml")


def settings(name):
    return train_coreg.read_settings(["--recipe", name])


def header(name):
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("\n")
    return [line[1:] for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]


def commands(name):
    return [shlex.split(line) for line in header(name) if line.startswith("   ") and (".py" in line or "python -m" in line)]


def test_all_data_sets_are_there():
    wanted = "cifar10 cifar100 cifar100_synthetic eurosat fashion_mnist fer2013 gtsrb svhn digits folder".split()
    towers = "cifar10 cifar100 cifar10_lt cifar100_lt fgvc cub cars dogs places_lt imagenet_lt".split()
    assert {*wanted, *(f"partialclip_{name}" for name in towers)} <= set(NAMES)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_recipe_can_be_trained_with(name):
    _, image_options, method = settings(name)
    views = image_options.augmentation()
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, image_options.channels, views.size, views.size), np.uint8)
    )
    seen = views.strong(images, torch.arange(2), (0, "view"))
    assert seen.shape == images.shape and seen.isfinite().all()
    backbone = create_backbone(
        image_options.backbone, 3, image_options.channels, parse_backbone_args(image_options.backbone_args), False
    )
    net = Model(backbone.eval(), method.projection_dim)
    with torch.no_grad():
        maps, (logits, features) = backbone.forward_features(seen), net(seen)
    assert logits.shape == (2, 3) and features.shape == (2, method.projection_dim)
    # the last stage of the papers' network ends with 4x4 maps, whatever the data set
    assert maps.shape[-1] == 4 or name not in PAPERS


def test_the_recipe_for_ones_own_images_says_how_to_do_without_the_hub(monkeypatch):
    _, image_options, _ = settings("folder")
    assert image_options.pretrained

    def unreachable(name, pretrained, **more):
        raise OSError("We could not connect to the hub\nand some more lines")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(UserError, match=r"could not connect to the hub\); .* --pretrained false$"):
        create_backbone(
            image_options.backbone,
            3,
            image_options.channels,
            parse_backbone_args(image_options.backbone_args),
            image_options.pretrained,
        )


# name: W, epochs, channels, size, padding, flip, RandomAugment, mean, std; from the tables of the reference implementation
PUBLISHED = {
    "cifar10": (50, 800, 3, 32, 4, True, True, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": (100, 800, 3, 32, 4, True, True, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar100_synthetic": (200, 800, 3, 32, 4, True, True, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "svhn": (50, 800, 3, 32, 4, False, True, (0.5,) * 3, (0.5,) * 3),
    "fashion_mnist": (50, 100, 1, 28, 4, True, False, (0.1307,), (0.3081,)),
    "eurosat": (50, 100, 3, 64, 8, True, True, (0.5,) * 3, (0.5,) * 3),
    "fer2013": (50, 100, 1, 64, 8, True, False, (0.5,), (0.5,)),
    "gtsrb": (50, 100, 3, 64, 8, False, True, (0.5,) * 3, (0.5,) * 3),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_values_are_the_published_ones(name):
    warmup, epochs, channels, size, padding, flip, operations, mean, std = PUBLISHED[name]
    job, image_options, method = settings(name)
    views = image_options.augmentation()
    assert (method.warmup_epochs, job.epochs, image_options.channels) == (warmup, epochs, channels)
    assert (views.size, views.padding, views.flip, views.mean, views.std) == (size, padding, flip, mean, std)
    if operations:
        assert (views.strong_count, views.cutout, views.cutout_fixed) == (1, 0.5, 0)
        assert set(views.strong_ops) == set(RANDAUGMENT)
    else:
        assert (views.strong_count, views.cutout, views.cutout_fixed) == (0, 0, 16)
    assert (image_options.backbone, method.preset) == ("preact_resnet18", "reference")
    assert parse_backbone_args(image_options.backbone_args).get("first_stride", 1) == (2 if size == 64 else 1)
    assert (job.batch_size, job.lr, job.lr_floor, job.momentum, job.weight_decay) == (256, 0.01, 1e-5, 0.9, 5e-4)
    assert job.lr_horizon == 800
    assert (method.temperature, method.queue_size, method.projection_dim, method.mixup_alpha) == (0.5, 8192, 128, 4)


def test_no_recipe_depends_on_a_default_of_its_table():
    for name in PAPERS:
        below, above = read_recipe(name)
        written = below | above
        for (
            key
        ) in "image_size channels mean std padding flip strong_count cutout epochs warmup_epochs lr batch_size".split():
            assert key in written, (name, key)


@pytest.mark.parametrize("recipe", ["folder", "digits"])
def test_recipes_that_no_paper_has_leave_mixup_to_the_methods_that_are_made_of_it(recipe):
    assert settings(recipe)[2].mixup_alpha == 0
    (method,) = parse(DivideMixOptions, argv=["--recipe", recipe], others=OTHERS, prog="baselines/dividemix.py")
    assert method.mixup_alpha == 4 and method.warmup_epochs == settings(recipe)[2].warmup_epochs


# epochs, --q, imbalance, method: what the paper's tables were made with (He et al., 2025), as its code's scripts say
TUNED = {
    "cifar10": (10, 0.5, 1, "cr_dpll"),
    "cifar100": (10, 0.1, 1, "cr_dpll"),
    "cifar10_lt": (10, 0.3, 100, "records"),
    "cifar100_lt": (10, 0.05, 100, "records"),
    "fgvc": (100, 0.01, 1, "cr_dpll"),
    "cub": (20, 0.01, 1, "cr_dpll"),
    "cars": (60, 0.01, 1, "cr_dpll"),
    "dogs": (50, 0.01, 1, "cr_dpll"),
    "places_lt": (10, 0.02, 1, "records"),
    "imagenet_lt": (10, 0.02, 1, "records"),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_tuned_as_in_the_paper(name):
    epochs, q, imbalance, method = TUNED[name.removeprefix("partialclip_")]
    annotate, draw, train = commands(name)
    assert (annotate[2], draw[:3], train[2]) == ("annotate_vlm.py", ["python", "-m", "coreg.weak"], "baselines/pll.py")
    (annotated,), (drawn,) = parse(AnnotateConfig, argv=annotate[3:]), parse(WeakConfig, argv=draw[3:])
    assert (annotated.images, annotated.classes, annotated.vlm) == (drawn.images, drawn.classes, "ViT-B-16/openai")
    assert (drawn.rule, drawn.q, drawn.imbalance) == ("fps", q, imbalance)
    job, image_options, options = pll.read_settings(train[3:])
    assert (job.annotations, job.prefilter_annotations) == (drawn.output_dir, annotated.output_dir)
    assert (options.method, job.epochs, job.batch_size, options.schedule) == (method, epochs, 64, "cosine")
    assert (job.optimizer, job.lr, job.lr_floor, job.momentum, job.weight_decay) == ("sgd", 0.01, 0, 0.9, 5e-4)
    # the views of its loaders: the image as it is where sets are large, crops and colours where they are fine-grained
    views = ("pico_weak", "pico_strong") if job.dataset in ("fgvc", "cub", "cars", "dogs") else ("plain", "clip_train")
    assert (options.weak_view, options.strong_view) == views
    tuned = (image_options.backbone, image_options.tuner, image_options.head, image_options.head_init)
    assert tuned == ("annotator", ["adaptformer"], "cosine", "text")
    text = " ".join(header(name))
    number = re.search(r"Published by the paper, not measured here: test accuracy \d\d\.\d %", text)
    assert (number is None) == ("was not at hand" in text)


@pytest.mark.parametrize("name", STUDENTS)
def test_the_commands_on_top_are_typed_correctly(name):
    stores = []
    for words in commands(name):
        if words[:3] == ["python", "-m", "coreg.weak"]:
            (config,) = parse(WeakConfig, argv=words[3:])
            stores.append(config.output_dir)
        elif words[2] == "annotate_vlm.py":
            (config,) = parse(AnnotateConfig, argv=words[3:])
            stores.append(config.output_dir)
            if name in PAPERS and config.classes:
                assert read_class_names(str(ROOT / config.classes))
        elif words[2] == "baselines/spml.py":
            job, *_ = spml.read_settings(words[3:])
            assert name == "digit_pictures" and job.annotations is None
        else:
            assert words[:3] == ["accelerate", "launch", "train_coreg.py"]
            job, *_ = train_coreg.read_settings(words[3:])
            assert [job.annotations] == (stores[-1:] or [None])
            assert name not in PAPERS or f"--recipe {name}" in " ".join(words)
    assert commands(name)


@pytest.mark.parametrize("name", PAPERS)
def test_published_results_are_marked_as_such(name):
    text = " ".join(header(name))
    assert re.search(r"Published by the papers, not measured here: test accuracy (in %|\d\d\.\d\d %)", text)


def test_the_listing_names_every_recipe_in_one_line(capsys):
    main()
    lines = capsys.readouterr().out.split("\n")
    for name in NAMES:
        description = listing()[name]
        assert len(description) > 20 and header(name)[0].strip() == description
        assert sum(re.fullmatch(f"{name} +{re.escape(description)}", line) is not None for line in lines) == 1


# ---- class names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "count", "first", "last"),
    [
        ("svhn", 10, "number 0", "number 9"),
        ("fer2013", 7, "Angry Facial Expression", "Neutral Facial Expression"),
        ("gtsrb", 43, "German Traffic Sign: Speed limit 20", "German Traffic Sign: Lift ban on truck overtaking"),
        ("eurosat_words", 10, "Annual Crop Land", "Sea or Lake"),
    ],
)
def test_class_name_files(file, count, first, last):
    names = read_class_names(str(FOLDER / "classes" / f"{file}.txt"))
    assert (len(names), names[0], names[-1]) == (count, first, last)


def test_some_signs_lie_at_their_official_numbers():
    names = read_class_names(str(FOLDER / "classes" / "gtsrb.txt"))
    official = {12: "Priority road", 13: "Give way", 14: "Stop", 17: "No entry", 40: "Driving around the island"}
    for index, sign in official.items():
        assert names[index] == f"German Traffic Sign: {sign}"


@pytest.mark.parametrize(("file", "name"), [("svhn", "SVHN"), ("fer2013", "FER2013"), ("gtsrb", "GTSRB")])
def test_class_name_files_agree_with_the_names_that_torchvision_sets_get(file, name):
    assert read_class_names(str(FOLDER / "classes" / f"{file}.txt")) == TORCHVISION[name]


def test_the_superclasses_are_twenty_of_five():
    path = str(FOLDER / "classes" / "cifar100_superclasses.csv")
    with Path(path).open(newline="") as file:
        table = list(csv.DictReader(file))
    names = [row["class"] for row in table]
    assert names == sorted(names) and len(set(names)) == 100  # torchvision's order is alphabetical
    assert np.bincount(read_superclasses(path, names)).tolist() == [5] * 20
    of = {row["class"]: row["superclass"] for row in table}
    assert of["aquarium_fish"] == of["trout"] == "fish" and of["maple_tree"] == "trees" and of["worm"] == of["crab"]
