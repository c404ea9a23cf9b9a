"""A tiny LLaVA on real images (scikit-learn's handwritten digits), in both modes, through to two trained networks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import zero_shot_accuracy
from sklearn.datasets import load_digits
from test_annotate_chat import save_tiny_llava

import annotate_vlm
import train_coreg
from coreg.annotate.chat import CHAT_TEMPLATES, ChatAnnotator
from coreg.annotate.models import resolve
from coreg.store.store import AnnotationStore

NAMES = ["zero", "one", "two", "three"]
TRAIN = (
    "--recipe folder --epochs 2 --warmup_epochs 1 --backbone preact_resnet_tiny --pretrained false --image_size 16 "
    "--padding 2 --batch_size 16 --channels 3 --report_to none --workers 0"
)


def digits(first, last):
    """Images 32 x 32 and labels of rows first ... last of the digits 0 to 3."""
    bunch = load_digits(n_class=len(NAMES))
    pixels = (bunch.images[first:last] * 15.9).astype(np.uint8)
    return [Image.fromarray(image).resize((32, 32)) for image in pixels], bunch.target[first:last]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that was taught some digits, and a folder with others."""
    root = tmp_path_factory.mktemp("real")
    save_tiny_llava(root / "model")
    annotator = ChatAnnotator(resolve(f"chat:{root / 'model'}"), CHAT_TEMPLATES, NAMES)
    network = annotator.network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    images, labels = digits(0, 240)
    asked = [annotator.preprocess(image) for image in images]
    for step in range(90):
        rows = [(step * 16 + place) % len(asked) for place in range(16)]
        prompt = asked[0]["text"][step % len(CHAT_TEMPLATES)]["input_ids"].expand(16, -1)
        tokens = [[*annotator.names[labels[row]], 2] for row in rows]
        longest = max(map(len, tokens))
        answer = torch.tensor([one + [4] * (longest - len(one)) for one in tokens])
        pixels = torch.cat([asked[row]["pixels"]["pixel_values"] for row in rows])
        logits = network(input_ids=torch.cat([prompt, answer], dim=1), pixel_values=pixels).logits
        logits = logits[:, prompt.shape[1] - 1 : -1].flatten(0, 1)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, answer.flatten(), ignore_index=4).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.save_pretrained(root / "model")
    images, labels = digits(300, 420)
    for row, (image, label) in enumerate(zip(images, labels)):
        folder = root / "photos" / ("test" if row % 4 == 0 else "train") / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{row}.png")
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


@pytest.mark.parametrize("mode", ["likelihood", "generate"])
def test_from_real_images_to_trained_networks(place, mode, tmp_path):
    options = f"--images {place}/photos --vlm chat:{place}/model --classes {place}/classes.txt --chat_mode {mode}"
    annotate_vlm.main([*options.split(), "--output_dir", str(tmp_path / "ann"), "--workers", "0", "--batch_size", "20"])
    store = AnnotationStore.open(tmp_path / "ann")
    right = (store.probs().argmax(axis=1) == store.labels).mean()
    assert right > 0.5  # far above the 0.25 of guessing, and far from perfect: what the method is for
    train_coreg.main(["--annotations", str(tmp_path / "ann"), "--output_dir", str(tmp_path / "run"), *TRAIN.split()])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["annotator"]["zero_shot_accuracy"] == pytest.approx(zero_shot_accuracy(store))
    assert (tmp_path / "run" / "labels.csv").read_text().count("\n") == 91
    assert (tmp_path / "run" / "export").is_dir()
