"""Annotators against a softmax written out template by template; models that cannot be had end in one line."""

import json
import math
import pickle
import threading
import time

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from runs import error_of
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from coreg import hub
from coreg.annotate import models, scores
from coreg.annotate.annotators import ClipAnnotator, load_annotator
from coreg.annotate.models import load_open_clip, resolve
from coreg.errors import UserError

NAMES, TEMPLATES = ["cat", "dog", "blue whale"], ["a photo of a {}", "the {}", "{} at night", "my {}"]


def save_tiny_clip(folder, seed=0, custom_text=False, **model_changes):
    """A randomly initialised CLIP as a model folder, with features that differ enough for votes to differ."""
    model_cfg = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        **model_changes,
    }
    torch.manual_seed(seed)
    build = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = build(**model_cfg)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.mul_(4 if "embedding" in name or "conv1" in name else 1.5)
        model.logit_scale.fill_(math.log(30.0))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    config = {
        "model_cfg": model_cfg | ({"custom_text": True} if custom_text else {}),
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("models") / "tiny")


def batch(count=20, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def judged(annotator, images):
    evidence = annotator.annotate(images)
    return evidence["votes"], evidence["probs"], evidence["features"]


def written_out(folder, images, templates, names):
    """Votes and mean probabilities, one template, one image and one class at a time, from open_clip's own calls."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    votes, means = [], []
    with torch.no_grad():
        scale = model.logit_scale.exp().item()
        for image in images:
            seen = model.encode_image(image[None])[0].double()
            seen = seen / seen.norm()
            row, total = [], [0.0] * len(names)
            for template in templates:
                logits = []
                for name in names:
                    text = model.encode_text(tokenizer([template.format(name)]))[0].double()
                    logits.append(scale * float(seen @ text / text.norm()))
                top = max(logits)
                weights = [math.exp(logit - top) for logit in logits]
                row.append(logits.index(top))
                total = [t + w / sum(weights) / len(templates) for t, w in zip(total, weights)]
            votes.append(row)
            means.append(total)
    return torch.tensor(votes), torch.tensor(means, dtype=torch.double)


def test_votes_and_probabilities_are_those_of_a_loop_over_templates(tiny):
    annotator = ClipAnnotator(resolve(f"local-dir:{tiny}"), TEMPLATES, NAMES)
    images = batch()
    votes, probs, features = judged(annotator, images)
    wanted_votes, wanted_probs = written_out(tiny, images, TEMPLATES, NAMES)
    assert (votes.dtype, probs.dtype, features.dtype) == (torch.int16, torch.float16, torch.float16)
    assert votes.shape == (20, 4) and probs.shape == (20, 3) and features.shape == (20, 8) == (20, annotator.features)
    assert torch.equal(votes.long(), wanted_votes)
    assert torch.allclose(probs.double(), wanted_probs, atol=1e-3)
    assert torch.allclose(features.float().norm(dim=1), torch.ones(20), atol=2e-3)
    assert len(votes.unique()) > 1 and (votes != votes[:, :1]).any()  # the case is not trivial


def test_the_result_does_not_depend_on_chunks_or_batches(tiny, monkeypatch):
    annotator = ClipAnnotator(resolve(f"local-dir:{tiny}"), TEMPLATES, NAMES)
    whole = judged(annotator, batch())
    parts = [judged(annotator, part) for part in batch().split([1, 13, 6])]
    monkeypatch.setattr(scores, "SCORES_AT_ONCE", 1)  # one template at a time
    single = judged(annotator, batch())
    for index in range(3):
        joined = torch.cat([part[index] for part in parts])
        assert torch.allclose(whole[index].float(), joined.float(), atol=2e-3)
        assert torch.allclose(whole[index].float(), single[index].float(), atol=2e-3)
    assert torch.equal(whole[0], single[0]) and torch.equal(whole[0], torch.cat([part[0] for part in parts]))


def test_the_text_side_is_encoded_once(tiny, monkeypatch):
    names = [f"thing {i}" for i in range(150)]
    annotator = ClipAnnotator(resolve(f"local-dir:{tiny}"), TEMPLATES, names)
    assert annotator.text.shape == (600, 8)
    model, _, tokenizer = load_open_clip(resolve(f"local-dir:{tiny}"))
    wanted = model.encode_text(tokenizer(["the thing 7"]), normalize=True)
    assert torch.allclose(annotator.text[1 * 150 + 7], wanted[0], atol=1e-5)
    monkeypatch.setattr(annotator.towers, "text", None)
    assert annotator.annotate(batch())["probs"].shape == (20, 150)


def test_models_trained_with_a_sigmoid_are_scored_by_their_sigmoids(tmp_path):
    plain = save_tiny_clip(tmp_path / "plain", custom_text=True)
    biased = save_tiny_clip(tmp_path / "biased", custom_text=True, init_logit_bias=-10.0)
    assert load_open_clip(resolve(f"local-dir:{biased}"))[0].logit_bias.item() == -10
    one, two = (ClipAnnotator(resolve(f"local-dir:{f}"), TEMPLATES, NAMES) for f in (plain, biased))
    assert (one.towers.bias, two.towers.bias) == (None, -10) and one.towers.scale == two.towers.scale
    images = batch()
    votes, probs, features = judged(two, images)
    assert torch.equal(votes, judged(one, images)[0]) and not torch.equal(probs, judged(one, images)[1])
    for row in range(len(images)):
        mean = [0.0] * 3
        for t in range(len(TEMPLATES)):
            texts = two.text[3 * t : 3 * t + 3].double()
            cosines = [float(features[row].double() @ text) for text in texts]
            odds = [1 / (1 + math.exp(10 - two.towers.scale * cosine)) for cosine in cosines]
            mean = [m + o / sum(odds) / len(TEMPLATES) for m, o in zip(mean, odds)]
        assert torch.allclose(probs[row].double(), torch.tensor(mean, dtype=torch.double), atol=2e-3)


def save_family(folder, build, config):
    """A randomly initialised model of another family of open_clip as a model folder."""
    torch.manual_seed(0)
    state = build(**config).state_dict()
    folder.mkdir()
    save_file({name: value.clone().contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    config = {"model_cfg": config | {"custom_text": True}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


TOWER = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
FAMILIES = {
    "CoCa": (
        open_clip.CoCa,
        {
            "embed_dim": 16,
            "vision_cfg": {
                "image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16,
                "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True,
            },
            "text_cfg": TOWER | {"embed_cls": True, "output_tokens": True},
            "multimodal_cfg": TOWER,
        },
    ),
    "SigLIP with a timm tower": (
        open_clip.CustomTextCLIP,
        {
            "embed_dim": 16,
            "vision_cfg": {
                "image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False,
                "timm_pool": "", "timm_proj": "linear",
            },
            "text_cfg": TOWER,
            "init_logit_bias": -10.0,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_in_every_precision(tmp_path, family):
    spec = resolve(f"local-dir:{save_family(tmp_path / 'model', *FAMILIES[family])}")
    outputs = {}
    for precision in ("fp32", "bf16", "fp16"):
        annotator = ClipAnnotator(spec, TEMPLATES, NAMES, precision=precision)
        images = [annotator.towers.preprocess(Image.new("RGB", (50, 40), colour)) for colour in ("red", "blue", "gray")]
        votes, probs, features = judged(annotator, annotator.collate(images))
        assert (votes.shape, probs.shape, features.shape) == ((3, 4), (3, 3), (3, 16))
        outputs[precision] = features.float(), annotator.towers.scale, annotator.towers.bias
    for features, *scale_and_bias in outputs.values():
        assert scale_and_bias == list(outputs["fp32"][1:])  # not rounded, whatever the weights are
        assert ((features * outputs["fp32"][0]).sum(dim=1) > 0.99).all()
    model, _, _ = open_clip.create_model_and_transforms(spec.name)
    with torch.no_grad():
        wanted = model.eval().encode_image(torch.stack(images), normalize=True)
    assert torch.allclose(outputs["fp32"][0], wanted, atol=2e-3)


def test_preprocessing_is_the_models_own(tiny):
    annotator = ClipAnnotator(resolve(f"local-dir:{tiny}"), TEMPLATES, NAMES)
    assert annotator.preprocessing["mean"] == [0.5] * 3 and annotator.preprocessing["size"] in (32, [32, 32])
    for mode in ("L", "RGB"):
        pixels = annotator.towers.preprocess(Image.new(mode, (50, 40), "white"))
        assert pixels.shape == (3, 32, 32) and torch.allclose(pixels, torch.full_like(pixels, 2.0))


def test_what_travels_in_eight_bits_becomes_the_models_own_pixels(tiny):
    """As bytes from a decoding process, and floats on the device: the same bits as the model's preprocessing."""
    annotator = ClipAnnotator(resolve(f"local-dir:{tiny}"), TEMPLATES, NAMES)
    generator = np.random.default_rng(0)
    shapes = ((40, 50, 3), (32, 32, 3), (33, 70))
    images = [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    bytes_ = annotator.collate([annotator.preprocess(image) for image in images])
    assert bytes_.dtype == torch.uint8 and bytes_.shape == (3, 32, 32, 3)
    wanted = torch.stack([annotator.towers.preprocess(image) for image in images])
    assert torch.equal(annotator.towers.eight_bit.floats(bytes_), wanted)
    features = F.normalize(annotator.towers.image(wanted), dim=-1).half()
    assert torch.equal(annotator.encode(bytes_), features)


def test_the_built_in_annotator_is_an_ordinary_model(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = resolve("builtin:glyph-clip")
    assert model.spec == "builtin:glyph-clip" and model.name.startswith(f"local-dir:{tmp_path}")
    votes, probs, _ = judged(ClipAnnotator(model, ["a {}"], ["one", "two"]), batch(2))
    assert votes.shape == (2, 1) and torch.allclose(probs.float().sum(dim=1), torch.ones(2), atol=1e-2)


# ---- identity -------------------------------------------------------------------------------------------------------


def test_the_weights_of_a_folder_are_its_content(tiny, tmp_path):
    same = save_tiny_clip(tmp_path / "same")
    other = save_tiny_clip(tmp_path / "other", seed=1)
    weights = [resolve(f"local-dir:{folder}").weights for folder in (tiny, same, other)]
    assert weights[0] == weights[1] != weights[2] and weights[0].startswith("sha256 ")
    (same / "README.md").write_text("hello")
    assert resolve(f"local-dir:{same}").weights == weights[0]
    assert resolve(f"local-dir:{same}/../same").spec == f"local-dir:{same}"


def test_names_of_open_clip_are_resolved_without_loading():
    model = resolve("ViT-B-32/openai")
    assert (model.name, model.tag, model.weights) == ("ViT-B-32", "openai", "tag openai")
    assert resolve("hf-hub:timm/ViT-B-16-SigLIP").tag is None


def test_quick_gelu_follows_the_weights(monkeypatch):
    """open_clip only warns when ViT-B-32/openai, trained with QuickGELU, is built without it."""
    asked = {}

    def create(name, **options):
        asked[name, options["pretrained"]] = options
        raise RuntimeError("far enough")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    for spec in ("ViT-B-32/openai", "ViT-B-32/laion2b_s34b_b79k"):
        with pytest.raises(RuntimeError, match="far enough"):
            models._load(resolve(spec))
    assert asked["ViT-B-32", "openai"]["force_quick_gelu"] is True
    assert asked["ViT-B-32", "laion2b_s34b_b79k"]["force_quick_gelu"] is False
    assert all(options["weights_only"] is True for options in asked.values())


# ---- models that cannot be had --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("ViT-B-32", "says no weights; write --vlm ViT-B-32/openai"),
        ("ViT-B-32/opnai", "has no weights 'opnai', did you mean openai?"),
        ("ViTB-32/openai", "unknown model ViTB-32/openai, did you mean ViT-B-32/openai?"),
        ("ViT-B-3", "did you mean ViT-B-32"),
        ("builtin:glyphclip", "did you mean builtin:glyph-clip?"),
        ("something else", "unknown model something else; write --vlm NAME/TAG"),
        ("local-dir:/nowhere/at/all", "model folder /nowhere/at/all does not exist"),
    ],
)
def test_unknown_models_are_one_line(spec, words):
    assert words in error_of(resolve, spec)


def test_folders_that_hold_no_model_are_one_line(tmp_path, tiny):
    folder = tmp_path / "model"
    folder.mkdir()
    spec = f"local-dir:{folder}"
    assert "open_clip_config.json does not exist" in error_of(resolve, spec)
    for content in ("", "[]", '{"model_cfg": {}}', '{"model_cfg": 3}', '{"vision_cfg": {}}'):
        (folder / "open_clip_config.json").write_text(content)
        assert "is not an open_clip configuration" in error_of(resolve, spec)
    config = (tiny / "open_clip_config.json").read_text()
    (folder / "open_clip_config.json").write_text(config)
    assert "holds no weights" in error_of(resolve, spec)
    (folder / "open_clip_model.safetensors").write_bytes(b"junk")
    assert "cannot load local-dir:" in error_of(load_open_clip, resolve(spec))
    wrong = dict(load_file(tiny / "open_clip_model.safetensors"))
    wrong.pop("text_projection")
    save_file(wrong, folder / "open_clip_model.safetensors")
    assert "cannot load local-dir:" in error_of(load_open_clip, resolve(spec))


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    folder = save_tiny_clip(tmp_path / "model")
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["text_projection"].fill_(math.nan)
    save_file(weights, folder / "open_clip_model.safetensors")
    assert "not finite" in error_of(ClipAnnotator, resolve(f"local-dir:{folder}"), TEMPLATES, NAMES)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_never_run_code(tmp_path):
    folder = save_tiny_clip(tmp_path / "model")
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": Trap(tmp_path / "trapped")}, folder / "open_clip_pytorch_model.bin")
    assert "cannot load" in error_of(load_open_clip, resolve(f"local-dir:{folder}"))
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    assert "cannot load" in error_of(load_open_clip, resolve(f"local-dir:{folder}"))
    assert not (tmp_path / "trapped").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "trapped")))
    assert (tmp_path / "trapped").exists()  # the trap works where code is run


