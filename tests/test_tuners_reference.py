"""Tuners against the numbers that public code gives on the same weights and images (`tests/reference/`)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from coreg.nets.tuners.apply import apply_tuners
from coreg.nets.tuners.inserts import default_bottleneck
from coreg.nets.tuners.own import default_mask_ratio
from coreg.nets.tuners.tower import TunerOptions

FOLDER = Path(__file__).parent / "reference"
# layers by their names in the reference
LAYERS = {"attn_in": "qkv", "attn_out": "proj", "mlp_in": "fc1", "mlp_out": "fc2", "ln_1": "norm1", "ln_2": "norm2"}
MASKED = {"attn_in": "attn_qkv", "attn_out": "attn_proj", "mlp_in": "mlp_fc1", "mlp_out": "mlp_fc2"}


@pytest.fixture(scope="module")
def base():
    return np.load(FOLDER / "vit_base.npz")


def network(base):
    """The reference's network, its images, and the list to which each pass adds the last block's tokens."""
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 0}
    net, tokens = VisionTransformer(**size).double(), []
    weights = {name.removeprefix("base."): base[name] for name in base.files if name.startswith("base.")}
    net.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    # before there are any tuners, so that it comes first
    net.blocks[-1].register_forward_hook(lambda block, inputs, output: tokens.append(output) and None)
    return net, torch.from_numpy(base["image"]), tokens


def our_name(tuner, name):
    """Of `adapter_list.0.ln.weight`: `0.ln.weight`."""
    number, *rest = name.split(".")[1:]
    middle = ["qkv", *rest] if tuner == "lora" else [LAYERS.get(word, word) for word in rest]
    return ".".join([number, *middle])


def weights_and_gradients(tuner, numbers):
    """By our names."""
    if tuner == "mask":
        for name in numbers.files:
            if name.endswith("_values") and len(numbers[name]):
                number, layer, values = name.split(".")
                gradient = numbers[name.replace("_values", "_grad")]
                yield f"{number}.{MASKED[layer]}.{values}", numbers[name], gradient
    for name in numbers.files:
        if name.startswith("param."):
            key = name.removeprefix("param.")
            yield our_name(tuner, key), numbers[name], numbers[f"grad.{key}"]


TUNED = ["adapter", "adaptformer", "lora", "mask", "ssf_attn", "ssf_ln", "ssf_mlp", "vpt_deep", "vpt_shallow"]


@pytest.mark.parametrize("tuner", TUNED)
def test_outputs_and_gradients_are_those_of_public_code(tuner, base):
    numbers = np.load(FOLDER / f"peft_{tuner}.npz")
    net, images, tokens = network(base)
    options = TunerOptions(n_classes=7, bottleneck=4, prompt_tokens=3, mask_ratio=0.05)
    inserted = apply_tuners(net, [tuner], "all", options)[tuner].double()
    expected = {name: (weight, gradient) for name, weight, gradient in weights_and_gradients(tuner, numbers)}
    weights = dict(inserted.named_parameters())
    assert set(weights) == set(expected)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(torch.from_numpy(expected[name][0]))

    feature = net(images)

    np.testing.assert_allclose(tokens[-1].detach(), numbers["tokens_out"], atol=1e-12)
    np.testing.assert_allclose(feature.detach(), numbers["feature"], atol=1e-12)
    gradients = torch.autograd.grad((tokens[-1] * torch.from_numpy(numbers["probe"])).sum(), list(weights.values()))
    for name, gradient in zip(weights, gradients):
        np.testing.assert_allclose(gradient, expected[name][1], atol=1e-12, err_msg=name)


def test_masks_are_those_of_public_code(base):
    numbers = np.load(FOLDER / "peft_mask.npz")
    net, *_ = network(base)
    inserted = apply_tuners(net, ["mask"], "all", TunerOptions(n_classes=7, mask_ratio=0.05))["mask"]
    buffers = dict(inserted.named_buffers())
    for number in (0, 1):
        for theirs, ours in MASKED.items():
            for tensor in ("weight", "bias"):
                mask = numbers[f"{number}.{theirs}.mask_{tensor}"]
                got = buffers.get(f"{number}.{ours}.{tensor}_mask", torch.zeros(mask.shape, dtype=torch.bool))
                np.testing.assert_array_equal(got, mask)


def test_default_sizes_are_those_of_the_specification():
    """Rows (layers, classes, bottleneck) as public code gives them."""
    for depth, n_classes, expected in [(12, 2, 1), (12, 10, 1), (12, 100, 4), (12, 196, 8), (12, 365, 8), (12, 1000, 32)]:
        assert default_bottleneck(n_classes, depth) == expected
    for depth, n_classes, expected in [(24, 20, 1), (24, 100, 2), (24, 365, 4), (24, 1000, 16)]:
        assert default_bottleneck(n_classes, depth) == expected
    assert default_mask_ratio(10, 12, 768) == 0.001
    assert default_mask_ratio(1000, 12, 768) == pytest.approx(0.009)  # 1000 / 110592 = 0.00904
