"""The documentation as a site: every page is on it, and so is every public name."""

import subprocess
import sys
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
