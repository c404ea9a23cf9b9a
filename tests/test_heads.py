"""Heads against the numbers of public code and by hand, and in timm models."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from coreg.errors import UserError
from coreg.nets.heads import Head, back_projected, class_features, put_head, random_weight
from coreg.nets.model import Model

FOLDER = Path(__file__).parent / "reference"


def numbers_of(name):
    return {key: torch.from_numpy(value) for key, value in np.load(FOLDER / f"{name}.npz").items()}


@pytest.mark.parametrize(("kind", "theirs"), [("cosine", "cosine"), ("l2", "l2normed"), ("layernorm", "layernormed")])
def test_heads_give_the_numbers_of_public_code(kind, theirs):
    numbers = numbers_of("heads")
    head = Head(kind, numbers["weight"], float(numbers["scale"]))
    feature = numbers["feature"].requires_grad_()
    logits = head(feature)
    (logits * numbers["probe"]).sum().backward()
    for ours, name in ((logits, "logits"), (feature.grad, "grad_feature"), (head.weight.grad, "grad_weight")):
        torch.testing.assert_close(ours, numbers[f"{theirs}_{name}"], rtol=1e-9, atol=1e-9)


def test_a_projected_head_is_the_cosine_of_the_projected_features():
    torch.manual_seed(0)
    text, projection, shift, h = torch.randn(5, 3), torch.randn(3, 8), torch.randn(3), torch.randn(4, 8)
    logits = Head("projected", text, 30.0, (projection, shift))(h)
    for i in range(4):
        embedded = torch.stack([projection[e] @ h[i] + shift[e] for e in range(3)])
        for k in range(5):
            wanted = 30 * (embedded @ text[k]) / (embedded.norm() * text[k].norm())
            torch.testing.assert_close(logits[i, k], wanted)


@pytest.mark.parametrize("kind", ["cosine", "l2", "layernorm", "projected"])
def test_the_linear_classifier_of_a_head_ranks_classes_as_it_does(kind):
    torch.manual_seed(0)
    projection = (torch.randn(6, 8), torch.randn(6)) if kind == "projected" else None
    head = Head(kind, torch.randn(5, 6 if projection else 8), 25.0, projection).double()
    h = torch.randn(20, 8).double()
    linear, logits = head.as_linear(), head(h)
    ratio = (h @ linear["weight"].T + linear["bias"]) / logits
    torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, 5))
    assert (ratio > 0).all()
    if kind == "l2":
        torch.testing.assert_close(ratio, torch.ones_like(ratio))


@pytest.mark.parametrize("name", ["default", "ensemble", "descriptor"])
def test_text_becomes_weights_as_in_public_code(name):
    numbers = numbers_of("text_init")
    C, owner = len(numbers["text_raw"]), torch.arange(len(numbers["text_raw"]))
    raw = {"default": numbers["text_raw"], "ensemble": numbers["text_raw_templates"].flatten(0, 1)}
    owners = {"default": owner, "ensemble": owner.repeat(3)}
    raw["descriptor"] = numbers["text_raw_descriptors"]
    owners["descriptor"] = owner.repeat_interleave(numbers["descriptor_count"])
    text = class_features(F.normalize(raw[name], dim=1), owners[name], C)
    weight = back_projected(text, numbers["projection"].T)
    torch.testing.assert_close(weight, numbers[f"weight_{name}"])
    without_projection = {"default": "weight_resnet", "ensemble": "weight_ensemble_resnet"}
    if name in without_projection:
        torch.testing.assert_close(text, numbers[without_projection[name]])


def test_a_random_head_has_rows_of_length_one():
    weight = random_weight(7, 5)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(7))


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "resnet50_clip"])
def test_a_head_takes_the_place_of_the_classifier(name):
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=3, **({"img_size": 32} if "vit" in name else {}))
    put_head(backbone, Head("cosine", random_weight(3, backbone.head_hidden_size)))
    net, images = Model(backbone, 4).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        h = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
        wanted = 25 * torch.cosine_similarity(h[:, None], backbone.get_classifier().weight[None], dim=-1)
        torch.testing.assert_close(net.logits(images), wanted)
        torch.testing.assert_close(net(images)[0], wanted)


def test_a_network_without_a_linear_classifier_is_refused():
    with pytest.raises(UserError, match="choose --head linear, or another --backbone"):
        put_head(timm.create_model("test_byobnet", num_classes=0), nn.Identity())
