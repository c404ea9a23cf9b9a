"""One dataclass per group of settings, filled from a recipe file first and the command line second.

The parser checks both in the same way, because a recipe's keys are put in front of the typed arguments as if they had
been typed: unknown keys, wrong types and wrong choices are found wherever they were written, and the command line wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from coreg import scripts
from coreg.errors import UserError
from coreg.records import RecordError

RECIPES = Path(__file__).parent / "recipes"
# a recipe may hold settings of one of them alone, below its name
SCRIPTS = ("train_coreg.py", "baselines/distill.py", "baselines/dividemix.py", "baselines/pll.py", "baselines/probe.py")
# bounds of a seed: network k of a training is seeded with 1000 * seed + k, which has to fit into 32 bits
SEEDS = (0, 4_294_966)
SAFE_CSV = "CSV files: an apostrophe before texts that a spreadsheet would take for a formula"
LARGEST_YAML = 1 << 20
_METAVAR = {int: "N", float: "X", str: "TEXT"}


def option(default: Any, text: str, bounds: tuple[float, float] | None = None) -> Any:
    """A dataclass field with a default (copied when it is a list) and its help text.

    Args:
        bounds: smallest and largest value of an option that is a number, or a list of numbers.
    """
    metadata = {"help": text, "bounds": bounds}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line on stderr and exit code 2."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def _truth(word: str) -> bool:
    """What an option that is true or false was set to."""
    values = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
    try:
        return values[word.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false") from None


def _accepted(kind: Any) -> dict[str, Any]:
    """What argparse has to know about a field of type `kind`: what it converts, and how many words it takes."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # X | None: not set, or an X
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is list:
        return _accepted(typing.get_args(kind)[0]) | {"nargs": "+"}
    if kind is bool:
        return {"type": _truth, "nargs": "?", "const": True, "metavar": "true|false"}
    return {"type": kind, "metavar": _METAVAR[kind]}


