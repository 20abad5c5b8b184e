"""`--help` of every command fits a terminal, and an option of one meaning has one name in all of them."""

import dataclasses
import re
import shutil
import typing

import pytest

from chai_jax.cli import COMMANDS, main
from chai_jax.commands.options import METAVARS, help_of
from chai_jax.config import DeviceConfig, PlanConfig

COLUMNS = 100

# What several commands take, and which.
SHARED = {
    "model": "run plan explain evaluate generate serve bench-serve verify export lm-eval aot",
    "task": "run plan evaluate",
    "text": "run plan evaluate",
    "data_dir": "run plan evaluate lm-eval",
    "out": "run plan evaluate bench bench-serve export report",
    "plan": "run explain aot",
    "seed": "run plan generate bench bench-serve",
    "limit": "run evaluate",
    "revision": "run evaluate lm-eval",
    "batch": "run bench aot",
    "accumulation": "run aot",
    "cache_teacher": "run aot",
    "moments": "run aot",
    "remat": "run aot",
    "share": "run plan bench aot",
    "clusters": "run plan bench aot",
    "storage": "run serve bench aot",
    "attention": "bench aot",
    "prompt": "generate bench",
    "api_key": "serve bench-serve",
    **dict.fromkeys(
        ("dtype", "require_backend", "compile_cache"), "run plan evaluate generate serve bench lm-eval env"
    ),
    "new_tokens": "bench bench-serve",
    "chat": "generate bench-serve",
    "mesh": "run plan evaluate generate bench lm-eval aot env",
    "fsdp": "run plan evaluate generate bench lm-eval aot env",
}
EVERYWHERE = "run plan evaluate generate bench lm-eval env"  # which compute


def fields(kind: type) -> dict[str, typing.Any]:
    """Name and type of every option of a command; those of its groups of settings too."""
    found: dict[str, typing.Any] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        found |= fields(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return found


def shown(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    assert shutil.get_terminal_size().columns == COLUMNS


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(command, capsys)
    assert f"usage: {' '.join(['chai-jax', command]).strip()}" in text
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert "None" not in text
    assert not re.search(r"\bSTR\b", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help_and_one_default(command: str) -> None:
    """Help says the default only where it is chosen later: any other follows the text by itself."""
    hints = typing.get_type_hints(COMMANDS[command])
    for group in (COMMANDS[command], *filter(dataclasses.is_dataclass, hints.values())):
        texts = help_of(group)
        for option in dataclasses.fields(group):
            if option.name != "arguments" and not dataclasses.is_dataclass(typing.get_type_hints(group)[option.name]):
                told = texts[option.name].count("(default:")
                assert told <= (option.default in (None, "") or option.default is False), option.name


def test_options_of_one_meaning_have_one_name() -> None:
    taken: dict[str, list[str]] = {}
    for command, kind in COMMANDS.items():
        for name in fields(kind):
            taken.setdefault(name, []).append(command)
    several = {name: " ".join(commands) for name, commands in taken.items() if len(commands) > 1}
    wanted = dict.fromkeys(fields(DeviceConfig), EVERYWHERE) | dict.fromkeys(fields(PlanConfig), "run plan") | SHARED
    assert several == wanted
    assert not taken.keys() & {"output", "output_dir", "samples", "destination", "batch_size", "random_seed", "device"}


def test_what_help_says_of_values_is_of_options() -> None:
    assert METAVARS.keys() <= {name for kind in COMMANDS.values() for name in fields(kind)}
