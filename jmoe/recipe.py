"""Recipes, flags and JSON: the three ways a configuration is written down.

A recipe is a Python file with `def config() -> Config`. A flag is the dotted path of a field and a value, for instance
`--optim.schedule WSD --optim.schedule.final 0.1`. The JSON form is nested objects, in which a member of a union says by
`kind` which one it is. All three pass through one strict reading, so a mistake gets the same one-line answer wherever
it is made.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import os
import shutil
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from jmoe.config import Config, InputError, require
from jmoe.json_form import decode, did_you_mean, encode, item_of, join, kinds_of, members_of, nearest

T = TypeVar("T")
Options = TypeVar("Options")


# -------------------------------------------------------------------------------------------------------------- recipes


def load(path: str | os.PathLike[str]) -> Config:
    """Runs a recipe file and returns what its `config()` returns, every field's type checked; or reads a config.json.

    Raises `InputError` if the file is missing, fails, has no `config`, or returns anything but a sound `Config`.
    """
    path = Path(path)
    scope: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        if path.suffix == ".json":
            return from_dict(json.loads(path.read_bytes()))
        exec(compile(path.read_bytes(), str(path), "exec"), scope)
        require("config" in scope, f"{path} has no `def config() -> Config`")
        config = scope["config"]()
    except FileNotFoundError as error:
        if path.exists():  # the recipe itself looked for a file
            raise InputError(_failure(path, error)) from error
        there = sorted(file.name for file in path.parent.glob("*.py"))
        near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
        near = [str(path.with_name(name)) for name in near]
        raise InputError(f"there is no recipe {path}" + did_you_mean(near)) from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        raise InputError(_failure(path, error)) from error
    require(isinstance(config, Config), f"{path}: config() returned {type(config).__name__}; it must return a Config")
    try:
        return from_dict(to_dict(config))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _failure(path: Path, error: Exception) -> str:
    """What went wrong in a recipe and on which of its lines."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f"{path}:{lines[-1]}" if lines else str(path)
    if isinstance(error, InputError):
        return f"{place}: {error}"
    first_line, *_ = str(error).splitlines() or [""]
    return f"{place}: {type(error).__name__}: {first_line}".rstrip(": ")


