"""Chat models as annotators, on a tiny LLaVA in the real format: against plain forwards, and taught to answer."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from runs import error_of
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from annotate_vlm import main
from coreg.annotate.annotators import load_annotator
from coreg.annotate.chat import CHAT_TEMPLATES, ChatAnnotator, questions
from coreg.annotate.models import ModelSpec, resolve
from coreg.store.store import AnnotationStore

NAMES = ["red thing", "green thing", "blue sky", "cat"]
CONVERSATION = (  # LLaVA-1.5's
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tiny_tokenizer(words=()):
    """A byte-level BPE trained on the questions."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [*CHAT_TEMPLATES, "USER: ASSISTANT:", *words] * 3,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens={"image_token": "<image>"}, **special_tokens)


def save_tiny_llava(folder, seed=0, conversation=CONVERSATION):
    """A randomly initialised LLaVA of 80,000 parameters as transformers saves it."""
    tokenizer = tiny_tokenizer()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=conversation,
    )
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, num_attention_heads=4, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **shape, vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            bos_token_id=1, eos_token_id=2, pad_token_id=4,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.mul_(5)  # answers that differ from image to image
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures(count, seed=0):
    """Noise of one main colour, of several sizes; the colour's class for each."""
    generator = np.random.default_rng(seed)
    images, classes = [], []
    for number in range(count):
        pixels = generator.integers(0, 120, (generator.integers(30, 70), generator.integers(30, 70), 3), dtype=np.uint8)
        pixels[..., number % 3] += 120
        images.append(Image.fromarray(pixels))
        classes.append(number % 3)
    return images, classes


