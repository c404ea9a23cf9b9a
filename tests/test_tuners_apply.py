"""Tuners on every family of vision towers: what trains, what stays, that they begin where the network was, and merging."""

import copy

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import nn

from coreg.errors import UserError
from coreg.nets.tuners.apply import TUNERS, apply_tuners, check_tuners, merge
from coreg.nets.tuners.own import MaskedEntries
from coreg.nets.tuners.tower import TunerOptions, parse_blocks

OPTIONS = TunerOptions(n_classes=4, bottleneck=8, prompt_tokens=3, mask_ratio=0.05)
VITS = {
    "clip": "vit_base_patch16_clip_quickgelu_224",
    "siglip": "vit_base_patch16_siglip_224",  # attention pooling over all tokens, no class token
    "augreg": "vit_tiny_patch16_224",
    "dinov2": "vit_small_patch14_reg4_dinov2",  # layer scales, register tokens
    "dinov3": "vit_small_patch16_dinov3_qkvb",  # rotary positions, a bias that is added apart
    "eva02": "eva02_base_patch16_clip_224",  # rotary positions, q, k and v apart, three layers in the MLP
    "rope_mixed": "vit_base_patch16_rope_mixed_224",  # rotary positions of each block's own
}
FOR_VITS = [name for name in TUNERS if name != "bn"]
FOR_RESNETS = ["full", "linear", "bias", "bn", "ssf_attn"]
BEGINS_ELSEWHERE = {"vpt_shallow", "vpt_deep", "ssf_attn", "ssf_mlp", "ssf_ln"}
MERGED = ["full", "linear", "bias", "ln", "mask", "lora", "lora_mlp", "ssf_attn", "ssf_mlp", "ssf_ln"]
SIDE = 28


def clip_resnet():
    layers = ByoModelCfg(
        blocks=(ByoBlockCfg(type="bottle", d=1, c=16, s=1, br=0.25), ByoBlockCfg(type="bottle", d=1, c=64, s=2, br=0.25)),
        stem_chs=(8, 8, 16),
        stem_type="",
        stem_pool="avg2",
        downsample="avg",
        aa_layer="avg",
        head_type="attn_abs",
    )
    return ByobNet(layers, num_classes=4, img_size=32)


@pytest.fixture(scope="module")
def families():
    """An untouched network of each."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 4}
    nets = {
        family: timm.create_model(name, img_size=SIDE if "14" in name else 32, **sizes) for family, name in VITS.items()
    }
    nets["resnet"] = clip_resnet()
    for net in nets.values():
        # a fresh network's zeros (biases, position embeddings) would hide mistakes
        for weight in net.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
        net.eval()
    return nets


def images(net, count=3):
    side = SIDE if getattr(net, "patch_embed", None) and net.patch_embed.patch_size[0] == 14 else 32
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def tuned(families, family, names, blocks="all"):
    torch.manual_seed(2)
    net = copy.deepcopy(families[family])
    return net, apply_tuners(net, names, blocks, OPTIONS)


def shake(modules):
    """Move what was inserted away from where it began."""
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in modules.parameters():
            weight += 0.1 * torch.randn_like(weight)


def training(module):
    return {name for name, weight in module.named_parameters() if weight.requires_grad}


TOGETHER = [name for name in FOR_VITS if name not in ("full", "vpt_shallow")]
GENTLE = [name for name in TOGETHER if name not in BEGINS_ELSEWHERE]


@pytest.mark.parametrize(
    ("family", "tuners"),
    [("clip", [tuner]) for tuner in FOR_VITS]
    + [(family, tuners) for family in VITS for tuners in (GENTLE, TOGETHER)]
    + [("resnet", [tuner]) for tuner in FOR_RESNETS],
)
def test_starts_as_the_network_was_and_trains_what_it_should(families, family, tuners):
    before = families[family]
    net, inserted = tuned(families, family, tuners, "all" if family == "resnet" else "1-2")
    x = images(net)
    if not BEGINS_ELSEWHERE & set(tuners):
        torch.testing.assert_close(net(x), before(x), atol=1e-6, rtol=0)

    shake(inserted)
    net(x).square().sum().backward()

    for name, weight in [*net.named_parameters(), *inserted.named_parameters()]:
        assert (weight.grad is not None) == weight.requires_grad, name
    assert [n for n, weight in inserted.named_parameters() if not weight.grad.any()] == []
    classifier = "head.proj." if family == "resnet" else "head."
    own = {name.replace("parametrizations.", "").replace(".original", "") for name in training(net)}
    head = {name for name in training(before) if name.startswith(classifier)}
    assert own == head.union(*(expected(before, family, tuner) for tuner in tuners))
    assert set(inserted) == set(tuners) - {"full", "linear", "bias", "ln", "bn"}


def expected(net, family, tuner):
    """Names of the network's own weights that a tuner trains, of a vit in its last two blocks."""
    kinds = {"ln": nn.LayerNorm, "bn": nn.BatchNorm2d}
    names = {name for name, _ in net.named_parameters()}
    chosen = {name for name in names if family == "resnet" or name.startswith(("blocks.1.", "blocks.2."))}
    if tuner == "full":
        return chosen
    if tuner == "bias":
        return {name for name in chosen if name.endswith("bias")}
    if tuner in kinds:
        return {name for name in chosen if isinstance(net.get_submodule(name.rpartition(".")[0]), kinds[tuner])}
    return set()


