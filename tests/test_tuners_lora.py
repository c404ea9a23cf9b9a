"""Adapters on real towers: they change nothing at first, are all that is trained, survive a file; dead ones are named."""

import json

import open_clip
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from test_annotate_annotators import save_tiny_clip
from test_annotate_chat import save_tiny_llava
from test_annotate_transformers import save_tiny

from coreg.annotate.annotators import open_clip_towers, transformers_towers
from coreg.annotate.chat import load_chat
from coreg.annotate.models import resolve
from coreg.errors import UserError
from coreg.nets.tuners.lora import (
    attach,
    attention_targets,
    dead_parameters,
    decoder_targets,
    refuse_dead,
    save_adapter,
)

CPU, TEXTS = torch.device("cpu"), ["a cat", "the dog", "my blue whale"]
TIMM = {"image_size": 160, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "token"}


def load(folder, family):
    if family in ("clip", "siglip"):
        made = transformers_towers(resolve(f"transformers:{folder}"), CPU, "fp32")
    else:
        made = open_clip_towers(resolve(f"local-dir:{folder}"), CPU, "fp32")
    made.network.double()
    return made


def save(folder, family):
    if family in ("clip", "siglip"):
        return save_tiny(folder, family)
    return save_tiny_clip(folder, custom_text=family == "timm", **({"vision_cfg": TIMM} if family == "timm" else {}))


@pytest.fixture(scope="module", params=["open_clip", "timm", "clip", "siglip"])
def model(request, tmp_path_factory):
    return request.param, save(tmp_path_factory.mktemp("models") / request.param, request.param)


def pixels(towers):
    size = towers.preprocess(Image.new("RGB", (40, 40))).shape[-1]
    return torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def outputs(towers):
    return torch.cat([towers.image(pixels(towers)).flatten(), towers.text(towers.tokenize(TEXTS)).flatten()])


def targets_of(towers):
    image = attention_targets(towers.network, lambda: towers.image(pixels(towers)))
    text = attention_targets(towers.network, lambda: towers.text(towers.tokenize(TEXTS)))
    return image, text


def adapted(towers, rank=2, dropout=0.0):
    image, text = targets_of(towers)
    torch.manual_seed(1)
    return attach(towers.network, image[0] + text[0], image[1] + text[1], rank, 1.0, dropout, True, "some/base")


def trained_weights(network):
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def test_adapters_go_on_queries_keys_and_values_of_every_layer_that_works(model):
    family, folder = model
    (image_layers, image_weights), (text_layers, text_weights) = targets_of(load(folder, family))
    if family == "open_clip":
        assert image_weights == ["visual.transformer.resblocks.0.attn.in_proj_weight"]
        assert text_weights == ["transformer.resblocks.0.attn.in_proj_weight"] and not image_layers + text_layers
    elif family == "timm":
        assert image_layers == [f"visual.trunk.blocks.{number}.attn.qkv" for number in range(6)] and not image_weights
        assert text_weights == ["text.transformer.resblocks.0.attn.in_proj_weight"] and not text_layers
    else:
        for tower, layers in (("vision_model", image_layers), ("text_model", text_layers)):
            wanted = {f"{tower}.encoder.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkv"}
            assert set(layers) == wanted
        head = ["vision_model.head.attention.in_proj_weight"]  # SigLIP's pooling
        assert image_weights == (head if family == "siglip" else []) and not text_weights


def test_they_change_nothing_at_first_and_are_all_that_is_trained(model):
    family, folder = model
    towers = load(folder, family)
    before, frozen = outputs(towers), {name: value.clone() for name, value in towers.network.state_dict().items()}
    network = adapted(towers)
    torch.testing.assert_close(outputs(towers), before, rtol=0, atol=1e-12)
    weights = trained_weights(network)
    assert weights and all("lora_" in name for name in weights)
    assert not dead_parameters(weights, lambda: outputs(towers))
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        outputs(towers).square().sum().backward()
        optimizer.step()
    assert (outputs(towers) - before).abs().max() > 1e-3
    own = {name.replace(".base_layer", ""): value for name, value in towers.network.state_dict().items()}
    assert all(torch.equal(own[name], value) for name, value in frozen.items())  # bit for bit, in spite of 12 passes


def test_a_tower_whose_names_end_like_the_others_is_adapted_alone(tmp_path):
    """The text side's `transformer.resblocks` is the end of `visual.transformer.resblocks`, which PEFT takes for it too."""
    towers = load(save(tmp_path / "tiny", "open_clip"), "open_clip")
    before = towers.image(pixels(towers))
    _, (layers, weights) = targets_of(towers)
    network = attach(towers.network, layers, weights, 2, 1.0, 0.0, True, "some/base")
    trained = trained_weights(network)
    assert len(trained) == 2 and not any("visual" in name for name in trained)
    assert not dead_parameters(trained, lambda: outputs(towers))
    with torch.no_grad():
        for weight in trained.values():
            weight.normal_(0, 0.1)
    torch.testing.assert_close(towers.image(pixels(towers)), before, rtol=0, atol=1e-12)
    save_adapter(network, tmp_path / "adapter")
    anew = load(tmp_path / "tiny", "open_clip")
    PeftModel.from_pretrained(anew.network, str(tmp_path / "adapter"))
    torch.testing.assert_close(outputs(anew), outputs(towers), rtol=0, atol=1e-7)


