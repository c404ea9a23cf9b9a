"""Tuned networks: what is exported of them, and how it comes back."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from coreg.export.ensemble import export, make_program
from coreg.export.folder import load_export
from coreg.learn.partial import METHODS
from coreg.learn.partial.method import PartialBatch
from coreg.learn.partial_options import OPTIONS
from coreg.learn.schedules import Step
from coreg.nets.model import Model, create_backbone
from coreg.nets.tuning import Tuning

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SETTINGS = {"class_names": ["a", "b", "c"], "image_size": 16, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
NAME = "vit_tiny_patch16_224"


def tuned(tuners, head):
    """A network as after a training: nothing of it is where it began."""
    torch.manual_seed(0)
    backbone = create_backbone(NAME, 3, 3, TINY, pretrained=False)
    tuning = Tuning(tuners, head=head, bottleneck=2, prompt_tokens=2, mask_ratio=0.1)
    net = Model(backbone, 4, tuning.apply(backbone, 3))
    with torch.no_grad():
        for weight in net.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))
    return net.eval(), tuning


def written(folder, net, tuning, images):
    export(folder, [net.backbone], NAME, TINY, images, tuning, [net.tuners], **SETTINGS)
    return load_export(folder)


CASES = [
    ((), "cosine", False),
    ((), "layernorm", False),
    (("linear",), "linear", True),
    (("lora", "ssf_ln", "bias"), "linear", True),
    (("mask", "ln"), "l2", False),
    (("vpt_deep", "lora"), "linear", False),
    (("adaptformer", "mask", "bias"), "cosine", False),
]


@pytest.mark.parametrize(("tuners", "head", "plain"), CASES, ids=str)
def test_an_export_computes_what_was_tuned(tmp_path, tuners, head, plain):
    net, tuning = tuned(tuners, head)
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        wanted = net.logits(images)
        (again,), settings = written(tmp_path / "export", net, tuning, images)
        torch.testing.assert_close(again(images), wanted, rtol=1e-5, atol=1e-5)
        moved = nn.ModuleList([copy.deepcopy(again)]).double()[0]
        torch.testing.assert_close(moved(images.double()).float(), wanted, rtol=1e-5, atol=1e-5)
        assert ("tuning" not in settings) == plain
        itself = timm.create_model(f"local-dir:{tmp_path / 'export' / 'net1'}", pretrained=True).eval()
        if plain:
            torch.testing.assert_close(itself(images), wanted, rtol=1e-5, atol=1e-5)
        elif not settings["tuning"]["tuners"]:  # another head alone: timm ranks the classes alike
            assert torch.equal(itself(images).argsort(1), wanted.argsort(1))


@pytest.mark.parametrize("kind", ["torch_export", "onnx"])
def test_programs_compute_what_was_tuned(tmp_path, kind):
    net, tuning = tuned(("vpt_deep", "adaptformer"), "cosine")
    nets, settings = written(tmp_path / "export", net, tuning, torch.randn(5, 3, 16, 16))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8))
    _, record = make_program(nets, settings, kind, images)  # compares
    assert record["largest_difference"] < 1e-4


def test_the_written_head_has_its_own_scale(tmp_path):
    torch.manual_seed(0)
    backbone = create_backbone(NAME, 3, 3, TINY, pretrained=False)
    tuning = Tuning(head="cosine")
    tuning.apply(backbone, 3)
    (again,), settings = written(tmp_path / "export", Model(backbone, 4).eval(), tuning, torch.randn(2, 3, 16, 16))
    assert settings["tuning"]["head_scale"] == 25.0 == again.get_classifier().scale


SETS = torch.tensor([[True, True, False], [True, False, True], [False, True, True], [True, False, False]])


def stepped(name, tuners, head):
    """A method on a tuned network, after a step in its sixth epoch of nine."""
    net, tuning = tuned(tuners, head)
    method = METHODS[name](net, SETS, OPTIONS[name]())
    when, images = Step(5, 9), torch.randn(2, 4, 3, 16, 16)
    views = tuple(images[: len(method.passes(when).views)])
    parts = method.train()(PartialBatch(torch.arange(4), when, views, draws=("test",)))
    parts["loss"].backward()
    return method.eval(), tuning, images[0]


@pytest.mark.parametrize("name", ["records", "htc"])
@pytest.mark.parametrize(
    ("tuners", "head"),
    [((), "cosine"), (("lora",), "linear"), (("vpt_deep", "bias"), "layernorm"), (("adaptformer",), "linear")],
)
def test_an_export_of_what_a_method_judges_by(tmp_path, name, tuners, head):
    method, tuning, images = stepped(name, tuners, head)
    with torch.no_grad():
        judged = method.judged()
        wanted = judged.logits(images)
        assert (wanted - method.net.logits(images)).abs().max() > 1e-3 or name == "htc"
        torch.testing.assert_close(judged(images)[0], wanted)
        (again,), _ = written(tmp_path / "export", judged, tuning, images)
        torch.testing.assert_close(again(images), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["able", "idgp", "solar", "records", "htc"])
def test_methods_train_what_is_tuned_and_nothing_frozen(name):
    method, _, images = stepped(name, ("adaptformer", "lora"), "cosine")
    for place, weight in method.trained().named_parameters():
        if "projector" not in place:
            assert (weight.grad is not None) == weight.requires_grad, place
    if name == "idgp":
        # the second network has tuners of its own on the same frozen weights
        own = {id(weight) for weight in method.net.parameters()}
        shared = [weight for weight in method.generator.parameters() if id(weight) in own]
        assert shared and not any(weight.requires_grad for weight in shared)
        with torch.no_grad():
            before = method.net.logits(images)
            for weight in method.generator.parameters():
                if weight.requires_grad:
                    weight.add_(1.0)
            torch.testing.assert_close(method.net.logits(images), before, rtol=0, atol=0)
            assert (method.generator.logits(images) - before).abs().max() > 1e-3
