"""What a prompt asks for, as data; nothing here knows of tokens or models.

<lora:name:0.8>           networks, taken out of the text first
a cat AND a dog :0.5      several prompts, each with a weight
[from:to:when] [a|b]      texts that change with the steps
(word:1.2) [word] BREAK   attention within a text
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

# Networks


class Network(msgspec.Struct, frozen=True):
    """`<kind:name:first:second>`, also with `te=`, `unet=` for the weights: how strongly it acts on
    the text encoders and on the UNet. `ignored`: the names of other arguments."""

    kind: str
    name: str
    text_weight: float = 1.0
    unet_weight: float = 1.0
    ignored: tuple[str, ...] = ()


class BadPrompt(ValueError):
    """The text says what is wrong, without quoting the prompt."""


_NETWORK = re.compile(r"<(\w+):([^<>]+)>")
NETWORKS = ("lora", "lyco")
"""The kinds that act here."""


def take_networks(prompt: str) -> tuple[str, list[Network]]:
    """The prompt without its `<kind:name:…>`, and what they say. Raises BadPrompt for one that acts
    here and has a weight that is no number."""
    networks = [_network(found[1], found[2]) for found in _NETWORK.finditer(prompt)]
    return _NETWORK.sub("", prompt), networks


def _network(kind: str, arguments: str) -> Network:
    name, *rest = (part.strip() for part in arguments.split(":"))
    if kind not in NETWORKS:
        return Network(kind, name)
    named = dict(part.split("=", 1) for part in rest if "=" in part)
    unnamed = [part for part in rest if "=" not in part]
    text = named.get("te", unnamed[0] if unnamed else "1")
    unet = named.get("unet", unnamed[1] if len(unnamed) > 1 else text)
    weights = _number(text), _number(unet)
    if weights[0] is None or weights[1] is None:
        raise BadPrompt(f"prompt: <{kind}:{name[:60]}:…> has a weight that is no number")
    ignored = [f"{key[:20]}=" for key in named if key not in ("te", "unet")]
    ignored += ["a third number"] * (len(unnamed) > 2)
    return Network(kind, name, weights[0], weights[1], tuple(ignored))


# Several prompts at once


class Part(msgspec.Struct, frozen=True):
    """One of the prompts that AND joins."""

    text: str
    weight: float = 1.0


_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")


def split_parts(prompt: str) -> list[Part]:
    parts = []
    for piece in _AND.split(prompt):
        text, colon, weight = piece.rpartition(":")
        if colon and _WEIGHT.fullmatch(weight.strip()):
            parts.append(Part(text.rstrip(), float(weight)))
        else:
            parts.append(Part(piece.rstrip()))
    return parts


# Texts that change with the steps


class Phase(msgspec.Struct, frozen=True):
    """A text, and the last step (from 1) that it holds for."""

    until: int
    text: str


class _Switch(msgspec.Struct, frozen=True):
    before: list[_Node]
    after: list[_Node]
    when: str


class _Turns(msgspec.Struct, frozen=True):
    options: list[list[_Node]]


_Node = str | _Switch | _Turns

_WHEN = re.compile(r"\s*[-+]?(?:\d+(?:\.\d*)?|\.\d+)\s*")
_CLOSES = {")": "(", "]": "["}
MOST_NESTED = 50
"""Brackets within each other that may change with the steps; those around them are plain text."""


def plan_phases(prompt: str, steps: int, *, done_before: int | None = None) -> list[Phase]:
    """What the text is at each of `steps` steps.

    A `when` with a point is a share of the steps, one without counts them. `done_before`: steps of
    the first pass, of which this is the second (hires fix): it counts on from there, and its shares
    run from 1 to 2.
    """
    nodes = _parse(prompt)
    ends = {steps} | {end for end in _ends(nodes, steps, done_before) if end >= 1}
    return [Phase(end, _text_at(nodes, end, steps, done_before)) for end in sorted(ends)]


def text_at(phases: Sequence[Phase], call: int) -> int:
    """Which phase holds at a call of the model (from 0): the webui compares the two counts as they
    are, so a text holds for one call longer than it says."""
    return next((n for n, phase in enumerate(phases) if call <= phase.until), 0)


def _parse(text: str) -> list[_Node]:
    return _parse_range(text, 0, len(text), _match_brackets(text))


def _match_brackets(text: str) -> dict[int, int]:
    """Where each bracket that is opened closes; stray ones are missing."""
    pairs: dict[int, int] = {}
    opened: list[int] = []
    heights = [0]  # of what lies within each of them, and within none
    position = 0
    while position < len(text):
        sign = text[position]
        if sign == "\\":
            position += 1
        elif sign in "([":
            opened.append(position)
            heights.append(0)
        elif sign in _CLOSES and opened and text[opened[-1]] == _CLOSES[sign]:
            start, height = opened.pop(), heights.pop() + 1
            if height <= MOST_NESTED:
                pairs[start] = position
            heights[-1] = max(heights[-1], height)
        position += 1
    return pairs


def _parse_range(text: str, start: int, end: int, pairs: dict[int, int]) -> list[_Node]:
    nodes: list[_Node] = []
    plain = position = start
    while position < end:
        close = pairs.get(position)
        if close is not None and text[position] == "[":
            special = _parse_brackets(text, position, close, pairs)
            if special:
                nodes += [text[plain:position], special]
                plain = position = close + 1
                continue
        position += 2 if text[position] == "\\" else 1
    nodes.append(text[plain:end])
    return nodes


def _parse_brackets(
    text: str, opening: int, close: int, pairs: dict[int, int]
) -> _Switch | _Turns | None:
    """None for brackets that only lower the attention."""
    marks, position = [opening], opening + 1
    while position < close:
        inner = pairs.get(position)
        if inner is not None:
            position = inner
        elif text[position] == "\\":
            position += 1
        elif text[position] in ":|":
            marks.append(position)
        position += 1
    ranges = [(a + 1, b) for a, b in zip(marks, [*marks[1:], close], strict=True)]
    signs = {text[mark] for mark in marks[1:]}
    if signs == {"|"}:
        return _Turns([_parse_range(text, *one, pairs) for one in ranges])
    if signs == {":"} and len(ranges) in (2, 3) and _WHEN.fullmatch(text[slice(*ranges[-1])]):
        texts = [_parse_range(text, *one, pairs) for one in ranges[:-1]]
        before: list[_Node] = texts[0] if len(texts) == 2 else []
        return _Switch(before, texts[-1], text[slice(*ranges[-1])].strip())
    return None


def _step_of(when: str, steps: int, done_before: int | None) -> int:
    value = float(when)
    if "." in when:
        value = (value - (done_before is not None)) * steps
    else:
        value -= done_before or 0
    return int(max(0, min(steps, value)))


def _ends(nodes: Iterable[_Node], steps: int, done_before: int | None) -> set[int]:
    ends: set[int] = set()
    for node in nodes:
        if isinstance(node, _Switch):
            ends.add(_step_of(node.when, steps, done_before))
            ends |= _ends([*node.before, *node.after], steps, done_before)
        elif isinstance(node, _Turns):
            ends |= set(range(1, steps + 1))
            for option in node.options:
                ends |= _ends(option, steps, done_before)
    return ends


def _text_at(nodes: Iterable[_Node], step: int, steps: int, done_before: int | None) -> str:
    def text_of(node: _Node) -> str:
        if isinstance(node, _Switch):
            early = step <= _step_of(node.when, steps, done_before)
            return _text_at(node.before if early else node.after, step, steps, done_before)
        if isinstance(node, _Turns):
            option = node.options[(step - 1) % len(node.options)]
            return _text_at(option, step, steps, done_before)
        return node

    return "".join(map(text_of, nodes))


# Attention


class Weighted(msgspec.Struct, frozen=True):
    """`text` is None for a BREAK."""

    text: str | None
    weight: float = 1.0


_PIECES = re.compile(
    r"""\\\(|\\\)|\\\[|\\]|\\\\|\\
    |\(|\[
    |:\s*([+-]?[.\d]+)\s*\)
    |\)|]
    |[^\\()\[\]:]+
    |:""",
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")


def parse_attention(prompt: str) -> list[Weighted]:
    """`a (red:1.2) ball` -> a ×1, red ×1.2, ball ×1. Brackets that never close count, too."""
    texts: list[str | None] = []
    weights = array("d")
    round_starts: list[int] = []
    square_starts: list[int] = []

    def multiply(start: int, factor: float) -> None:
        if start < len(weights):  # numpy, as there may be 10,000 brackets around each other
            with np.errstate(all="ignore"):
                np.frombuffer(weights)[start:] *= factor

    for piece in _PIECES.finditer(prompt):
        text, weight = piece[0], _number(piece[1])
        if text.startswith("\\"):
            texts.append(text[1:])
            weights.append(1.0)
        elif text == "(":
            round_starts.append(len(texts))
        elif text == "[":
            square_starts.append(len(texts))
        elif weight is not None and round_starts:
            multiply(round_starts.pop(), weight)
        elif text == ")" and round_starts:
            multiply(round_starts.pop(), 1.1)
        elif text == "]" and square_starts:
            multiply(square_starts.pop(), 1 / 1.1)
        else:
            parts = _BREAK.split(text)
            for number, part in enumerate(parts):
                if number:
                    texts.append(None)
                    weights.append(1.0)
                    part = part.lstrip()
                texts.append(part.rstrip() if number < len(parts) - 1 else part)
                weights.append(1.0)
    for start in round_starts:
        multiply(start, 1.1)
    for start in square_starts:
        multiply(start, 1 / 1.1)
    return _merged(texts, weights)


def _number(text: str | None) -> float | None:
    """None for what is none, such as 1.2.3, and for what is beyond all numbers."""
    try:
        number = math.nan if text is None else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _merged(texts: Sequence[str | None], weights: Sequence[float]) -> list[Weighted]:
    """Neighbours of one weight become one text: words are not to be cut by a lone bracket."""
    merged: list[Weighted] = []
    for text, weight in zip(texts, weights, strict=True):
        last = merged[-1] if merged else None
        if last and last.text is not None and text is not None and last.weight == weight:
            merged[-1] = Weighted(last.text + text, weight)
        elif text is None:
            merged.append(Weighted(None))
        else:
            merged.append(Weighted(text, weight))
    return merged or [Weighted("")]
