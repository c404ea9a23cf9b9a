"""annotate_vlm.py as a person uses it: real `main([...])`, real files, tiny models, kills and restarts."""

import csv
import html
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from runs import refused
from test_annotate_annotators import save_tiny_clip

import annotate_vlm
from annotate_vlm import AnnotateConfig, annotate, main
from coreg import files
from coreg.annotate.prompts import TEMPLATES
from coreg.errors import UserError
from coreg.store.store import AnnotationStore

NAMES = ["red thing", "green thing", "blue thing"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a folder of 23 images of which 2 cannot be read, and files with names and templates."""
    root = tmp_path_factory.mktemp("place")
    save_tiny_clip(root / "model")
    generator = np.random.default_rng(0)
    for number in range(21):
        folder = root / "photos" / ("test" if number % 5 == 0 else "train") / NAMES[number % 3].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        shape = generator.integers(20, 60, 2)
        pixels = generator.integers(0, 100, (*shape, 3), dtype=np.uint8)
        pixels[..., number % 3] += 150
        Image.fromarray(pixels).save(folder / f"{number:02d} ü.png")
    (root / "photos" / "train" / "broken.jpg").write_bytes(b"")
    (root / "photos" / "train" / "text.png").write_text("no image")
    (root / "photos" / "notes.txt").write_text("not an image and not called like one")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    (root / "templates.txt").write_text("a photo of a {}\na {} at night\nmy {}\n")
    return root


def arguments(place, output, **changed):
    options = {
        "images": place / "photos",
        "vlm": f"local-dir:{place / 'model'}",
        "classes": place / "classes.txt",
        "templates": place / "templates.txt",
        "output_dir": output,
        "batch_size": 3,
        "block_size": 4,
        "workers": 0,
        **changed,
    }
    return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]


def block_bytes(root):
    return {file.name: file.read_bytes() for file in sorted((Path(root) / "blocks").iterdir())}


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "ann"
    main(arguments(place, output))
    return output


def test_a_folder_becomes_a_store(place, finished):
    store = AnnotationStore.open(finished)
    assert len(store) == 23 and store.class_names == NAMES and len(store.templates) == 3
    assert [path for path, bad in zip(store.paths, store.unreadable) if bad] == ["train/broken.jpg", "train/text.png"]
    with (finished / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["train/broken.jpg", "train/text.png"] and rows[0]["reason"] == "empty file"
    for path, label, split in zip(store.paths, store.labels, store.split):
        assert split == path.startswith("test/")
        assert label == (NAMES.index(path.split("/")[1].replace("_", " ")) if path.count("/") == 2 else -1)
    assert store.manifest["model"]["spec"] == f"local-dir:{(place / 'model').resolve()}"
    assert store.manifest["preprocessing"]["mean"] == [0.5] * 3 and store.manifest["features"] == 8


def test_the_votes_are_those_of_open_clip_on_the_files(place, finished):
    store = AnnotationStore.open(finished)
    name = f"local-dir:{place / 'model'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    for row in np.flatnonzero(~store.unreadable):
        image = preprocess(Image.open(place / "photos" / store.paths[row]))[None]
        with torch.no_grad():
            seen = model.encode_image(image, normalize=True)
            probs = torch.cat(
                [
                    (model.logit_scale.exp() * seen @ model.encode_text(tokenizer(texts), normalize=True).T).softmax(dim=1)
                    for texts in [[template.format(n) for n in NAMES] for template in store.templates]
                ]
            )
        assert store.votes()[row].tolist() == probs.argmax(dim=1).tolist()
        assert np.allclose(store.probs()[row], probs.mean(dim=0).numpy(), atol=2e-3)
        assert np.allclose(store.features()[row], seen[0].numpy(), atol=2e-3)
    assert (store.votes()[store.unreadable] == -1).all()
    assert np.allclose(store.probs()[store.unreadable], 1 / 3, atol=1e-3)


def test_the_summary_says_what_came_out_and_what_to_type_next(place, tmp_path, capsys):
    main(arguments(place, tmp_path / "my ann"))
    text = capsys.readouterr().out
    for words in (
        "23 images, 3 classes, 3 templates",
        "unreadable images      2 (see errors.csv)",
        "mean candidates",
        "zero-shot",
    ):
        assert words in text
    assert f"next: accelerate launch train_coreg.py --annotations '{tmp_path}/my ann' --output_dir" in text


def test_the_summary_counts_splits_labels_and_what_was_passed_over(place, tmp_path, capsys):
    """In the terminal, in the health report and in its page."""
    photos = tmp_path / "photos"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in (
        "train/red thing/1",
        "train/Green Things/2",
        "train/Green Things/3",
        "val/blue thing/4",
        "val/5",
        "test/6",
    ):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(photos / f"{name}.png")
    (photos / "raw.cr2").write_bytes(b"x")
    Image.fromarray(np.full((9, 9), 4095, np.uint16)).save(photos / "deep.png")
    main(arguments(place, tmp_path / "ann", images=photos))
    output = capsys.readouterr().out
    assert output.count("note: 1 images of 16 bits a channel have no value above a quarter of the range") == 1
    lines = [
        "images: train 4 (1 labelled), test 1 (0 labelled), held out 2 (1 labelled)",
        "folders called like no class: 'Green Things' (2 images, did you mean 'green thing'?)",
        "splits: 'test' is test, 'train' is train, 'val' is held out (neither trained on nor counted as test)",
        "passed over: 1 .cr2",
    ]
    page = (tmp_path / "ann" / "report.html").read_text(encoding="utf-8")
    for line in lines:
        assert f"  {line}\n" in output and f"{line}\n" in (tmp_path / "ann" / "report.txt").read_text(encoding="utf-8")
        assert f"<p>{html.escape(line, quote=True)}</p>" in page
    main(arguments(place, tmp_path / "ann2", rescore=tmp_path / "ann", images=None, templates=None, vlm=None))
    assert all(f"  {line}\n" in capsys.readouterr().out for line in lines[3:])


def test_the_same_command_again_does_nothing(place, finished, capsys, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    monkeypatch.setattr(annotate_vlm, "load_annotator", None)  # the model is not even loaded
    main(arguments(place, finished))
    assert "nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_started_again_gives_the_same_store(place, finished, tmp_path, monkeypatch, workers):
    output = tmp_path / "ann"
    real, left = files.os.fsync, [13]

    def dies(descriptor):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", dies)
    # four files, flushed again with the folder that holds them, the texts and three blocks are there; the fourth is torn
    with pytest.raises(KeyboardInterrupt):
        main(arguments(place, output, workers=workers))
    monkeypatch.setattr(files.os, "fsync", real)
    written = {file: file.stat().st_mtime_ns for file in (output / "blocks").glob("0*")}
    assert len(written) == 3 and not (output / "errors.csv").exists()
    main(arguments(place, output, workers=workers))
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in written.items())
    assert block_bytes(output) == block_bytes(finished)
    assert AnnotationStore.open(output).hash == AnnotationStore.open(finished).hash
    assert (output / "errors.csv").read_bytes() == (finished / "errors.csv").read_bytes()


def test_a_damaged_block_is_annotated_again(place, finished, tmp_path):
    output = tmp_path / "ann"
    shutil.copytree(finished, output)
    content = bytearray((output / "blocks" / "00002.safetensors").read_bytes())
    content[-1] ^= 255
    (output / "blocks" / "00002.safetensors").write_bytes(content)
    (output / "blocks" / "00004.safetensors").unlink()
    main(arguments(place, output))
    assert block_bytes(output) == block_bytes(finished)


def test_another_job_does_not_touch_the_folder(place, finished, tmp_path, capsys):
    before = block_bytes(finished)
    (tmp_path / "classes.txt").write_text("\n".join([*NAMES, "purple thing"]))
    save_tiny_clip(tmp_path / "model", seed=5)
    shutil.copytree(place / "photos", tmp_path / "photos")
    for changed, words in [
        ({"classes": tmp_path / "classes.txt"}, "class_names (3 there, 4 asked for)"),
        ({"templates": None}, "templates (3 there, 27 asked for)"),
        ({"vlm": f"local-dir:{tmp_path / 'model'}"}, "model spec"),
        ({"images": tmp_path / "photos" / "test"}, "images count (23 there, 5 asked for)"),
        ({"block_size": 5}, "block_size (4 there, 5 asked for)"),
    ]:
        line = refused(capsys, main, *arguments(place, finished, **changed))
        assert "another job" in line and words in line
    assert block_bytes(finished) == before and len(TEMPLATES) == 27


def test_bad_input_ends_in_one_line_and_leaves_nothing(place, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"")
    (broken / "b.png").write_text("text")
    files = {"one": "cat\n", "twice": "cat\nCat\n", "blank": "\n \n", "plain": "a photo\n"}
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_text(content)
    output = tmp_path / "new" / "ann"
    for changed, words in [
        ({"images": tmp_path / "nowhere"}, "does not exist"),
        ({"images": broken}, "none of the 2 images"),
        ({"images": tmp_path / "new.csv"}, "does not exist"),
        ({"classes": None}, "write them into classes.txt, one a line, and add --classes classes.txt"),
        ({"classes": tmp_path / "one.txt"}, "at least two"),
        ({"classes": tmp_path / "twice.txt"}, "repeats the class name"),
        ({"classes": tmp_path / "blank.txt"}, "holds no class names"),
        ({"classes": tmp_path / "none.txt"}, "No such file"),
        ({"templates": tmp_path / "plain.txt"}, "exactly one {}"),
        ({"vlm": "ViT-B-23/openai"}, "did you mean ViT-B-32/openai?"),
        ({"vlm": f"local-dir:{broken}"}, "open_clip_config.json does not exist"),
        ({"batch_size": 0}, "--batch_size is 0; give a number from 1"),
        ({"block_size": -1}, "--block_size is -1; give a number from 1"),
        ({"batch_size": "many"}, "many"),
        ({"image": "x"}, "did you mean --images?"),
        ({"output_dir": tmp_path}, "holds other things"),
        ({"output_dir": tmp_path / "one.txt"}, "holds other things"),
    ]:
        assert words in refused(capsys, main, *arguments(place, changed.pop("output_dir", output), **changed))
    assert not output.parent.exists() and (tmp_path / "one.txt").read_text() == "cat\n"


def test_without_arguments_the_demo_is_annotated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    main([])
    assert "note:" not in capsys.readouterr().out
    store = AnnotationStore.open("runs/demo/annotations")
    assert len(store) == 1797 and len(store.class_names) == 10 and store.images_spec == "builtin:digits"
    assert store.manifest["model"]["spec"] == "builtin:glyph-clip" and store.templates[0] != TEMPLATES[0]
    assert store.split.sum() == 360 and (store.images().labels == store.labels).all()
    right = (store.probs().argmax(axis=1) == store.labels)[store.split == 0].mean()
    assert right > 0.4  # far from the 0.1 of guessing


def test_the_built_in_model_on_other_images_is_remarked(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "digits.txt").write_text("one\ntwo\n")
    main(arguments(place, tmp_path / "ann", vlm="builtin:glyph-clip", templates=None, classes=tmp_path / "digits.txt"))
    assert "note: builtin:glyph-clip reads single digits and nothing else" in capsys.readouterr().out


def test_annotate_is_a_function_of_a_config(place, finished, tmp_path):
    config = AnnotateConfig(
        images=str(place / "photos"), vlm=f"local-dir:{place / 'model'}", classes=str(place / "classes.txt"),
        templates=str(place / "templates.txt"), output_dir=str(tmp_path / "ann"), batch_size=3, block_size=4, workers=1,
    )  # fmt: skip
    store = annotate(config)
    assert store.hash == AnnotationStore.open(finished).hash


def test_images_that_were_moved_go_on_in_the_old_store(place, finished, tmp_path, capsys):
    shutil.copytree(place / "photos", tmp_path / "new")
    output = shutil.copytree(finished, tmp_path / "ann")
    digest = AnnotationStore.open(output).hash
    main(arguments(place, output, images=tmp_path / "new"))
    assert "nothing to do" in capsys.readouterr().out
    (output / "blocks" / "00003.safetensors").unlink()
    main(arguments(place, output, images=tmp_path / "new"))
    store = AnnotationStore.open(output)
    assert store.hash == digest and store.images_spec == str(tmp_path / "new")
    assert block_bytes(output) == block_bytes(finished)


def test_a_damaged_manifest_or_list_is_mended_by_the_same_command(place, finished, tmp_path, capsys):
    output = shutil.copytree(finished, tmp_path / "ann")
    names = ("manifest.json", "images.txt", "samples.safetensors", "errors.csv")
    for name, content in {name: (output / name).read_bytes() for name in names}.items():
        (output / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match="command"):
            AnnotationStore.open(output)
        main(arguments(place, output))
        assert (output / name).read_bytes() == content
        assert AnnotationStore.open(output).hash == AnnotationStore.open(finished).hash
    assert block_bytes(output) == block_bytes(finished)


def test_a_report_that_could_not_be_written_is_written_by_the_same_command(place, finished, tmp_path, capsys, monkeypatch):
    output = shutil.copytree(finished, tmp_path / "ann")
    report = (output / "report.html").read_bytes()
    (output / "report.html").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full_disk)
        assert "No space left" in refused(capsys, main, *arguments(place, output))
    main(arguments(place, output))
    assert len((output / "report.html").read_bytes()) == len(report) + len(str(output)) * 2 - len(str(finished)) * 2
    (output / "report.txt").unlink()
    main(arguments(place, output))
    assert (output / "report.txt").exists()


def full_disk(descriptor):
    raise OSError(28, "No space left on device")


def test_numbers_that_overflow_are_no_votes(place, tmp_path, capsys, monkeypatch):
    real = annotate_vlm.load_annotator

    def overflowing(*arguments):
        annotator = real(*arguments)
        image = annotator.towers.image

        def half(pixels):  # some of the images, as a tower in float16 does
            features = image(pixels)
            features[pixels.mean(dim=(1, 2, 3)) > pixels.mean()] = torch.inf
            return features

        annotator.towers.image = half
        return annotator

    monkeypatch.setattr(annotate_vlm, "load_annotator", overflowing)
    for precision, advice in (("fp16", "--precision bf16"), ("fp32", "get them again")):
        with pytest.raises(SystemExit):
            main(arguments(place, tmp_path / precision, precision=precision))
        line = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
        assert "block 0 is not written: image '" in line and advice in line
        assert not list((tmp_path / precision / "blocks").iterdir())
