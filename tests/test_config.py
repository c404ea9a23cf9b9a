"""Recipe below command line, presets below recipes, and every misspelling named wherever it was written."""

import dataclasses
import importlib
import itertools
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import yaml

from coreg.config import RECIPES, advanced, as_settings, as_yaml, beside_the_job, check_bounds, option, parse, read_recipe
from coreg.errors import UserError
from coreg.network_options import ImageConfig
from coreg.settings import JobConfig


@dataclass
class First:
    """What comes first."""

    rate: float = option(0.1, "a rate of 5%")
    names: list[str] = option(["a", "b"], "a list")
    mode: Literal["slow", "fast"] = option("slow", "a choice")
    preset: Literal["plain", "odd"] = option("plain", "a preset")


@dataclass
class Second:
    """What comes second."""

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
    argv = [*recipe(tmp_path, rate=-0.5, count=5, on=False), "--preset", "odd", "--count=6"]
    first, second = parse(First, Second, argv=argv, preset=preset)
    assert (first.rate, first.mode, second.count, second.on, first.preset) == (-0.5, "fast", 6, False, "odd")


def preset(first, second):
    return {"rate": 7, "count": 7, "mode": "fast"} if first.preset == "odd" else {}


def test_a_recipe_can_name_the_preset(tmp_path):
    first, _ = parse(First, Second, argv=recipe(tmp_path, preset="odd"), preset=preset)
    assert (first.rate, first.preset) == (7.0, "odd")


def test_every_layer_wins_over_those_before_it(tmp_path):
    """Every choice of layers that set `count`: the last of them has its value, whatever the others do."""
    layers = ("defaults", "preset", "recipe", "command line")
    for chosen in itertools.product((False, True), repeat=4):
        below, named, above, typed = chosen
        argv = recipe(tmp_path, **({"defaults": {"count": 10}} if below else {}), **({"count": 30} if above else {}))
        argv += ["--count=40"] if typed else []
        _, second = parse(First, Second, argv=argv, preset=lambda *_, named=named: {"count": 20} if named else {})
        assert second.count == max([3, *(10 * (place + 1) for place in range(4) if chosen[place])]), (layers, chosen)


def test_a_preset_goes_by_what_recipe_and_command_line_say(tmp_path):
    seen = []
    argv = [*recipe(tmp_path, count=5, defaults={"rate": 2}), "--mode", "fast"]
    parse(First, Second, argv=argv, preset=lambda first, second: seen.append((first, second)) or {})
    assert seen == [(First(rate=2, mode="fast"), Second(count=5))]


def test_a_recipe_can_tell_one_script_alone(tmp_path):
    settings = {"rate": 3, "train_coreg.py": {"rate": 5, "count": 7}, "baselines/pll.py": {"rate": 9}}
    for prog, rate, count in (
        ("train_coreg.py", 5, 7),
        ("baselines/pll.py", 9, 3),
        ("baselines/distill.py", 3, 3),
        (None, 3, 3),
    ):
        first, second = parse(First, Second, argv=recipe(tmp_path, **settings), prog=prog)
        assert (first.rate, second.count) == (rate, count)
    first, _ = parse(First, Second, argv=[*recipe(tmp_path, **settings), "--rate", "1"], prog="train_coreg.py")
    assert first.rate == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ratee", "1"], "did you mean --rate?"),
        (["--rate", "much"], "invalid float value: 'much'"),
        (["--mode", "quick"], "invalid choice: 'quick'"),
        (["--preset", "strange"], "invalid choice: 'strange'"),
        (["--recipe", "nothing"], "unknown recipe nothing"),
        (["--recipe", "missing.yaml"], "missing.yaml does not exist"),
        (["--recipe"], "argument --recipe: expected one argument"),
        (["stray"], "unknown option stray"),
    ],
)
def test_bad_arguments(argv, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse(First, Second, argv=argv, preset=preset)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratee": 1}, "unknown key ratee, did you mean --rate"),
        ({"rate": None}, "gives rate no plain value"),
        ({"rate": {"a": 1}}, "gives rate no plain value"),
        ({"help": 1}, "unknown key help"),
        ({"train_coreg": {"rate": 1}}, "gives train_coreg no plain value"),
        ({"train_coreg.py": 1}, "gives train_coreg.py a int; write"),
        ({"defaults": 1}, "gives defaults a int; write"),
        ({"defaults": {"ratee": 1}}, "unknown key ratee, did you mean --rate"),
        ({"defaults": {"rate": "much"}}, "invalid float"),
        ({"train_coreg.py": {"rate": None}}, "gives rate no plain value"),
        ({"train_coreg.py": {"ratee": 1}}, "unknown key ratee, did you mean --rate"),
        ({"rate": "much"}, "invalid float"),
    ],
)
def test_bad_recipes(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        parse(First, Second, argv=recipe(tmp_path, **settings), prog="train_coreg.py")


def test_a_recipe_that_is_no_mapping(tmp_path):
    for text, message in (("- a\n- b\n", "holds a list"), ("a: [1\n", "not a valid YAML")):
        (tmp_path / "odd.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            parse(First, argv=["--recipe", str(tmp_path / "odd.yaml")])


@pytest.mark.parametrize(
    "text",
    [
        "names: &a [x, y]\nmore: *a\n",
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40)),  # 9^39 texts
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 40)),
        "rate: &a [*a]\n",
    ],
)
def test_aliases_are_refused_before_they_are_followed(tmp_path, text):
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(
        UserError, match=r"bomb\.yaml is not a valid YAML file: line [12] has an alias; write the value itself"
    ):
        parse(First, argv=["--recipe", str(tmp_path / "bomb.yaml")])


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
class Round:
    """What is round."""

    shape: Literal["round", "square"] = option("round", "a shape")
    radius: int = option(1, "a radius", (0, 9))


