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
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

import msgspec
import numpy as np

from shared.webui.body_names import NETWORK, NETWORKS
from shared.webui.settings import Emphasis

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


def take_networks(prompt: str) -> tuple[str, list[Network]]:
    """The prompt without its `<kind:name:…>`, and what they say. Raises BadPrompt for one that acts
    here and has a weight that is no number."""
    networks = [_network(found[1], found[2]) for found in NETWORK.finditer(prompt)]
    return NETWORK.sub("", prompt), networks


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
    """`height`: how many that change lie within each other, with this one."""

    before: list[_Node]
    after: list[_Node]
    when: str
    height: int


class _Turns(msgspec.Struct, frozen=True):
    options: list[list[_Node]]
    height: int


_Node = str | _Switch | _Turns

_SIGN = re.compile(r"\\.|[\\\[\]():|]")
"""What is more than itself; a backslash takes the next sign along, if that is in its line."""
_WHEN = re.compile(r"\s*[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\s*")
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


class _Open(msgspec.Struct):
    """A bracket that may close. `marks`: the `:` and `|` directly within it. `inner`: how many of
    what was found lie before it."""

    start: int
    inner: int
    marks: list[int] = []

    def has_turns(self, text: str) -> bool:
        return any(text[mark] == "|" for mark in self.marks)


class _Found(msgspec.Struct, frozen=True):
    start: int
    end: int
    node: _Switch | _Turns


def _parse(text: str) -> list[_Node]:
    """By the webui's grammar: brackets and colons may be stray where they are in no whole bracket,
    but a `|` that is in none, and a backslash with nothing behind it, are no prompt, and nothing in
    such a text changes. Where the grammar allows to read brackets as stray or as whole, and the
    webui does now one and now the other, they are whole."""
    found: list[_Found] = []
    opened: list[_Open] = []
    for sign in _SIGN.finditer(text):
        at, what = sign.start(), sign[0]
        if what == "\\":
            return [text]
        if what in ("(", "["):
            opened.append(_Open(at, len(found)))
        elif what in (":", "|"):
            if opened:
                opened[-1].marks.append(at)
            elif what == "|":
                return [text]
        elif what in _CLOSES and opened:
            last = opened.pop()
            if text[last.start] != _CLOSES[what] or not _close(text, last, at, found):
                # It is stray, and so is all that it would be in.
                if any(one.has_turns(text) for one in (last, *opened)):
                    return [text]
                opened.clear()
    if any(one.has_turns(text) for one in opened):
        return [text]
    return _nodes(text, 0, len(text), found)


def _close(text: str, bracket: _Open, end: int, found: list[_Found]) -> bool:
    """False for a bracket that is none by the grammar. One that changes with the steps takes the
    place of what was found in it; of others nothing is kept."""
    edges = [bracket.start, *bracket.marks, end]
    ranges = [(before + 1, after) for before, after in pairwise(edges)]
    signs = {text[mark] for mark in bracket.marks}
    if text[bracket.start] == "(":
        return "|" not in signs and len(ranges) <= 2
    if not signs:
        return True
    inner = found[bracket.inner :]
    height = 1 + max((one.node.height for one in inner), default=0)
    node: _Switch | _Turns
    if signs == {"|"}:
        node = _Turns([_nodes(text, *one, inner) for one in ranges], height)
    elif signs == {":"} and len(ranges) <= 3 and _WHEN.fullmatch(text[slice(*ranges[-1])]):
        texts = [_nodes(text, *one, inner) for one in ranges[:-1]]
        before: list[_Node] = texts[0] if len(texts) == 2 else []
        node = _Switch(before, texts[-1], text[slice(*ranges[-1])].strip(), height)
    else:
        return False
    if height <= MOST_NESTED:
        found[bracket.inner :] = [_Found(bracket.start, end + 1, node)]
    return True


def _nodes(text: str, start: int, end: int, found: Sequence[_Found]) -> list[_Node]:
    """A part of the text, with what was found in it. `found`: in their order."""
    nodes: list[_Node] = []
    first, last = (bisect_left(found, at, key=lambda one: one.start) for at in (start, end))
    for one in found[first:last]:
        nodes += [text[start : one.start], one.node]
        start = one.end
    nodes.append(text[start:end])
    return nodes


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
BREAK, BREAKS = "BREAK", -1.0
"""The word, and the attention by which it is more than that. Brackets change it, so that within
them it is a word, unless they come to nothing."""


def parse_attention(prompt: str, emphasis: Emphasis = "Original") -> list[Weighted]:
    """`a (red:1.2) ball` -> a ×1, red ×1.2, ball ×1. Brackets that never close count, too. A BREAK
    that they change is a word, of less than no attention, as in the webui."""
    if emphasis == "None":
        return [Weighted(prompt)]
    texts: list[str] = []
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
                    texts.append(BREAK)
                    weights.append(BREAKS)
                    part = part.lstrip()
                texts.append(part.rstrip() if number < len(parts) - 1 else part)
                weights.append(1.0)
    for start in round_starts:
        multiply(start, 1.1)
    for start in square_starts:
        multiply(start, 1 / 1.1)
    merged = _merged(texts, weights)
    return [Weighted(part.text) for part in merged] if emphasis == "Ignore" else merged


def _number(text: str | None) -> float | None:
    """None for what is none, such as 1.2.3, and for what is beyond all numbers."""
    try:
        number = math.nan if text is None else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _merged(texts: Sequence[str], weights: Sequence[float]) -> list[Weighted]:
    """Neighbours of one weight become one text: words are not to be cut by a lone bracket."""
    merged = [
        ("".join(text for text, _ in alike), weight)
        for weight, alike in groupby(zip(texts, weights, strict=True), key=lambda one: one[1])
    ]
    return [
        Weighted(None) if (text, weight) == (BREAK, BREAKS) else Weighted(text, weight)
        for text, weight in merged or [("", 1.0)]
    ]
