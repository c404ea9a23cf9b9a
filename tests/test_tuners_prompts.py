"""Learned prompts against hand-worked token rows, open_clip's and transformers' own text towers, and zero-shot features."""

import json

import open_clip
import pytest
import torch
from test_annotate_annotators import save_tiny_clip
from test_annotate_transformers import save_tiny
from tokenizers import Tokenizer, processors

from coreg.annotate.annotators import open_clip_towers, transformers_towers
from coreg.annotate.models import resolve
from coreg.errors import UserError
from coreg.nets.tuners.prompts import PromptLearner, lay_out, prompt_texts, random_context, text_ids, token_embedding

NAMES = ["cat", "blue whale", "x_ray"]
CPU = torch.device("cpu")


class Words:
    """A tokenizer that a hand can follow: one number a word, `.` a word of its own, cut to a length like CLIP's."""

    def __init__(self, length=12, start=(90,), end=99, pad=0):
        self.ids, self.length, self.start, self.end, self.pad = {}, length, start, end, pad

    def __call__(self, texts):
        rows = []
        for text in texts:
            words = text.replace(".", " .").split()
            row = [*self.start, *(self.ids.setdefault(word, len(self.ids) + 1) for word in words), self.end]
            if len(row) > self.length:
                row = [*row[: self.length - 1], self.end]
            rows.append(row + [self.pad] * (self.length - len(row)))
        return {"input_ids": torch.tensor(rows)}


def layout(words, names, count, position):
    """Rows as text, with V for a context vector."""
    laid_out = lay_out(words, names, count, position)
    spelled = {number: word for word, number in words.ids.items()} | {90: "<", 99: ">", 0: "-"}
    ids, slots = laid_out.tokens["input_ids"].tolist(), laid_out.slots.tolist()
    return [" ".join("V" if v else spelled[i] for i, v in zip(*row)) for row in zip(ids, slots)]


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("end", ["< V V V cat . > - - - - -", "< V V V blue whale . > - - - -", "< V V V x ray . > - - - -"]),
        ("middle", ["< V cat V V . > - - - - -", "< V blue whale V V . > - - - -", "< V x ray V V . > - - - -"]),
        ("front", ["< cat V V V . > - - - - -", "< blue whale V V V . > - - - -", "< x ray V V V . > - - - -"]),
    ],
)
def test_rows_are_those_worked_out_by_hand(position, expected):
    assert layout(Words(), NAMES, 3, position) == expected


def test_clip_finds_its_end_where_the_hand_finds_it():
    """The end-of-text token is the largest number of a row: start, M vectors, the name, the full stop, then it."""
    tokenize = open_clip.SimpleTokenizer(context_length=16)
    for position in ("end", "middle", "front"):
        laid_out = lay_out(lambda texts: {"input_ids": tokenize(texts)}, ["cat", "sea or lake"], 4, position)
        ids = laid_out.tokens["input_ids"]
        assert ids.argmax(dim=1).tolist() == [1 + 4 + 1 + 1, 1 + 4 + 3 + 1]
        assert (ids[:, 0] == 49406).all() and laid_out.slots.sum(1).tolist() == [4, 4] and not laid_out.slots[:, 0].any()


@pytest.mark.parametrize("special", [{"pad": 99}, {"start": ()}, {"start": (), "end": 1000, "pad": 1000}])
def test_other_special_tokens(special):
    words = Words(**special)
    laid_out = lay_out(words, ["cat", "blue whale"], 2, "end")
    first = len(words.start)
    assert laid_out.slots.nonzero().tolist() == [[row, first + place] for row in (0, 1) for place in (0, 1)]


def test_what_does_not_fit_is_refused_with_what_would():
    words = Words(length=9)
    assert layout(words, ["cat"], 5, "end") == ["< V V V V V cat . >"]
    with pytest.raises(UserError, match="--context_tokens 5 or less"):
        lay_out(words, ["cat"], 6, "end")
    with pytest.raises(UserError, match="--context_tokens 4 or less"):
        lay_out(words, NAMES, 5, "middle")
    with pytest.raises(UserError, match="leaves no room for context vectors"):
        lay_out(Words(length=4), NAMES, 1, "end")
    words = Words(length=60)  # a tokenizer that does not part words
    with pytest.raises(UserError, match="choose another model"):
        lay_out(lambda texts: words([text.replace(" ", "") for text in texts]), ["cat"], 2, "end")


def test_texts():
    assert prompt_texts(["a_b"], ["p", "q", "r"], "middle") == ["p a b q r."]
    words = Words()
    words(["an old photo of cat ."])
    assert text_ids(words, "photo of an", NAMES).tolist() == [words.ids[word] for word in ("photo", "of", "an")]
    for broken in ("", " ", "a " * 20):
        with pytest.raises(UserError, match="--context_init"):
            text_ids(words, broken, NAMES)


