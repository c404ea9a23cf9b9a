"""One dataclass per group of settings, filled in layers: what stands later in this list wins.

    1. defaults: of the dataclasses, then those that a recipe has below `defaults:`
    2. the preset
    3. the recipe
    4. the command line

One parser reads them all, as if every layer had been typed: unknown keys, wrong types and wrong choices are reported
wherever they were written.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from coreg import scripts
from coreg.errors import UserError
from coreg.plaintext import did_you_mean, one_line, without_credentials
from coreg.records import RecordError, read_file

RECIPES = Path(__file__).parent / "recipes"
# below these words a recipe holds what presets win over, and settings of one script alone
DEFAULTS = "defaults"
SCRIPTS = (
    "train_coreg.py", "baselines/distill.py", "baselines/dividemix.py", "baselines/pll.py", "baselines/probe.py",
    "baselines/spml.py",
)  # fmt: skip
# bounds of a seed: network k of a training is seeded with 1000 * seed + k, which has to fit into 32 bits
SEEDS = (0, 4_294_966)
SAFE_CSV = "CSV files: an apostrophe before texts that a spreadsheet would take for a formula"
SHOWN = 25  # options of which `--help` shows all
HELP = " (--help lists the options)"
LARGEST_YAML = 1 << 20
_METAVAR = {int: "N", float: "X", str: "TEXT"}


def option(
    default: Any, text: str, bounds: tuple[float, float] | None = None, *, job: bool = True, advanced: bool = False
) -> Any:
    """A dataclass field with a default (copied when it is a list) and its help text.

    Args:
        bounds: smallest and largest value of an option that is a number, or a list of numbers.
        job: whether another value makes another job; False for places, and for how a job is watched.
        advanced: whether `--help_all` alone lists it.
    """
    metadata = {"help": text, "bounds": bounds, "job": job, "advanced": advanced}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# an option that `--help_all` alone lists
advanced = functools.partial(option, advanced=True)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line on stderr and exit code 2, and which gives what was typed alone."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} ({self.prog} --help lists the options)")

    @property
    def words(self) -> list[str]:
        return [word for action in self._actions for word in action.option_strings]

    def layer(self, words: Sequence[str]) -> dict[str, Any]:
        """Name -> value of the options that were typed."""
        typed, unknown = self.parse_known_args(words)
        if unknown:
            raise UserError(f"unknown option {unknown[0]}{did_you_mean(unknown[0].split('=')[0], self.words) or HELP}")
        return vars(typed)


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


def _build_parser(
    groups: Sequence[type], default_recipe: str | None, prog: str | None, description: str | None, everything: bool = True
) -> _Parser:
    """A parser with one heading for each class whose docstring begins with one, and every field's default in its help.

    Args:
        groups: a field that several of them have is one option. everything: list the advanced options too, as is done
            where there are few.
    """
    prog = scripts.command or prog
    parser = _Parser(
        prog=prog,
        usage=f"{prog or Path(sys.argv[0]).name} [options]",
        description=description,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help and stop")
    parser.add_argument("--help_all", action="store_true", help="show all options and stop")
    shown = f" (default: {default_recipe})" if default_recipe else ""
    text = f"built-in recipe or .yaml file, whose values replace the defaults below; the command line wins over it{shown}"
    parser.add_argument("--recipe", metavar="NAME", help=text)
    fields: dict[str, tuple[type, dataclasses.Field, Any]] = {}
    for group in groups:
        types_of = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            fields.setdefault(field.name, (group, field, types_of[field.name]))
    sections: dict[str | None, argparse._ActionsContainer] = {None: parser}
    everything, hidden = everything or len(fields) <= SHOWN, {}
    for name, (group, field, kind) in fields.items():
        # a group may be made of others: what counts is the first that has the field
        part = next(part for part in reversed(group.__mro__) if name in inspect.get_annotations(part))
        title, colon, about = part.__doc__.split("\n")[0].partition(": ")
        title = title if colon else None
        if title not in sections:
            sections[title] = parser.add_argument_group(title)
        if title:
            sections[title].description = about
        made = field.default_factory is not dataclasses.MISSING
        default, text = field.default_factory() if made else field.default, field.metadata["help"]
        if default is not None and "default" not in text:
            text += f" (default: {_shown(default)})"
        if field.metadata["advanced"] and not everything:
            hidden[title], text = hidden.get(title, 0) + 1, argparse.SUPPRESS
        sections[title].add_argument(f"--{name}", help=text.replace("%", "%%"), **_accepted(kind))
    for title, count in hidden.items():
        sections[title].description += f" ({count} more: --help_all)"
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
    raise UserError(
        f"unknown recipe {name}{did_you_mean(name, built_in)} (there are: {', '.join(built_in)}; or give a .yaml file)"
    )


def read_recipe(name: str, script: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a recipe, from option name to value: those that presets win over, and those that win over presets.

    Args:
        name: of the recipe, or its file. script: whose own settings, which the recipe holds below its name, count too.

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
    sections = {key: settings.pop(key) for key in (DEFAULTS, *SCRIPTS) if key in settings}
    for key, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(
                f"{path} gives {key} a {type(section).__name__}; write `option: value` lines, indented, below it"
            )
    parts = sections.get(DEFAULTS, {}), settings | sections.get(script, {})
    for key, value in [pair for part in parts for pair in part.items()]:
        if not isinstance(key, str):
            raise UserError(f"{path} has an option that is no text, {str(key)[:40]}; write one `option: value` a line")
        if not all(isinstance(part, (str, int, float)) for part in (value if isinstance(value, list) else [value])):
            raise UserError(f"{path} gives {key} no plain value; write `{key}: VALUE` or delete the line")
    return parts


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
        return yaml.load(read_file(path, LARGEST_YAML).decode(), _PlainLoader)
    except RecordError:
        raise
    except Exception as error:  # not all that yaml stumbles over is a YAMLError: dates that there are not, endless nesting
        raise RecordError(one_line(error)) from None


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


def paths_and_options(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The words before the first option, and the others; of `sys.argv` by default."""
    words = list(sys.argv[1:] if argv is None else argv)
    first = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def names_of(*groups: type) -> set[str]:
    """Names of the options of dataclasses."""
    return {field.name for group in groups for field in dataclasses.fields(group)}


