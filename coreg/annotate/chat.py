"""Chat models as annotators: LLaVA and every other image-text-to-text model that transformers loads."""

from __future__ import annotations

import copy
import inspect
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image

from coreg.annotate.answers import AnswerParser
from coreg.annotate.models import PRECISIONS, ModelSpec, load_transformers, one_line
from coreg.annotate.texts import refuse_same, same_rows
from coreg.data.keyed import keyed_generator
from coreg.errors import UserError

# {} is where the class names go; their order differs from question to question, because chat models prefer some places.
CHAT_TEMPLATES = (
    "Which of these is shown in the image: {}? Answer with exactly one of these names and nothing else.",
    "Choose the name that describes the image best. The choices are: {}. Reply with the chosen name only.",
    "Classify the image into one of the following classes: {}. Write only the name of the class.",
    "The image shows one of the following: {}. Which one is it? Answer with its name only.",
    "Look at the main object of the image. Name it with exactly one of these words: {}.",
    "What is in this picture? Pick one from this list: {}. Answer with the name from the list and no other words.",
)
ROWS_AT_ONCE = 64  # pairs of image and class name in a forward pass, when batches of images are smaller
EXTRA_TOKENS = 4  # an answer may be this many tokens longer than the longest class name
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # of log-likelihoods with and without cache