def test_full_with_all_blocks_is_the_whole_network(families):
    net, _ = tuned(families, "siglip", ["full"])
    assert training(net) == {name for name, _ in families["siglip"].named_parameters()}


@pytest.mark.parametrize("family", ["clip", "eva02"])
def test_copies_are_independent(families, family):
    """As the momentum encoder and the peer are made: after a pass, with everything on at once."""
    net, inserted = tuned(families, family, TOGETHER)
    x = images(net)
    given = net(x)
    other_net, other_inserted = copy.deepcopy(nn.ModuleList([net, inserted]))
    assert torch.equal(other_net(x), given)
    shake(other_inserted)
    assert torch.equal(net(x), given)
    assert not torch.allclose(other_net(x), given, atol=1e-3)
    other_net(x).sum().backward()
    assert all(weight.grad is not None for weight in other_inserted.parameters())
    assert all(weight.grad is None for weight in inserted.parameters())


@pytest.mark.parametrize(
    ("family", "tuners"),
    [("clip", [tuner]) for tuner in MERGED] + [(family, MERGED) for family in VITS] + [("resnet", ["ssf_attn"])],
)
def test_merged_networks_give_what_tuned_ones_do(families, family, tuners):
    if family in ("dinov3", "eva02"):  # their keys have no bias
        with pytest.raises(UserError, match="without a bias"):
            merge(*tuned(families, family, ["ssf_attn"]))
        tuners = [tuner for tuner in tuners if tuner != "ssf_attn"]
    net, inserted = tuned(families, family, tuners)
    shake(inserted)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.01 * weight.requires_grad
    x, before = images(net), copy.deepcopy(net.state_dict())
    plain = merge(net, inserted)
    torch.testing.assert_close(plain(x), net(x), atol=1e-5, rtol=1e-5)
    fresh = copy.deepcopy(families[family])
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fresh(x), net(x), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("tuner", ["vpt_shallow", "vpt_deep", "adapter", "adaptformer"])
def test_what_is_no_change_of_weights_is_not_merged(families, tuner):
    with pytest.raises(UserError, match=f"what {tuner} inserted is no change"):
        merge(*tuned(families, "clip", [tuner]))


