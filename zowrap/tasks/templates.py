"""Templates: ``"{premise} {hypothesis}\\nTrue or false: {label}"``. A field names a column of the data."""

from __future__ import annotations

import string
from collections.abc import Callable

from zowrap.errors import ZOError


def parse(template: str) -> list[tuple[str, str | None]]:
    """The template as (literal text, field) pairs; a field is a column's name, the last pair may have none.

    Raises:
        ZOError: unbalanced braces, or a field that is not a plain name.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ZOError(f"--template {template!r} is malformed: {error} (write {{{{ for a literal brace)") from None
    for _, field, spec, conversion in parts:
        if field is not None and (not field.strip() or spec or conversion):
            raise ZOError(f"--template {template!r}: a field is a column's name in braces, such as {{text}}")
    return [(literal, field) for literal, field, _, _ in parts]


def render(parts: list[tuple[str, str | None]], value: Callable[[str], str]) -> str:
    """Fill in the fields with ``value(field)``."""
    return "".join(literal + (value(field) if field is not None else "") for literal, field in parts)


def split_label(template: str) -> list[tuple[str, str | None]]:
    """The part of a label-words template before ``{label}``, which must end it.

    Raises:
        ZOError: ``{label}`` is missing, repeated, or followed by more text; or no other field is there.
    """
    parts = parse(template)
    fields = [field for _, field in parts if field is not None]
    if fields.count("label") != 1 or parts[-1][1] != "label":
        raise ZOError(f"--template {template!r} must end with {{label}}: its words are scored as what follows the text")
    if len(fields) == 1:
        raise ZOError(f"--template {template!r} has no field for the text, such as {{text}}")
    return [*parts[:-1], (parts[-1][0], None)]


def text_only(template: str) -> list[tuple[str, str | None]]:
    """The template of a form that does not see the label.

    Raises:
        ZOError: ``{label}`` is in it, or no field at all.
    """
    parts = parse(template)
    fields = [field for _, field in parts if field is not None]
    if "label" in fields:
        raise ZOError(f"--template {template!r} has {{label}}, which only --head words uses")
    if not fields:
        raise ZOError(f"--template {template!r} has no field for the text, such as {{text}}")
    return parts