@dataclass
class Square:
    """What is square."""

    shape: Literal["round", "square"] = option("round", "a shape")
    side: int = option(1, "a side", (0, 9))


def test_the_value_of_one_option_decides_which_others_there_are(tmp_path, capsys):
    kinds = ("shape", {"round": Round, "square": Square})
    assert parse(Second, argv=["--radius", "3"], kinds=kinds) == (Second(), Round("round", 3))
    assert parse(Second, argv=["--side", "3", "--shape", "square"], kinds=kinds) == (Second(), Square("square", 3))
    # a recipe may hold what belongs to another kind, and may choose
    chosen = recipe(tmp_path, shape="square", radius=2, side=4)
    assert parse(Second, argv=chosen, kinds=kinds) == (Second(), Square("square", 4))
    assert parse(Second, argv=[*chosen, "--shape", "round"], kinds=kinds) == (Second(), Round("round", 2))
    with pytest.raises(UserError, match=r"^--side is no option of --shape round; these have it: square$"):
        parse(Second, argv=["--side", "3"], kinds=kinds)
    with pytest.raises(UserError, match="invalid choice: 'oval'"):
        parse(Second, argv=["--shape", "oval"], kinds=kinds)
    with pytest.raises(SystemExit):
        parse(Second, argv=[*chosen, "--help"], kinds=kinds)
    shown = capsys.readouterr().out
    assert "--side" in shown and "--radius" not in shown


def test_help_of_many_options_leaves_out_the_advanced_ones_and_says_how_many(capsys):
    fields = [(f"plain{n}", int, option(n, "a number", (0, 99))) for n in range(20)]
    fields += [(f"odd{n}", int, advanced(n, "a number", (0, 99))) for n in range(6)]
    many = dataclasses.make_dataclass("Many", fields, namespace={"__doc__": "many: so many."})
    for word, advanced_too in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit) as stopped:
            parse(many, argv=[word])
        shown = capsys.readouterr().out
        assert stopped.value.code == 0 and shown.count("--plain") == 20
        assert shown.count("--odd") == 6 * advanced_too and ("so many. (6 more: --help_all)" in shown) != advanced_too
    assert parse(many, argv=["--odd3", "5"])[0].odd3 == 5


def test_what_is_beside_the_job_is_said_at_the_option():
    @dataclass
    class Placed:
        folder: str = option("", "a folder", job=False)
        rate: float = option(0.1, "a rate")

    assert beside_the_job(Placed, First()) == {"folder"}
    changes = {name for group in (JobConfig, ImageConfig) for name in beside_the_job(group)}
    assert {"output_dir", "workers", "labels", "print_config"} <= changes and not changes & {"seed", "lr", "share"}


@dataclass
class Grouped:
    """a group: what is grouped.

    And more about it.
    """

    sizes: list[int] = option([1, 2], "some sizes")
    off: bool = option(False, "another switch")


