"""The backbone's peculiarities, its parameter count, and the way through timm's own save and load."""

import copy
import json
import time

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from coreg.errors import UserError
from coreg.nets.model import CoRegNet, check_backbone, check_weights, create_backbone, evaluate_lone_values
from coreg.nets.preact import PreActBlock
from coreg.run.job import other_pixels
from coreg.settings import ImageConfig


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
def test_coreg_net_gives_logits_and_unit_features(norm):
    net = CoRegNet(create_backbone("preact_resnet_tiny", 5, 1, {"norm": norm}, pretrained=False), dim=16)
    logits, q = net(torch.randn(3, 1, 16, 16))
    assert logits.shape == (3, 5) and q.shape == (3, 16)
    torch.testing.assert_close(q.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(net.logits(torch.zeros(1, 1, 16, 16)), net(torch.zeros(1, 1, 16, 16))[0])


def test_any_timm_model_can_be_the_backbone():
    net = CoRegNet(create_backbone("resnet18", 7, 3, {}, pretrained=False)).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net(images)[0], net.backbone(images))


@pytest.mark.parametrize(
    ("name", "said"), [("resnet19", "did you mean resnet18"), ("local-dir:/nowhere", "no config.json"), ("../x", "unknown")]
)
def test_a_wrong_backbone_is_named(name, said):
    with pytest.raises(UserError, match=said):
        check_backbone(name)


def test_pixels_unlike_those_that_weights_were_trained_with_are_told(tmp_path):
    def told(backbone, mean, std, pretrained=True, channels=3):
        return other_pixels(ImageConfig(backbone=backbone, mean=mean, std=std, pretrained=pretrained, channels=channels))

    wants = "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
    assert told("resnet18", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) is None
    assert told("tf_efficientnet_lite0", [0.5], [0.5]) is None
    assert told("resnet18", [0.5], [0.5]).endswith(f"resnet18 was trained with other pixels; it wants {wants}")
    assert told("resnet18", [0.485, 0.456, 0.406], [0.3]) is not None
    assert told("resnet18", [0.5], [0.5], pretrained=False) is None  # it was not
    assert told("resnet18", [0.5], [0.5], channels=1) is None  # timm adds up the colours' weights
    for untold in ({"pretrained_cfg": {"mean": [0.1], "std": [0.2]}}, {}, []):  # one channel, nothing, no settings at all
        (tmp_path / "config.json").write_text(json.dumps(untold))
        assert told(f"local-dir:{tmp_path}", [0.5], [0.5], pretrained=False) is None
    (tmp_path / "config.json").write_text(json.dumps({"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}))
    assert told(f"local-dir:{tmp_path}", [0.5], [0.5]).endswith("it wants --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25")


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