def teach(folder, names=NAMES, steps=60):
    """Teach a saved model to answer with the colour's class name, and save it again."""
    annotator = ChatAnnotator(resolve(f"chat:{folder}"), CHAT_TEMPLATES, names)
    network = annotator.network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    images, classes = pictures(48, seed=1)
    asked = [annotator.preprocess(image) for image in images]
    for step in range(steps):
        rows = [(step * 12 + place) % 48 for place in range(12)]
        number = step % len(CHAT_TEMPLATES)
        answers = [[*annotator.names[classes[row]], 2] for row in rows]
        longest = max(map(len, answers))
        prompt = asked[0]["text"][number]["input_ids"].expand(12, -1)
        answer = torch.tensor([one + [4] * (longest - len(one)) for one in answers])
        pixels = torch.cat([asked[row]["pixels"]["pixel_values"] for row in rows])
        logits = network(input_ids=torch.cat([prompt, answer], dim=1), pixel_values=pixels).logits
        logits = logits[:, prompt.shape[1] - 1 : -1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, answer.flatten(), ignore_index=4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.eval().save_pretrained(folder)
    return float(loss.detach())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_llava(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = save_tiny_llava(tmp_path_factory.mktemp("models") / "taught-llava")
    assert teach(folder) < 0.3
    return folder


def prompt_of(processor, template, number):
    question = questions([*CHAT_TEMPLATES[:number], template], NAMES)[number]
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(conversation, add_generation_prompt=True)


def plain_likelihoods(folder, images, templates):
    """Mean log-likelihoods (T, n, C): one forward without cache for every image, template and class name."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    scores = torch.empty(len(templates), len(images), len(NAMES))
    for t, template in enumerate(templates):
        prompt = prompt_of(processor, template, t)
        for i, image in enumerate(images):
            before = processor(images=image, text=prompt, return_tensors="pt")["input_ids"].shape[1]
            for c, name in enumerate(NAMES):
                inputs = processor(images=image, text=f"{prompt} {name}", return_tensors="pt")
                with torch.no_grad():
                    logp = model(**inputs).logits[0].log_softmax(dim=-1)
                ids = inputs["input_ids"][0]
                scores[t, i, c] = torch.stack([logp[k - 1, ids[k]] for k in range(before, len(ids))]).mean()
    return scores


def judge(annotator, images):
    return annotator.annotate(annotator.collate([annotator.preprocess(image) for image in images]))


def test_likelihoods_are_those_of_one_forward_a_class(tiny):
    images, templates = pictures(4)[0], CHAT_TEMPLATES[:3]
    annotator = load_annotator(resolve(f"chat:{tiny}"), templates, NAMES)
    assert annotator.cached  # LLaVA's cache can be reused
    assert len({len(name) for name in annotator.names}) > 1  # names of one token and of several
    judged = judge(annotator, images)
    scores = plain_likelihoods(tiny, images, templates)
    assert torch.equal(judged["votes"].long(), scores.argmax(dim=2).T)
    assert torch.allclose(judged["probs"].float(), scores.softmax(dim=2).mean(dim=0), atol=1e-3)
    assert (judged["votes"].dtype, judged["probs"].dtype) == (torch.int16, torch.float16) and set(judged) == {
        "votes",
        "probs",
    }
    assert (scores.softmax(dim=2).std(dim=1) > 0.002).any()  # images differ
    annotator.cached = False
    anew = judge(annotator, images)
    assert torch.equal(anew["votes"], judged["votes"])
    assert torch.allclose(anew["probs"].float(), judged["probs"].float(), atol=1e-3)


def test_the_result_does_not_depend_on_chunks_or_batches(tiny, monkeypatch):
    images = pictures(5)[0]
    annotator = load_annotator(resolve(f"chat:{tiny}"), CHAT_TEMPLATES[:2], NAMES)
    whole = judge(annotator, images)
    monkeypatch.setattr("coreg.annotate.chat.ROWS_AT_ONCE", 1)  # one class name at a time
    parts = [judge(annotator, [image]) for image in images]
    for name in ("votes", "probs"):
        assert torch.allclose(whole[name].float(), torch.cat([part[name] for part in parts]).float(), atol=1e-3)


def test_answers_are_those_of_greedy_generation(tiny):
    images, templates = pictures(3)[0], CHAT_TEMPLATES[:2]
    annotator = load_annotator(resolve(f"chat:{tiny}"), templates, NAMES, chat_mode="generate")
    judged = judge(annotator, images)
    processor, model = AutoProcessor.from_pretrained(tiny), AutoModelForImageTextToText.from_pretrained(tiny).eval()
    length = max(map(len, annotator.names)) + 4
    for t, template in enumerate(templates):
        prompt = prompt_of(processor, template, t)
        for i, image in enumerate(images):
            inputs = processor(images=image, text=prompt, return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=length)[0, inputs["input_ids"].shape[1] :]
            assert judged["answers"][i][t] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert (judged["votes"] == -1).all()  # a model of noise says nothing: no vote, and no preference
    assert torch.allclose(judged["probs"].float(), torch.full((3, 4), 0.25), atol=1e-3)


@pytest.mark.parametrize("mode", ["likelihood", "generate"])
def test_a_taught_model_names_what_it_sees(taught, mode):
    images, classes = pictures(12, seed=2)
    annotator = load_annotator(resolve(f"chat:{taught}"), CHAT_TEMPLATES, NAMES, chat_mode=mode)
    judged = judge(annotator, images)
    right = judged["votes"] == torch.tensor(classes)[:, None]
    assert right.float().mean() > 0.9
    assert (judged["probs"].argmax(dim=1) == torch.tensor(classes)).float().mean() > 0.9
    if mode == "generate":
        assert judged["answers"][0][0] == NAMES[classes[0]]
    # an answer that is no class name is no vote, and counts as uniform
    other = load_annotator(resolve(f"chat:{taught}"), CHAT_TEMPLATES[:1], ["dog", *NAMES[1:]], chat_mode="generate")
    red = judge(other, [images[0], images[1]])
    assert red["votes"].tolist() == [[-1], [1]] and red["probs"][0].tolist() == [0.25] * 4
    assert red["probs"][1].tolist() == [0, 1, 0, 0]


def test_choices_are_listed_in_another_order_for_every_question():
    names = [f"thing {number}" for number in range(12)]
    asked = questions(CHAT_TEMPLATES, names)
    orders = [[int(number) for number in re.findall(r"thing (\d+)", text)] for text in asked]
    assert orders[0] == list(range(12)) and len({tuple(order) for order in orders}) == len(CHAT_TEMPLATES)
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert asked == questions(CHAT_TEMPLATES, names)
    assert all(template.count("{}") == 1 for template in CHAT_TEMPLATES)


@pytest.mark.parametrize("mode", ["likelihood", "generate"])
def test_annotate_vlm_asks_a_chat_model(taught, tmp_path, mode, capsys):
    images, classes = pictures(10, seed=3)
    for number, (image, index) in enumerate(zip(images, classes)):
        folder = tmp_path / "photos" / NAMES[index]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    (tmp_path / "photos" / "x.png").write_bytes(b"")
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    options = f"--images {tmp_path}/photos --vlm chat:{taught} --classes {tmp_path}/classes.txt --chat_mode {mode}"
    options += f" --batch_size 3 --block_size 4 --output_dir {tmp_path}/ann"
    main([*options.split(), "--workers", "1"])
    capsys.readouterr()
    store = AnnotationStore.open(tmp_path / "ann")
    assert store.manifest["model"]["mode"] == mode and store.manifest["features"] is None
    assert store.templates == list(CHAT_TEMPLATES)
    known = ~store.unreadable
    assert known.sum() == 10 and (store.votes()[known] == store.labels[known, None]).mean() > 0.8
    assert (store.votes()[~known] == -1).all()
    answers = store.answers()
    assert (answers is not None) == (mode == "generate")
    if mode == "generate":
        assert len(answers) == 11 and all(len(row) == len(CHAT_TEMPLATES) for row in answers)
        assert (tmp_path / "ann" / "report.txt").read_text().count("answers without a vote") == 1
    before = sorted((tmp_path / "ann" / "blocks").iterdir())
    content = [file.read_bytes() for file in before]
    before[1].unlink()
    main([*options.split(), "--workers", "0"])
    assert [file.read_bytes() for file in before] == content
    with pytest.raises(SystemExit):
        main(["--rescore", str(tmp_path / "ann"), "--output_dir", str(tmp_path / "new")])
    assert "keeps no features" in capsys.readouterr().err


def test_bf16_gives_nearly_the_same(tiny):
    images = pictures(4)[0]
    one, two = (
        judge(load_annotator(resolve(f"chat:{tiny}"), CHAT_TEMPLATES[:1], NAMES, precision=precision), images)
        for precision in ("fp32", "bf16")
    )
    assert torch.allclose(one["probs"].float(), two["probs"].float(), atol=0.05)


# ---- models that cannot be had --------------------------------------------------------------------------------------


def test_folders_that_hold_no_chat_model_are_one_line(tiny, tmp_path):
    assert "does not exist" in error_of(resolve, "chat:/nowhere/at/all")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in error_of(resolve, f"chat:{tmp_path}/empty")
    shutil.copytree(tiny, tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    assert "holds no .safetensors weights" in error_of(resolve, f"chat:{tmp_path}/weightless")
    shutil.copytree(tiny, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"junk")
    assert "as a chat model" in error_of(load_annotator, resolve(f"chat:{tmp_path}/damaged"), CHAT_TEMPLATES, NAMES)
    shutil.copytree(tiny, tmp_path / "silent")
    (tmp_path / "silent" / "chat_template.jinja").unlink()
    assert "chat_template" in error_of(load_annotator, resolve(f"chat:{tmp_path}/silent"), CHAT_TEMPLATES, NAMES)
    shutil.copytree(tiny, tmp_path / "blind")
    (tmp_path / "blind" / "processor_config.json").unlink()
    assert str(tmp_path / "blind") in error_of(load_annotator, resolve(f"chat:{tmp_path}/blind"), CHAT_TEMPLATES, NAMES)


def test_code_in_a_folder_is_never_run(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "evil")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Model", "AutoModelForImageTextToText": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "asks to run code of its own" in error_of(resolve, f"chat:{folder}")
    unchecked = ModelSpec(f"chat:{folder}", str(folder), None, "", "chat")
    assert "cannot load" in error_of(load_annotator, unchecked, CHAT_TEMPLATES, NAMES)
    assert not (tmp_path / "trapped").exists()


def test_the_weights_of_a_folder_are_its_content(tiny, tmp_path):
    same = shutil.copytree(tiny, tmp_path / "same")
    assert resolve(f"chat:{same}").weights == resolve(f"chat:{tiny}").weights
    (same / "chat_template.jinja").write_text("{{ 'other' }}")
    assert resolve(f"chat:{same}").weights != resolve(f"chat:{tiny}").weights
    assert len(load_file(tiny / "model.safetensors")) > 10
