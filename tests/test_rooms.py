"""The rooms of the package: what may import what."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "coreg"
# from top to bottom: a file imports from its own room and from those below it, and that is the whole rule
ROOMS = """
    adapt
    run
    annotate
    demo recipes
    export
    status
    report
    label
    process
    settings network_options
    learn
    weak
    nets
    store
    views
    data
    config scripts webpage progress hub records files errors plaintext interrupt
"""
LEVELS = {room: level for level, line in enumerate(reversed(ROOMS.split("\n"))) for room in line.split()}


def module_of(file):
    """`coreg/views/order.py` is `views.order`, and `coreg/views/__init__.py` is `views`."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in PACKAGE.rglob("*.py")}


def imported(file):
    """Modules of the package that a file imports, wherever in it; not those for type checkers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "coreg":
            names = [f"{node.module}.{alias.name}".removeprefix("coreg.") for alias in node.names]
            yield from (name if name in MODULES else name.rpartition(".")[0] for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("coreg.") for alias in node.names if alias.name.startswith("coreg."))


# the package's own file says where public names live, and names no room
IMPORTS = {name: set(imported(file)) - {"", "__init__"} for name, file in MODULES.items() if name != "__init__"}


def test_every_file_is_in_a_room():
    assert {name.split(".")[0] for name in IMPORTS} <= set(LEVELS)
    assert set(LEVELS) == {name.split(".")[0] for name in IMPORTS}


def test_no_import_goes_upwards():
    upwards = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if LEVELS[other.split(".")[0]] > LEVELS[name.split(".")[0]]
    ]
    assert not upwards


def test_no_circle_between_files():
    """Raises CycleError, which names the files, where there is one."""
    assert set(TopologicalSorter(IMPORTS).static_order()) == set(IMPORTS)


def test_the_rule_sees_imports(tmp_path):
    """An import inside a function counts, one for type checkers does not."""
    file = tmp_path / "a.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport coreg.nets\nfrom coreg import files\n"
        "if TYPE_CHECKING:\n    from coreg.run.job import Run\n"
        "def f():\n    from coreg.views.order import ShuffledRows\n"
    )
    assert list(imported(file)) == ["nets", "files", "views.order"]