def parse(
    *groups: type,
    argv: Sequence[str] | None = None,
    default_recipe: Callable[[Mapping[str, Any]], str] | None = None,
    preset: Callable[..., Mapping[str, Any]] | None = None,
    implied: Callable[..., Mapping[str, Any]] | None = None,
    kinds: tuple[str, Mapping[str, type]] | None = None,
    others: Sequence[type] = (),
    prog: str | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Fill each dataclass of `groups`: defaults, then the preset, then the recipe, then what was typed and implies.

    Args:
        groups: dataclasses whose fields were made by `option`; no field name occurs twice.
        argv: the arguments without the program's name, by default `sys.argv[1:]`.
        default_recipe: names the recipe where `argv` names none, from what was typed.
        preset: the preset's settings, from the filled dataclasses as they are without it.
        implied: settings that follow from what was typed and win over the recipe, from that and the filled dataclasses.
        kinds: an option and, for each of its values, one more dataclass to fill; all have the option and its default.
        others: dataclasses of other scripts, whose settings a recipe may hold too; they are passed over.
        prog: the program's name in messages. description: the help's opening text; its layout is kept.

    Returns:
        One instance for each of `groups`, and one of the kind that was chosen.

    Raises:
        UserError: an unknown option, a value of the wrong type or outside the choices or bounds, an option of another
            kind, or an unreadable recipe.
    """
    option_name, by_kind = kinds or ("", {})
    everything = list(dict.fromkeys([*groups, *by_kind.values()]))
    parser = _build_parser(everything, None, prog, description)
    typed = parser.layer([_underscored(word) for word in (sys.argv[1:] if argv is None else argv)])
    usual = default_recipe(typed) if default_recipe else None
    name = typed.pop("recipe", None) or usual
    wants_help = [typed.pop(word, False) for word in ("help", "help_all")]
    ours, theirs = names_of(*everything), names_of(*others)

    def known(settings: dict[str, Any]) -> dict[str, Any]:
        unknown = [key for key in settings if key not in ours | theirs]
        if unknown:
            raise UserError(
                f"recipe {name} has an unknown key {unknown[0]}{did_you_mean('--' + unknown[0], parser.words) or HELP}"
            )
        return parser.layer(_as_arguments({key: value for key, value in settings.items() if key in ours}))

    below, recipe = map(known, read_recipe(name, prog)) if name else ({}, {})
    if by_kind:
        chosen = (below | recipe | typed).get(option_name, getattr(everything[-1], option_name))
        groups = (*groups, by_kind[chosen])
    if any(wants_help):
        _build_parser(groups, usual, prog, description, everything=wants_help[1]).print_help()
        raise SystemExit(0)
    strange = [key for key in typed if key not in names_of(*groups)]
    if strange:
        having = ", ".join(kind for kind, group in by_kind.items() if strange[0] in names_of(group))
        raise UserError(f"--{strange[0]} is no option of --{option_name} {chosen}; these have it: {having}")

    def filled(*layers: dict[str, Any]) -> tuple[Any, ...]:
        values = {key: value for layer in layers for key, value in layer.items()}
        return tuple(group(**{key: values[key] for key in values.keys() & names_of(group)}) for group in groups)

    configs = filled(below, recipe, typed)
    if preset:
        below |= parser.layer(_as_arguments(preset(*configs)))
        configs = filled(below, recipe, typed)
    check_bounds(*configs)
    if implied:
        configs = filled(below, recipe, parser.layer(_as_arguments(implied(typed, *configs))), typed)
        check_bounds(*configs)
    return configs


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


def beside_the_job(*groups: Any) -> set[str]:
    """Names of the options that may change between two starts of the same job; of dataclasses or their instances."""
    return {field.name for group in groups for field in dataclasses.fields(group) if not field.metadata["job"]}


def as_settings(*configs: Any) -> dict[str, Any]:
    """The fields of several dataclass instances as one flat mapping of plain values, to be written down: no credentials."""
    return {
        key: without_credentials(value) if isinstance(value, str) else value
        for config in configs
        for key, value in dataclasses.asdict(config).items()
    }


def as_yaml(settings: dict[str, Any]) -> str:
    """`settings` as YAML that `--recipe FILE` reads back.

    Options that are not set are left out, and `print_config`, which would print the recipe instead of training with it.
    """
    return yaml.safe_dump(
        {k: v for k, v in settings.items() if v is not None and k != "print_config"}, sort_keys=False, allow_unicode=True
    )
