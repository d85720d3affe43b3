"""The webui's prompt syntax -> text embeddings of CLIP.

    (word)  (word:1.3)  [word]  \\( \\) \\[ \\]  BREAK

Attention is multiplied onto the embeddings, whose mean is then restored. Prompts of any length are
cut into chunks of 75 tokens, at a comma where one is near. It follows the code of AUTOMATIC1111's
webui 1.7 (`prompt_parser.py`, `sd_hijack_clip.py`); for a prompt without any of the syntax the
result is bit for bit that of diffusers.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import torch
from torch import Tensor

CHUNK = 75
COMMA_NEAR = 20
"""A chunk ends at the last comma if that is at most so many tokens back."""

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
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):([^:<>]+)(?::[^<>]*)?>")
_BRACKETED = re.compile(r"\[([^\[\]()]*)\]")
_AND = re.compile(r"\bAND\b")


class Weighted(msgspec.Struct, frozen=True):
    """`text` is None for a BREAK."""

    text: str | None
    weight: float = 1.0


class Chunk(msgspec.Struct, frozen=True):
    """Up to 75 tokens and the attention of each."""

    tokens: list[int]
    weights: list[float]


def plain_prompt(prompt: str) -> tuple[str, list[str]]:
    """The prompt without what this version can't do, and warnings that say what it was."""
    warnings = [
        f"<{found[1]}>: networks in prompts have no effect in this version"
        for found in _NETWORK.finditer(prompt)
    ]
    prompt = _NETWORK.sub("", prompt)
    if any(":" in inner or "|" in inner for inner in _BRACKETED.findall(prompt)):
        warnings.append("prompt: [from:to:when] and [a|b] are read as plain text by this version")
    if _AND.search(prompt):
        warnings.append("prompt: AND is read as plain text by this version")
    return prompt, warnings


def parse_attention(prompt: str) -> list[Weighted]:
    """`a (red:1.2) ball` -> a ×1, red ×1.2, ball ×1. Brackets that never close count, too."""
    texts: list[str | None] = []
    weights: list[float] = []
    round_starts: list[int] = []
    square_starts: list[int] = []

    def multiply(start: int, factor: float) -> None:
        for position in range(start, len(weights)):
            weights[position] *= factor

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
    try:
        return None if text is None else float(text)
    except ValueError:  # such as 1.2.3, which then is plain text
        return None


def _merged(texts: list[str | None], weights: list[float]) -> list[Weighted]:
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


def cut_chunks(prompt: str, tokenizer: Any) -> list[Chunk]:
    """At least one chunk, so that an empty prompt has an embedding, too."""
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    chunks: list[Chunk] = []
    tokens: list[int] = []
    weights: list[float] = []
    last_comma = -1

    def close(upto: int) -> None:
        nonlocal tokens, weights, last_comma
        chunks.append(Chunk(tokens[:upto], weights[:upto]))
        tokens, weights, last_comma = tokens[upto:], weights[upto:], -1

    for part in parse_attention(prompt):
        if part.text is None:
            close(len(tokens))
            continue
        encoded = tokenizer(part.text, truncation=False, add_special_tokens=False, verbose=False)
        for token in encoded.input_ids:
            if token == comma:
                last_comma = len(tokens)
            elif len(tokens) == CHUNK and last_comma != -1 and CHUNK - last_comma <= COMMA_NEAR:
                close(last_comma + 1)
            if len(tokens) == CHUNK:
                close(CHUNK)
            tokens.append(token)
            weights.append(part.weight)
    if tokens or not chunks:
        close(len(tokens))
    return chunks


@torch.no_grad()
def encode_chunks(
    chunks: list[Chunk], tokenizer: Any, text_encoder: Any, clip_skip: int = 1
) -> Tensor:
    """(1, 77 * len(chunks), width). `clip_skip` n takes the n-th layer from the end."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [
        [start, *chunk.tokens, end, *[tokenizer.pad_token_id] * (CHUNK - len(chunk.tokens))]
        for chunk in chunks
    ]
    token_ids = torch.tensor(rows, device=text_encoder.device)
    output = text_encoder(token_ids, output_hidden_states=clip_skip > 1)
    if clip_skip > 1:
        core = getattr(text_encoder, "text_model", text_encoder)
        layer = max(-clip_skip, -len(output.hidden_states))
        states = core.final_layer_norm(output.hidden_states[layer])
    else:
        states = output[0]
    weighted = [
        _weigh(state, chunk.weights) if set(chunk.weights) - {1.0} else state
        for state, chunk in zip(states, chunks, strict=True)
    ]
    return torch.cat(weighted)[None]


def _weigh(state: Tensor, weights: list[float]) -> Tensor:
    """(77, width) -> the same, with each token's attention on it and the old mean."""
    row = [1.0, *weights, *[1.0] * (len(state) - 1 - len(weights))]
    factors = torch.tensor(row, dtype=state.dtype, device=state.device)
    changed = state * factors[:, None]
    return changed * (state.mean() / changed.mean())


def encode_pair(
    prompt: str, negative_prompt: str, tokenizer: Any, text_encoder: Any, clip_skip: int = 1
) -> tuple[Tensor, Tensor]:
    """Both embeddings, the shorter one filled up with empty chunks."""
    pair = [cut_chunks(prompt, tokenizer), cut_chunks(negative_prompt, tokenizer)]
    longest = max(map(len, pair))
    positive, negative = (
        encode_chunks(
            chunks + [Chunk([], [])] * (longest - len(chunks)), tokenizer, text_encoder, clip_skip
        )
        for chunks in pair
    )
    return positive, negative