def questions(templates: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """T questions that list all C class names; the first in the given order, the others each in an order of its own."""
    asked = []
    for number, template in enumerate(templates):
        order = range(len(class_names)) if number == 0 else keyed_generator("choices", number).permutation(len(class_names))
        asked.append(template.replace("{}", ", ".join(class_names[index] for index in order)))
    return asked


@dataclass
class Asked:
    """PIL image -> what the model's processor makes of it under every question; picklable, holds no model.

    The result has `text`, for every question a mapping from `input_ids` (and other tensors with one value a token) to
    tensors (L,), and `pixels`, a mapping to tensors whose first dimension counts images, tiles or patches.
    """

    processor: Any  # of transformers
    prompts: list[str]  # a conversation for every question
    special_tokens: bool  # whether the tokenizer is to add those that begin a text

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        image = image.convert("RGB")
        text, pixels = [], {}
        for number, prompt in enumerate(self.prompts):
            inputs = self.processor(
                images=[image], text=[prompt], return_tensors="pt", add_special_tokens=self.special_tokens
            )
            shape = inputs["input_ids"].shape
            inputs.pop("attention_mask", None)  # one image and one text: nothing is padded
            text.append({name: value[0] for name, value in inputs.items() if value.shape == shape})
            if number == 0:  # the image becomes the same under every question
                pixels = {name: value for name, value in inputs.items() if value.shape != shape}
        return {"text": text, "pixels": pixels}


@dataclass
class Read:
    """What the model has read of n conversations of equal length."""

    ids: torch.Tensor  # int64 (n, L), the tokens
    types: dict[str, torch.Tensor]  # (n, L') by name, other values of tokens, as many as have one
    pixels: list[dict[str, torch.Tensor]]  # of each conversation, see `Asked`
    cache: Any = None  # the model's keys and values of the tokens; without, all are read anew for every further one

    def copied(self, times: int = 1) -> Read:
        """An independent copy with every conversation `times` times, one after the other."""
        cache = copy.deepcopy(self.cache)
        if cache is not None and times > 1:
            cache.batch_repeat_interleave(times)
        return Read(
            self.ids.repeat_interleave(times, dim=0),
            {name: value.repeat_interleave(times, dim=0) for name, value in self.types.items()},
            [row for row in self.pixels for _ in range(times)],
            cache,
        )


class ChatAnnotator:
    """A chat model that is asked, for every template, which of the class names an image shows.

    `likelihood`: the score of a class is the mean over its name's tokens of log p(token | image, question, tokens before);
    p_t is the softmax of the scores over the classes and the vote its argmax. `generate`: the model answers greedily in at
    most as many tokens as the longest name and a few more, and `AnswerParser` finds the vote or abstains; p_t is 1 for the
    vote, or uniform. Both read the image and what all questions have in common once, and keep it for every question and
    every class name, if the model's cache turns out to give what reading everything anew gives.
    """

    features = None
    notes: ClassVar[list[str]] = []
    collate = list

    def __init__(
        self,
        model: ModelSpec,
        templates: Sequence[str],
        class_names: Sequence[str],
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        mode: str = "likelihood",
    ) -> None:
        """Load the model.

        Raises:
            UserError: it cannot be loaded, has no chat template, or reads the same in two class names.
        """
        self.device, self.dtype, self.mode = torch.device(device), PRECISIONS[precision], mode
        processor, network = load_chat(model, self.dtype)
        self.network = network.to(self.device)
        self.tokenizer = processor.tokenizer
        prompts = [self._prompt(model, processor, question) for question in questions(templates, class_names)]
        # chat templates write the token that begins a text themselves, or leave it to the tokenizer
        begin = self.tokenizer.bos_token
        special = not (begin and prompts[0].startswith(begin))
        self.preprocess = Asked(processor, prompts, special)
        self.preprocessing = json.loads(processor.image_processor.to_json_string())
        self.names = [self._name_tokens(prompts[0], name, special) for name in class_names]
        longest = max(map(len, self.names))
        refuse_same(
            same_rows(torch.tensor([name + [-1] * (longest - len(name)) for name in self.names])), class_names, model.spec
        )
        self.parse = AnswerParser(class_names)
        ends = getattr(network.generation_config, "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        self.ends = torch.tensor([*ends, self.tokenizer.eos_token_id or 0], device=self.device)
        self.keeps_logits = "logits_to_keep" in inspect.signature(network.forward).parameters
        self.cached = self._cache_works()

    @staticmethod
    def _prompt(model: ModelSpec, processor: Any, question: str) -> str:
        conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        try:
            return processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False).rstrip(" ")
        except Exception as error:
            raise UserError(
                f"{model.spec} cannot be asked: {one_line(error)}; use a chat model whose folder has a chat_template"
            ) from None

    def _name_tokens(self, prompt: str, name: str, special: bool) -> list[int]:
        """The tokens with which the answer `name` goes on after `prompt`."""
        answer = name if prompt[-1:].isspace() else f" {name}"
        before = self.tokenizer(prompt, add_special_tokens=special)["input_ids"]
        whole = self.tokenizer(prompt + answer, add_special_tokens=special)["input_ids"]
        # A tokenizer that adds an end token adds it to both.
        while before and before[-1] == whole[-1] == self.tokenizer.eos_token_id:
            before, whole = before[:-1], whole[:-1]
        if whole[: len(before)] == before and len(whole) > len(before):
            return whole[len(before) :]
        return self.tokenizer(name, add_special_tokens=False)["input_ids"]

    # ---- reading ----

    def _read(self, read: Read, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """Let every conversation of `read` go on with tokens `ids` (n, k); `read` is changed.

        Returns:
            float32 (n, keep, V): logits after the last `keep` of the tokens.
        """
        old = read.ids.shape[1]
        read.ids = torch.cat([read.ids, ids], dim=1)
        inputs: dict[str, Any] = {"logits_to_keep": keep} if self.keeps_logits else {}
        if old == 0 or read.cache is None:
            for name in read.pixels[0]:
                value = torch.cat([row[name] for row in read.pixels]).to(self.device)
                inputs[name] = value.to(self.dtype) if value.is_floating_point() else value
            length = read.ids.shape[1]
            for name, value in read.types.items():  # tokens of an answer are of type 0, as in generation
                inputs[name] = torch.nn.functional.pad(value, (0, max(0, length - value.shape[1])))[:, :length]
            tokens = read.ids
            inputs["attention_mask"] = torch.ones_like(tokens)
        else:  # nothing is padded; from a mask of all tokens Qwen would count the positions of all, not of the new ones
            tokens, inputs["past_key_values"] = ids, read.cache
        output = self.network(input_ids=tokens, use_cache=self.cached, return_dict=True, **inputs)
        read.cache = output.past_key_values if self.cached else None
        return output.logits[:, -keep:].float()

    def _begin(self, items: list[dict[str, Any]]) -> tuple[Read, list[tuple[torch.Tensor, dict[str, torch.Tensor]]]]:
        """Read what all questions about n images begin with, the images among it.

        Returns:
            what was read; for every question the rest of its tokens, int64 (n, k_t), not read yet, with the types of all
            tokens that have one.
        """
        count = len(items)
        texts = [{name: value.to(self.device) for name, value in text.items()} for text in items[0]["text"]]
        tokens = [text.pop("input_ids") for text in texts]
        shared = min(len(ids) for ids in tokens) - 1
        for ids in tokens[1:]:
            differs = (ids[:shared] != tokens[0][:shared]).nonzero()
            shared = int(differs[0]) if len(differs) else shared
        image_token = getattr(self.network.config, "image_token_id", None)
        if not self.cached or image_token is None or any((ids[shared:] == image_token).any() for ids in tokens):
            shared = 0  # an image is read in one piece
        # after the images all tokens are of the same type
        types = [{name: value[: shared or None].expand(count, -1) for name, value in text.items()} for text in texts]
        read = Read(tokens[0].new_empty(count, 0), types[0], [item["pixels"] for item in items])
        if shared:
            self._read(read, tokens[0][:shared].expand(count, -1), keep=1)
        return read, [(ids[shared:].expand(count, -1), kinds) for ids, kinds in zip(tokens, types)]

    # ---- asking ----

    @torch.inference_mode()
    def annotate(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor | list]:
        """Ask every question about every image of a batch.

        Args:
            batch: n results of `preprocess`.

        Returns:
            votes int16 (n, T), -1 for abstention; probs float16 (n, C); in mode `generate` also the answers.
        """
        groups = defaultdict(list)  # images whose conversations are equally long are read together, without padding
        for place, item in enumerate(batch):
            lengths = tuple(len(text["input_ids"]) for text in item["text"])
            groups[lengths, str({name: value.shape[1:] for name, value in item["pixels"].items()})].append(place)
        count, classes = len(self.preprocess.prompts), len(self.names)
        votes = torch.empty(len(batch), count, dtype=torch.int16)
        probs = torch.zeros(len(batch), classes)
        answers: list[list[str]] = [[] for _ in batch]
        for places in groups.values():
            begun, rest = self._begin([batch[place] for place in places])
            for number, (ids, types) in enumerate(rest):
                read = begun.copied()
                read.types = types
                if self.mode == "likelihood":
                    scores = self._likelihoods(read, ids).cpu()
                    named = scores.argmax(dim=1)
                    probs[places] += scores.softmax(dim=1)
                else:
                    replies = self._generate(read, ids)
                    named = torch.tensor([self.parse(answer) for answer in replies])
                    certain = torch.nn.functional.one_hot(named.clamp(min=0), classes).float()
                    probs[places] += torch.where(named[:, None] >= 0, certain, torch.tensor(1 / classes))
                    for place, answer in zip(places, replies):
                        answers[place].append(answer)
                votes[places, number] = named.to(torch.int16)
        judged: dict[str, torch.Tensor | list] = {"votes": votes, "probs": (probs / count).half()}
        return judged | ({"answers": answers} if self.mode == "generate" else {})

    def _likelihoods(self, read: Read, ids: torch.Tensor) -> torch.Tensor:
        """float32 (n, C): mean log-likelihood of the tokens of every class name as the answer."""
        first = self._read(read, ids, keep=1)[:, -1].log_softmax(dim=-1)
        scores = []
        step = max(1, ROWS_AT_ONCE // len(ids))
        for start in range(0, len(self.names), step):
            names = self.names[start : start + step]
            lengths = torch.tensor([len(name) for name in names], device=self.device)
            longest = int(lengths.max())
            tokens = torch.tensor([name + name[-1:] * (longest - len(name)) for name in names], device=self.device)
            each = first[:, tokens[:, 0]][..., None]
            if longest > 1:
                some = read.copied(len(names))
                logits = self._read(some, tokens[:, :-1].repeat(len(ids), 1), keep=longest - 1)
                logits = logits.log_softmax(dim=-1).view(len(ids), len(names), longest - 1, -1)
                wanted = tokens[:, 1:].expand(len(ids), -1, -1)[..., None]
                each = torch.cat([each, logits.gather(-1, wanted)[..., 0]], dim=2)
            counts = torch.arange(longest, device=self.device) < lengths[:, None]  # not the padding after a name
            scores.append((each * counts).sum(dim=2) / lengths)
        return torch.cat(scores, dim=1)

    def _generate(self, read: Read, ids: torch.Tensor) -> list[str]:
        """The n greedy answers."""
        ended = torch.zeros(len(ids), dtype=torch.bool, device=self.device)
        generated = []
        for _ in range(max(map(len, self.names)) + EXTRA_TOKENS):
            token = self._read(read, ids, keep=1)[:, -1].argmax(dim=-1)
            token = torch.where(ended, self.ends[-1], token)
            generated.append(token)
            ended |= torch.isin(token, self.ends)
            if bool(ended.all()):
                break
            ids = token[:, None]
        return [text.strip() for text in self.tokenizer.batch_decode(torch.stack(generated, 1), skip_special_tokens=True)]

    @torch.inference_mode()
    def _cache_works(self) -> bool:
        """Whether likelihoods with the cache are those without; not every model's cache can be copied and extended."""
        item = self.preprocess(Image.new("RGB", (48, 32), "gray"))
        names, self.names = self.names, self.names[:3]
        try:
            scores = []
            for self.cached in (False, True):
                read, rest = self._begin([item, item])
                scores.append(self._likelihoods(read.copied(), rest[0][0]))
            return bool((scores[0] - scores[1]).abs().max() <= AGREEMENT[self.dtype])
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError):
            if not self.cached:
                raise  # without a cache it has to work
            return False
        finally:
            self.names = names


def load_chat(model: ModelSpec, dtype: torch.dtype) -> tuple[Any, torch.nn.Module]:
    """Processor and model of a folder that transformers saved; only safetensors are read and no code in it is run.

    Raises:
        UserError: they cannot be loaded.
    """
    remedy = "give a folder with an image-text-to-text model"
    processor, network = load_transformers(model, "AutoModelForImageTextToText", dtype, " as a chat model", remedy)
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UserError(f"{model.spec} has no processor for images and text; copy its processor files into the folder too")
    return processor, network.eval().requires_grad_(False)