def test_help_is_grouped_and_writes_defaults_as_one_types_them(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("count: 4\n")
    monkeypatch.setattr("coreg.config.RECIPES", tmp_path)
    with pytest.raises(SystemExit):
        parse(Second, Grouped, argv=["--help"], default_recipe=lambda typed: "mine")
    shown = capsys.readouterr().out
    first, second = (" ".join(part.split()) for part in shown.split("\na group:\n"))
    assert "--count" in first and "--sizes" not in first and "--sizes" in second
    assert "(default: mine)" in first and "(default: true)" in first and "(default: None)" not in shown
    assert "what is grouped." in second and "And more" not in shown
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
        """What has dashes."""

        some_path: str = option("", "a path")
        wide: list[float] = option([0.0], "numbers")

    (config,) = parse(Dashed, argv=["--some-path=a-b", "--wide", "-1", "2"])
    assert (config.some_path, config.wide) == ("a-b", [-1.0, 2.0])


def option_groups():
    """Every dataclass of the package and its scripts whose fields are options."""
    root = Path(__file__).parent.parent
    files = [*root.glob("*.py"), *root.glob("baselines/*.py"), *root.glob("coreg/**/*.py")]
    files = [file for file in files if re.search("(option|advanced)[(]", file.read_text())]
    names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
    modules = [importlib.import_module(name) for name in names]
    groups = {group for module in modules for group in vars(module).values() if dataclasses.is_dataclass(group)}
    return sorted((group for group in groups if any("help" in f.metadata for f in dataclasses.fields(group))), key=str)


NUMBERS = {int, float, int | None, float | None, list[int], list[float]}
NUMERIC = [
    (group, field)
    for group in option_groups()
    for field in dataclasses.fields(group)
    if get_type_hints(group)[field.name] in NUMBERS
]


def test_the_walk_finds_the_options_of_every_script():
    assert len(option_groups()) >= 15 and len(NUMERIC) >= 90


@pytest.mark.parametrize("group, field", NUMERIC, ids=lambda it: getattr(it, "__name__", None) or it.name)
def test_every_number_has_bounds_that_the_command_line_and_recipes_keep(tmp_path, group, field):
    low, high = field.metadata["bounds"]
    made = field.default_factory() if field.default is dataclasses.MISSING else field.default
    for value in made if isinstance(made, list) else [made]:
        assert value is None or low <= value <= high
    whole = "float" not in str(get_type_hints(group)[field.name])
    assert math.isfinite(low) and math.isfinite(high)
    for value in (low, high):
        (config,) = parse(group, argv=[f"--{field.name}={value}"])
        assert getattr(config, field.name) in (value, [value])
    outside = [low - 1, high + 1] if whole else [low - 1.0, 2.0 * high, -math.inf, math.inf, math.nan]
    for value in outside:
        for argv in ([f"--{field.name}={value}"], recipe(tmp_path, **{field.name: value})):
            with pytest.raises(UserError) as refused:
                parse(group, argv=argv)
            assert str(refused.value) == f"--{field.name} is {value}; give a number from {low} to {high}"


def test_bounds_hold_for_settings_made_in_python_and_for_every_number_of_a_list():
    @dataclass
    class Few:
        """Numbers."""

        shares: list[float] = option([0.5], "shares", (0, 1))
        limit: int | None = option(None, "a limit", (0, 9))

    check_bounds(Few(), Few(limit=9, shares=[0, 1]))
    with pytest.raises(UserError, match=r"--shares is 1\.5; give a number from 0 to 1"):
        check_bounds(Few(shares=[0.5, 1.5]))
    with pytest.raises(UserError, match="--limit is 10"):
        check_bounds(Few(), Few(limit=10))


def test_a_seed_fits_into_what_the_random_generators_take():
    import numpy as np

    from coreg.config import SEEDS

    for number in range(100):  # networks and processes of a run have seeds 1000 * seed + number
        np.random.RandomState(1000 * SEEDS[1] + number)
    with pytest.raises(ValueError):
        np.random.RandomState(1000 * (SEEDS[1] + 2))


def test_a_damaged_recipe_is_one_line_or_settings(tmp_path):
    """Bytes flipped, files cut off, and YAML that its reader stumbles over."""
    rng, whole = random.Random(0), (RECIPES / "cifar10.yaml").read_bytes()
    odd = ["[" * 100_000, "a: 2001-99-99", "? [a, b]\n: 1", "1: 2", "a: !!int x", "a: !!python/name:os.system", "&a [*a]",
           "a: {b: 1}", "a: [[1]]", "- 1", "a: 2001-01-01", "<<: 1", "\x00", "train_coreg.py: 3", "a: &b [*b]"]  # fmt: skip
    file, refused = tmp_path / "own.yaml", 0
    for number in range(4 * len(odd)):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        contents = [damaged, damaged[: rng.randrange(len(damaged))], odd[number // 4].encode(), b"\xff" + whole]
        file.write_bytes(contents[number % 4])
        try:
            below, above = read_recipe(str(file), "train_coreg.py")
            assert all(isinstance(name, str) for name in (*below, *above))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(file) in str(error)
    assert refused >= 2 * len(odd)  # the last two kinds always are
