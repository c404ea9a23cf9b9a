"""The GPU's benchmark, rehearsed on the CPU: every part runs, what fails takes nothing with it, tables by hand."""

import json
import zipfile

import pytest
from runs import refused

from benchmarks import gpu, gpu_parts
from benchmarks.__main__ import PAGE

QUICK = [name for name in gpu.PARTS if name != "tests"]  # that one starts pytest, which takes seconds to collect


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The JSON file and a page of a whole rehearsal."""
    place = tmp_path_factory.mktemp("gpu")
    page = place / "page.md"
    page.write_text("Above.\n<!-- gpu -->\n<!-- end of gpu -->\n")
    assert gpu.main(["--dry_run", "--output", f"{place / 'gpu.json'}", "--page", f"{page}", "--only", *QUICK]) == 0
    return json.loads((place / "gpu.json").read_text()), page.read_text()


def test_every_part_gives_numbers(rehearsed):
    record, page = rehearsed
    parts = record["parts"]
    assert list(parts) == QUICK and not any("error" in numbers for numbers in parts.values())
    for part in ("step_fp32", "step_bf16", "step_compiled"):
        assert parts[part]["to_passes"]["passes"] == 1 and parts[part]["to_passes"]["ours"] > 0
        assert f"| {parts[part]['images'] / parts[part]['seconds']['ours']:,.0f} |".strip("| ") in page
    assert "plain" in parts["step_fp32"]["seconds"] and parts["step_bf16"]["waits"] == {}
    assert {"networks", "division", "plain"} <= set(parts["epoch"]) and parts["annotation"]["share"] > 0
    assert len(parts["step_bf16"]["top"]) == 10 and parts["tables"]["images"] == gpu_parts.DRY.table_images
    assert page.startswith("Above.\n<!-- gpu -->\n") and "Not measured" not in page


def test_the_operations_of_a_step_are_those_of_its_convolutions_and_products(rehearsed):
    """Counted by hand for preact_resnet_tiny: 14 B forward and 6 B backward passes, a backward one as two forward ones."""
    case = gpu_parts.DRY.case
    bench = gpu_parts.bench_of(gpu_parts.DRY, "no", False)
    (net,) = bench.networks(1)
    counted, hooks = [], []
    for module in net.modules():
        if type(module).__name__ in ("Conv2d", "Linear"):
            hooks.append(
                module.register_forward_hook(
                    lambda module, inputs, output: counted.append(
                        2 * output.numel() * module.weight.numel() // module.weight.shape[0]
                    )
                )
            )
    net(bench.data.view("plain", bench.rows(0)[0], ()))
    one = sum(counted) / case.batch
    # the first convolution has no gradient for its images, which is all that a backward pass saves
    measured = rehearsed[0]["parts"]["step_fp32"]["flop"]
    assert (14 + 11) * case.batch * one < measured <= (14 + 12) * case.batch * one


def test_tables_by_hand():
    steps = {"seconds": {"plain": 0.5, "ours": 0.1}, "to_passes": {"plain": 6.25, "ours": 1.25}, "images": 512}
    steps |= {"flop": 2e12, "peak_bytes": {"plain": 3e9, "ours": 2e9}}
    parts = {
        "card": {"rates": {"bf16": 8e14, "fp32": 5e13}},
        "step_fp32": steps,
        "epoch": {"error": "not finished after 1 s"},
    }
    plain, ours = gpu.step_rows(parts)
    assert ours == {
        "step": "ours, float32",
        "images/s": "5,120",
        "ms": "100.0",
        "times plain": "5.00",
        "time / passes": "1.250",
        "of the card's rate": "40.0%",  # 2e12 operations in 0.1 s are 2e13 of 5e13 a second
        "peak MB": "2,000",
    }
    assert plain["of the card's rate"] == "-" and plain["times plain"] == "1.00"
    assert gpu.made_of(parts).endswith("Not measured:\n\n- epoch: not finished after 1 s")
    del parts["card"]
    assert gpu.step_rows(parts)[1]["of the card's rate"] == "-"


def test_a_part_that_hangs_or_fails_is_one_line(tmp_path):
    output = tmp_path / "part.json"
    output.write_text('{"done": {"accuracy": 0.5}}')  # what a part had written when it was stopped
    assert gpu.in_process("card", output, 0.2, []) == {"done": {"accuracy": 0.5}, "error": "not finished after 0 s"}
    assert not output.exists()
    (error,) = gpu.in_process("card", output, 60, ["--minutes", "x"]).values()
    assert "invalid float value: 'x'" in error


def test_without_a_gpu_or_images_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--dry_run goes through all calls" in refused(capsys, gpu.main, "--output", tmp_path / "gpu.json")
    assert "--pack FOLDER" in refused(capsys, gpu.main, "--dry_run", "--images", tmp_path / "none.zip")
    assert not list(tmp_path.iterdir())


def image_folder(place, each):
    for split, count in (("train", each), ("test", 2)):
        for name in ("ship", "frog"):
            (place / split / name).mkdir(parents=True)
            for number in range(count):
                (place / split / name / f"{number:03d}.png").write_bytes(bytes(1000))
    return place


def test_as_many_training_images_of_every_class_are_packed_as_fit(tmp_path):
    folder, archive = image_folder(tmp_path / "set", 9), tmp_path / "set.zip"
    # 4 test images and twice 5 training images of 1,200 bytes, and not twice 6
    assert gpu_parts.pack(folder, archive, 17e-3) == 5
    assert archive.stat().st_size <= 17_000
    names = zipfile.ZipFile(archive).namelist()
    assert sorted(names) == sorted(
        f"{split}/{name}/{number:03d}.png"
        for split, count in (("train", 5), ("test", 2))
        for name in ("ship", "frog")
        for number in range(count)
    )
    assert gpu_parts.pack(folder, archive, 1.0) == 9


@pytest.mark.slow
def test_trainings_on_real_images_are_rehearsed(tmp_path):
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:300], digits.target)):
        folder = tmp_path / "set" / ("test" if number % 3 == 0 else "train") / f"n{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).convert("RGB").resize((32, 32)).save(folder / f"{number}.png")
    gpu_parts.pack(tmp_path / "set", tmp_path / "set.zip", 5.0)
    trained = gpu_parts.accuracy(gpu_parts.DRY, tmp_path / "set.zip", tmp_path / "part.json")
    assert trained == json.loads((tmp_path / "part.json").read_text()) and len(trained) == 5
    assert all(0 <= row["accuracy"] <= 1 for row in trained.values()), trained


def test_the_page_has_a_place_for_it():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- gpu -->\n") == page.count("<!-- end of gpu -->") == 1