def test_an_adapter_survives_a_file(model, tmp_path):
    family, folder = model
    towers = load(folder, family)
    network = adapted(towers)
    with torch.no_grad():
        for weight in trained_weights(network).values():
            weight.normal_(0, 0.1)
    save_adapter(network, tmp_path / "adapter")
    plain = tmp_path / "plain"
    plain.touch()  # another user can read it where the umask lets them, whatever the library that wrote it prefers
    assert {file.stat().st_mode for file in (tmp_path / "adapter").iterdir()} == {plain.stat().st_mode}
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 2, "some/base")
    anew = load(folder, family)
    plain = outputs(anew)
    PeftModel.from_pretrained(anew.network, str(tmp_path / "adapter"))
    assert (plain - outputs(towers)).abs().max() > 1e-3
    torch.testing.assert_close(outputs(anew), outputs(towers), rtol=0, atol=1e-7)  # the file holds float32
    merged = load(folder, family)
    merged.network = PeftModel.from_pretrained(merged.network, str(tmp_path / "adapter")).merge_and_unload()
    torch.testing.assert_close(outputs(merged), outputs(towers), rtol=0, atol=1e-6)


def test_a_packed_projection_is_adapted_by_the_product_of_both_matrices(tmp_path):
    towers = load(save(tmp_path / "tiny", "open_clip"), "open_clip")
    attention = towers.network.transformer.resblocks[0].attn
    packed = attention.in_proj_weight.detach().clone()
    network = adapted(towers, rank=4)
    with torch.no_grad():
        for weight in trained_weights(network).values():
            weight.normal_(0, 0.1)
    text = towers.text(towers.tokenize(TEXTS))
    a, b = (
        trained_weights(network)[f"base_model.model.transformer.resblocks.0.attn.lora_{m}.default.weight"] for m in "AB"
    )
    plain = load(tmp_path / "tiny", "open_clip")
    with torch.no_grad():
        plain.network.transformer.resblocks[0].attn.in_proj_weight.copy_(packed + (b @ a) * 1.0 / 4**0.5)
    torch.testing.assert_close(text, plain.text(plain.tokenize(TEXTS)), rtol=0, atol=1e-12)


# ---- adapters that never act ----------------------------------------------------------------------------------------


def test_dead_adapters_are_found_and_the_others_are_not(tmp_path):
    """`out_proj` of MultiheadAttention is read as a weight, its forward is never called."""
    towers = load(save(tmp_path / "tiny", "open_clip"), "open_clip")
    config = LoraConfig(r=2, target_modules=["out_proj", "c_fc"])
    network = get_peft_model(towers.network, config)
    weights = trained_weights(network)
    assert len(weights) == 8
    values, generator = {name: weight.detach().clone() for name, weight in weights.items()}, torch.get_rng_state()
    dead = dead_parameters(weights, lambda: outputs(towers))
    assert sorted(dead) == sorted(name for name in weights if "out_proj" in name)
    assert all(torch.equal(weights[name], value) and weights[name].grad is None for name, value in values.items())
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(UserError, match=r"4 of 8 adapter weights change nothing .*out_proj"):
        refuse_dead(weights, lambda: outputs(towers))
    towers = load(tmp_path / "tiny", "open_clip")
    weights = trained_weights(get_peft_model(towers.network, LoraConfig(r=2, target_modules=["out_proj"])))
    assert len(dead_parameters(weights, lambda: outputs(towers))) == len(weights) == 4


def test_adapters_of_a_tower_that_is_not_asked_are_dead(model):
    family, folder = model
    towers = load(folder, family)
    weights = trained_weights(adapted(towers))
    dead = dead_parameters(weights, lambda: towers.image(pixels(towers)))
    text = [name for name in weights if ".visual." not in name and ".vision_model." not in name]
    assert dead == text and 0 < len(dead) < len(weights)


def test_a_tower_of_convolutions_has_nothing_to_adapt():
    """The pooling of CLIP's ResNets reads its projections as weights, so they are not seen working."""
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    network = open_clip.CLIP(8, vision, text).eval()
    assert attention_targets(network, lambda: network.encode_image(torch.randn(1, 3, 32, 32))) == ([], [])


def test_the_decoder_that_writes_captions_is_left_alone():
    """CoCa has one between its towers, which features do not pass through."""
    shape = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16, "attentional_pool": True,
              "attn_pooler_heads": 2, "output_tokens": True}  # fmt: skip
    network = open_clip.CoCa(
        8, shape | {"attn_pooler_heads": 2}, shape | {"embed_cls": True, "output_tokens": True}, vision
    )
    ids = open_clip.tokenize(["a cat", "a dog"], 16)
    _, weights = attention_targets(network.eval(), lambda: network.encode_text(ids))
    assert weights == ["text.transformer.resblocks.0.attn.in_proj_weight"]


def test_dropout_is_refused_where_it_could_not_act(tmp_path):
    towers = load(save(tmp_path / "tiny", "open_clip"), "open_clip")
    with pytest.raises(UserError, match=r"--dropout is 0\.25, and .*in_proj_weight"):
        adapted(towers, dropout=0.25)


def test_chat_models_are_adapted_in_their_language_model(tmp_path):
    folder = save_tiny_llava(tmp_path / "llava")
    _, network = load_chat(resolve(f"chat:{folder}"), torch.float32)
    targets = decoder_targets(network)
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert sorted(targets) == sorted(f"model.language_model.layers.{n}.{part}" for n in (0, 1) for part in parts)