def test_folders_that_bring_code_are_refused(tmp_path):
    folder = save_tiny_clip(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')
    assert "asks to run code of its own" in error_of(resolve, f"local-dir:{folder}")
    (folder / "tokenizer_config.json").unlink()
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert "asks to run code of its own" in error_of(resolve, f"local-dir:{folder}")


@pytest.mark.parametrize("spec", ["ViT-B-32/openai", "hf-hub:timm/ViT-B-16-SigLIP", "ViT-B-16-SigLIP/webli"])
def test_without_network_a_hub_model_is_given_up_within_seconds(spec, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    message = error_of(load_open_clip, resolve(spec))
    assert time.monotonic() - start < 10
    assert "cannot be reached" in message and "local-dir:FOLDER" in message and spec in message
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    assert capfd.readouterr().err == ""


def test_a_name_server_that_never_answers_does_not_hang(monkeypatch):
    monkeypatch.setattr(hub, "NETWORK_SECONDS", 0.2)
    end = threading.Event()

    def never(*args, **kwargs):
        end.wait(30)
        raise OSError

    monkeypatch.setattr(hub.urllib.request, "urlopen", never)
    start = time.monotonic()
    assert hub.hub_answers() is False and time.monotonic() - start < 5
    end.set()


@pytest.mark.parametrize("changes", [{"mean": ["a", 0.5, 0.5]}, {"std": [0.0, 0.5, 0.5]}, {"mean": [0.5, 0.5]}])
def test_a_configuration_that_loads_and_cannot_be_used_is_one_line(tmp_path, changes):
    """Libraries read some of its values when the first image comes, which would be after the store was begun."""
    save_tiny_clip(tmp_path)
    file = tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["preprocess_cfg"] |= changes
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be used"):
        load_annotator(resolve(f"local-dir:{tmp_path}"), ["a {}"], ["cat", "dog"])
