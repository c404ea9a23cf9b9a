"""Recipe below command line, presets below recipes, and every misspelling named wherever it was written."""

from dataclasses import dataclass
from typing import Literal

import pytest
import yaml

from coreg.config import as_settings, as_yaml, option, parse
from coreg.errors import UserError


@dataclass
class First:
    rate: float = option(0.1, "a rate of 5%")
    names: list[str] = option(["a", "b"], "a list")
    mode: Literal["slow", "fast"] = option("slow", "a choice")
    preset: Literal["plain", "odd"] = option("plain", "a preset")


@dataclass
class Second:
    count: int = option(3, "a count")
    on: bool = option(True, "a switch")
    path: str | None = option(None, "an optional path")


def recipe(tmp_path, **settings):
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(settings))
    return ["--recipe", str(file)]


def test_defaults_are_fresh_copies():
    one, two = parse(First, Second, argv=[])[0], parse(First, Second, argv=[])[0]
    one.names.append("c")
    assert two.names == ["a", "b"]


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_preset(tmp_path):
    presets = {"plain": {}, "odd": {"rate": 7, "count": 7, "mode": "fast"}}
    argv = [*recipe(tmp_path, rate=-0.5, count=5, on=False), "--preset", "odd", "--count=6"]
    first, second = parse(First, Second, argv=argv, presets=presets)
    assert (first.rate, first.mode, second.count, second.on, first.preset) == (-0.5, "fast", 6, False, "odd")


def test_a_recipe_can_name_the_preset(tmp_path):
    first, _ = parse(First, Second, argv=recipe(tmp_path, preset="odd"), presets={"odd": {"rate": 7}})
    assert (first.rate, first.preset) == (7.0, "odd")


def test_a_recipe_can_tell_one_script_alone(tmp_path):
    told = {"rate": 3, "train_coreg.py": {"rate": 5, "count": 7}, "baselines/pll.py": {"rate": 9}}
    for prog, rate, count in (
        ("train_coreg.py", 5, 7),
        ("baselines/pll.py", 9, 3),
        ("baselines/distill.py", 3, 3),
        (None, 3, 3),
    ):
        first, second = parse(First, Second, argv=recipe(tmp_path, **told), prog=prog)
        assert (first.rate, second.count) == (rate, count)
    first, _ = parse(First, Second, argv=[*recipe(tmp_path, **told), "--rate", "1"], prog="train_coreg.py")
    assert first.rate == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--ratee", "1"], "did you mean --rate?"),
        (["--rate", "much"], "invalid float value: 'much'"),
        (["--mode", "quick"], "invalid choice: 'quick'"),
        (["--preset", "strange"], "invalid choice: 'strange'"),
        (["--recipe", "nothing"], "unknown recipe nothing"),
        (["--recipe", "missing.yaml"], "missing.yaml does not exist"),
        (["--recipe"], "--recipe needs a value"),
        (["stray"], "unknown option stray"),
    ],
)
def test_bad_arguments(argv, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        parse(First, Second, argv=argv, presets={"plain": {}})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratee": 1}, "unknown key ratee, did you mean --rate"),
        ({"rate": None}, "gives rate no plain value"),
        ({"rate": {"a": 1}}, "gives rate no plain value"),
        ({"help": 1}, "unknown key help"),
        ({"train_coreg": {"rate": 1}}, "gives train_coreg no plain value"),
        ({"train_coreg.py": 1}, "gives train_coreg.py a int; write"),
        ({"train_coreg.py": {"rate": None}}, "gives rate no plain value"),
        ({"train_coreg.py": {"ratee": 1}}, "unknown key ratee, did you mean --rate"),
        ({"rate": "much"}, "invalid float"),
    ],
)
def test_bad_recipes(tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        parse(First, Second, argv=recipe(tmp_path, **settings), prog="train_coreg.py")


def test_a_recipe_that_is_no_mapping(tmp_path):
    for text, said in (("- a\n- b\n", "holds a list"), ("a: [1\n", "not a valid YAML")):
        (tmp_path / "odd.yaml").write_text(text)
        with pytest.raises(UserError, match=said):
            parse(First, argv=["--recipe", str(tmp_path / "odd.yaml")])


def test_written_settings_read_back_the_same(tmp_path):
    filled = parse(First, Second, argv=["--rate", "3e-7", "--names", "x", "y z", "--on", "false"])
    file = tmp_path / "config.yaml"
    file.write_text(as_yaml(as_settings(*filled)))
    assert parse(First, Second, argv=["--recipe", str(file)]) == filled


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(First, Second, argv=["--help"], prog="me", description="What I do.")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "What I do." in shown and "a rate of 5% (default: 0.1)" in " ".join(shown.split())


@dataclass
class Grouped:
    """What is grouped.

    And more about it.
    """

    _argument_group_name = "a group"

    sizes: list[int] = option([1, 2], "some sizes")
    off: bool = option(False, "another switch")


def test_help_is_grouped_and_writes_defaults_as_one_types_them(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("count: 4\n")
    monkeypatch.setattr("coreg.config.RECIPES", tmp_path)
    with pytest.raises(SystemExit):
        parse(Second, Grouped, argv=["--help"], default_recipe="mine")
    shown = capsys.readouterr().out
    first, second = (" ".join(part.split()) for part in shown.split("\na group:\n"))
    assert "--count" in first and "--sizes" not in first and "--sizes" in second
    assert "(default: mine)" in first and "(default: true)" in first and "(default: None)" not in shown
    assert "What is grouped." in second and "And more" not in shown
    assert "(default: 1 2)" in second and "(default: false)" in second


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], False),
        (["--off"], True),
        (["--off", "--sizes", "3"], True),
        (["--off=false"], False),
        (["--off", "Yes"], True),
        (["--off", "0"], False),
    ],
)
def test_switches(argv, expected):
    assert parse(Grouped, argv=argv)[0].off is expected


def test_a_switch_that_is_neither_on_nor_off():
    with pytest.raises(UserError, match="argument --off: 'maybe' is neither true nor false"):
        parse(Grouped, argv=["--off", "maybe"])


def test_dashes_are_underscores_in_names_and_nowhere_else():
    @dataclass
    class Dashed:
        some_path: str = option("", "a path")
        wide: list[float] = option([0.0], "numbers")

    (found,) = parse(Dashed, argv=["--some-path=a-b", "--wide", "-1", "2"])
    assert (found.some_path, found.wide) == ("a-b", [-1.0, 2.0])


from coreg.config import option
