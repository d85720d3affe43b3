"""Prompts that have a name: the webui's styles."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import msgspec

NO_STYLE = "None"


class Style(msgspec.Struct, frozen=True, kw_only=True):
    """What is added to the prompts of a body; `{prompt}` is where they go, at the front without
    it."""

    prompt: str = ""
    negative_prompt: str = ""


Styles = Mapping[str, Style]


@cache
def read_styles(told: str) -> Styles:
    """`told`: JSON `{"name": {"prompt": "…", "negative_prompt": "…"}}`, or the path of such a file
    or of a webui's styles.csv. Raises ValueError that says what is wrong."""
    if not told.strip():
        return {}
    try:
        text = told if told.lstrip().startswith("{") else Path(told).read_text("utf-8-sig")
        if text.lstrip().startswith("{"):
            return msgspec.json.decode(text, type=dict[str, Style])
        return _read_csv(text)
    except (OSError, msgspec.MsgspecError, csv.Error) as error:
        raise ValueError(str(error)) from None


def check_styles(told: str) -> Styles:
    """As `read_styles`. Raises SystemExit that says what is wrong with the setting."""
    try:
        return read_styles(told)
    except ValueError as error:
        raise SystemExit(f"bad setting DARKROOM_STYLES: {error}") from None


def _read_csv(text: str) -> Styles:
    """As the webui reads it: lines that begin with # are comments, and the prompt's column had
    another name once."""
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    if not {"name"} < set(reader.fieldnames or ()):
        raise ValueError("no styles.csv: its first line is not name,prompt,negative_prompt")
    return {
        row["name"]: Style(
            prompt=row.get("prompt") or row.get("text") or "",
            negative_prompt=row.get("negative_prompt") or "",
        )
        for row in reader
        if row["name"] and not row["name"].startswith("#")
    }


def written(
    prompt: str,
    additions: Sequence[str],
    webui_version: str,
    *,
    longest: int,
    comments: bool = True,
) -> str:
    """A prompt as it is rendered: with those of styles, and written as the webui writes it.
    `comments`: whether there may be some, which are left out. Raises ValueError for one that its
    styles make longer than `longest`."""
    prompt = styled(prompt, additions, longest)
    if webui_version == "1.7":
        return tidied(prompt)
    return without_comments(prompt) if comments else prompt


def styled(prompt: str, additions: Sequence[str], longest: int) -> str:
    """A prompt with those of styles, one after the other, as the webui puts them together. Raises
    ValueError, see `written`."""
    for addition in additions:
        if "{prompt}" in addition:
            prompt = addition.replace("{prompt}", prompt)
        else:
            prompt = ", ".join(part for part in (prompt.strip(), addition.strip()) if part)
        if len(prompt) > longest:
            raise ValueError(f"with its styles it has more than {longest} characters")
    return prompt


def tidied(prompt: str) -> str:
    """Webui 1.7 does this to every prompt: several commas or spaces in a row are one, and none are
    at the ends."""
    prompt = re.sub(r"(?<!,)(?:,+\s+)+,?", ", ", prompt)
    return re.sub(r"\s{2,}", " ", prompt).strip(", ")


def without_comments(prompt: str) -> str:
    """Webui 1.10 leaves out what follows on # in a line, and lines that begin with it."""
    prompt = re.sub(r"(^|\n)#[^\n]*(\n|$)", "\n", prompt)
    return re.sub(r"#[^\n]*(\n|$)", "\n", prompt)
