"""Every method that learns from candidate sets, with every kind of tuner and head, from a step to the export."""

import dataclasses
import itertools

import pytest
import torch

from coreg.export.ensemble import export
from coreg.export.folder import load_export
from coreg.learn.partial import METHODS
from coreg.learn.partial.method import PartialBatch
from coreg.learn.partial_options import OPTIONS
from coreg.learn.schedules import Step
from coreg.nets.model import Model, create_backbone
from coreg.nets.tuning import Tuning

N, C, n = 6, 3, 4
NAME, TINY = "vit_tiny_patch16_224", {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SETTINGS = {"class_names": ["a", "b", "c"], "image_size": 16, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
SETS = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
TUNERS = [(), ("adaptformer",), ("lora", "vpt_deep")]


def made(name, tuning):
    torch.manual_seed(0)
    backbone = create_backbone(NAME, C, 3, TINY, pretrained=False)
    net = Model(backbone, 4, tuning.apply(backbone, C))
    small = {"projection_dim": 4, "queue_size": 8, "plan_queue": 4}
    has = [field.name for field in dataclasses.fields(OPTIONS[name])]
    return METHODS[name](net, SETS, OPTIONS[name](**{key: value for key, value in small.items() if key in has}))


def images(*key, rows=n):
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(hash(key)))


def batch(method, when):
    """Four of the six images, with the views that the method wants."""
    passes, index = method.passes(when), torch.tensor([4, 1, 5, 2])
    views = tuple(images(when.step, number) for number in range(len(passes.views)))
    mixed = {"mixed": images(7), "partner": torch.tensor([2, 3, 1, 0]), "share_kept": 0.8} if passes.mixup != "none" else {}
    key, glance = (images(number) if kind else None for number, kind in ((8, passes.key), (9, passes.glance)))
    return PartialBatch(index, when, views, key, glance, draws=("test", when.step), **mixed)


def trained(method):
    """Two steps in the middle of a training and the end of their epoch; gives what trained in the beginning."""
    weights = [weight for weight in method.trained().parameters() if weight.requires_grad]
    before, optimizer = [weight.detach().clone() for weight in weights], torch.optim.SGD(weights, lr=0.1)
    for step in range(2):
        one = batch(method, Step(6, 10, step, 2))
        parts = method.train()(one)
        assert all(part.isfinite() for part in parts.values())
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(one)
    with torch.no_grad():
        method.survey(method.net.eval()(images(0, rows=N))[0], Step(6, 10))
    method.finish_epoch(Step(6, 10))
    return before


def cases():
    """All of them, most marked slow; one of every method and all of those with a prediction of their own are quick."""
    each = list(itertools.product(TUNERS, ["linear", "cosine"]))
    for number, name in enumerate(METHODS):
        for place, (tuners, head) in enumerate(each):
            quick = METHODS[name].prediction or place == number % len(each)
            label = "-".join([name, *(tuners or ["untuned"]), head])
            yield pytest.param(name, tuners, head, id=label, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "tuners", "head"), list(cases()))
def test_a_method_trains_what_is_tuned_and_its_export_predicts_as_it_does(tmp_path, name, tuners, head):
    tuning = Tuning(tuners, head=head, bottleneck=2, prompt_tokens=2)
    method = made(name, tuning)
    still = {key: w.detach().clone() for key, w in method.net.backbone.named_parameters() if not w.requires_grad}
    assert bool(still) == bool(tuners)
    before = trained(method)
    after = [weight for weight in method.trained().parameters() if weight.requires_grad]
    assert sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) >= 2
    assert all(torch.equal(w, still[key]) for key, w in method.net.backbone.named_parameters() if key in still)
    at_start = made(name, tuning).net.tuners.state_dict()
    moved = {key.split(".")[0] for key, w in method.net.tuners.state_dict().items() if not torch.equal(w, at_start[key])}
    assert moved == set(tuners)

    with torch.no_grad():
        judged = method.judged().eval()
        wanted = judged.logits(images(3))
        assert wanted.shape == (n, C) and wanted.isfinite().all()
        # a checkpoint, which holds nothing that is frozen, brings a fresh method there
        fresh = made(name, tuning)
        state = method.state_dict()
        assert not any(key.removeprefix("net.backbone.") in still for key in state)
        fresh.load_state_dict(state)
        assert torch.equal(fresh.judged().eval().logits(images(3)), wanted)
        export(tmp_path / "export", [judged.backbone], NAME, TINY, images(4), tuning, [judged.tuners], **SETTINGS)
        (again,), _ = load_export(tmp_path / "export")
        torch.testing.assert_close(again(images(3)), wanted, rtol=1e-4, atol=1e-5)
