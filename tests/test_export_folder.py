"""Damaged, foreign and old exports: whatever happened to one, its reader ends in one line or predicts the same."""

import json
import math
import os
import random
import resource
import shutil
import subprocess

import numpy as np
import pytest
import torch
from runs import in_processes
from safetensors.torch import load_file, save_file

from coreg.errors import UserError, exits_with_one_line
from coreg.export import ensemble
from coreg.export.ensemble import export, make_program
from coreg.export.folder import load_export, write_settings
from coreg.export.predict import load_classifier
from coreg.nets.model import create_backbone

NAMES = ["ant", "bee", "cat"]
SETTINGS = {"class_names": NAMES, "image_size": 16, "channels": 3, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
SMALL = {"norm": "group", "widths": [4, 8], "depths": [1, 1]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An export of two networks; nobody writes into it."""
    torch.manual_seed(0)
    nets = [create_backbone("preact_resnet_tiny", 3, 3, SMALL, pretrained=False).eval() for _ in range(2)]
    folder = tmp_path_factory.mktemp("exported") / "export"
    export(folder, nets, "preact_resnet_tiny", SMALL, torch.randn(2, 3, 16, 16), **SETTINGS, temperature=0.7)
    return folder


@pytest.fixture(scope="module")
def program(whole):
    """The same as the content of an ONNX file."""
    pytest.importorskip("onnxscript")
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    return make_program(*load_export(whole), "onnx", images)[0]


def answer(path):
    """Class names and probabilities, or the one line of the error."""
    try:
        classifier = load_classifier(path)
        shape = (4, classifier.channels, classifier.image_size, classifier.image_size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return classifier.class_names, classifier._probabilities(pixels).tolist()
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)


def old(folder, copy):
    """The same export as versions without checksums wrote it."""
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "coreg.json").read_text())
    (copy / "coreg.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in ("files", "checksum")}))
    return copy


def flipped(content, rng):
    """One bit of it the other way round."""
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def test_the_export_says_what_its_files_hash_to(whole):
    settings = json.loads((whole / "coreg.json").read_text())
    for name in ("net1/config.json", "net1/model.safetensors", "net2/config.json", "net2/model.safetensors"):
        hashed = subprocess.run(["sha256sum", whole / name], capture_output=True, text=True, check=True).stdout.split()[0]
        assert settings["files"][name] == hashed
    assert settings["temperature"] == 0.7 and len(settings["files"]) == 4


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_whoever_the_umask_lets_can_read_the_export(tmp_path, umask):
    before = os.umask(umask)
    try:
        net = create_backbone("preact_resnet_tiny", 3, 3, SMALL, pretrained=False).eval()
        export(tmp_path / "export", [net], "preact_resnet_tiny", SMALL, torch.randn(2, 3, 16, 16), **SETTINGS)
        write_settings(tmp_path / "export", load_export(tmp_path / "export")[1], {"model.onnx": b"x"})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "export").rglob("*")}
    assert modes.pop("net1") == 0o777 & ~umask
    assert modes == dict.fromkeys(("coreg.json", "config.json", "model.safetensors", "model.onnx"), 0o666 & ~umask)


def test_every_flipped_bit_of_a_folder_is_noticed_or_harmless(whole, tmp_path):
    """Ten flips in each file, and a truncation of each; the seed is the test's."""
    rng, right = random.Random(0), answer(whole)
    assert isinstance(right, tuple)
    folder, noticed = shutil.copytree(whole, tmp_path / "export"), 0
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        content = path.read_bytes()
        for damaged in [*(flipped(content, rng) for _ in range(10)), content[: len(content) // 2], b""]:
            path.write_bytes(damaged)
            given = answer(folder)
            assert given == right or isinstance(given, str), path
            noticed += isinstance(given, str)
        path.write_bytes(content)
    assert noticed >= 0.9 * 12 * len(files) and answer(folder) == right


def test_every_flipped_bit_of_an_onnx_file_is_noticed_or_harmless(program, tmp_path):
    rng, path = random.Random(1), tmp_path / "model.onnx"
    path.write_bytes(program)
    right = answer(path)
    assert right[0] == NAMES
    # the last bytes are the checksum itself
    tail = [
        program[:-i] + bytes([program[-i] ^ 1 << rng.randrange(8)]) + program[len(program) - i + 1 :] for i in range(1, 85)
    ]
    for damaged in [*(flipped(program, rng) for _ in range(40)), *tail, program[:-80], program[: len(program) // 2], b""]:
        path.write_bytes(damaged)
        assert isinstance(answer(path), str)


@pytest.mark.slow
def test_an_onnx_file_is_read_by_others_as_before(program, tmp_path):
    """The checksum is one more entry of the metadata, and the file a valid model for its own checker."""
    import hashlib

    import onnx
    import onnxruntime

    (tmp_path / "model.onnx").write_bytes(program)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["coreg"])["class_names"] == NAMES
    ends = [n for n in range(len(program)) if hashlib.sha256(program[:n]).hexdigest() == metadata["sha256"]]
    assert len(ends) == 1 and len(program) - ends[0] < 100


def test_old_exports_stay_readable(whole, program, tmp_path):
    import onnx

    right = answer(whole)
    assert answer(old(whole, tmp_path / "old")) == right
    message = onnx.ModelProto.FromString(program)
    held = {entry.key: entry.value for entry in message.metadata_props}
    del message.metadata_props[:]
    about = {k: v for k, v in json.loads(held["coreg"]).items() if k != "sealed"}
    message.metadata_props.add(key="coreg", value=json.dumps(about))
    (tmp_path / "old.onnx").write_bytes(message.SerializeToString())
    names, probabilities = answer(tmp_path / "old.onnx")
    assert names == NAMES and np.allclose(probabilities, right[1], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"std": [0.0, 1.0, 1.0]}, r"std\[0\] is 0.0"),
        ({"std": [1.0, 1.0]}, "std has 2 numbers for 3 channels"),
        ({"mean": [math.nan] * 3}, r"mean\[0\] is nan"),
        ({"mean": 0.5}, "mean is 0.5, expected a list"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 10**12}, "image_size is 10"),
        ({"channels": 2}, "channels is 2"),
        ({"channels": 4}, "channels is 4"),
        ({"class_names": []}, "0 names"),
        ({"class_names": ["a", "a", "b"]}, "3 names, 2 of them different"),
        ({"class_names": ["a", "b", 3]}, r"class_names\[2\] is 3"),
        ({"class_names": ["a", "b"]}, "num_classes in config.json is 3, and coreg.json names 2 classes"),
        ({"nets": 0}, "nets is 0"),
        ({"nets": 3}, "net3 cannot be loaded"),
        ({"schema": 2}, "schema 2"),
        ({"schema": None}, "schema None"),
    ],
)
def test_settings_out_of_range_are_named(whole, tmp_path, change, problem):
    folder = shutil.copytree(whole, tmp_path / "export")
    write_settings(folder, load_export(folder)[1] | change)  # with a right checksum
    with pytest.raises(UserError, match=problem):
        load_export(folder)
    folder = old(whole, tmp_path / "old")
    settings = json.loads((folder / "coreg.json").read_text()) | change
    (folder / "coreg.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=problem):
        load_export(folder)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b"{}"])
