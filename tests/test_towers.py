"""The annotator's image tower as a backbone: equal to it, a plain timm folder, and with its texts just as it judges."""

import json
import shutil
import sys
import types

import numpy as np
import open_clip
import pytest
import timm
import torch
import yaml
from PIL import Image
from runs import error_of, final_state, on_two_processes, refused, same_curves, script
from safetensors.torch import load_file, save_file
from test_annotate_annotators import save_tiny_clip
from test_tuners_lora import save
from torch import nn
from torch.nn import functional as F

import annotate_vlm
import train_coreg
from coreg.annotate import tower
from coreg.annotate.annotators import ClipAnnotator, load_towers
from coreg.annotate.models import resolve
from coreg.annotate.prompts import read_descriptions
from coreg.annotate.tower import class_texts, disagreement, write_tower
from coreg.errors import UserError
from coreg.export.folder import load_export, read_settings, write_settings
from coreg.export.predict import load_classifier
from coreg.nets.heads import ClassText, back_projected
from coreg.nets.model import Model, create_backbone
from coreg.nets.towers import timm_tower
from coreg.nets.tuning import Tuning
from coreg.run.job import persons_files
from coreg.store.preprocessing import annotators_pixels
from coreg.store.store import AnnotationStore
from coreg.weak.__main__ import main as draw

