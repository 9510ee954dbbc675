"""Job files in and out: TOML plus ``table.key=value`` overrides to a `Config`, and back.

Unknown names are refused with the nearest known one, wrong types with the key, the value and the type
wanted. Rules that span fields are in ``check.py``.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from megapre.config.check import ConfigError
from megapre.config.schema import Config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list[int]: "a list of integers",
    list[float]: "a list of numbers",
    list[str]: "a list of strings",
}


LARGEST = 2**22
"""Bytes of a job file that are read."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a job file and apply overrides such as ``parallel.tensor=2`` in order.

    Raises `ConfigError` in one sentence for a file that cannot be read or parsed, an unknown table or key,
    or a value of the wrong type. Rules that span fields are left to `megapre.config.check.check`.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ConfigError(f"{path} has more than {LARGEST} bytes, which no job file has")
        tables = tomllib.loads(text.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {_one_line(error)}") from None
    except ValueError:  # Python reads no integer of more than 4,300 digits
        raise ConfigError(f"{path} is not valid TOML: a number in it is too long") from None
    except RecursionError:
        raise ConfigError(f"{path} is not a job file: its values are nested too deeply") from None
    for override in overrides:
        _apply(tables, override)
    return from_dict(tables)


def from_dict(tables: Mapping[str, Any]) -> Config:
    """Build a `Config` from ``{table: {key: value}}``; what is absent keeps its default.

    Raises `ConfigError` for an unknown table or key or a value of the wrong type.
    """
    known = get_type_hints(Config)
    built = {}
    for table, values in tables.items():
        if table not in known:
            raise ConfigError(f"unknown table [{table}]{_nearest(table, known)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{table} must be a table of keys, as in [{table}], not {_shown(values)}")
        types = get_type_hints(known[table])
        for key in values:
            if key not in types:
                raise ConfigError(f"unknown key {table}.{key}{_nearest(key, types, table)}")
        built[table] = known[table](**{k: _typed(f"{table}.{k}", v, types[k]) for k, v in values.items()})
    return Config(**built)


def from_toml(text: str) -> Config:
    """The `Config` that `to_toml` wrote as ``text``."""
    return from_dict(tomllib.loads(text))


def to_toml(config: Config) -> str:
    """Every field of ``config`` as TOML text; `from_toml` gives ``config`` back."""
    lines = []
    for table in fields(config):
        lines.append(f"[{table.name}]")
        values = getattr(config, table.name)
        lines += [f"{f.name} = {_toml_value(getattr(values, f.name))}" for f in fields(values)]
        lines.append("")
    return "\n".join(lines)


def digest(config: Config) -> str:
    """SHA-256 of the resolved job in hexadecimal; equal on two ranks exactly when their jobs are equal."""
    return hashlib.sha256(to_toml(config).encode()).hexdigest()


def _apply(tables: dict[str, Any], override: str) -> None:
    """Set one ``table.key=value`` in ``tables``."""
    name, equals, text = override.partition("=")
    table, dot, key = name.strip().partition(".")
    if not equals or not dot or not table or not key:
        raise ConfigError(f"override {override!r} must have the form table.key=value, such as parallel.tensor=2")
    known = get_type_hints(Config)
    if table not in known:
        raise ConfigError(f"unknown table [{table}] in override {override!r}{_nearest(table, known)}")
    types = get_type_hints(known[table])
    if key not in types:
        raise ConfigError(f"unknown key {table}.{key} in override {override!r}{_nearest(key, types, table)}")
    values = tables.setdefault(table, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{table} must be a table of keys, as in [{table}], not {_shown(values)}")
    values[key] = _override_value(text.strip(), types[key])


def _override_value(text: str, wanted: Any) -> Any:
    """Value of an override: TOML, or the bare text where a string (or a list of them) is wanted."""
    if not text.isprintable():
        raise ConfigError(f"override value {text!r} holds characters that cannot be printed")
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    if wanted is str:
        return value if isinstance(value, str) else text
    if get_origin(wanted) is list and not isinstance(value, list):
        # A shell user writes data.paths=a,b rather than data.paths='["a", "b"]'.
        (item,) = get_args(wanted)
        return [_override_value(part.strip(), item) for part in text.strip("[]").split(",") if part.strip()]
    return value


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """``value`` as type ``wanted``; an integer may stand for a float, a bool for neither."""
    if get_origin(wanted) is list:
        (item,) = get_args(wanted)
        if isinstance(value, list) and all(_fits(v, item) for v in value):
            return [_number(v, item) for v in value]
    elif _fits(value, wanted):
        return _number(value, wanted)
    raise ConfigError(f"{name} must be {TYPE_NAMES[wanted]}, not {_shown(value)}")


def _fits(value: Any, wanted: type) -> bool:
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


def _number(value: Any, wanted: type) -> Any:
    # An integer beyond the largest float would raise; infinity is refused by the range rules instead.
    if wanted is not float:
        return value
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _nearest(name: str, known: Mapping[str, Any], table: str = "") -> str:
    """The part of a sentence that names the nearest known name, or every one when none is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {table}.{close[0]}?" if table else f"; did you mean [{close[0]}]?"
    return "; known are " + ", ".join(known)


def _shown(value: Any) -> str:
    text = _one_line(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON strings are TOML strings but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)