@pytest.mark.parametrize("name", ["coreg.json", "net1/config.json"])
def test_records_that_are_none_are_one_line(whole, tmp_path, name, content):
    folder = old(whole, tmp_path / "export")
    (folder / name).write_bytes(content)
    assert str(folder) in answer(folder)


def test_files_that_are_no_files_are_one_line(whole, tmp_path):
    for number, name in enumerate(("coreg.json", "net1/config.json", "net1/model.safetensors")):
        folder = shutil.copytree(whole, tmp_path / str(number))
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert "damaged" in answer(folder) or "there is no file" in answer(folder)
        (folder / name).unlink()
        (folder / name).mkdir()
        assert str(folder) in answer(folder)


def change_config(folder, **changes):
    path = folder / "net1" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_without_checksums_no_network_is_random(whole, tmp_path):
    """timm builds what a config.json says and keeps weights that do not fit at random; here that is an error."""
    folder = old(whole, tmp_path / "classes")
    change_config(folder, num_classes=4)
    assert "num_classes in config.json is 4" in answer(folder)
    folder = old(whole, tmp_path / "width")
    change_config(folder, model_args={"in_chans": 3} | SMALL | {"widths": [4, 12]})
    assert "net1 cannot be loaded" in answer(folder)
    folder = old(whole, tmp_path / "name")
    change_config(folder, architecture="resnet18")
    assert "net1 cannot be loaded" in answer(folder)
    folder = old(whole, tmp_path / "weight")
    weights = load_file(folder / "net1" / "model.safetensors")
    weights["fc.weight"][0, 0] = math.nan
    save_file(weights, folder / "net1" / "model.safetensors")
    assert "probabilities that are no numbers" in answer(folder)


