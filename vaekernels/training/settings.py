"""Settings from TOML files and ``key=value``, and back: the mapping between text and :class:`Config`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vaekernels._files import open_regular
from vaekernels.training.config import Config
from vaekernels.training.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["changed", "from_mapping", "from_toml", "load", "nearest", "parse_set", "read_toml", "to_toml"]

T = TypeVar("T")


def load(path: Path) -> Config:
    """The config in the TOML file at ``path``. ConfigError names the file and the key at fault."""
    values = read_toml(path)
    try:
        return from_mapping(Config, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_toml(text: str) -> Config:
    """The config in a TOML text."""
    return from_mapping(Config, _loads(text))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. ConfigError names the file, and the line where it is no TOML."""
    try:
        with open_regular(path) as file:
            return _loads(file.read().decode())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # of the text as TOML, or of the bytes as UTF-8
        raise ConfigError(f"{path} is not a TOML file: {error}") from error


def _loads(text: str) -> dict[str, Any]:
    """The tables of a TOML text. ValueError if it is none."""
    try:
        tables: dict[str, Any] = tomllib.loads(text)
        return tables
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def to_toml(config: Config) -> str:
    """The config as TOML that :func:`load` reads back. None, which TOML has no word for, is the default of
    every setting that may be None, so such a setting is left out."""
    lines: list[str] = []
    for table in dataclasses.fields(config):
        lines.append(f"[{table.name}]")
        for name, value in dataclasses.asdict(getattr(config, table.name)).items():
            if value is not None:
                # JSON's strings, numbers and booleans are TOML's as well, but for a bare DEL.
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{name} = {text}")
        lines.append("")
    return "\n".join(lines)


def parse_set(options: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``table.key=value`` options as nested mappings. A value is read as TOML, a bare word as a string, and
    ``none`` unsets."""
    given: dict[str, dict[str, Any]] = {}
    for option in options:
        name, equals, text = option.partition("=")
        table, dot, key = name.strip().partition(".")
        if not (equals and dot and key):
            raise ConfigError(f"--set takes TABLE.KEY=VALUE, such as objective.beta=2; got {option!r}")
        given.setdefault(table, {})[key] = _value(text.strip())
    return given


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return _loads(f"x = {text}")["x"]
    except ValueError:
        return text


def from_mapping(kind: type[T], values: object, where: str = "") -> T:
    """A dataclass from nested mappings. ConfigError for an unknown key or a value of the wrong type or
    range."""
    arguments = _known(kind, values, where)
    hints = typing.get_type_hints(kind)
    for key, value in arguments.items():
        if dataclasses.is_dataclass(hints[key]):
            arguments[key] = from_mapping(typing.cast(type[Any], hints[key]), value, f"{where}{key}.")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where.rstrip('.') or 'the config'} lacks a setting: {error}") from error


def changed(config: Config, given: Mapping[str, object]) -> Config:
    """``config`` with the settings in ``given``, a mapping of tables."""
    tables = _known(Config, given, "")
    for table, values in tables.items():
        current = getattr(config, table)
        tables[table] = dataclasses.replace(current, **_known(type(current), values, f"{table}."))
    return dataclasses.replace(config, **tables)


def _known(kind: type[Any], values: object, where: str) -> dict[str, Any]:
    """A copy of ``values`` if they are a mapping whose keys are fields of ``kind``, else ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where.rstrip('.') or 'the config'} must be a table of settings, got {values!r}")
    names = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            raise ConfigError(f"unknown setting {where}{key}; {nearest(key, names, where)}")
    return dict(values)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """'did you mean ...?' where something known is near, else the list of the known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
