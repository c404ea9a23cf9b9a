"""What frozen weights save: no graph before the first trained block, shared copies, half the memory; and torch's tools."""

import copy

import pytest
import timm
import torch

from coreg.nets.tuners.apply import apply_tuners, merge
from coreg.nets.tuners.frozen import halve_frozen, moving_weights, sharing_copy
from coreg.nets.tuners.tower import TunerOptions

OPTIONS = TunerOptions(n_classes=4, bottleneck=4, prompt_tokens=3, mask_ratio=0.004)
EVERYTHING = ["bias", "mask", "vpt_deep", "ssf_attn", "lora", "lora_mlp", "adapter", "adaptformer"]


def tuned(names, blocks="all", depth=4):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 16, "depth": depth, "num_heads": 2, "num_classes": 4}
    net = timm.create_model("vit_tiny_patch16_224", **sizes)
    inserted = apply_tuners(net, names, blocks, OPTIONS)
    net.tuners = inserted  # one module, as in training
    return net


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def saved_bytes(net, images):
    """What a forward pass keeps for the backward one, the weights themselves left out; each tensor once."""
    weights, kept = {w.untyped_storage().data_ptr() for w in [*net.parameters(), *net.buffers()]}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(images).sum()
    total = sum(kept.values())
    loss.backward()
    return total


@pytest.mark.parametrize("tuner", ["full", "bias", "lora", "adaptformer", "vpt_deep", "mask"])
def test_blocks_before_the_first_trained_one_keep_nothing(images, tuner):
    """With as many trained blocks, a deeper network keeps as much; with more of them, more."""
    shallow, deep = tuned([tuner], "last:2", depth=4), tuned([tuner], "last:2", depth=8)
    assert saved_bytes(shallow, images) == saved_bytes(deep, images) < saved_bytes(tuned([tuner], "last:3", 8), images)
    inputs = []
    for block in deep.blocks:
        block.register_forward_hook(lambda block, inputs_, output: inputs.append(inputs_[0].requires_grad) and None)
    deep(images)
    assert inputs[:6] == [False] * 6 and inputs[7]


def test_linear_keeps_the_last_tokens_alone(images):
    """Of 5 images, 5 tokens of 16 float32; the features are a view of them."""
    assert saved_bytes(tuned(["linear"]), images) == 5 * 5 * 16 * 4


def test_copies_share_what_is_frozen(images):
    net = tuned(EVERYTHING)
    copied = sharing_copy(net)
    assert not any(weight.requires_grad for weight in copied.parameters())
    for name, weight in net.named_parameters():
        assert (copied.get_parameter(name) is weight) != weight.requires_grad, name
    own, followed = moving_weights(copied, net)
    assert [id(w) for w in followed] == [id(w) for w in net.parameters() if w.requires_grad]
    before = copied(images)
    with torch.no_grad():
        for weight in followed:
            weight += 0.1
    assert torch.equal(copied(images), before)
    with torch.no_grad():
        for weight, source in zip(own, followed):
            weight.copy_(source)
    assert torch.equal(copied(images), net(images))


def test_an_untuned_network_shares_nothing():
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2)
    copied = sharing_copy(net)
    own, followed = moving_weights(copied, net)
    assert [id(w) for w in own] == [id(w) for w in copied.parameters()]
    assert [id(w) for w in followed] == [id(w) for w in net.parameters()]
    assert not {id(w) for w in own} & {id(w) for w in followed}


def test_half_the_memory_computes_the_same_under_autocast(images):
    net = tuned(EVERYTHING)
    half, copied = copy.deepcopy(net), copy.deepcopy(net)
    halve_frozen(half, copied)
    gradients = []
    for model in (net, half, copied):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).float().square().sum()
        loss.backward()
        gradients.append([loss] + [w.grad for w in model.parameters() if w.requires_grad])
    for ours in gradients[1:]:
        assert len(ours) == len(gradients[0]) and all(torch.equal(a, b) for a, b in zip(ours, gradients[0]))
    kept = {weight.dtype for weight in half.parameters() if weight.requires_grad}
    assert kept == {torch.float32}
    matrices = [w for name, w in half.named_parameters() if ".blocks." in f".{name}" and "original" in name]
    assert matrices and all(
        w.dtype == torch.bfloat16 for name, w in half.named_parameters() if name.endswith("weight.original")
    )


def test_merging_gives_float32_back(images):
    net = tuned(["lora", "mask"])
    halve_frozen(net)
    plain = merge(net, net.tuners)
    assert {weight.dtype for weight in plain.parameters()} == {torch.float32}


def test_compiled(images):
    """One graph, and its gradients."""
    net = tuned(EVERYTHING, depth=2)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    outputs = [model(images) for model in (compiled, net)]
    torch.testing.assert_close(*outputs)
    for one, other in zip(*(torch.autograd.grad(output.square().sum(), weights) for output in outputs)):
        torch.testing.assert_close(one, other)


def test_with_gradient_checkpointing(images):
    net = tuned(EVERYTHING)
    gradients = []
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)
        net.zero_grad()
        net(images).square().sum().backward()
        gradients.append([weight.grad for weight in net.parameters() if weight.requires_grad])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)
