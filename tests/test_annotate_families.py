"""Chat models that are built otherwise than LLaVA-1.5: images of several tiles, and positions in three dimensions."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_annotate_chat import CONVERSATION, NAMES, judge, tiny_tokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from coreg.annotate.annotators import load_annotator
from coreg.annotate.chat import CHAT_TEMPLATES
from coreg.annotate.models import resolve

SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
TEXT = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4}


def save_tiny_llava_next(folder):
    """Images of another shape have another number of tiles and of tokens."""
    tokenizer, tiles = tiny_tokenizer(), [[32, 64], [64, 32], [64, 64]]
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=tiles
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CONVERSATION,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**SHAPE, num_attention_heads=4, image_size=32, patch_size=8),
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=tiles,
    )
    return saved(LlavaNextForConditionalGeneration, config, processor, folder)


def save_tiny_qwen(folder):
    """Pixels come as a list of patches, and tokens have types."""
    tokenizer = tiny_tokenizer()
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.image_token, tokenizer.video_token = special[2:]
    start, end, image, video = map(tokenizer.convert_tokens_to_ids, special)
    conversation = CONVERSATION.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    pictures = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    processor = Qwen2VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor(), chat_template=conversation)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    config = Qwen2VLConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config=vision | {"spatial_merge_size": 2, "temporal_patch_size": 2},
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    return saved(Qwen2VLForConditionalGeneration, config, processor, folder)


def saved(build, config, processor, folder):
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.mul_(4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("save", [save_tiny_llava_next, save_tiny_qwen])
def test_images_of_every_shape_are_judged_alike_together_and_alone(save, tmp_path):
    model = resolve(f"chat:{save(tmp_path / 'model')}")
    generator = np.random.default_rng(0)
    shapes = [(40, 50, 3), (40, 90, 3), (40, 50, 3), (90, 40, 3)]
    images = [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    for mode in ("likelihood", "generate"):
        annotator = load_annotator(model, CHAT_TEMPLATES[:3], NAMES, chat_mode=mode)
        lengths = {len(annotator.preprocess(image)["text"][0]["input_ids"]) for image in images}
        assert annotator.cached and len(lengths) > 1  # so they cannot all be read together
        together = judge(annotator, images)
        annotator.cached = False  # everything anew for every token, every image by itself
        alone = [judge(annotator, [image]) for image in images]
        assert torch.equal(together["votes"], torch.cat([one["votes"] for one in alone]))
        probs = torch.cat([one["probs"] for one in alone]).float()
        assert torch.allclose(together["probs"].float(), probs, atol=1e-3)
        if mode == "generate":
            assert together["answers"] == [one["answers"][0] for one in alone]
        else:
            assert probs.std(dim=0).max() > 1e-3  # the images make a difference
