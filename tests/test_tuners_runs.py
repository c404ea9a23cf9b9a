"""Tuned networks in the scripts: stopped and resumed, on two processes, and exported."""

import copy
import json

import pytest
import torch
from conftest import SMALL_JOB
from runs import final_state, on_two_processes, script, signalled_after, with_method
from timm.models.vision_transformer import VisionTransformer

import train_coreg
from coreg.errors import UserError
from coreg.export.folder import load_export
from coreg.nets.model import Model, create_backbone
from coreg.nets.tuners.audit import audit
from coreg.nets.tuning import Tuning
from coreg.run.watch import EXIT_INTERRUPTED

TINY = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
TUNED = [
    "--backbone",
    "vit_tiny_patch16_224",
    "--backbone_args",
    json.dumps(TINY),
    "--tuner",
    "adaptformer",
    "lora",
    "--bottleneck",
    "2",
]
SMALL = [
    "--recipe", "digits", "--refine", "none", "--dtype", "float64", "--channels", "3", "--image_size", "12", *TUNED,
    "--epochs", "2", "--batch_size", "13", "--workers", "0", "--report_to", "none",
]  # fmt: skip
OWN = {"queue_size": 50, "projection_dim": 8, "correction_margin": 0}
pll = script("pll")


def pll_words(method, *more):
    return [*SMALL, *with_method(method, **OWN), *more]


COREG = [*SMALL_JOB, "--epochs", "2", *TUNED]
OTHERS = ["--blocks", "last:1", "--head", "cosine", "--head_init", "class_mean"]
SCRIPTS = {
    "pico": (pll.main, pll_words("pico")),
    "coreg": (train_coreg.main, [*COREG, *OTHERS]),
    "dividemix": (script("dividemix").main, [*SMALL, "--warmup_epochs", "1", *OTHERS]),
    "distill": (script("distill").main, [*SMALL, *OTHERS]),
}


def run(main, words, store, output):
    main(["--annotations", str(store), "--output_dir", str(output), *words])