def test_weights_of_an_onnx_file_lie_in_it(program, tmp_path, monkeypatch):
    """External data, which onnxruntime would read relative to the working directory, wherever a tensor can be."""
    import onnx

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("it was handed to onnxruntime"))
    (tmp_path / "secret").write_bytes(bytes(10_000))

    def outside(tensor):
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="secret")

    def initializer(model):
        outside(model.graph.initializer[0])

    def attribute(model):
        tensor = model.graph.node[0].attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
        outside(tensor)

    def nested(model):
        graph = model.graph.node[0].attribute.add(name="body", type=onnx.AttributeProto.GRAPH).g
        outside(graph.initializer.add(name="w", data_type=1, dims=[1]))

    def function(model):
        outside(model.functions.add(name="f").node.add(op_type="Constant").attribute.add(name="value").t)

    def sparse(model):
        outside(model.graph.sparse_initializer.add().values)

    for change in (initializer, attribute, nested, function, sparse):
        model = onnx.ModelProto.FromString(program)
        change(model)
        (tmp_path / "outside.onnx").write_bytes(model.SerializeToString())
        assert "its weights are in other files" in answer(tmp_path / "outside.onnx"), change


def test_an_onnx_file_from_elsewhere_is_refused(program, tmp_path):
    import onnx

    model = onnx.ModelProto.FromString(program)
    del model.metadata_props[:]
    (tmp_path / "plain.onnx").write_bytes(model.SerializeToString())
    assert "no class names inside" in answer(tmp_path / "plain.onnx")
    for text, problem in (
        ("[]", "expected an object"),
        ('{"class_names": ["a"], "image_size": -1, "channels": 3}', "image_size is -1"),
        ('{"class_names": ["a", "b", "c"], "image_size": 8, "channels": 1}', "cannot be run on images"),
        ('{"class_names": ["a"], "image_size": 16, "channels": 3}', "probabilities where"),
        ("{", "no JSON"),
    ):
        del model.metadata_props[:]
        model.metadata_props.add(key="coreg", value=text)
        (tmp_path / "other.onnx").write_bytes(model.SerializeToString())
        assert problem in answer(tmp_path / "other.onnx")


def limited(bytes_a_file, main, *words):
    """A process that can write files of so many bytes, as where a disk is full."""
    limits = (bytes_a_file, bytes_a_file)
    return in_processes(1, main, *words, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))


@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
def test_a_program_that_does_not_fit_on_the_disk_is_one_line(whole, tmp_path, kind):
    pytest.importorskip("onnxscript")
    folder = shutil.copytree(whole, tmp_path / "export")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ended = limited(8192, ensemble.main, "--run", folder, "--format", kind, "--images", "builtin:digits")
    errors = [line for line in ended.stderr.splitlines() if "rror" in line]
    assert ended.codes == [2] and len(errors) == 1, ended.stderr
    assert errors[0].startswith(f"error: cannot write {folder}") and "File too large" in errors[0]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_export_that_does_not_fit_on_the_disk_is_one_line(tmp_path):
    @exits_with_one_line
    def main(words):
        nets = [create_backbone("preact_resnet_tiny", 3, 3, SMALL, pretrained=False).eval()]
        export(tmp_path / "export", nets, "preact_resnet_tiny", SMALL, torch.zeros(2, 3, 16, 16), **SETTINGS)

    ended = limited(4096, main)
    assert ended.codes == [2] and ended.stderr.count("\n") == 1, ended.stderr
    assert "cannot write" in ended.stderr and "the same command goes on" in ended.stderr
    assert not list(tmp_path.iterdir())
