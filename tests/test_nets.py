"""The backbone's peculiarities, its parameter count, and the way through timm's own save and load."""

import copy
import inspect
import json
import os
import re
import time

import huggingface_hub
import pytest
import timm
import torch
from runs import error_of, refused, script
from safetensors.torch import save_file
from torch import nn

import train_coreg
from coreg.errors import UserError
from coreg.export.ensemble import export
from coreg.export.folder import load_export
from coreg.nets.made_for import trained_with
from coreg.nets.model import (
    Model,
    check_backbone,
    check_network,
    check_weights,
    create_backbone,
    evaluate_lone_values,
)
from coreg.nets.preact import PreActBlock
from coreg.network_options import ImageConfig
from coreg.run.job import other_pixels


def test_preact_resnet18_has_the_papers_shapes():
    net = timm.create_model("preact_resnet18", num_classes=10).eval()
    # textbook count: stem 3*64*9, eight blocks, 1x1 shortcuts at the three changes of width, classifier
    widths = [(64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    convs = 3 * 64 * 9 + sum(9 * a * b + 9 * b * b + (a * b if a != b else 0) for a, b in widths)
    norms = 2 * 64 + sum(2 * a + 2 * b for a, b in widths)
    assert sum(p.numel() for p in net.parameters()) == convs + norms + 512 * 10 + 10
    features = net.forward_features(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 512, 4, 4)
    assert (features < 0).any()  # no activation follows the last stage
    pooled = net.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, torch.nn.functional.avg_pool2d(features, 4).flatten(1))


def test_an_identity_shortcut_carries_the_activated_tensor():
    block = PreActBlock(4, 4, 1, "none")
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_a_model_gives_logits_and_unit_features(norm):
    net = Model(create_backbone("preact_resnet_tiny", 5, 1, {"norm": norm}, pretrained=False), dim=16)
    logits, q = net(torch.randn(3, 1, 16, 16))
    assert logits.shape == (3, 5) and q.shape == (3, 16)
    torch.testing.assert_close(q.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(net.logits(torch.zeros(1, 1, 16, 16)), net(torch.zeros(1, 1, 16, 16))[0])


def tuned():
    """A frozen network with one trained normalisation, and a module of a tuner."""
    net = create_backbone("preact_resnet_tiny", 5, 1, {}, pretrained=False).requires_grad_(False)
    net.get_classifier().requires_grad_(True)
    net.norm1.requires_grad_(True)
    return Model(net, 4, nn.ModuleDict({"scale": nn.Linear(2, 2)}))


def test_a_tuned_network_keeps_and_restores_what_is_trained_alone():
    torch.manual_seed(0)
    net, again = tuned(), tuned()
    again.backbone.load_state_dict(net.backbone.state_dict())  # the same frozen weights
    names = set(net.trained())
    head = {"backbone.fc.weight", "backbone.fc.bias"}
    norm = {f"backbone.norm1.{of}" for of in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert {name for name in names if name.startswith("backbone.")} == head | norm
    assert {name.split(".")[0] for name in names} == {"backbone", "projector", "tuners"}
    moving = {name for name, weight in net.named_parameters() if weight.requires_grad}
    assert moving == {name for name, value in net.trained().items() if value.requires_grad}

    images = torch.randn(4, 1, 16, 16)
    optimizer = torch.optim.SGD([weight for weight in net.parameters() if weight.requires_grad], 0.1)
    sum(out.sum() for out in net.train()(images)).backward()
    optimizer.step()
    holder, other = nn.ModuleDict({"net": net}), nn.ModuleDict({"net": again})
    assert holder.state_dict().keys() == {f"net.{name}" for name in names}
    other.load_state_dict(holder.state_dict())
    for copied in (again, copy.deepcopy(net).requires_grad_(False)):
        assert copied.state_dict().keys() == names
        assert torch.equal(copied.eval()(images)[0], net.eval()(images)[0])
    with pytest.raises(RuntimeError, match="scale"):
        other.load_state_dict({name: value for name, value in holder.state_dict().items() if "scale" not in name})


def test_frozen_statistics_stay_and_trained_ones_move():
    net = tuned().train()
    before = copy.deepcopy(net.backbone.state_dict())
    net(torch.randn(4, 1, 16, 16) + 3)
    after = net.backbone.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"norm1.{of}" for of in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_an_untuned_network_keeps_everything():
    net = Model(create_backbone("preact_resnet_tiny", 5, 1, {}, pretrained=False), 4)
    assert set(net.trained()) == {name for name, _ in net.named_parameters()} | {name for name, _ in net.named_buffers()}


def test_any_timm_model_can_be_the_backbone():
    net = Model(create_backbone("resnet18", 7, 3, {}, pretrained=False)).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net(images)[0], net.backbone(images))


def two_heads(net, features):
    """deit's distilled ones: the logits are the mean of a head on the class token and one on the distillation token."""
    return (net.head(features[:, 0]) + net.head_dist(features[:, 1])) / 2


def convolution(net, features):
    """dpn's head is a 1x1 convolution of the pooled map."""
    return net.classifier(features.mean(dim=(2, 3), keepdim=True)).flatten(1)


def second_head(net, features):
    """volo's adds half of the largest logit that a second head finds in any token."""
    return net.head(features[:, 0]) + net.aux_head(features[:, 1:]).amax(dim=1) / 2


@pytest.mark.parametrize(
    ("name", "arguments", "by_hand"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 24}, two_heads),
        ("dpn48b", {}, convolution),
        ("volo_d1_224", {"img_size": 32}, second_head),
    ],
)
def test_heads_of_any_kind_are_trained_and_exported_as_they_are(tmp_path, name, arguments, by_hand):
    torch.manual_seed(0)
    check_network(name, 3, 32, 3, arguments)
    net = Model(create_backbone(name, 3, 3, arguments, pretrained=False), dim=8)
    images = torch.randn(2, 3, 32, 32)
    logits, q = net.train()(images)
    logits.logsumexp(1).sum().backward()  # every head gets a gradient
    assert q.shape == (2, 8) and all(p.grad is not None for n, p in net.backbone.named_parameters() if "head" in n)
    net.eval()
    with torch.no_grad():
        wanted = by_hand(net.backbone, net.backbone.forward_features(images))
        torch.testing.assert_close(net(images)[0], wanted)
        settings = {"class_names": ["a", "b", "c"], "image_size": 32, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
        export(tmp_path / "export", [net.backbone], name, arguments, images, **settings)
        torch.testing.assert_close(load_export(tmp_path / "export")[0][0](images), wanted)


@pytest.mark.parametrize(
    ("name", "size", "arguments", "problem", "fits"),
    [
        (
            "vit_tiny_patch16_224",
            32,
            {"depth": 1},
            "224",
            r"fits: --image_size 224 or .*'{\"depth\": 1, \"img_size\": 32}'$",
        ),
        ("vit_tiny_patch16_224", 32, {"depth": 1, "img_size": 48}, "48", "fits: --backbone_args '{.*\"img_size\": 32}'$"),
        ("inception_v3", 299, {"aux_logits": True}, "more or other than 4 logits", "what fits: no --backbone_args$"),
        ("inception_v3", 16, {}, ".", "what fits: --image_size 299$"),
        ("resnet18", 32, {"global_pool": ""}, ".", "what fits: no --backbone_args$"),
        ("resnet18", 32, {"blocks": 3}, "blocks", "resnet18 does not take these --backbone_args"),
        ("test_vit", 32, {"img_size": "big"}, "could not be loaded|does not take", "--backbone_args"),
    ],
)
def test_a_network_that_does_not_fit_is_named_with_what_fits(name, size, arguments, problem, fits):
    with pytest.raises(UserError, match=fits) as refused:
        check_network(name, 4, size, 3, arguments)
    assert re.search(problem, str(refused.value)) and "\n" not in str(refused.value)


def test_the_check_leaves_random_draws_alone():
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    check_network("test_resnet", 4, 32, 1, {})
    assert torch.equal(torch.rand(3), wanted)


def test_a_local_folder_with_a_pipe_for_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is no file"):
        create_backbone(f"local-dir:{tmp_path}", 3, 3, {}, pretrained=False)


@pytest.mark.parametrize("content", ["", "[" * 100_000, '{"architecture": 3}', '{"architecture": "resnet18"}', "\xff"])
def test_a_damaged_local_folder_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert trained_with(f"local-dir:{tmp_path}") is None
    with pytest.raises(UserError, match=r"^backbone local-dir:.* could not be loaded .*; check the folder$"):
        check_network(f"local-dir:{tmp_path}", 3, 32, 3, {})


@pytest.mark.parametrize(
    ("name", "message"),
    [("resnet19", "did you mean resnet18"), ("local-dir:/nowhere", "no config.json"), ("../x", "unknown")],
)
def test_a_wrong_backbone_is_named(name, message):
    with pytest.raises(UserError, match=message):
        check_backbone(name)


def test_pixels_unlike_those_that_weights_were_trained_with_are_named(tmp_path):
    def warning(backbone, mean, std, pretrained=True, channels=3):
        return other_pixels(ImageConfig(backbone=backbone, mean=mean, std=std, pretrained=pretrained, channels=channels))

    wants = "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
    assert warning("resnet18", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) is None
    assert warning("tf_efficientnet_lite0", [0.5], [0.5]) is None
    assert warning("resnet18", [0.5], [0.5]).endswith(f"resnet18 was trained with other pixels; it wants {wants}")
    assert warning("resnet18", [0.485, 0.456, 0.406], [0.3]) is not None
    assert warning("resnet18", [0.5], [0.5], pretrained=False) is None  # it was not
    assert warning("resnet18", [0.5], [0.5], channels=1) is None  # timm adds up the colours' weights
    for config in ({"pretrained_cfg": {"mean": [0.1], "std": [0.2]}}, {}, []):  # one channel, nothing, no settings at all
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert warning(f"local-dir:{tmp_path}", [0.5], [0.5], pretrained=False) is None
    (tmp_path / "config.json").write_text(json.dumps({"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}))
    assert warning(f"local-dir:{tmp_path}", [0.5], [0.5]).endswith("it wants --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25")


def test_without_network_pretrained_weights_are_given_up_within_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"resnet18 are not in the cache .* cannot be reached; .*--pretrained false"):
        check_weights("resnet18")
    assert time.monotonic() - start < 10
    with pytest.raises(UserError, match="preact_resnet18 has no pretrained weights"):
        check_weights("preact_resnet18")
    check_weights("local-dir:somewhere")


def test_cached_pretrained_weights_are_used_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--timm--test_vit.r160_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    saved = timm.create_model("test_vit")
    save_file(saved.state_dict(), snapshot / "model.safetensors")
    check_weights("test_vit")
    loaded = create_backbone("test_vit", 5, 3, {}, pretrained=True)
    assert all(torch.equal(saved.state_dict()[k], v) for k, v in loaded.state_dict().items() if not k.startswith("head."))
    assert loaded.num_classes == 5


def test_one_value_a_channel_is_normalised_as_in_evaluation():
    torch.manual_seed(0)
    made = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(3))
    plain = copy.deepcopy(made)
    evaluate_lone_values(made)
    made = copy.deepcopy(made)  # as a momentum encoder is made
    for images in (torch.randn(5, 3, 1, 1), torch.randn(2, 3, 1, 1), torch.randn(0, 3, 1, 1)):
        assert torch.equal(made(images), plain(images))
    one, state = torch.randn(1, 3, 1, 1), copy.deepcopy(plain.state_dict())
    with pytest.raises(ValueError, match="more than 1 value"):
        plain(one)
    assert torch.equal(made(one), plain.eval()(one))
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    assert all(part.training for part in made.modules())
    # a map of several pixels has a variance
    wide = torch.randn(1, 3, 4, 4)
    assert torch.equal(made[0](wide), plain.train()[0](wide))


def test_a_network_that_does_not_fit_leaves_no_run_folder(small_store, tmp_path, capsys):
    words = [
        "--annotations",
        small_store,
        "--output_dir",
        tmp_path / "run",
        "--recipe",
        "digits",
        "--refine",
        "none",
        "--channels",
        "3",
    ]
    words += ["--image_size", "32", "--backbone", "vit_tiny_patch16_224", "--backbone_args"]
    error = refused(capsys, train_coreg.main, *words, '{"depth": 1}')
    assert "--image_size 224" in error and not (tmp_path / "run" / "job.json").exists()


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224.openai", "resnet50_clip.openai"])
def test_size_and_pixels_come_with_a_network_of_one_size(name):
    read = script("pll").read_settings
    clip = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])

    def pixels(*words):
        _, image_options, _ = read(["--annotations", "ann", "--backbone", name, *words])
        return image_options.image_size, image_options.mean, image_options.std

    assert pixels() == (224, *clip)  # the recipe "folder" trains another network on 128 pixels
    assert pixels("--recipe", "eurosat", "--pretrained") == (224, *clip)
    assert pixels("--image_size", "64") == (64, *clip) and pixels("--mean", "0.5") == (224, [0.5], clip[1])
    assert pixels("--backbone_args", '{"img_size": 96}') == (96, *clip)
    assert pixels("--pretrained", "false") == (128, [0.5], [0.5])  # trained from nothing
    assert pixels("--channels", "1") == (224, [0.5], [0.5])  # the weights' are of three channels


