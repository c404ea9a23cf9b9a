"""What the documentation says can be typed can be typed: commands parse, files and names exist, the example runs."""

import argparse
import ast
import contextlib
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import coreg
import coreg.config
from coreg.learn import multi_options
from coreg.learn.partial_options import OPTIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
ENTRIES = {
    "coreg-train": "train_coreg.py",
    "coreg-annotate": "annotate_vlm.py",
    "coreg-predict": "coreg.export.predict",
    "coreg-export": "coreg.export.ensemble",
    "coreg-label": "coreg.label",
    "coreg-report": "coreg.report.compare",
    "coreg-status": "coreg.status",
}
COMMAND = re.compile(
    r"((accelerate launch|torchrun|python|sbatch) (.*\.(py|sh)\b|-m |.* -m )|coreg-\w+ \S|\S+\.(py|sh) --\w+ \S|make \w).*"
)


class Parsed(Exception):  # noqa: N818
    """Raised in place of what a command would do."""


# ---- commands -------------------------------------------------------------------------------------------------------


def fenced(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def unfenced(text):
    return re.sub(r"^```[a-z]*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(text):
    """What stands between backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", unfenced(text))]


def commands(text):
    """Every command of a page as it would be typed, without comments: indented lines, and code between backticks."""
    written = [line.strip() for line in unfenced(text).split("\n") if line.startswith("    ")] + spans(text)
    plain = [re.sub(r"^([A-Z_]+=\S+ )+", "", re.split(r"\s+#|\s{4,}", line)[0].replace("…", "")) for line in written]
    return [line for line in plain if COMMAND.fullmatch(line)]


def program_of(line):
    """The program behind any launcher (a module, or a path in the repository) and its own arguments."""
    words = shlex.split(re.sub(r"\$\(.*?\)", "what-a-command-prints", line))
    if words[0] == "coreg-baseline":
        (script,) = (ROOT / "baselines").glob(f"{words[1]}.*")
        return f"baselines/{script.name}", words[2:]
    for place, word in enumerate(words):
        if word in ENTRIES or word.endswith((".py", ".sh")):
            return ENTRIES.get(word, word), words[place + 1 :]
        if word == "-m":
            script = words[place + 1].removeprefix("coreg.").replace("baselines.", "baselines/") + ".py"
            return script if (ROOT / script).exists() else words[place + 1], words[place + 2 :]
    raise AssertionError(f"no program in {line}")


ALL = [(page, line) for page, text in TEXT.items() for line in commands(text)]
PROGRAMS = sorted({program_of(line)[0] for _, line in ALL if not line.startswith("make ")})


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """Runs a program as if it had been typed in an empty folder, up to the point where its arguments are parsed."""
    real = coreg.config.parse

    def parse(*args, **kwargs):
        real(*args, **kwargs)
        raise Parsed

    def run(program, words):
        for module in [module for name, module in sys.modules.items() if name.startswith("coreg.")]:
            if getattr(module, "parse", None) is real:
                monkeypatch.setattr(module, "parse", parse)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_behind(argparse.ArgumentParser.parse_args))
        monkeypatch.setattr(sys, "argv", [program, *words])
        monkeypatch.chdir(tmp_path)
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)

    yield run
    for module in list(sys.modules.values()):  # those that were imported meanwhile took it for the real one
        if getattr(module, "__dict__", {}).get("parse") is parse:
            module.parse = real


def stop_behind(parse_args):
    def parse_and_stop(parser, *args, **kwargs):
        parsed = parse_args(parser, *args, **kwargs)
        if isinstance(parser, coreg.config._Parser):  # has something to say about what it found
            return parsed
        raise Parsed

    return parse_and_stop


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{page}: {line[:70]}" for page, line in ALL])
def test_every_command_parses(page, line, typed, tmp_path, capsys):
    if line.startswith("make "):
        targets = [word for word in line.split()[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
        return
    program, words = program_of(line)
    if program.endswith(".sh"):
        assert (ROOT / program).stat().st_mode & 0o100
        if "slurm" not in program:  # which hands everything on to train_coreg.py
            assert all(word in (ROOT / program).read_text() for word in words if re.fullmatch(r"--\w+", word))
            return
        program = "train_coreg.py"
    for recipe in ("mine.yaml", "runs/a/config.yaml"):
        (tmp_path / recipe).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / recipe).write_text("seed: 1\n")
    words = [re.sub(r"^[nNK]$", "1", word) for word in words]  # letters that stand for a number
    # a folder of weights that the reader has
    words = ["tf_efficientnet_lite0" if word == "local-dir:lite0" else word for word in words]
    try:
        typed(program, words)
        assert not words  # a program that takes no options, such as coreg.recipes
    except Parsed:
        pass
    except SystemExit:
        # a program without options looks for the reader's store at once
        assert re.search(r"\bann\b", capsys.readouterr().err) and any(word.split("/")[0] == "ann" for word in words)


MANIFESTS = [(page, text) for page, whole in TEXT.items() for text in fenced(whole, "yaml")]
BATCHES = [(page, text) for page, whole in TEXT.items() for text in fenced(whole, "bash") if "#SBATCH" in text]


def test_what_clusters_are_given_is_there():
    kinds = [record["kind"] for _, text in MANIFESTS for record in yaml.safe_load_all(text) if "kind" in record]
    assert sorted(kinds) == ["Job", "Job", "Service"] and len(BATCHES) == 1


def parses(command, typed):
    """Whether a command's program takes its options, without a launcher's own in front of it."""
    program, words = program_of(command)
    with pytest.raises(Parsed):
        typed(program, words)


@pytest.mark.parametrize("text", [text for _, text in MANIFESTS if "kind: Job" in text])
def test_jobs_of_kubernetes_load_and_their_commands_parse(text, typed):
    (job,) = [record for record in yaml.safe_load_all(text) if record["kind"] == "Job"]
    pod = job["spec"]["template"]["spec"]
    assert job["apiVersion"] == "batch/v1" and job["spec"]["completions"] == job["spec"]["parallelism"]
    assert pod["restartPolicy"] == "OnFailure" and job["spec"]["backoffLimit"] >= 20
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (command,) = container["args"]
    assert container["command"] == ["sh", "-c"]
    checked = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    parses(command, typed)


@pytest.mark.parametrize("text", [text for _, text in BATCHES])
def test_batch_files_of_slurm_are_valid_and_their_command_parses(text, typed):
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and text.startswith("#!/bin/bash\n"), checked.stderr
    lines = text.splitlines()[1:]
    options = [line for line in lines if line.startswith("#SBATCH ")]
    # Slurm reads options up to the first command only
    assert lines[: len(options)] == options and {"--requeue", "--array=0-15"} <= {line.split()[1] for line in options}
    (command,) = [line for line in lines if "srun" in line]
    parses(command, typed)


def options_of(program, typed, capsys):
    """What `--help` of a program lists."""
    if program.endswith(".sh"):
        return set(re.findall(r"--[a-z_]+", (ROOT / program).read_text()))
    several = {
        "coreg.annotate": [["merge"], ["export"], ["refine"], ["publish"], ["compare"]],
        "baselines/pll.py": [["--method", method] for method in OPTIONS],
        "baselines/spml.py": [["--method", method] for method in multi_options.OPTIONS],
    }
    for command in several.get(program, [[]]):
        for word in ("--help", "--help_all"):  # some programs have an argument parser of their own
            with contextlib.suppress(SystemExit):
                typed(program, [*command, word])
    return set(re.findall(r"--[a-z_]+", capsys.readouterr().out))


# of accelerate, torchrun, sbatch, tensorboard, pip and hf
OF_OTHERS = set(
    "--config_file --num_processes --machine_rank --main_process_ip --quiet --max_restarts --standalone --nproc_per_node "
    "--nodes --logdir --local-dir".split()
)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_options_that_are_mentioned_exist(typed, capsys):
    known = set().union(*(options_of(program, typed, capsys) for program in PROGRAMS)) | OF_OTHERS
    for page, text in TEXT.items():
        said = {word.split("=")[0] for span in spans(text) for word in span.split() if re.match(r"--[a-z]", word)}
        assert said <= known, (page, said - known)


# ---- files and names ------------------------------------------------------------------------------------------------

# what the reader has, or makes with the commands; placeholders; what Slurm and Python packages call their things
OF_THE_READER = re.compile(
    r"^(runs|ann\d?|photos|images|new|test|train|shards|saved|export|blocks|checkpoints|tensorboard|prompt|data)(/|$)|"
    r"[A-Z]{2}|^(config|mine|classes)\.\w+$"
)


def test_files_that_are_mentioned_exist():
    import open_clip

    models = {"/".join(pair) for pair in open_clip.list_pretrained()}
    for page, text in TEXT.items():
        folder = (ROOT / page).parent
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", unfenced(text)):
            assert target.startswith("http") or (folder / target).exists(), (page, target)
        for span in spans(text):
            path = re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?|[\w.-]+\.(py|md|yaml|sh|cfg)", span)
            if not path or span in models or OF_THE_READER.search(span):
                continue
            if span.startswith(("division/", "prototypes/")):  # a curve
                assert f'"{span}"' in (ROOT / "coreg/report/metrics.py").read_text()
                continue
            places = (ROOT / span, folder / span, ROOT / "coreg" / span, ROOT / "accelerate_configs" / span)
            assert any(place.exists() for place in places), (page, span)


def test_sections_that_are_linked_exist():
    for page, text in TEXT.items():
        for target, section in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text):
            other = (ROOT / page).parent / target if target else ROOT / page
            titles = re.findall(r"^#+ (.*)$", other.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert section in slugs, (page, section)


def resolve(name):
    """The object of a dotted name below coreg: a module, or something in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def test_python_names_that_are_mentioned_exist():
    for page, text in TEXT.items():
        for name in re.findall(r"`(coreg(?:\.\w+)+)`", text):
            if name.endswith((".json", ".py")):
                continue
            assert resolve(name) is not None, (page, name)
    # the table from equations to code
    for name in re.findall(r"`((?:losses|division|pseudo|memory)\.\w+)`", TEXT["docs/method.md"]):
        assert resolve(f"coreg.learn.{name}"), name
    for name in re.findall(r"`CoRegLearner\.(\w+)`", TEXT["docs/method.md"]):
        assert hasattr(coreg.CoRegLearner, name), name


# ---- the Python example ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["in short", "the whole method"])
def test_the_python_examples_run(which, tmp_path, monkeypatch, capsys):
    # the second one goes on after the first
    source = "\n".join(fenced(TEXT["docs/python.md"], "python")[: which + 1])
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "docs/python.md", "exec"), {"__name__": "example"})
    shares = [float(share) for share in re.findall(r"([\d.]+)% right", capsys.readouterr().out)]
    # far more than the tenth of guessing; what it comes to differs with the machine, and four epochs are too few for more
    assert len(shares) == (1, 5)[which] and min(shares) > 35


def test_everything_that_coreg_offers_is_there_and_named_in_the_documentation():
    for name in coreg.__all__:
        assert getattr(coreg, name) is not None and name in dir(coreg)
        assert f"`{name}`" in TEXT["docs/python.md"], name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        coreg.nothing  # noqa: B018


def test_type_checkers_see_what_coreg_offers():
    tree = ast.parse((ROOT / "coreg" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: f"{node.module}.{alias.name}" for node in block.body for alias in node.names}
    assert seen == {name: f"{getattr(coreg, name).__module__}.{name}" for name in coreg.__all__}
    assert (ROOT / "coreg" / "py.typed").is_file()


def test_importing_coreg_is_fast():
    said = "import sys, coreg; print([name for name in ('torch', 'numpy', 'timm', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"
