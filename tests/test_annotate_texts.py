"""Class names that a model cannot tell apart are refused, names that it does not read to their end are named."""

import numpy as np
import pytest
import torch
from PIL import Image
from runs import error_of, script
from test_annotate_annotators import save_tiny_clip
from test_annotate_chat import save_tiny_llava
from test_annotate_transformers import save_tiny

from annotate_vlm import main
from coreg.annotate.annotators import load_annotator
from coreg.annotate.models import resolve
from coreg.annotate.texts import compare_texts, groups_of, same_rows

LONG = "a very long name of an animal that lives in the deep and dark forest of the far north"
TWINS = [f"{LONG} and is black", "cat", f"{LONG} and is white"]


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_tiny_clip(root / "open_clip")
    save_tiny(root / "clip", "clip")
    save_tiny(root / "siglip", "siglip")
    save_tiny_llava(root / "llava")
    return {"open_clip": f"local-dir:{root}/open_clip", "chat": f"chat:{root}/llava"} | {
        name: f"transformers:{root}/{name}" for name in ("clip", "siglip")
    }


@pytest.mark.parametrize("seed", range(20))
def test_equal_rows_are_those_that_comparing_all_pairs_finds(seed):
    random = np.random.default_rng(seed)
    rows = torch.from_numpy(random.integers(0, 3, (30, 3))).double()
    numbers = same_rows(rows)
    for a in range(30):
        for b in range(30):
            assert (numbers[a] == numbers[b]) == bool((rows[a] == rows[b]).all())
    groups = groups_of(numbers)
    assert groups == sorted(groups) and all(len(group) > 1 and group == sorted(group) for group in groups)
    assert sum(map(len, groups)) == sum(int((numbers == n).sum()) > 1 for n in numbers)


def test_rows_within_the_tolerance_are_equal_and_others_are_not():
    rows = torch.nn.functional.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = torch.cat([rows, rows[:5] + 5e-7, rows[:5] + 1e-4])
    assert groups_of(same_rows(rows, 1e-6)) == [[n, 50 + n] for n in range(5)]
    assert groups_of(same_rows(rows[:1])) == []


def test_one_template_is_a_note_and_every_template_an_error():
    features = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    names, templates, none = ["a", "b", "c", "d"], ["one {}", "two {}"], torch.zeros(4, dtype=torch.bool)
    assert compare_texts(features.view(8, 8), none, templates, names, "m", 0.0) == []
    features[1, 3] = features[1, 1]
    (note,) = compare_texts(features.view(8, 8), none, templates, names, "m", 0.0)
    assert note == "the template 'two {}' is the same text for 'b' and 'd'"
    features[0, 2] = features[0, 1]  # other classes under the other template: every two differ somewhere
    assert len(compare_texts(features.view(8, 8), none, templates, names, "m", 0.0)) == 2
    features[0, 3] = features[0, 1]
    assert "'b' and 'd' and cannot tell them apart" in error_of(
        compare_texts, features.view(8, 8), none, templates, names, "m", 0.0
    )
    cut = none.clone()
    cut[[2, 3]] = True
    (note,) = compare_texts(torch.randn(8, 8), cut, templates, names, "m", 0.0)
    assert "2 of 4 classes ('c', 'd')" in note


@pytest.mark.parametrize("kind", ["open_clip", "clip", "siglip"])
def test_names_beyond_the_context_are_refused_where_they_become_equal(specs, kind):
    model = resolve(specs[kind])
    line = error_of(load_annotator, model, ["a {}", "my {}"], TWINS)
    assert repr(TWINS[0]) in line and repr(TWINS[2]) in line and "'cat'" not in line
    # distinguished by their beginnings, but not read to the end
    (note,) = load_annotator(model, ["a {}", "my {}"], [f"black {LONG}", "cat", f"white {LONG}"]).notes
    assert "2 of 3 classes" in note and "'cat'" not in note
    assert load_annotator(model, ["a {}", "my {}"], ["cat", "dog"]).notes == []


@pytest.mark.parametrize("kind", ["open_clip", "clip", "siglip"])
def test_a_text_is_cut_from_the_first_token_too_many_on(specs, kind):
    towers = load_annotator(resolve(specs[kind]), ["{}"], ["cat", "dog"]).towers
    # a digit is a token of its own; two more begin and end a text in open_clip, none in these tokenizers of transformers
    room = towers.context - 2 * (kind == "open_clip")
    digits = ["7" * n if kind != "open_clip" else " ".join("7" * n) for n in range(1, room + 4)]
    assert towers.cut(digits).tolist() == [n > room for n in range(1, room + 4)]


def test_a_template_that_is_cut_before_the_name_is_a_note(specs):
    notes = load_annotator(resolve(specs["open_clip"]), ["a {}", f"{LONG} or a {{}}"], ["cat", "dog"]).notes
    assert any("the same text for 'cat' and 'dog'" in note for note in notes)


def test_chat_models_need_names_of_different_tokens(specs):
    model = resolve(specs["chat"])
    question = ["Which one: {}?"]
    assert load_annotator(model, question, ["cat", "dog"]).notes == []
    assert "'cat' and 'cat'" in error_of(load_annotator, model, question, ["cat", "dog", "cat"])


def test_annotating_and_judging_again_refuse_such_names_and_leave_nothing(specs, tmp_path, capsys):
    for number, name in enumerate(["cat", "dog"] * 3):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (40 * number, 0, 90)).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "twins.txt").write_text("\n".join(TWINS))
    (tmp_path / "long.txt").write_text(f"cat\ndog\nblack {LONG}")
    common = ["--batch_size", "3", "--workers", "0", "--output_dir"]
    job = ["--images", str(tmp_path / "photos"), "--vlm", specs["open_clip"]]
    with pytest.raises(SystemExit):
        main([*job, "--classes", str(tmp_path / "twins.txt"), *common, str(tmp_path / "new")])
    assert "cannot tell them apart" in capsys.readouterr().err and not (tmp_path / "new").exists()
    main([*job, "--classes", str(tmp_path / "long.txt"), *common, str(tmp_path / "ann")])
    assert "note: local-dir:" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        again = ["--rescore", str(tmp_path / "ann"), "--classes", str(tmp_path / "twins.txt")]
        main([*again, *common, str(tmp_path / "again")])
    assert "cannot tell them apart" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_prompts_that_are_the_same_to_the_model_are_not_tuned():
    class Same:
        """A tokenizer that writes every name as one token, the first two as the same."""

        def __call__(self, texts):
            vocabulary = {"cat": 5, "Cat": 5, "dog": 6}
            rows = [[1, *(vocabulary.get(w, 7 + ord(w[0])) for w in t.replace(".", "").split()), 2] for t in texts]
            return {"input_ids": torch.tensor([row + [0] * (12 - len(row)) for row in rows])}

    coop = script("coop")
    from coreg.nets.tuners.prompts import lay_out

    prompts = lay_out(Same(), ["cat", "Cat", "dog"], 2, "end")
    assert "'cat' and 'Cat'" in error_of(
        coop.refuse_same, coop.same_rows(prompts.tokens["input_ids"]), ["cat", "Cat", "dog"], "the model"
    )