CPU, NAMES = torch.device("cpu"), ["a cat", "the_dog", "blue whale"]
TINY = {"vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Twelve images of the annotator's own size, judged by a tiny CLIP under one template."""
    place = tmp_path_factory.mktemp("store")
    save_tiny_clip(place / "clip", **TINY)
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = place / "images" / ("train" if i < 8 else "test") / NAMES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (place / "classes.txt").write_text("\n".join(NAMES))
    (place / "templates.txt").write_text("a photo of a {}\n")
    annotate_vlm.main([
        "--images", str(place / "images"), "--classes", str(place / "classes.txt"), "--vlm", f"local-dir:{place / 'clip'}",
        "--templates", str(place / "templates.txt"), "--output_dir", str(place / "ann"), "--workers", "0",
    ])  # fmt: skip
    return AnnotationStore.open(place / "ann")


@pytest.mark.parametrize("family", ["open_clip", "timm", "clip", "siglip"])
def test_a_tower_gives_the_annotators_features(family, tmp_path):
    kind = "transformers" if family in ("clip", "siglip") else "local-dir"
    towers = load_towers(resolve(f"{kind}:{save(tmp_path / family, family)}"), CPU, "fp32")
    size = towers.preprocess(Image.new("RGB", (64, 64))).shape[-1]
    tower = timm_tower(towers.network, size)
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = F.linear(tower.network(images), *tower.projection)
        theirs = towers.image(images)
    # features as large as 100 differ between processors by rounding, small entries of them as much as large ones
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert disagreement(towers, tower, size) < 1e-5


@pytest.mark.slow
def test_a_clip_resnet_gives_its_features():
    torch.manual_seed(0)
    config = open_clip.model.CLIPVisionCfg(layers=[3, 4, 6, 3], width=64, image_size=64)
    visual = open_clip.model._build_vision_tower(32, config).eval()
    for module in visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    tower, images = timm_tower(types.SimpleNamespace(visual=visual), 64), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = F.linear(tower.network(images), *tower.projection), visual(images)
    torch.testing.assert_close(F.normalize(ours), F.normalize(theirs), rtol=0, atol=1e-5)


def test_an_untouched_tower_with_a_projected_head_says_what_the_annotator_said(store, tmp_path):
    write_tower(store, tmp_path / "tower", "annotator")
    backbone = create_backbone(f"local-dir:{tmp_path / 'tower'}", 3, 3, {}, pretrained=False)
    Tuning(("linear",), head="projected").apply(backbone, 3, ClassText.read(tmp_path / "tower"))
    net = Model(backbone, 4).eval()
    pixels = annotators_pixels(str(store.root))
    assert pixels == {"image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}
    images = store.images()
    batch = torch.stack([torch.from_numpy(np.array(images.load(row))) for row in range(12)]).permute(0, 3, 1, 2)
    annotator = ClipAnnotator(resolve(store.manifest["model"]["spec"]), store.templates, store.class_names)
    with torch.no_grad():
        probs = net.logits((batch / 255 - 0.5) / 0.25).softmax(1)
        shown = torch.stack([annotator.towers.preprocess(images.load(row)) for row in range(12)])
        features = F.normalize(annotator.towers.image(shown), dim=1)
        said = (annotator.towers.scale * features @ annotator.text.T).softmax(1)
    torch.testing.assert_close(probs, said, rtol=0, atol=1e-5)
    assert np.array_equal(probs.argmax(1), store.votes()[:, 0])
    # the store's are of float16 features, and in float16
    np.testing.assert_allclose(probs, store.probs().astype(np.float32), atol=2e-2)
    assert len(set(store.votes()[:, 0].tolist())) > 1


def test_text_becomes_the_weights_of_a_head(store, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps({name: ["it has fur", f"it is {name}"] for name in NAMES}))
    texts, classes = class_texts(store, "default", str(tmp_path / "d.json"))
    assert texts == [text for name in NAMES for text in ("it has fur", f"it is {name}")] and classes.tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    texts, classes = class_texts(store, "default", None)
    assert texts == ["a photo of a a cat.", "a photo of a the dog.", "a photo of a blue whale."]
    assert class_texts(store, "classname", None)[0] == ["a cat", "the dog", "blue whale"]
    assert class_texts(store, "annotator", None) is None  # as they stand in the store
    ensemble, classes = class_texts(store, "ensemble", None)
    assert len(set(ensemble)) == 80 * 3 and classes.tolist() == [0, 1, 2] * 80
    assert ensemble[:2] == ["a bad photo of a a cat.", "a bad photo of a the dog."] and "itap of a blue whale." in ensemble
    write_tower(store, tmp_path / "tower", "default")
    towers = load_towers(resolve(store.manifest["model"]["spec"]), CPU, "fp32")
    with torch.no_grad():
        t = F.normalize(towers.text(towers.tokenize(texts)), dim=1)
    backbone = create_backbone(f"local-dir:{tmp_path / 'tower'}", 3, 3, {}, pretrained=False)
    text = ClassText.read(tmp_path / "tower")
    for head in ("linear", "cosine"):
        Tuning(head=head).apply(backbone, 3, text)
        weight = F.normalize(t @ towers.network.visual.proj.T, dim=1)
        torch.testing.assert_close(backbone.get_classifier().weight.data, weight)
        torch.testing.assert_close(weight, back_projected(text.features, text.projection))


def test_texts_that_the_store_keeps_are_not_encoded_again(store, tmp_path, monkeypatch):
    (tmp_path / "d.json").write_text(json.dumps({name: [f"it is {name}"] for name in NAMES}))
    write_tower(store, tmp_path / "loaded", "ensemble")
    shutil.copytree(store.root, tmp_path / "old")
    (tmp_path / "old" / "texts.safetensors").unlink()  # as in a store of an earlier version
    old = AnnotationStore.open(tmp_path / "old")
    kept = ("default", "classname", "annotator")
    for name in kept:
        write_tower(old, tmp_path / f"{name} anew", name)

    def without_text(*arguments):
        towers = load_towers(*arguments)
        towers.text = None
        return towers

    monkeypatch.setattr(tower, "load_towers", without_text)
    for name in kept:
        write_tower(store, tmp_path / name, name)
        mine, theirs = (ClassText.read(tmp_path / folder) for folder in (name, f"{name} anew"))
        assert torch.equal(mine.features, theirs.features) and mine.scale == theirs.scale
    for name, more in {"ensemble": None, "default": tmp_path / "d.json"}.items():
        with pytest.raises(TypeError):
            write_tower(store, tmp_path / "none", name, more and str(more))


def test_descriptions_of_the_annotation_are_texts_for_a_head(store, tmp_path, capsys):
    described = {name: [f"it is {name}", "it has fur"][: 1 + (name == "the_dog")] for name in NAMES}
    (tmp_path / "d.json").write_text(json.dumps(described))
    words = ["--rescore", store.root, "--descriptions", tmp_path / "d.json", "--output_dir", tmp_path / "ann"]
    annotate_vlm.main([*map(str, words), "--workers", "0"])
    again = AnnotationStore.open(tmp_path / "ann")
    write_tower(again, tmp_path / "own", "descriptions")
    write_tower(store, tmp_path / "file", "default", str(tmp_path / "d.json"))
    own, given = (ClassText.read(tmp_path / name).features for name in ("own", "file"))
    torch.testing.assert_close(own, given)
    with pytest.raises(UserError, match="was annotated without descriptions; give some with --descriptions"):
        write_tower(store, tmp_path / "none", "descriptions")
    # those that images were annotated with: the untouched model says what the annotator said, with descriptions too
    write_tower(again, tmp_path / "tower", "annotator")
    backbone = create_backbone(f"local-dir:{tmp_path / 'tower'}", 3, 3, {}, pretrained=False)
    Tuning(("linear",), head="projected").apply(backbone, 3, ClassText.read(tmp_path / "tower"))
    images = again.images()
    batch = torch.stack([torch.from_numpy(np.array(images.load(row))) for row in range(12)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        probs = Model(backbone, 4).eval().logits((batch / 255 - 0.5) / 0.25).softmax(1)
    np.testing.assert_allclose(probs, again.probs().astype(np.float32), atol=2e-2)


def test_what_cannot_be_taken_over_is_refused_in_one_line(store, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps({"a cat": ["x"], "the_dog": [], "blue whale": ["y"]}))
    with pytest.raises(UserError, match="has no text for 'the_dog'"):
        read_descriptions(str(tmp_path / "d.json"), NAMES)
    with pytest.raises(UserError, match="does not describe 'fox'"):
        read_descriptions(str(tmp_path / "d.json"), [*NAMES, "fox"])
    with pytest.raises(UserError, match="a Linear is neither a ViT nor a ResNet"):
        timm_tower(types.SimpleNamespace(visual=nn.Linear(2, 2)), 16)
    with pytest.raises(UserError, match="holds no text features"):
        ClassText.read(tmp_path)


def test_settings_that_contradict_each_other_are_refused(capsys):
    main = script("pll").read_settings
    assert "--head_init text needs --backbone annotator" in refused(capsys, main, "--head_init", "text")
    assert "needs --head_init text, not random" in refused(capsys, main, "--head", "projected", "--backbone", "annotator")


def test_pixels_of_an_annotator_are_those_it_was_made_with():
    job, image_options, _ = script("pll").read_settings(["--backbone", "annotator"])
    assert (job.epochs, image_options.image_size, image_options.mean) == (10, 32, [0.3] * 3) and not image_options.flip
    _, image_options, _ = script("pll").read_settings(["--backbone", "annotator", "--image_size", "64"])
    assert image_options.image_size == 64
    assert annotators_pixels("nowhere") == {}


def test_other_descriptions_make_another_run(tmp_path):
    words = ["--backbone", "annotator", "--head_init", "text", "--descriptions", str(tmp_path / "d.json")]
    job, image_options, _ = script("pll").read_settings(words)
    assert "cannot read the descriptions in" in error_of(persons_files, job, image_options)
    hashes = []
    for content in ("{}", "[]", "{}"):
        (tmp_path / "d.json").write_text(content)
        hashes.append(persons_files(job, image_options))
    assert hashes[0] == hashes[2] != hashes[1] and set(hashes[0]) == {"descriptions"}
    assert persons_files(*script("pll").read_settings([])[:2]) == {}


@pytest.fixture(scope="module")
def tuned(store, tmp_path_factory):
    """The annotator, tuned on its own candidate sets: the words of the command, the last of which is the run folder."""
    words = ["--annotations", store.root, "--backbone", "annotator", "--tuner", "adaptformer", "--head", "cosine"]
    words += ["--head_init", "text", "--method", "cr_dpll", "--epochs", "1", "--batch_size", "4", "--workers", "0"]
    words += ["--output_dir", tmp_path_factory.mktemp("tuned") / "run"]
    script("pll").main([*map(str, words)])
    return words


def test_a_tuned_annotator_end_to_end(tuned, capsys):
    output = tuned[-1]
    classifier = load_classifier(output / "export")
    assert "which timm does not read" in (output / "export" / "README.md").read_text()
    assert classifier.class_names == NAMES and (output / "tower" / "text.safetensors").is_file()
    itself = timm.create_model(f"local-dir:{output / 'tower'}", pretrained=True, num_classes=0)
    assert itself(torch.zeros(1, 3, 16, 16)).shape == (1, 16)
    script("pll").main([*map(str, tuned)])
    printed = capsys.readouterr().out
    assert "This run is finished" in printed and "was trained with other pixels" not in printed


def test_a_tuned_annotator_does_not_estimate_its_own_accuracy_and_is_judged_as_itself(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr("coreg.report.estimate.FEWEST", 2)
    monkeypatch.setattr("coreg.report.estimate.COVERED", 2)
    made = []
    for backbone in ("annotator", f"local-dir:{tuned[-1] / 'tower'}"):  # as itself, and as any network with such weights
        output = tmp_path / f"{len(made)}"
        words = [*map(str, tuned[:-1]), f"{output}"]
        words[words.index("annotator")] = backbone
        words[words.index("text")] = "random"
        script("pll").main([*words, "--image_size", "16"])
        made.append(json.loads((output / "report.json").read_text()))
    itself, other = made
    assert "estimate" not in itself and set(other["estimate"]) == {"train", "test"}
    assert itself["label_free"]["approximated_accuracy"]["train"] > 0
    # nor is it judged by features as if they were another network's
    assert (itself["trust"]["kind"], other["trust"]["kind"]) == ("own", "weights")


def test_a_tuned_annotator_annotates_again_and_teaches_a_small_student(store, tuned, tmp_path, capsys):
    words = ["--images", str(store.root.parent / "images"), "--vlm", f"run:{tuned[-1]}", "--workers", "0"]
    annotate_vlm.main([*words, "--output_dir", str(tmp_path / "ann")])
    again = AnnotationStore.open(tmp_path / "ann")
    assert again.class_names == NAMES and again.manifest["model"]["spec"] == f"run:{tuned[-1]}"
    # what the export says of the very files
    ((_, probabilities, failed),) = load_classifier(tuned[-1]).batches(again.images())
    assert not failed and len(probabilities) == 12
    np.testing.assert_allclose(again.probs(), probabilities, atol=1e-3)
    np.testing.assert_array_equal(again.votes()[:, 0], probabilities.argmax(axis=1))
    (net,), settings = load_export(tuned[-1])
    for row, features in enumerate(again.features()):
        pixels = np.asarray(again.images().load(row).convert("RGB")) / 255  # they have the networks' size already
        x = torch.tensor((pixels - settings["mean"]) / settings["std"]).float().permute(2, 0, 1)
        with torch.no_grad():
            h = net.forward_head(net.forward_features(x[None]), pre_logits=True)[0].numpy()
        np.testing.assert_allclose(features, h / np.linalg.norm(h), atol=1e-3)

    capsys.readouterr()
    student = [
        "--annotations",
        again.root,
        "--recipe",
        "digits",
        "--refine",
        "none",
        "--image_size",
        "16",
        "--backbone_args",
    ]
    student += ['{"widths": [4, 8], "depths": [1, 1]}', "--epochs", "1", "--batch_size", "4", "--workers", "0"]
    student += ["--refine", "none"]
    for teacher in ("averaged", "single"):
        output = tmp_path / teacher
        script("distill").main([*map(str, student), "--teacher", teacher, "--output_dir", str(output)])
        report = json.loads((output / "report.json").read_text())
        assert report["annotator"]["name"].endswith(str(tuned[-1])) and "votes of the first" not in report["teacher"]
        assert str(tuned[-1].parent) not in (output / "export" / "README.md").read_text()
    np.testing.assert_array_equal(script("distill").single_template_probabilities(again), again.probs())


def test_a_run_annotates_with_its_own_classes_and_without_texts(store, tuned, tmp_path, capsys):
    place, output = store.root.parent, ["--output_dir", tmp_path / "ann"]
    words = ["--images", place / "images", "--vlm", f"run:{tuned[-1]}", "--workers", "0", *output]
    (tmp_path / "others.txt").write_text("a cat\nblue whale\nthe_dog\n")
    main = annotate_vlm.main
    assert "leave out --classes" in refused(capsys, main, *words, "--classes", tmp_path / "others.txt")
    assert "leave out --templates" in refused(capsys, main, *words, "--templates", place / "templates.txt")
    assert "leave out --precision" in refused(capsys, main, *words, "--precision", "bf16")
    assert "no exported model" in refused(capsys, main, *words[:3], f"run:{tmp_path}", *output)
    assert f"write --vlm run:{tuned[-1]}" in refused(capsys, main, *words[:3], tuned[-1], *output)
    assert not (tmp_path / "ann").exists()
    main([*map(str, words), "--classes", str(place / "classes.txt")])
    assert "reads no texts" in refused(capsys, main, "--rescore", tmp_path / "ann", "--output_dir", tmp_path / "other")
    network = ["--annotations", tmp_path / "ann", "--backbone", "annotator", "--output_dir", tmp_path / "other"]
    assert "is no backbone" in refused(capsys, script("pll").main, *network, "--tuner", "bias", "--method", "cc")
    # its identity is all that its probabilities depend on
    shutil.copytree(tuned[-1], tmp_path / "copy")
    before, settings = resolve(f"run:{tuned[-1]}"), read_settings(tmp_path / "copy" / "export")
    assert resolve(f"run:{tmp_path / 'copy' / 'export'}").weights == before.weights
    write_settings(tmp_path / "copy" / "export", settings | {"agreement": {}})
    assert resolve(f"run:{tmp_path / 'copy'}").weights == before.weights
    write_settings(tmp_path / "copy" / "export", settings | {"temperature": 2.5})
    assert resolve(f"run:{tmp_path / 'copy'}").weights != before.weights


def test_sets_that_were_drawn_are_learned_by_the_tower_of_another_stores_annotator(store, tmp_path, capsys):
    place = store.root.parent
    draw([
        "--images", str(place / "images"), "--classes", str(place / "classes.txt"), "--rule", "fps", "--q", "0.5",
        "--output_dir", str(tmp_path / "drawn"),
    ])  # fmt: skip
    words = ["--annotations", tmp_path / "drawn", "--backbone", "annotator", "--tuner", "linear", "--head", "cosine"]
    words += ["--head_init", "text", "--method", "cc", "--epochs", "1", "--batch_size", "4", "--workers", "0"]
    output, main = ["--output_dir", str(tmp_path / "run")], script("pll").main
    assert "name the store of an annotator with --prefilter_annotations" in refused(capsys, main, *words, *output)
    words += ["--prefilter_annotations", store.root]
    main([*map(str, words), *output])
    assert (tmp_path / "run" / "tower" / "text.safetensors").is_file()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["weak_labels"]["generator"].startswith("fps(") and "prefilter" not in report["weak_labels"]
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (settings["image_size"], settings["mean"]) == (16, [0.5] * 3)  # the annotator's own, not the default [0.5]


def test_class_means_are_the_start_of_a_head(store, tmp_path, monkeypatch):
    """Every class weight is the direction of the features of length 1, each divided among its candidates."""
    words = ["--annotations", store.root, "--backbone", "annotator", "--tuner", "linear", "--head", "cosine"]
    words += ["--workers", "0", "--head_init", "class_mean", "--method", "cc", "--output_dir", tmp_path / "run"]
    words += ["--candidates", "topk:2"]
    pll, seen = script("pll"), []
    monkeypatch.setattr(pll, "train", lambda run, task, training, lr: seen.append((task, training)) or sys.exit(7))
    with pytest.raises(SystemExit):
        pll.main([*map(str, words)])
    ((task, training),) = seen
    net = training.learners[0].net.eval()
    sums = torch.zeros(3, 16)
    for i, candidates in enumerate(task.weak.table):
        with torch.no_grad():
            view = task.data.view("plain", np.array([i]), ())
            h = net.backbone.forward_head(net.backbone.forward_features(view), pre_logits=True)[0]
        for k in np.flatnonzero(candidates):
            sums[k] += h / h.norm() / candidates.sum()
    wanted = sums / sums.norm(dim=1, keepdim=True)
    torch.testing.assert_close(net.backbone.get_classifier().weight.detach(), wanted)


def test_a_run_whose_frozen_weights_changed_does_not_go_on(store, tmp_path, capsys):
    words = ["--annotations", store.root, "--backbone", "annotator", "--tuner", "bias", "--method", "cc", "--workers", "0"]
    words += ["--epochs", "1", "--batch_size", "4", "--output_dir", tmp_path / "run"]
    main = script("pll").main
    main([*map(str, words)])
    (tmp_path / "run" / "report.json").unlink()
    file = tmp_path / "run" / "tower" / "model.safetensors"
    weights = load_file(file)
    weights["blocks.0.attn.qkv.weight"][0, 0] += 1
    save_file(weights, file)
    assert "frozen_weights was" in refused(capsys, main, *words)


def test_tuners_and_heads_that_do_not_fit_are_refused_before_any_work(store, tmp_path, capsys):
    words = ["--annotations", store.root, "--backbone", "annotator", "--output_dir", tmp_path / "run"]
    main = script("pll").main
    assert "--blocks last:9 does not fit" in refused(capsys, main, *words, "--tuner", "lora", "--blocks", "last:9")
    assert "did you mean adapter?" in refused(capsys, main, *words, "--tuner", "adapters")
    plain = ["--annotations", store.root, "--recipe", "digits", "--output_dir", tmp_path / "run"]
    assert "goes into pre-norm vision transformers" in refused(capsys, main, *plain, "--tuner", "vpt_deep")


@pytest.mark.parametrize(
    "name", ["train_coreg", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dividemix", "distill"))]
)
def test_every_script_tunes_the_annotator(store, tmp_path, name):
    words = ["--annotations", store.root, "--backbone", "annotator", "--tuner", "lora", "vpt_deep", "--head", "cosine"]
    words += ["--epochs", "2", "--batch_size", "4", "--workers", "0", "--output_dir", tmp_path / "run"]
    words += ["--bottleneck", "2", "--prompt_tokens", "2", "--warmup_epochs", "1"][: 4 if name == "distill" else 6]
    main = train_coreg.main if name == "train_coreg" else script(name).main
    main([*map(str, words)])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    nets, settings = load_export(tmp_path / "run")
    assert len(nets) == (1 if name == "distill" else 2) and settings["tuning"]["tuners"] == ["lora", "vpt_deep"]
    assert report["accuracy"]["test"]["n"] == 4


@pytest.mark.multiprocess
def test_two_processes_tune_as_one_does_and_a_run_that_was_stopped_goes_on(store, tmp_path):
    words = ["--annotations", store.root, "--backbone", "annotator", "--tuner", "adaptformer", "bias", "--head", "cosine"]
    words += ["--head_init", "text", "--method", "pico", "--epochs", "2", "--batch_size", "4", "--workers", "0"]
    words += ["--dtype", "float64", "--queue_size", "8"]
    states = {}
    for name in ("one", "two"):
        output = ["--output_dir", tmp_path / name]
        if name == "two":
            on_two_processes(script("pll").main, *words, *output)
        else:
            script("pll").main([*map(str, words), *map(str, output)])
        states[name] = final_state(tmp_path / name)
    same_curves(states["one"], states["two"])
    for mine, theirs in zip(*(state["learners"][0].items() for state in states.values()), strict=True):
        assert mine[0] == theirs[0]
        torch.testing.assert_close(mine[1], theirs[1], rtol=1e-9, atol=1e-9)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "one", again)
    shutil.rmtree(max((again / "checkpoints").iterdir()))
    (again / "report.json").unlink()
    script("pll").main([*map(str, words), "--output_dir", str(again)])
    resumed = final_state(again)["learners"][0]
    assert all(torch.equal(value, resumed[name]) for name, value in states["one"]["learners"][0].items())
