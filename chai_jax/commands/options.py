"""What all command lines share: how options are named and shown, and how words become values.

Commands are frozen dataclasses. A field is an option, and the text below it is its help. Settings (`chai_jax.config`)
know nothing of the command line, so what it shows for a field comes from the tables here, by the field's name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro
from tyro.conf import DisallowNone, OmitArgPrefixes, PositionalMetavarFromFieldName, arg, subcommand
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from chai_jax.errors import InputError
from chai_jax.inputs.paths import user_path

# What `--help` shows as an option's value; others are shown by their type. A command may say more of its own options.
METAVARS = {
    **dict.fromkeys(("baseline", "draft", "teacher"), "MODEL"),
    **dict.fromkeys(("compile_cache", "data_dir"), "FOLDER"),
    **dict.fromkeys(("kv_budget", "layers", "model_budget", "rank"), "FRACTION"),
    **dict.fromkeys(("checkpoint_minutes", "max_minutes"), "MINUTES"),
    "clusters": "elbow|N|FRACTION|correlation:R",
    "coordinator": "HOST:PORT",
    "gate": "NATS",
    "lr": "RATE",
    "mesh": "DATAxMODEL",
    "order": "STAGE,...",
    "pin": "LAYER,...",
    "plan": "PLAN",
    "revision": "REVISION",
    "storages": "FORMAT,...",
    "system": "TEXT",
    "task": "TASK",
    "text": "FILE",
    "wandb": "PROJECT",
}
OutFile = Annotated[Path, arg(aliases=["-o"], metavar="FILE")]
OutFolder = Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")]
OptionalOutFolder = Annotated[Path | None, arg(aliases=["-o"], metavar="FOLDER")]
RULES = ConstructorRegistry()


class Refused(Exception):
    """Carries an InputError through tyro, which frames ValueErrors in boxes."""


def read(kind: Any, argv: Sequence[str] | None, *, unknown: bool = False, **about: str) -> Any:
    """What a command line asks for.

    Args:
        kind: a dataclass of options, or a union of subcommands.
        argv: the words; None: those of this process.
        unknown: also return the words that are no option.
        about: tyro's `prog` and `description`.

    Raises:
        InputError: a path that cannot be.
        SystemExit: an option or a value that is not known, status 2, or `--help`.
    """
    look: dict[str, Any] = {"config": (OmitArgPrefixes, DisallowNone, PositionalMetavarFromFieldName), **about}
    try:
        return tyro.cli(kind, args=argv, registry=RULES, return_unknown_args=unknown, **look)  # type: ignore[call-overload]
    except Refused as error:
        raise error.args[0] from None


def one_of(commands: Mapping[str, type]) -> Any:
    """What `read` takes to choose a command by its name."""
    return Union[tuple(Annotated[kind, subcommand(name)] for name, kind in commands.items())]  # noqa: UP007


@RULES.primitive_rule
def path_option(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """How every option that is a path is read."""

    def read_path(words: list[str]) -> Path:
        try:
            return user_path(words[0])
        except InputError as error:
            raise Refused(error) from None

    if kind.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        1, "PATH", read_path, lambda value: isinstance(value, Path), lambda path: [str(path)]
    )


@RULES.struct_rule
def options_of(kind: StructTypeInfo) -> StructConstructorSpec | None:
    """The options of a dataclass, with their help and what it shows of them."""
    if not dataclasses.is_dataclass(kind.type) or hasattr(kind.type, "__parameters__"):
        return None  # a generic one is tyro's own, around a union of commands
    given = kind.default if isinstance(kind.default, kind.type) else None
    types, texts = get_type_hints(kind.type, include_extras=True), help_of(kind.type)
    fields = (
        StructFieldSpec(one.name, as_shown(one.name, types[one.name]), default_of(one, given), texts.get(one.name))
        for one in dataclasses.fields(kind.type)
    )
    return StructConstructorSpec(kind.type, tuple(fields))


def help_of(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass, in it or in a class that it extends."""
    parsed = (docstring_parser.parse_from_object(base).params for base in reversed(kind.__mro__[:-1]))
    return {one.arg_name: " ".join(one.description.split()) for params in parsed for one in params if one.description}


def as_shown(name: str, hint: Any) -> Any:
    """The type of a field with its metavar, and with its default shown where it is one that says something."""
    kind, *own = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    return Annotated[kind, arg(metavar=METAVARS.get(name), help_behavior_hint=default_hint), *own]


def default_hint(default: str) -> str:
    """How help ends. Of a default that is chosen later, the text itself says what it will be."""
    return "" if default in ("None", "False", "", "''") else f"(default: {default})"


def default_of(one: Any, given: Any) -> Any:
    """The default of a dataclass's field, within the default of the whole if there is one."""
    if given is not None:
        return getattr(given, one.name)
    if one.default_factory is not dataclasses.MISSING:
        return one.default_factory()
    return MISSING_NONPROP if one.default is dataclasses.MISSING else one.default