# ----------------------------------------------------------------------------------------------------------------- JSON


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of a configuration: dicts, lists, strings, numbers, booleans and None."""
    return encode(config, type(config), "")


def from_dict(value: Any) -> Config:
    """The configuration that `to_dict` wrote.

    A field that is missing takes its default, so a file from before the field existed can still be read; anything
    unknown, of a wrong type or impossible raises `InputError` with its dotted place.
    """
    if isinstance(value, dict) and isinstance(value.get("optim"), dict) and "kind" not in value["optim"]:
        value = value | {"optim": {"kind": "AdamW", **value["optim"]}}  # from before there was a choice
    return decode(value, Config, "")


# ---------------------------------------------------------------------------------------------------------------- flags


def override(config: T, flags: Sequence[str]) -> T:
    """The dataclass instance `config` with `flags` applied, such as `["--steps", "200", "--optim.schedule", "WSD"]`.

    A field that holds a choice takes the name of a kind, which starts from that kind's own defaults, or a JSON object;
    a tuple takes a JSON list. `--flag value` and `--flag=value`, `-` and `_` are the same; a switch alone is true.
    Where any text is a value, None is written exactly so. `--help` or `-h` in the place of a flag prints all flags,
    with the values that the flags before it gave them, and exits 0.
    Raises `InputError` for an unknown flag, a wrong type or an impossible value.
    """
    return _override([config], flags)[0]


def parse(argv: Sequence[str], options: Options, *, default: str | os.PathLike[str]) -> tuple[Path, Config, Options]:
    """Reads the command line `[RECIPE] [--flag value ...]` of a training script.

    `options` is an instance of the script's own dataclass; its fields are flags beside those of `Config`. Returns the
    path of the recipe, the resolved configuration (`run_dir` is runs/NAME of the recipe if neither recipe nor flags
    say otherwise) and the script's options. `--help` prints every flag and exits 0.
    """
    recipe, flags = _positional(argv)
    path = Path(recipe or default)
    config = load(path)
    meaning = f"a Python file with `def config() -> Config`, or a run's config.json; default {default}"
    usage = f"[RECIPE] [--flag value ...]\n\nRECIPE is {meaning}."
    options, config = _override([options, config], flags, usage)
    if config.run_dir is None:
        config = dataclasses.replace(config, run_dir=str(Path("runs") / path.stem))
    return path, config, options


def arguments(argv: Sequence[str], options: Options, *, name: str, meaning: str) -> tuple[str, Options]:
    """Reads the command line `NAME [--flag value ...]` of a script whose flags are the fields of `options`.

    Returns the one positional argument, called `name` and explained by `meaning` in the help, and the options.
    """
    (value,), options = positional_arguments(argv, options, {name: meaning})
    return value, options


def positional_arguments(argv: Sequence[str], options: Options, places: Mapping[str, str]) -> tuple[list[str], Options]:
    """`arguments` for several positional arguments: `places` has the meaning of each by its name, in order."""
    values, flags = [], argv
    for _ in places:
        value, flags = _positional(flags)
        values += [] if value is None else [value]
    meanings = "\n".join(f"{name} is {meaning}." for name, meaning in places.items())
    (options,) = _override([options], flags, f"{' '.join(places)} [--flag value ...]\n\n{meanings}")
    for name, meaning in list(places.items())[len(values) :]:
        place = f"after {list(places)[len(values) - 1]}" if values else "first"
        raise InputError(f"{name} is missing; it comes {place} and is {meaning}")
    return values, options


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Around a script's work: an `InputError` becomes its message on stderr and exit code 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _positional(argv: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    return (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)


@dataclasses.dataclass
class _Flag:
    """One field of a configuration in its JSON form, and where it is kept."""

    name: str
    hint: Any
    owner: type | None
    """the dataclass whose field it is; None for an item of a tuple"""
    holder: Any
    key: Any

    @property
    def value(self) -> Any:
        return self.holder[self.key]

    @property
    def meaning(self) -> str:
        return _meanings(self.owner).get(self.key, "") if self.owner else ""


def _flags(value: Any, hint: Any, name: str = "") -> Iterator[_Flag]:
    """Every flag of an encoded configuration, choices before the fields of what they hold."""
    owner: type | None = None
    parts: dict[Any, Any] = {}
    if isinstance(value, dict):
        kinds = kinds_of(hint)
        owner = kinds[value["kind"]] if len(kinds) > 1 else next(iter(kinds.values()))
        parts = typing.get_type_hints(owner)
    elif isinstance(value, list):
        parts = dict.fromkeys(range(len(value)), item_of(hint))
    for key, part_hint in parts.items():
        part = join(name, key).replace("_", "-")
        yield _Flag(part, part_hint, owner, value, key)
        yield from _flags(value[key], part_hint, part)


def _override(configs: Sequence[Any], flags: Sequence[str], usage: str = "[--flag value ...]") -> list[Any]:
    trees = [encode(config, type(config), "") for config in configs]

    def known() -> dict[str, _Flag]:
        found = (flag for tree, config in zip(trees, configs, strict=True) for flag in _flags(tree, type(config)))
        return {flag.name: flag for flag in found}

    rest = list(flags)
    while rest:
        written, equals, text = rest.pop(0).partition("=")
        if written in ("--help", "-h"):
            print(_help(known().values(), usage))
            raise SystemExit(0)
        if not written.startswith("-"):
            raise InputError(f"unexpected {written!r}: after the first argument come flags, each with one value")
        name = written.lstrip("-").replace("_", "-")
        flag = known().get(name) if written.startswith("--") else None
        if flag is None:
            near = [f"--{n}" for n in nearest(name, known())]
            raise InputError(f"unknown flag {written}" + (did_you_mean(near) or "; --help lists all flags"))
        if not equals:
            takes_text = str in members_of(flag.hint)
            if rest and not rest[0].startswith("--") and (takes_text or rest[0] != "-h"):
                text = rest.pop(0)
            elif flag.hint is bool:
                text = "true"
            else:
                way = f"; if {rest[0]} is meant as text, write --{name}={rest[0]}" if rest and takes_text else ""
                raise InputError(f"--{name} needs a value: {_type_name(flag.hint)}{way}")
        read = decode(_read(text, flag.hint, f"--{name}"), flag.hint, f"--{name}")
        flag.holder[flag.key] = encode(read, flag.hint, name)
    return [decode(tree, type(config), "") for tree, config in zip(trees, configs, strict=True)]


def _read(text: str, hint: Any, place: str) -> Any:
    """The JSON value that the text of a flag stands for; `_decode` then judges it."""
    members = members_of(hint)
    if types.NoneType in members and (text == "None" or (text.lower() == "none" and str not in members)):
        return None
    if str in members or typing.get_origin(hint) is Literal:
        return text
    if bool in members:
        return {"true": True, "false": False}.get(text.lower(), text)
    if (int in members or float in members) and not (text.startswith("[") and item_of(hint)):
        try:
            return int(text) if int in members else float(text)
        except ValueError:
            return text
    kinds = kinds_of(hint)
    if len(kinds) > 1 and text.isidentifier():
        return {"kind": text}
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        expected = "the name of a kind or JSON" if len(kinds) > 1 else "JSON"
        raise InputError(f"{place} is {text!r}; it must be {expected} ({error})") from error


# ----------------------------------------------------------------------------------------------------------------- help


def _help(flags: Iterable[_Flag], usage: str) -> str:
    """The usage, then every flag with its type, present value and meaning: first the run's own, then part by part."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = [f"usage: python {Path(sys.argv[0]).name} {usage}", *textwrap.wrap(_FLAGS, width), ""]
    for flag in sorted(flags, key=lambda flag: "." in flag.name or isinstance(flag.value, dict | list)):
        kinds, value, meaning = kinds_of(flag.hint), flag.value, flag.meaning
        if isinstance(value, dict):
            kind = value.get("kind", next(iter(kinds)))
            meaning = meaning or (inspect.getdoc(kinds[kind]) or "").split("\n\n")[0].replace("\n", " ")
            if len(kinds) == 1:
                lines += ["", *textwrap.wrap(f"{flag.name}: {meaning}", width)]
                continue
            value = kind
        elif isinstance(value, list) and value:
            value = "as follows"
        lines.append(f"  --{flag.name} {_type_name(flag.hint)} (default: {value})")
        lines += textwrap.wrap(meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


_FLAGS = (
    "A flag of type {A,B} takes one of these names; where they are kinds of a part, the part then starts from that "
    "kind's defaults. A flag of type [A, ...] takes a JSON list. A BOOL is true or false; alone it is true."
)


@functools.cache
def _meanings(cls: type) -> dict[str, str]:
    """Field → its docstring, the string that stands below it in the source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {
        name: text for base in cls.__bases__ if dataclasses.is_dataclass(base) for name, text in _meanings(base).items()
    }
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = inspect.cleandoc(str(text.value.value)).replace("\n", " ")
    return found


def _type_name(hint: Any) -> str:
    """A type as the help writes it."""
    choices = kinds_of(hint) or (typing.get_args(hint) if typing.get_origin(hint) is Literal else ())
    if choices:
        return "{" + ",".join(choices) + "}" if len(choices) > 1 else "".join(choices)
    scalars = ["None" if m is types.NoneType else m.__name__.upper() for m in members_of(hint) if not item_of(m)]
    return "|".join(scalars + ([f"[{_type_name(item_of(hint))}, ...]"] if item_of(hint) else []))
