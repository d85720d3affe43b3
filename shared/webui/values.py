"""Flags and numbers in the ways that the webui's API takes them, which is pydantic 1's. What means
none stays as it is, for whoever says what is wrong with it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

_FLAGS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}


def as_flag(given: Any) -> Any:
    """True or False for whatever means that."""
    if isinstance(given, str):
        return _FLAGS.get(given.strip().lower(), given)
    return bool(given) if isinstance(given, int | float) and given in (0, 1) else given


def as_number(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    with suppress(ValueError):
        return float(given)
    return given


def as_whole(given: Any) -> Any:
    if isinstance(given, str):
        with suppress(ValueError):
            return int(given)
    number = as_number(given)
    return int(number) if isinstance(number, float) and number.is_integer() else given
