"""Settings from TOML files and ``key=value``, and back: the mapping between text and :class:`Config`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from vaekernels._files import open_regular
from vaekernels.training.config import Config
from vaekernels.training.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["changed", "from_toml", "load", "parse_set", "read_toml", "to_toml"]


def load(path: Path) -> Config:
    """The config in the TOML file at ``path``. ConfigError names the file and the key at fault."""
    values = read_toml(path)
    try:
        return Config(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_toml(text: str) -> Config:
    """The config in a TOML text."""
    return Config(**_loads(text))


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
    return tomli_w.dumps(
        {
            table: {name: value for name, value in values.items() if value is not None}
            for table, values in dataclasses.asdict(config).items()
        }
    )


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


def changed(config: Config, given: Mapping[str, object]) -> Config:
    """``config`` with the settings in ``given``, a mapping of tables. ConfigError for an unknown setting or a
    value of the wrong type or range."""
    tables: dict[str, Any] = dataclasses.asdict(config)
    for table, values in given.items():
        if table in tables and isinstance(values, Mapping):
            tables[table] |= values
        else:
            tables[table] = values  # which is refused, by name
    return Config(**tables)
