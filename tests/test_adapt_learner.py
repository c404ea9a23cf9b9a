"""Training steps of tuned models against losses written out, one image and one token at a time."""

import math

import numpy as np
import pytest
import torch
from test_annotate_chat import NAMES, pictures, save_tiny_llava

from coreg.adapt.chat import join
from coreg.adapt.learner import IGNORED, ChatBatch, ChatLearner, ClipBatch, ClipLearner, Learner
from coreg.annotate.chat import CHAT_TEMPLATES, ChatAnnotator
from coreg.annotate.models import resolve
from coreg.errors import UserError


class Text(torch.nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(classes, width, dtype=torch.float64))

    def forward(self):
        return torch.nn.functional.normalize(self.weight, dim=-1)


def clip_learner(classes=3, width=4):
    torch.manual_seed(0)
    text, image = Text(classes, width), torch.nn.Linear(5, width, dtype=torch.float64).requires_grad_(False)
    return ClipLearner(text, text, lambda pixels: image(pixels.flatten(1)), 30.0), image


def test_the_loss_is_the_mean_cross_entropy_of_scaled_cosines():
    learner, image = clip_learner()
    pixels, classes = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0, 2])
    parts = learner(ClipBatch(pixels, False, classes, 6))
    total, right = 0.0, 0
    for row, wanted in zip(image(pixels), classes.tolist()):
        cosines = [float(row @ t / row.norm() / t.norm()) for t in learner.trained.weight.detach()]
        total += math.log(sum(math.exp(30 * c) for c in cosines)) - 30 * cosines[wanted]
        right += cosines.index(max(cosines)) == wanted
    assert float(parts["loss"].detach()) == pytest.approx(total / 6, rel=1e-12)
    assert float(parts["accuracy"]) == pytest.approx(right / 6)
    encoded = torch.nn.functional.normalize(image(pixels), dim=-1)
    assert torch.equal(learner(ClipBatch(encoded, True, classes, 6))["loss"], parts["loss"])


def test_shares_of_a_batch_add_up_and_padding_counts_nothing():
    learner, _ = clip_learner()
    pixels, classes = torch.randn(5, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    whole = learner(ClipBatch(pixels, False, classes, 5))
    cut = [slice(0, 2), slice(2, 5)]
    parts = [learner(ClipBatch(pixels[part], False, classes[part], 5)) for part in cut]
    for name in ("loss", "accuracy"):
        assert float(sum(part[name] for part in parts).detach()) == pytest.approx(float(whole[name].detach()), rel=1e-12)
    nothing = learner(ClipBatch(pixels[:1], False, torch.tensor([IGNORED]), 5))
    nothing["loss"].backward()
    assert float(nothing["loss"].detach()) == 0 and not learner.trained.weight.grad.any()


def test_the_state_is_what_is_trained():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    learner, other = Learner(network), Learner(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    state = learner.state_dict()
    assert list(state) == ["0.weight", "0.bias"]
    other.load_state_dict(state)
    assert torch.equal(other.trained[0].weight, network[0].weight)
    with pytest.raises(KeyError, match=r"1\.bias"):
        other.load_state_dict(state | {"1.bias": torch.zeros(2)})


def test_only_adapters_drop_out():
    adapter = torch.nn.ModuleDict({"default": torch.nn.Dropout(0.5)})
    network = torch.nn.ModuleDict({"drop": torch.nn.Dropout(0.5), "lora_dropout": adapter})
    learner = Learner(network).train()
    assert not network["drop"].training and adapter["default"].training
    learner.train(False)
    assert not adapter["default"].training


# ---- conversations --------------------------------------------------------------------------------------------------


def item(ids, pixels=(1, 3, 2, 2)):
    kinds = torch.arange(len(ids)) % 2
    return {"text": [{"input_ids": torch.tensor(ids), "kinds": kinds}], "pixels": {"pixel_values": torch.ones(pixels)}}


def test_questions_and_answers_are_joined_as_worked_out_by_hand():
    inputs, labels = join([item([11, 12, 13]), item([11, 12, 13, 14, 15])], [[21, 22, 2], [31, 2]])
    assert inputs["input_ids"].tolist() == [[11, 12, 13, 21, 22, 2, 0], [11, 12, 13, 14, 15, 31, 2]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0], [1] * 7]
    assert inputs["kinds"].tolist() == [[0, 1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0]]
    n = IGNORED
    assert labels.tolist() == [[n, n, n, 21, 22, 2, n], [n, n, n, n, n, 31, 2]]
    assert inputs["pixel_values"].shape == (2, 3, 2, 2)
    with pytest.raises(UserError, match="--batch_size 1"):
        join([item([1]), item([1], pixels=(1, 3, 4, 2))], [[2], [2]])


@pytest.fixture(scope="module")
def annotator(tmp_path_factory):
    folder = save_tiny_llava(tmp_path_factory.mktemp("models") / "tiny-llava")
    made = ChatAnnotator(resolve(f"chat:{folder}"), CHAT_TEMPLATES[:1], NAMES)
    made.network.double()
    return made


def doubled(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("keeps_logits", [True, False])
def test_the_loss_sees_the_answers_tokens_alone(annotator, keeps_logits):
    """One conversation at a time, one token after the other, without padding."""
    images, classes = pictures(4)
    asked = [annotator.preprocess(image) for image in images]
    asked[1]["text"][0]["input_ids"] = asked[1]["text"][0]["input_ids"][:-3]  # a shorter question
    answers = [[*annotator.names[index], 2] for index in classes]
    assert len({len(answer) for answer in answers}) > 1
    inputs, labels = join(asked, answers)
    tokens = sum(map(len, answers))
    learner = ChatLearner(annotator.network, keeps_logits)
    parts = learner(ChatBatch(doubled(inputs), labels, 4, tokens))
    total, right = 0.0, 0
    for one, answer in zip(asked, answers):
        ids = one["text"][0]["input_ids"].tolist()
        for token in answer:
            seen = {"input_ids": torch.tensor([ids]), "pixel_values": one["pixels"]["pixel_values"].double()}
            with torch.no_grad():
                logits = annotator.network(**seen, attention_mask=torch.ones(1, len(ids))).logits[0, -1]
            total -= float(logits.log_softmax(dim=0)[token])
            right += int(logits.argmax()) == token
            ids.append(token)
    assert float(parts["loss"].detach()) == pytest.approx(total / tokens, rel=1e-5)  # the model's softmax is float32
    assert float(parts["accuracy"]) == pytest.approx(right / tokens)


def test_a_process_without_conversations_has_no_gradient(annotator):
    inputs, labels = join([annotator.preprocess(pictures(1)[0][0])], [[5, 2]])
    weight = annotator.network.get_input_embeddings().weight.requires_grad_(True)
    try:
        parts = ChatLearner(annotator.network, True)(ChatBatch(doubled(inputs), labels.fill_(IGNORED), 3, 6))
        parts["loss"].backward()
        assert float(parts["loss"].detach()) == 0 and not weight.grad.any()
    finally:
        weight.requires_grad_(False)
        weight.grad = None


def test_places_beyond_the_answer_do_not_matter(annotator):
    asked = [annotator.preprocess(image) for image in pictures(2)[0]]
    inputs, labels = join(asked, [[5, 2], [6, 7, 8, 2]])
    learner = ChatLearner(annotator.network, True)
    before = learner(ChatBatch(doubled(inputs), labels, 2, 6))["loss"]
    inputs["input_ids"][0, -2:] = 9
    assert torch.equal(learner(ChatBatch(doubled(inputs), labels, 2, 6))["loss"], before)
    assert np.isfinite(float(before.detach()))