def end_texts_with_a_token(folder):
    """Let the tokenizer begin and end texts as CLIP's does, and CLIP take the feature of the token that ends them."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start, end = ((word, tokenizer.token_to_id(word)) for word in ("<s>", "<image>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A <image>", special_tokens=[start, end])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = end[1]
    (folder / "config.json").write_text(json.dumps(config))


# ---- through real text towers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["clip", "custom", "siglip text", "transformers clip", "transformers siglip"])
def towers(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    if request.param.startswith("transformers"):
        save_tiny(folder, request.param.split()[1])
        end_texts_with_a_token(folder)
        made = transformers_towers(resolve(f"transformers:{folder}"), CPU, "fp32")
    else:
        text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
        if request.param == "siglip text":
            text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        save_tiny_clip(folder, custom_text=request.param != "clip", text_cfg=text)
        made = open_clip_towers(resolve(f"local-dir:{folder}"), CPU, "fp32")
    made.network.double()
    return made


def learner_of(towers, context, count, position="end", names=NAMES):
    prompts = lay_out(towers.tokenize, names, count, position)
    return PromptLearner(prompts, context, token_embedding(towers.network, towers.text, prompts.tokens), towers.text)


def width(towers):
    return token_embedding(towers.network, towers.text, towers.tokenize(["cat"])).embedding_dim


def test_with_a_templates_words_it_is_zero_shot(towers):
    names = ["cat", "blue whale", "dog at night"]
    ids = text_ids(towers.tokenize, "a photo of a", names)
    table = token_embedding(towers.network, towers.text, towers.tokenize(names))
    features = learner_of(towers, table.weight[ids].detach().clone(), len(ids), names=names)()
    wanted = towers.text(towers.tokenize([f"a photo of a {name}." for name in names]))
    torch.testing.assert_close(features, torch.nn.functional.normalize(wanted, dim=-1), rtol=0, atol=1e-10)
    assert (features[0] - features[1]).abs().max() > 1e-3


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("shape", ["shared", "per_class"])
def test_random_vectors_do_what_words_of_such_a_meaning_would(towers, position, shape):
    """The same vectors written into rows of the table that no prompt uses, looked up by the tower itself."""
    count, dim = 3, width(towers)
    context = random_context((len(NAMES), count, dim) if shape == "per_class" else (count, dim), seed=7).double()
    learner = learner_of(towers, context.clone(), count, position)
    laid_out = lay_out(towers.tokenize, NAMES, count, position)
    table = token_embedding(towers.network, towers.text, laid_out.tokens)
    spare = [index for index in range(100, 300) if index not in laid_out.tokens["input_ids"]][: count * len(NAMES)]
    ids = laid_out.tokens["input_ids"].clone()
    each = context.expand(len(NAMES), count, dim)
    before = table.weight.detach().clone()
    try:
        for row in range(len(NAMES)):
            ids[row, laid_out.slots[row]] = torch.tensor(spare[row * count : (row + 1) * count])
        table.weight.data[spare] = each.reshape(-1, dim)
        wanted = torch.nn.functional.normalize(towers.text(laid_out.tokens | {"input_ids": ids}), dim=-1)
    finally:
        table.weight.data.copy_(before)
    torch.testing.assert_close(learner(), wanted.detach(), rtol=0, atol=1e-10)


def test_the_gradient_reaches_the_vectors_and_nothing_else(towers):
    dim = width(towers)
    shared = learner_of(towers, random_context((2, dim), 0).double(), 2)
    each = learner_of(towers, random_context((3, 2, dim), 0).double(), 2)
    assert [name for name, _ in each.named_parameters()] == ["context"]
    features = each()
    (gradient,) = torch.autograd.grad(features[1].square().sum() + features[1, 0], [each.context])
    assert gradient[1].abs().min() > 0 and not gradient[0].any() and not gradient[2].any()
    shared()[:, 0].sum().backward()
    assert shared.context.grad.shape == (2, dim) and shared.context.grad.abs().min() > 0
    assert all(weight.grad is None for weight in towers.network.parameters())


def test_the_tower_is_left_as_it_was(towers):
    tokens = towers.tokenize(NAMES)
    before = towers.text(tokens)
    learner_of(towers, random_context((2, width(towers)), 0).double(), 2)()
    assert torch.equal(towers.text(tokens), before)


def test_a_tower_without_a_table_is_refused(tmp_path):
    towers = open_clip_towers(resolve(f"local-dir:{save_tiny_clip(tmp_path / 'tiny')}"), CPU, "fp32")

    class Bytes(torch.nn.Module):
        weight = towers.network.token_embedding.weight

        def forward(self, ids):
            return torch.nn.functional.embedding(ids, self.weight)

    towers.network.token_embedding = Bytes()
    with pytest.raises(UserError, match="no plain embedding table"):
        token_embedding(towers.network, towers.text, towers.tokenize(NAMES))


def test_random_vectors_are_seeded():
    one, two, other = (random_context((400, 64), seed) for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert abs(float(one.std()) - 0.02) < 1e-3 and abs(float(one.mean())) < 1e-3