def assert_same(ours, theirs):
    for one, other in zip(ours["learners"], theirs["learners"], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one)
    assert ours["curves"] == theirs["curves"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_and_resumed_bit_for_bit(small_annotated, tmp_path, monkeypatch, script):
    main, words = SCRIPTS[script]
    run(main, words, small_annotated, tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped, signalled_after(monkeypatch, 5):
        run(main, words, small_annotated, tmp_path / "run")
    assert stopped.value.code == EXIT_INTERRUPTED
    run(main, words, small_annotated, tmp_path / "run")
    whole = final_state(tmp_path / "whole")
    assert_same(whole, final_state(tmp_path / "run"))
    # no frozen weight is in a checkpoint: of network and momentum encoder, what was inserted, head and projector
    for learner in whole["learners"]:
        parts = {tuple(name.split(".")[1:3]) for name in learner if name.startswith(("net.", "key_net."))}
        assert {part for part in parts if part[0] != "projector"} == {
            ("tuners", "adaptformer"), ("tuners", "lora"), ("backbone", "head"),
        }  # fmt: skip
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    blocks, classifier = (2, 3 * 16 + 3) if script == "pico" else (1, 3 * 16)
    # of a block: a normalisation, two linear layers and a factor; two matrices each for queries and values
    assert report["trainable_parameters"] == blocks * (32 + (32 + 2) + (32 + 16) + 1 + 2 * 2 * 32) + classifier
    named = "linear head" if script == "pico" else "cosine head, from mean features of the classes"
    assert report["tuning"].startswith("adaptformer and lora") and report["tuning"].endswith(named)
    assert report["tuning"] in (tmp_path / "whole" / "report.html").read_text()


@pytest.mark.parametrize(
    "more",
    [("cr_dpll", "--tuner", "vpt_deep", "mask", "--blocks", "last:1"), ("htc", "--tuner", "lora", "ssf_ln", "bias")],
    ids=lambda more: more[0],
)
def test_what_was_trained_is_exported(small_store, tmp_path, more):
    run(pll.main, pll_words(*more), small_store, tmp_path / "run")
    nets, settings = load_export(tmp_path / "run" / "export")
    assert nets[0](torch.zeros(1, 3, 12, 12)).shape == (1, 3)
    assert settings["agreement"]["timm"]["largest_difference"] < 1e-4  # with the network that was trained
    state = final_state(tmp_path / "run")["learners"][0]
    inserted = [value for name, value in state.items() if name.startswith("net.tuners.")]
    assert inserted and all(value.any() for value in inserted)


@pytest.mark.parametrize("method", ["proden", "pico_plus"])
def test_a_classifier_on_plain_views_reads_features_that_were_made_once(small_store, tmp_path, monkeypatch, method):
    """Nothing else is computed than with images; a method that mixes pixels gets them."""
    words = pll_words(method, "--tuner", "linear", "--weak_view", "plain")
    passes = []
    whole = VisionTransformer.forward_features

    def counted(net, x, **named):
        passes.append(len(x))
        return whole(net, x, **named)

    with monkeypatch.context() as patched:
        patched.setattr(VisionTransformer, "forward_features", counted)
        run(pll.main, words, small_store, tmp_path / "features")
        made = sum(passes)
        passes.clear()
        patched.setattr(Model, "features_are_fixed", False)
        run(pll.main, words, small_store, tmp_path / "images")
    assert sum(passes) - made >= 2 * 97 if method == "proden" else sum(passes) > made
    for ours, theirs in zip(*(final_state(tmp_path / name)["learners"] for name in ("features", "images"))):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-10, equal_nan=True)


def tuned_model(tuners):
    backbone = create_backbone("vit_tiny_patch16_224", 3, 3, TINY, pretrained=False)
    return Model(backbone, 4, Tuning(tuners, bottleneck=2).apply(backbone, 3))


def test_the_audit_passes_and_leaves_the_network_as_it_was():
    net = tuned_model(("vpt_deep", "adaptformer", "lora", "ssf_mlp", "bias", "mask")).train()
    before = {name: value.clone() for name, value in net.trained().items()}
    audit(net, torch.zeros(2, 3, 12, 12))
    assert all(module.training for module in net.modules())
    assert all(weight.grad is None for weight in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.trained().items())


def test_the_audit_names_what_would_not_train():
    """A module that nothing reads; and a weight that trains and would be in no checkpoint."""
    net = tuned_model(("lora",))
    net.tuners["idle"] = torch.nn.Linear(2, 2)
    with pytest.raises(
        UserError, match=r"^2 weights, such as tuners\.idle\.bias, would get no gradient and never be trained; "
    ):
        audit(net, torch.zeros(2, 3, 12, 12))
    net = tuned_model(("lora",))
    net.backbone.blocks[1].norm1.weight.requires_grad_(True)
    with pytest.raises(
        UserError, match=r"^1 weights, such as backbone\.blocks\.1\.norm1\.weight, would be trained and should stay"
    ):
        audit(net, torch.zeros(2, 3, 12, 12))
    net = tuned_model(("lora",))
    net.tuners["lora"]["0"]["qkv"].q.lora_A.requires_grad_(False)
    with pytest.raises(UserError, match=r"such as tuners\.lora\.0\.qkv\.q\.lora_A, would get no gradient"):
        audit(net, torch.zeros(2, 3, 12, 12))


def test_halved_networks_pass_by_themselves_as_under_autocast():
    net = tuned_model(("adaptformer", "bias"))
    half, copied = copy.deepcopy(net), copy.deepcopy(net).requires_grad_(False)
    half.halve(copied)
    images = torch.randn(3, 3, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = [*net(images), net.logits(images), net.pooled(images)]
    for model in (half, copied):
        assert all(map(torch.equal, [*model(images), model.logits(images), model.pooled(images)], wanted))
        kept = {name for name, weight in model.named_parameters() if weight.dtype == torch.bfloat16}
        assert kept == {
            name
            for name, _ in net.named_parameters()
            if name.startswith("backbone.") and name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))
        } | {"backbone.patch_embed.proj.bias"}


@pytest.mark.multiprocess
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_train_like_one(small_annotated, tmp_path, script):
    main, words = SCRIPTS[script]
    run(main, words, small_annotated, tmp_path / "one")
    on_two_processes(main, "--annotations", small_annotated, *words, "--output_dir", tmp_path / "two")
    for ours, theirs in zip(*(final_state(tmp_path / name)["learners"] for name in ("one", "two")), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-10, equal_nan=True)
