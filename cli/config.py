"""``--config run.toml``: the options of the command line in a file, by the same names."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import typer

from zowrap.errors import ZOError, nearest


def apply(context: typer.Context, path: str | None) -> str | None:
    """Callback of ``--config``: the file's values become defaults, so that flags win.

    Raises:
        ZOError: the file cannot be read, or has a key that is no option of the command.
    """
    if path is None:
        return None
    from zowrap.cli.aliases import unalias
    from zowrap.cli.paths import expand

    path = str(expand(path))
    parameters = {parameter.name: parameter for parameter in context.command.params}
    names = {name: name for name in parameters if name not in ("help", "config")}
    values: dict[str, Any] = {}
    for key, value in read(path).items():
        name = unalias(f"--{key}".replace("_", "-"))[2:].replace("-", "_")
        if name not in names:
            raise ZOError(f"{path}: unknown option {key!r}{nearest(key, [n.replace('_', '-') for n in names])}")
        repeatable = getattr(parameters[name], "multiple", False)
        values[name] = _plain(path, key, value, repeatable)
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _plain(path: str, key: str, value: Any, repeatable: bool) -> Any:
    """The value as the command line would carry it."""
    if repeatable:
        if isinstance(value, dict):  # [rule-option] beta = 0.9
            return [f"{name}={one}" for name, one in value.items()]
        return [str(one) for one in (value if isinstance(value, list) else [value])]
    if isinstance(value, list) and key.replace("-", "_") == "labels":
        return ",".join(str(one) for one in value)
    if isinstance(value, dict | list):
        raise ZOError(f"{path}: {key} takes one value, not {'a table' if isinstance(value, dict) else 'a list'}")
    return value


def read(path: str) -> dict[str, Any]:
    """The file's keys and values.

    Raises:
        ZOError: missing, malformed, or of an unknown format.
    """
    file = Path(path)
    if not file.is_file():
        raise ZOError(f"no such configuration file: {path}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ZOError(f"{path} cannot be read: {error}") from error
    if file.suffix == ".toml":
        values = _toml(path, text)
    elif file.suffix in (".yaml", ".yml"):
        values = _yaml(path, text)
    else:
        raise ZOError(f"{path}: a configuration file is .toml or .yaml")
    if not isinstance(values, dict):
        raise ZOError(f"{path} does not hold named options")
    return {str(key): value for key, value in values.items() if value is not None}


def _toml(path: str, text: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ZOError(f"{path} is not valid TOML: {error}") from error


def _yaml(path: str, text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ZOError(f"reading {path} needs PyYAML: pip install pyyaml (or write it as .toml)") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ZOError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    # YAML 1.1 reads 1e-3 as a string; the option's own type reads it as a number.
    return {} if values is None else values
