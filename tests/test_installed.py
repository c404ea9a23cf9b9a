"""An installed wheel, used from an empty folder: its commands, its scripts under a launcher, every file that they need."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# folders of the repository and what they are called in an installation
INSIDE = {"coreg": "coreg", "baselines": "coreg/baselines", "accelerate_configs": "coreg/accelerate_configs"}
NAMES = "coop distill dividemix flips lora pll probe run_all spml zero_shot zero_shot_tags".split()
CONFIGS = "bf16.yaml compile.yaml cpu.yaml multi_gpu.yaml multi_node.yaml single_gpu.yaml slurm.sh".split()
TINY = [
    "--recipe", "digits", "--refine", "none", "--share", "0.1", "--epochs", "1", "--workers", "0",
    "--backbone_args", '{"norm": "group", "widths": [8, 16], "depths": [1, 1]}', "--report_to", "none",
]  # fmt: skip
# the checkout must not be found by what is tested
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def done(*words, cwd):
    """A command that ends well; its output."""
    words = [str(word) for word in words]
    ended = subprocess.run(words, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, (words, ended.stdout[-2000:], ended.stderr[-4000:])
    return ended.stdout


def packed(source, folder):
    """The wheel of a source tree, or of a source archive."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    done(*pip, "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def backend(kind, tree, folder):
    """What setuptools makes of a source tree: `sdist` or `editable`."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done(sys.executable, "-c", code, folder, cwd=tree)
    (made,) = folder.iterdir()
    return made


def empty_environment(folder, wheel):
    """A new environment with one wheel installed that shares the packages of the running one; its folder of programs."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet"]
    done(*pip, "--no-index", "--no-deps", wheel, cwd=folder)
    (packages,) = folder.glob("lib/*/site-packages")
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    return folder / "bin"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the repository, because building leaves files beside the sources."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "coreg", symlinks=True, ignore=ignored)


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return packed(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    """The programs of an environment with the wheel."""
    return empty_environment(tmp_path_factory.mktemp("environment"), wheel)


@pytest.fixture(scope="module")
def trained(programs, tmp_path_factory):
    """A folder in which `coreg-train` ran for one epoch, without any option that names a file; what it printed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    return folder, done(programs / "coreg-train", *TINY, "--warmup_epochs", "1", cwd=folder)


def refused(*words, cwd):
    """The one line of a refused start."""
    words = [str(word) for word in words]
    ended = subprocess.run(words, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 2 and not ended.stdout
    (line,) = ended.stderr.splitlines()
    return line


def sources():
    """Every file that an installation needs, by its name there."""
    for folder, name in INSIDE.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
    yield from ("train_coreg.py", "annotate_vlm.py")


def test_the_wheel_has_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == set(sources())


@pytest.mark.slow
def test_a_source_archive_makes_the_same_wheel(tree, wheel, tmp_path):
    for name in ("archive", "wheel"):
        (tmp_path / name).mkdir()
    archive = backend("sdist", tree, tmp_path / "archive")
    with tarfile.open(archive) as packed_sources:
        assert not [member.name for member in packed_sources if member.issym() or member.islnk()]
    again = packed(archive, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(again) as theirs:
        for name in ours.namelist():
            assert name.endswith("RECORD") or ours.read(name) == theirs.read(name)
        assert ours.namelist() == theirs.namelist()


def test_one_epoch_from_another_folder(trained, programs):
    folder, printed = trained
    assert (folder / "runs/demo/report.json").is_file() and "runs/demo" in printed
    assert sorted(path.name for path in folder.iterdir()) == ["runs"]
    code = "from importlib.util import find_spec; print(*(find_spec(name).origin for name in ('coreg', 'train_coreg')))"
    places = done(programs / "python", "-c", code, cwd=folder).split()
    assert len(places) == 2 and all(Path(place).is_relative_to(programs.parent) for place in places)
    # what is to be typed next can be typed here
    store = (folder / "runs/demo/annotations/report.txt").read_text()
    assert "next: accelerate launch -m train_coreg --annotations" in store
    page = (folder / "runs/demo/report.html").read_text()
    assert "accelerate launch -m train_coreg --recipe" in page


def test_one_epoch_of_a_baseline(trained, programs):
    folder, _ = trained
    words = ["--method", "proden", *TINY, "--annotations", "runs/demo/annotations"]
    done(programs / "coreg-baseline", "pll", *words, cwd=folder)
    assert (folder / "runs/proden/report.json").is_file()


def test_baselines_are_listed_with_one_line_each(programs, tmp_path):
    listed = done(programs / "coreg-baseline", cwd=tmp_path)
    assert done(programs / "coreg-baseline", "--help", cwd=tmp_path) == listed
    lines = {name: line for line in listed.split("\n\n")[0].splitlines() for name, line in [line.split(maxsplit=1)]}
    assert list(lines) == NAMES
    docstring = (ROOT / "baselines/pll.py").read_text().split("\n")[0]
    assert lines["pll"] == docstring.removeprefix('"""')
    assert all(line[0].isupper() and line.endswith(".") for line in lines.values())


def test_what_is_wrong_is_one_line_that_can_be_followed(programs, tmp_path):
    line = refused(programs / "coreg-baseline", "pl", cwd=tmp_path)
    assert line.startswith("error: ") and "pl, did you mean pll?" in line and ", ".join(NAMES) in line
    assert "coreg-baseline pll --help" in refused(programs / "coreg-baseline", "pll", "--lr", "fast", cwd=tmp_path)
    assert "coreg-train --help" in refused(programs / "coreg-train", "--lr", "fast", cwd=tmp_path)
    line = refused(programs / "python", "-m", "coreg.scripts", "gpu.yaml", cwd=tmp_path)
    assert line.startswith("error: ") and all(name in line for name in CONFIGS)


def test_help_of_an_installed_command_names_it(programs, tmp_path):
    assert done(programs / "coreg-annotate", "--help", cwd=tmp_path).startswith("usage: coreg-annotate [options]\n")
    assert done(programs / "coreg-baseline", "lora", "--help", cwd=tmp_path).startswith(
        "usage: coreg-baseline lora [options]\n"
    )


def test_files_for_launchers_have_places(programs, tmp_path):
    listed = done(programs / "python", "-m", "coreg.scripts", cwd=tmp_path)
    for name in CONFIGS:
        place = done(programs / "python", "-m", "coreg.scripts", name, cwd=tmp_path).removesuffix("\n")
        assert Path(place).read_bytes() == (ROOT / "accelerate_configs" / name).read_bytes()
        assert Path(place).is_relative_to(programs.parent) and place in listed


def test_ctrl_c_is_answered_for_a_script_that_is_started_by_its_file(programs, tmp_path):
    (baselines,) = programs.parent.glob("lib/*/site-packages/coreg/baselines")
    for folder, answered in ((baselines, "coreg.interrupt"), (tmp_path, "_signal")):
        script = folder / "asks.py"
        script.write_text("import coreg, signal\nprint(getattr(signal.getsignal(signal.SIGINT), '__module__', None))\n")
        printed = done(programs / "python", script, cwd=tmp_path)
        script.unlink()
        assert printed == f"{answered}\n"


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("module", ["train_coreg", "coreg.baselines.pll"])
def test_several_processes(trained, programs, module, tmp_path):
    folder, _ = trained
    config = done(programs / "python", "-m", "coreg.scripts", "cpu.yaml", cwd=folder).strip()
    launch = [programs / "python", "-m", "accelerate.commands.launch", "--config_file", config, "-m", module]
    own = ["--method", "cc"] if "pll" in module else ["--warmup_epochs", "1"]
    store = ["--annotations", folder / "runs/demo/annotations"]
    done(*launch, *own, *TINY, *store, "--output_dir", "run", cwd=tmp_path)
    assert json.loads((tmp_path / "run/report.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_every_method_in_one_table(trained, programs):
    """`coreg-baseline run_all` writes where it is typed, and starts the programs of its own environment."""
    folder, _ = trained
    words = "--annotations runs/demo/annotations --seeds 0 --epochs 1 --output_dir runs/some".split()
    done(programs / "coreg-baseline", "run_all", *words, "--only", "zero_shot cc", "--shots", "", cwd=folder)
    assert (folder / "runs/some/cc-0/report.json").is_file() and (folder / "runs/some/compare.html").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["runs"]


@pytest.mark.slow
def test_an_editable_installation_has_the_same_commands(tree, tmp_path):
    (tmp_path / "wheel").mkdir()
    programs = empty_environment(tmp_path / "environment", backend("editable", tree, tmp_path / "wheel"))
    assert done(programs / "coreg-baseline", "pll", "--help", cwd=tmp_path).startswith(
        "usage: coreg-baseline pll [options]\n"
    )
    done(programs / "python", "-m", "coreg.baselines.pll", "--help", cwd=tmp_path)
    done(programs / "python", "-m", "train_coreg", "--help", cwd=tmp_path)
    place = Path(done(programs / "python", "-m", "coreg.scripts", "cpu.yaml", cwd=tmp_path).strip())
    assert place.resolve() == (tree / "accelerate_configs/cpu.yaml").resolve()
