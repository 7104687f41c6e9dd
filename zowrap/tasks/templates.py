"""Parse and render templates such as ``"{premise} {hypothesis}\\nTrue or false: {label}"``.

A field names a column of the data.
"""

from __future__ import annotations

import string
from collections.abc import Callable

from zowrap.errors import ZOError


def parse(template: str) -> list[tuple[str, str | None]]:
    """Parse a template into (literal text, field) pairs; a field is a column's name, and the last pair may have none.

    Raises:
        ZOError: unbalanced braces, or a field that is not a plain name.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ZOError(f"--template {template!r} is malformed: {error} (write {{{{ for a literal brace)") from None
    for _, field, spec, conversion in parts:
        if field is not None and (not field.strip() or spec or conversion):
            raise ZOError(f"--template {template!r}: a field must be a column's name in braces, such as {{text}}")
    return [(literal, field) for literal, field, _, _ in parts]


def render(parts: list[tuple[str, str | None]], value: Callable[[str], str]) -> str:
    """Fill in the fields with ``value(field)``."""
    return "".join(literal + (value(field) if field is not None else "") for literal, field in parts)


def parse_with_label(template: str) -> list[tuple[str, str | None]]:
    """Parse a template that ends with ``{label}``, and return the part before it.

    Raises:
        ZOError: ``{label}`` is missing, repeated or followed by more text; or there is no other field.
    """
    parts = parse(template)
    fields = [field for _, field in parts if field is not None]
    if fields.count("label") != 1 or parts[-1][1] != "label":
        raise ZOError(f"--template {template!r} must end with {{label}}, whose words are scored after the text")
    if len(fields) == 1:
        raise ZOError(f"--template {template!r} has no field for the text, such as {{text}}")
    return [*parts[:-1], (parts[-1][0], None)]


def parse_text_only(template: str) -> list[tuple[str, str | None]]:
    """Parse a template without ``{label}``.

    Raises:
        ZOError: it has ``{label}``, or no field at all.
    """
    parts = parse(template)
    fields = [field for _, field in parts if field is not None]
    if "label" in fields:
        raise ZOError(f"--template {template!r} has {{label}}, which only --head words uses")
    if not fields:
        raise ZOError(f"--template {template!r} has no field for the text, such as {{text}}")
    return parts