def _shown(default: Any) -> str:
    """A default as one would type it."""
    if isinstance(default, list):
        return " ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def _build_parser(groups: Sequence[type], default_recipe: str | None, prog: str | None, description: str | None) -> _Parser:
    """A parser with one heading for each dataclass that names one, and every field's default in its help."""
    prog = scripts.command or prog
    parser = _Parser(
        prog=prog,
        usage=f"{prog or Path(sys.argv[0]).name} [options]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shown = f" (default: {default_recipe})" if default_recipe else ""
    text = f"built-in recipe or .yaml file, whose values replace the defaults below; the command line wins over it{shown}"
    parser.add_argument("--recipe", metavar="NAME", help=text)
    for group in groups:
        title = getattr(group, "_argument_group_name", None)
        section = parser.add_argument_group(title, (group.__doc__ or "").split("\n")[0]) if title else parser
        kinds = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if made else field.default
            text = field.metadata["help"]
            if default is not None and "default" not in text:
                text += f" (default: {_shown(default)})"
            section.add_argument(
                f"--{field.name}", default=default, help=text.replace("%", "%%"), **_accepted(kinds[field.name])
            )
    return parser


def recipe_path(name: str) -> Path:
    """The file of a built-in recipe, or of one's own when `name` ends in .yaml or .yml.

    Raises:
        UserError: there is no such recipe.
    """
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise UserError(f"recipe file {name} does not exist; give the path of a YAML file or the name of a built-in recipe")
    built_in = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name in built_in:
        return RECIPES / f"{name}.yaml"
    near = difflib.get_close_matches(name, built_in, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown recipe {name}{hint} (there are: {', '.join(built_in)}; or give a .yaml file)")


def read_recipe(name: str, script: str | None = None) -> dict[str, Any]:
    """The settings of a recipe as a flat mapping from option name to value.

    Args:
        name: of the recipe, or its file. script: whose own settings, which the recipe holds under its name, count too.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping of options to plain values.
    """
    path = recipe_path(name)
    try:
        settings = read_yaml(path)
    except RecordError as error:
        raise UserError(f"{path} is not a valid YAML file: {error}") from None
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds a {type(settings).__name__}; write one `option: value` a line")
    sections = {key: settings.pop(key) for key in SCRIPTS if key in settings}
    for key, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(
                f"{path} gives {key} a {type(section).__name__}; write `option: value` lines, indented, below it"
            )
    settings |= sections.get(script, {})
    for key, value in settings.items():
        if not isinstance(key, str):
            raise UserError(f"{path} has an option that is no text, {str(key)[:40]}; write one `option: value` a line")
        if not all(isinstance(part, (str, int, float)) for part in (value if isinstance(value, list) else [value])):
            raise UserError(f"{path} gives {key} no plain value; write `{key}: VALUE` or delete the line")
    return settings


class _PlainLoader(yaml.SafeLoader):
    """Values as they are written: a few aliases of aliases would fill any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise RecordError(f"line {self.peek_event().start_mark.line + 1} has an alias; write the value itself")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values, lists and mappings of them.

    Raises:
        RecordError: it cannot be read, is no YAML, has aliases, or has more than `LARGEST_YAML` bytes.
    """
    try:
        if not path.is_file():  # reading a pipe would never end
            raise RecordError("it is no file")
        if path.stat().st_size > LARGEST_YAML:
            raise RecordError(f"it has more than {LARGEST_YAML} bytes")
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except RecordError:
        raise
    except OSError as error:
        raise RecordError(error.strerror or str(error)) from None
    except Exception as error:  # not all that yaml stumbles over is a YAMLError: dates that there are not, endless nesting
        raise RecordError(" ".join(str(error).split())[:200]) from None


def _as_arguments(settings: dict[str, Any]) -> list[str]:
    arguments = []
    for key, value in settings.items():
        # `--key=value` for scalars, so that values with a leading minus are not taken for options
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        else:
            arguments.append(f"--{key}={value}")
    return arguments


def _underscored(word: str) -> str:
    """`--batch-size=3` is the same as `--batch_size=3`."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else word


def _pop(option_name: str, argv: list[str]) -> str | None:
    """Take `--NAME value` or `--NAME=value` out of `argv`; the last one counts."""
    name, flag = None, f"--{option_name}"
    while True:
        place = next((i for i, word in enumerate(argv) if word == flag or word.startswith(f"{flag}=")), None)
        if place is None:
            return name
        if "=" in argv[place]:
            name = argv.pop(place).split("=", 1)[1]
        elif place + 1 < len(argv):
            name = argv[place + 1]
            del argv[place : place + 2]
        else:
            raise UserError(f"{flag} needs a value behind it")


def _preset_arguments(name: str | None, presets: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    # an unknown name goes to the parser, which names the choices
    return [] if name is None else [f"--preset={name}", *_as_arguments(dict((presets or {}).get(name, {})))]


def parse(
    *groups: type,
    argv: Sequence[str] | None = None,
    default_recipe: str | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    others: Sequence[type] = (),
    prog: str | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Fill each dataclass of `groups` from `--preset`, then `--recipe` (or `default_recipe`), and then from `argv`.

    Args:
        groups: dataclasses whose fields were made by `option`; no field name occurs twice.
        argv: the arguments without the program's name; None means `sys.argv[1:]`.
        default_recipe: the recipe used where `argv` names none; None means the dataclasses' own defaults.
        presets: named settings that `--preset` (an option of one of `groups`) puts in front of the recipe.
        others: dataclasses of other methods, whose settings a recipe may hold too; they are passed over.
        prog: the program's name in messages.
        description: the help's opening text; its layout is kept.

    Returns:
        One instance for each of `groups`.

    Raises:
        UserError: an unknown option, a value of the wrong type or outside the choices or bounds, or an unreadable recipe.
    """
    parser = _build_parser(groups, default_recipe, prog, description)
    arguments = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    name = _pop("recipe", arguments) or default_recipe
    recipe = read_recipe(name, prog) if name else {}
    preset = _pop("preset", arguments) or recipe.pop("preset", None) if presets else None
    known = [word for action in parser._actions for word in action.option_strings]
    theirs = {field.name for group in others for field in dataclasses.fields(group)}
    recipe = {key: value for key, value in recipe.items() if f"--{key}" in known or key not in theirs}
    for key in recipe:
        if f"--{key}" not in known or key in ("help", "recipe"):
            raise UserError(f"recipe {name} has an unknown key {key}{_near('--' + str(key), known)}")
    found, unknown = parser.parse_known_args([*_preset_arguments(preset, presets), *_as_arguments(recipe), *arguments])
    if unknown:
        raise UserError(f"unknown option {unknown[0]}{_near(unknown[0].split('=')[0], known)}")
    filled = tuple(
        group(**{field.name: getattr(found, field.name) for field in dataclasses.fields(group)}) for group in groups
    )
    check_bounds(*filled)
    return filled


def check_bounds(*configs: Any) -> None:
    """Refuse numbers outside the bounds of their options; NaN lies outside all of them.

    Args:
        configs: instances of dataclasses whose fields were made by `option`.

    Raises:
        UserError: the first such number.
    """
    for config in configs:
        for field in dataclasses.fields(config):
            value, bounds = getattr(config, field.name), field.metadata.get("bounds")
            if value is None or bounds is None:
                continue
            low, high = bounds
            for number in value if isinstance(value, list) else [value]:
                if not low <= number <= high:
                    raise UserError(f"--{field.name} is {number}; give a number from {low} to {high}")


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else " (--help lists the options)"


def as_settings(*configs: Any) -> dict[str, Any]:
    """The fields of several dataclass instances as one flat mapping of plain values."""
    return {key: value for config in configs for key, value in dataclasses.asdict(config).items()}


def as_yaml(settings: dict[str, Any]) -> str:
    """`settings` as YAML that `--recipe FILE` reads back.

    Options that are not set are left out, and `print_config`, which would print the recipe instead of training with it.
    """
    return yaml.safe_dump(
        {k: v for k, v in settings.items() if v is not None and k != "print_config"}, sort_keys=False, allow_unicode=True
    )
