"""What is written down with a picture: the webui's infotext, and the info of its API's answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from typing import Any

VERSION = f"Darkroom {version('darkroom')}"


def infotext(prompt: str, negative_prompt: str, fields: Mapping[str, object]) -> str:
    """Three parts, one below the other: the prompt, the negative prompt (if any), the fields."""
    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    lines.append(
        ", ".join(
            f"{name}: {_quoted(value)}"
            for name, value in {**fields, "Version": VERSION}.items()
            if value is not None
        )
    )
    return "\n".join(lines)


def _quoted(value: object) -> str:
    """Values that hold what separates fields are quoted, as the webui's reader expects."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",\n:") else text


def param_json(parameters: Mapping[str, Any], info: Mapping[str, Any], count: int) -> bytes:
    """The webui's answer; `info` is JSON in a string there. `images` are names beside this file."""
    answer = {
        "parameters": parameters,
        "info": json.dumps({**info, "version": VERSION}, ensure_ascii=False),
        "images": [f"image_{number}.png" for number in range(count)],
    }
    return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def timestamp(now: datetime) -> str:
    return now.strftime("%Y%m%d%H%M%S")
