"""CLIP and SigLIP folders as transformers saves them: against transformers' own forward; precisions."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from runs import error_of
from test_annotate_annotators import save_tiny_clip
from test_annotate_chat import save_tiny_llava, tiny_tokenizer
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from annotate_vlm import main
from coreg.annotate.annotators import load_annotator
from coreg.annotate.models import resolve
from coreg.store.store import AnnotationStore

NAMES, TEMPLATES = ["cat", "dog", "blue whale"], ["a photo of a {}", "the {}", "{} at night"]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_tiny(folder, family):
    """A randomly initialised model whose features differ from image to image and from text to text."""
    tokenizer = tiny_tokenizer([*NAMES, *TEMPLATES])
    tokenizer.model_max_length = 24
    text = SHAPE | {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": 2, "bos_token_id": 1}
    vision = SHAPE | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if family == "clip":
        images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        processor = CLIPProcessor(images, tokenizer)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    else:
        processor = SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
        model = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=vision))
        model.logit_scale.data.fill_(3.0)
        model.logit_bias.data.fill_(-4.0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.mul_(6)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["clip", "siglip"])
def model(request, tmp_path_factory):
    return request.param, save_tiny(tmp_path_factory.mktemp("models") / request.param, request.param)


def pictures(count):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 30 + row, 3), dtype=np.uint8)) for row in range(count)]


def judge(annotator, images):
    return annotator.annotate(annotator.collate([annotator.preprocess(image) for image in images]))


def test_votes_and_probabilities_are_those_of_transformers(model):
    family, folder = model
    annotator = load_annotator(resolve(f"transformers:{folder}"), TEMPLATES, NAMES)
    images = pictures(9)
    judged = judge(annotator, images)
    processor, network = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    mean = torch.zeros(len(images), len(NAMES))
    for t, template in enumerate(TEMPLATES):
        padding = "max_length" if family == "siglip" else True
        texts = [template.format(name) for name in NAMES]
        inputs = processor(images=images, text=texts, padding=padding, return_tensors="pt")
        with torch.no_grad():
            logits = network(**inputs).logits_per_image
        assert torch.equal(judged["votes"][:, t].long(), logits.argmax(dim=1))
        if family == "siglip":  # its own sigmoids, as shares
            mean += logits.sigmoid() / logits.sigmoid().sum(dim=1, keepdim=True) / len(TEMPLATES)
        else:
            mean += logits.softmax(dim=1) / len(TEMPLATES)
    assert torch.allclose(judged["probs"].float(), mean, atol=5e-3)
    assert len(judged["votes"].unique()) > 1 and judged["features"].shape == (9, annotator.features)
    assert annotator.preprocessing["image_mean"] and (annotator.towers.bias is None) == (family == "clip")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_nearly_the_same(model, tmp_path, precision):
    clip = resolve(f"local-dir:{save_tiny_clip(tmp_path / 'open_clip')}")
    for spec in (resolve(f"transformers:{model[1]}"), clip):
        whole, half = (load_annotator(spec, TEMPLATES, NAMES, precision=name) for name in ("fp32", precision))
        one, two = judge(whole, pictures(6)), judge(half, pictures(6))
        kinds = {value.dtype for value in half.towers.image.__self__.state_dict().values()} if spec is clip else set()
        assert not kinds or half.dtype in kinds
        cosine = (one["features"].float() * two["features"].float()).sum(dim=1)
        assert cosine.mean() > 0.9  # these weights blow up every rounding
        assert not torch.equal(one["features"], two["features"]) and two["features"].dtype == torch.float16


def test_annotate_vlm_with_a_transformers_folder(model, tmp_path):
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(pictures(7)):
        image.save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    options = f"--images {tmp_path}/photos --vlm transformers:{model[1]} --classes {tmp_path}/classes.txt --precision bf16"
    main([*options.split(), "--output_dir", str(tmp_path / "ann"), "--workers", "2", "--batch_size", "4"])
    store = AnnotationStore.open(tmp_path / "ann")
    assert store.manifest["model"]["precision"] == "bf16" and (store.votes() >= 0).all()
    main(["--rescore", str(tmp_path / "ann"), "--output_dir", str(tmp_path / "again"), "--batch_size", "4"])
    assert AnnotationStore.open(tmp_path / "again").hash == store.hash


def refused(spec):
    return error_of(lambda: load_annotator(resolve(spec), TEMPLATES, NAMES))


def test_folders_of_other_kinds_are_one_line(model, tmp_path):
    assert "does not exist" in refused("transformers:/nowhere/at/all")
    llava = save_tiny_llava(tmp_path / "llava")
    assert "for chat models write chat:FOLDER" in refused(f"transformers:{llava}")
    assert "as a chat model" in refused(f"chat:{model[1]}")
    broken = shutil.copytree(model[1], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"junk")
    assert "cannot load transformers:" in refused(f"transformers:{broken}")