@pytest.mark.parametrize("ratio", [0.002, 0.05])
def test_masked_entries_have_the_gradients_that_the_whole_weight_has_there(ratio):
    """However few they are, whether the layer is called or its weight is read, and where a state says that they are."""
    torch.manual_seed(0)
    plain, x = nn.Linear(64, 48).double(), torch.randn(5, 7, 64, dtype=torch.float64, requires_grad=True)
    layer = copy.deepcopy(plain).requires_grad_(False)
    entries = MaskedEntries(layer, ratio, torch.Generator().manual_seed(1)).double()
    flipped = {name: value.flip(0) if name.endswith("_mask") else value + 1 for name, value in entries.state_dict().items()}
    entries.load_state_dict(flipped)
    with torch.no_grad():
        for name in ("weight", "bias"):
            if f"{name}_mask" in flipped:
                getattr(plain, name)[flipped[f"{name}_mask"]] = flipped[f"{name}_values"]
    wanted = torch.autograd.grad(plain(x).sin().sum(), [x, plain.weight, plain.bias])
    for run in (lambda: layer(x), lambda: nn.functional.linear(x, layer.weight, layer.bias), lambda: layer(x)):
        torch.testing.assert_close(run(), plain(x))
        got = dict(
            zip(
                ["x", *dict(entries.named_parameters())], torch.autograd.grad(run().sin().sum(), [x, *entries.parameters()])
            )
        )
        torch.testing.assert_close(got.pop("x"), wanted[0])
        assert "weight_values" in got
        for name, gradient in got.items():
            whole = wanted[1 if name == "weight_values" else 2]
            torch.testing.assert_close(gradient, whole[flipped[name.replace("_values", "_mask")]])
    merged = merge(nn.Sequential(layer), nn.ModuleDict({"mask": entries}))[0]
    assert type(merged) is nn.Linear and not merged._forward_hooks and not merged._forward_pre_hooks
    assert torch.equal(merged(x), layer(x))


def test_lora_in_the_mlp_is_pefts(families):
    """With PEFT's matrices, and alpha 1, outputs and gradients are equal."""
    config = LoraConfig(r=8, lora_alpha=1, target_modules=r"blocks\.[0-9]+\.mlp\.fc[12]", init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(families["clip"]), config)
    net, inserted = tuned(families, "clip", ["lora_mlp"])
    own = dict(theirs.named_parameters())

    def pairs():
        for name, weight in inserted["lora_mlp"].named_parameters():
            number, layer, matrix = name.split(".")
            yield weight, own[f"base_model.model.blocks.{number}.mlp.{layer}.{matrix}.default.weight"]

    for weight, other in pairs():
        weight.data.copy_(other.T)
    x = images(net)
    torch.testing.assert_close(net(x), theirs(x))
    for model in (net, theirs):
        model(x).square().sum().backward()
    for weight, other in pairs():
        torch.testing.assert_close(weight.grad.T, other.grad)


def test_prompts_have_no_place_of_their_own(families):
    """Rotary positions turn the network's own tokens alone: in what order the prompts stand makes no difference."""
    for family in ("dinov3", "rope_mixed"):
        net, inserted = tuned(families, family, ["vpt_shallow"])
        x = images(net)
        given = net(x)
        with torch.no_grad():
            inserted["vpt_shallow"]["0"].prompt.copy_(inserted["vpt_shallow"]["0"].prompt.flip(0))
        torch.testing.assert_close(net(x), given)


def test_pooling_reads_the_networks_own_tokens(families):
    """What a prompt has become is not pooled; the features keep their count."""
    net, _ = tuned(families, "siglip", ["vpt_deep"], "last:1")
    assert net.forward_features(images(net)).shape == (3, 4, 16)