def test_size_and_pixels_of_other_networks_are_the_recipes(tmp_path):
    read, usual = script("pll").read_settings, (128, [0.5])
    for words in ([], ["--backbone", "resnet18"], ["--backbone", "convnext_atto"], ["--backbone", "preact_resnet18"]):
        _, image_options, _ = read(["--annotations", "ann", *words])
        assert (image_options.image_size, image_options.mean) == usual
    # a recipe that names its network has the last word; saved settings are one
    (tmp_path / "mine.yaml").write_text("backbone: vit_base_patch16_clip_224.openai\npretrained: true\nimage_size: 32\n")
    _, image_options, _ = read(["--recipe", str(tmp_path / "mine.yaml")])
    assert image_options.image_size == 32
    # of a folder: its own configuration, which may say nothing
    folder, words = tmp_path / "net", ["--annotations", "ann", "--backbone", f"local-dir:{tmp_path / 'net'}"]
    folder.mkdir()
    own = {"fixed_input_size": True, "input_size": [3, 48, 48], "mean": [0.1] * 3, "std": [0.2] * 3}
    for config, wanted in ((own, (48, [0.1] * 3)), (own | {"fixed_input_size": False}, usual), ({}, usual)):
        (folder / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": config}))
        _, image_options, _ = read(words)
        assert (image_options.image_size, image_options.mean) == wanted
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": own | {"mean": [123.0] * 3}}))
    assert "--mean is 123.0; give a number from 0 to 1" in error_of(inspect.unwrap(read), words)
