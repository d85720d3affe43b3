"""What is written down with a picture: the webui's infotext, and the info of its API's answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

VERSION = f"Darkroom {version('darkroom')}"


def infotext(
    prompt: str, negative_prompt: str, fields: Mapping[str, object], *, version: bool = True
) -> str:
    """Three parts, one below the other: the prompt, the negative prompt (if any), the fields."""
    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    lines.append(fields_text({**fields, "Version": VERSION} if version else fields))
    return "\n".join(lines).strip()


def fields_text(fields: Mapping[str, object]) -> str:
    """`name: value, …` of those that have a value."""
    told = {name: value for name, value in fields.items() if value is not None}
    return ", ".join(f"{name}: {_quoted(value)}" for name, value in told.items())


def _quoted(value: object) -> str:
    """Values that hold what separates fields are quoted, as the webui's reader expects, and those
    that look as if they were."""
    text = str(value)
    quoted = set(text) & set(",\n:") or text.startswith('"')
    return json.dumps(text, ensure_ascii=False) if quoted else text


def param_json(
    parameters: Mapping[str, Any],
    info: Mapping[str, Any],
    image_names: Sequence[str],
    receipt: Mapping[str, Any],
) -> bytes:
    """The webui's answer, where `info` is JSON in a string; `images` are names beside this file.
    `receipt`: what it takes to make the same pictures again."""
    answer = {
        "parameters": parameters,
        "info": json.dumps({**info, "version": VERSION}, ensure_ascii=False, allow_nan=False),
        "images": image_names,
        "receipt": receipt,
    }
    return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def timestamp(now: datetime) -> str:
    return now.strftime("%Y%m%d%H%M%S")