# B/16 with 1, 4, 8, 32 for 10, 100, 200, 1000 classes; the classifier is not counted
COUNTS = [
    ("adaptformer", 10, 12 * (2 * 768 + 2 * 768 * 1 + 1 + 768 + 1)),
    ("adaptformer", 100, 12 * (2 * 768 + 2 * 768 * 4 + 4 + 768 + 1)),
    ("adaptformer", 1000, 12 * (2 * 768 + 2 * 768 * 32 + 32 + 768 + 1)),
    ("adapter", 100, 12 * (2 * 768 + 2 * 768 * 4 + 4 + 768)),
    ("lora", 10, 12 * 4 * 768),
    ("lora", 100, 12 * 4 * 768 * 4),
    ("lora", 200, 12 * 4 * 768 * 8),
    ("lora", 1000, 12 * 4 * 768 * 32),
    ("lora_mlp", 100, 12 * 4 * 2 * (768 + 3072)),
    ("vpt_deep", 100, 12 * 10 * 768),
    ("vpt_shallow", 100, 10 * 768),
    ("ssf_attn", 100, 12 * 2 * (3 * 768 + 768)),
    ("ssf_mlp", 100, 12 * 2 * (3072 + 768)),
    ("ssf_ln", 100, 12 * 2 * 2 * 768),
    ("ln", 100, 12 * 2 * 2 * 768),
    ("bias", 100, 12 * (3 * 768 + 768 + 3072 + 768 + 2 * 768)),
    ("full", 100, 12 * (12 * 768 * 768 + 13 * 768)),
]


@pytest.fixture(scope="module")
def base():
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_clip_224", num_classes=0)


@pytest.mark.parametrize(("tuner", "n_classes", "count"), COUNTS)
def test_counts_of_the_specification(base, tuner, n_classes, count):
    net = copy.deepcopy(base)
    with torch.device("meta"):
        inserted = apply_tuners(net, [tuner], "all", TunerOptions(n_classes))
    own = sum(weight.numel() for name, weight in net.named_parameters() if weight.requires_grad and "blocks" in name)
    assert own + sum(weight.numel() for weight in inserted.parameters()) == count


def test_round_numbers_of_the_specification():
    """As they are printed: adaptformer 46k, 101k, 618k; lora 37k, 147k, 295k, 1.18M; vpt_deep 92k."""
    printed = {(tuner, n_classes): count for tuner, n_classes, count in COUNTS}
    assert [round(printed["adaptformer", k] / 1000) for k in (10, 100, 1000)] == [46, 101, 618]
    assert [round(printed["lora", k] / 1000) for k in (10, 100, 200, 1000)] == [37, 147, 295, 1180]
    assert round(printed["vpt_deep", 100] / 1000) == 92


def test_blocks_by_their_numbers():
    assert list(parse_blocks("all", 12)) == list(range(12))
    assert list(parse_blocks("last:4", 12)) == [8, 9, 10, 11]
    assert list(parse_blocks("2-9", 12)) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert list(parse_blocks("0-0", 12)) == [0]
    assert list(parse_blocks("last:12", 12)) == list(range(12))


@pytest.mark.parametrize("text", ["", "last:0", "last:13", "9-2", "3-12", "-1", "1", "last:-1", "2-", "all,1", "٣-4"])
def test_blocks_that_mean_nothing(text):
    with pytest.raises(UserError, match=r"^--blocks .*; this network has blocks 0 to 11; write all, last:N, [^\n]*$"):
        parse_blocks(text, 12)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lorra"], "--tuner lorra is none of full, .*, did you mean lora?"),
        (["vpt_shallow", "lora", "vpt_deep"], "exclude each other"),
    ],
)
def test_wrong_names(names, message):
    with pytest.raises(UserError, match=message):
        check_tuners(names)


def test_what_does_not_fit_is_one_line(families):
    with pytest.raises(UserError, match="--blocks last:1 chooses transformer blocks, and ByobNet has none"):
        tuned(families, "resnet", ["full"], "last:1")
    with pytest.raises(
        UserError, match="--tuner lora goes into pre-norm vision transformers, and the backbone is a ByobNet"
    ):
        tuned(families, "resnet", ["lora"])
    with pytest.raises(UserError, match="--tuner bn finds nothing to train in VisionTransformer"):
        tuned(families, "clip", ["bn"])
    other = timm.create_model("vit_relpos_small_patch16_224", depth=1, embed_dim=32, num_heads=2)
    with pytest.raises(UserError, match="the backbone is a VisionTransformerRelPos of RelPosBlock"):
        apply_tuners(other, ["adapter"], "all", OPTIONS)
