"""The documentation as a site: every page is on it, and so is every public name."""

import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import coreg

ROOT = Path(__file__).parents[1]


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = [page for part in nav for pages in part.values() for page in ([pages] if isinstance(pages, str) else pages)]
    assert sorted(listed) == sorted(["index.md", *(page.name for page in (ROOT / "docs").glob("*.md"))])


def test_every_public_name_has_its_place():
    lines = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").splitlines()
    names = [line.rpartition(".")[2] for line in lines if line.startswith("::: ")]
    assert sorted(names) == sorted(coreg.__all__)


@pytest.mark.slow
def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    start = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "candidate" in start and 'src="http' not in start and "fonts.googleapis" not in start
    assert "AnnotationStore" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


def test_the_versions_that_are_tested_are_those_that_are_claimed():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    plan = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    matrix = plan["jobs"]["tests"]["strategy"]["matrix"]
    assert config["options"]["python_requires"] == f">={matrix['python'][0]}" == f">={matrix['include'][0]['python']}"
    # the oldest of everything that is required, which therefore has to say what that is
    assert all(">=" in requirement for requirement in config["options"]["install_requires"].split())
    oldest = [step["run"] for step in plan["jobs"]["tests"]["steps"] if step.get("if") == "matrix.packages == 'oldest'"]
    assert matrix["include"][0]["packages"] == "oldest" and "--resolution lowest-direct" in oldest[0]
    assert plan["jobs"]["tests"]["steps"][-1] == {"run": "bash .ci/run"} and (ROOT / ".ci" / "run").is_file()


def test_the_forms_of_issues_are_whole():
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert content["name"] and content["description"] and all(part["attributes"]["label"] for part in content["body"])


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda file: file.stem)
def test_the_notebooks_run_and_show_what_they_give(notebook, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    book = nbformat.read(notebook, as_version=4)
    written = [cell for cell in book.cells if cell.cell_type == "code"]
    assert written[-1]["outputs"]  # as it was executed when it was written
    paths = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in paths.items():
            patch.setenv(name, value)
        nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
