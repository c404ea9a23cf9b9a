"""Training an annotator anew."""

import math
import sys

import open_clip
import pytest
import torch

import coreg.demo.pretrain as pretraining
from coreg.demo.annotator import COMPACT_FILE, CONFIG_FILE, load_compact, local_dir
from coreg.demo.pretrain import main, pretrain


def test_a_few_steps_reduce_the_loss(fonts):
    _, token_ids, losses = pretrain(seed=0, steps=30, batch_size=64)
    assert len(losses) == 30 and all(math.isfinite(loss) for loss in losses)
    # An untrained CLIP guesses among 64 captions: log(64).
    assert losses[0] == pytest.approx(math.log(64), abs=0.5)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.3
    assert (token_ids.diff() > 0).all()


def test_the_seed_decides(fonts):
    first, again, other = (pretrain(seed=seed, steps=2, batch_size=16)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])


def test_command_writes_a_loadable_folder(fonts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pretraining, "BATCH_SIZE", 16)
    output = tmp_path / "deep" / "model"
    assert main(["--seed", "5", "--steps", "2", "--output", str(output)]) == 0
    assert sorted(p.name for p in output.iterdir()) == sorted([CONFIG_FILE, COMPACT_FILE])
    assert [p.name for p in output.parent.iterdir()] == ["model"]
    name = "local-dir:" + local_dir(output)
    assert name in capsys.readouterr().out
    model, _, _ = open_clip.create_model_and_transforms(name)
    _, state, _ = load_compact(output)
    assert torch.equal(model.visual.proj, state["visual.proj"])


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_no_steps_are_refused(tmp_path, capsys, steps):
    with pytest.raises(SystemExit) as caught:
        main(["--steps", steps, "--output", str(tmp_path / "model")])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit) as caught:
        main(["--steps", "1", "--output", str(tmp_path)])
    assert caught.value.code == 2 and "exists" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as caught:
        main(["--steps", "1", "--output", str(tmp_path / "model")])
    assert caught.value.code == 2 and "pip install 'coreg[dev]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_output_below_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(["--steps", "1", "--output", str(tmp_path / "file" / "model")])
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1
