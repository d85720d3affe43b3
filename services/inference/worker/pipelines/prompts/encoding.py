"""Texts -> embeddings of one or two text encoders, as the webui makes them.

Attention is multiplied onto the embeddings, whose mean is then restored. Texts of any length are
cut into chunks of 75 tokens, at a comma where one is near. For a text without any of the syntax the
result is bit for bit that of diffusers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.models.components import TextEncoder
from services.inference.worker.pipelines.models.embeddings import Embedding
from services.inference.worker.pipelines.prompts.syntax import parse_attention
from shared.webui.settings import Emphasis

CHUNK = 75
COMMA_NEAR = 20
"""A chunk ends at the last comma if that is at most so many tokens back."""
KEPT_BYTES = 256 * 1024**2
"""Of encoded texts; a chunk of one takes from 0.1 to 0.6 MB."""
MOST_CHUNKS = 1000
"""Of all the texts that one prompt goes through."""
AT_ONCE = 64
"""Chunks that a text encoder is given at once."""


class Chunk(msgspec.Struct, frozen=True):
    """Up to 75 tokens, the attention of each, and where vectors stand in place of tokens: those of
    a word."""

    tokens: list[int]
    weights: list[float]
    vectors: list[tuple[int, str]] = []


class Encoded(msgspec.Struct, frozen=True):
    """`context`: (77 * chunks, width of all encoders). `pooled`: (width,), of SDXL and its refiner:
    one vector for the whole text, that of its first chunk."""

    context: Tensor
    pooled: Tensor | None

    def zeros(self) -> Encoded:
        """What SDXL is given for an empty negative prompt."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Encoded(torch.zeros_like(self.context), pooled)


class Words(msgspec.Struct, frozen=True):
    """How texts are to be read. `embeddings`: by the words that stand for them."""

    clip_skip: int = 1
    comma_near: int = COMMA_NEAR
    embeddings: Mapping[str, Embedding] = {}
    emphasis: Emphasis = "Original"

    @property
    def key(self) -> tuple[object, ...]:
        known = tuple((word, embedding.identity) for word, embedding in self.embeddings.items())
        return (self.clip_skip, self.comma_near, known, self.emphasis)


class Encodings:
    """What texts came to, most recently used ones kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], list[Encoded]] = OrderedDict()
        self._bytes = 0

    def encode(
        self, texts: Sequence[str], encoders: Sequence[TextEncoder], words: Words, weights: object
    ) -> list[Encoded]:
        """`weights`: which weights the encoders have at the moment."""
        key = (weights, tuple(texts), words.key)
        if key not in self._kept:
            encoded = encode(texts, encoders, words)
            self._kept[key] = encoded
            self._bytes += _size(encoded)
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= _size(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(key)
        return self._kept[key]

    def clear(self) -> None:
        self._kept.clear()
        self._bytes = 0


def _size(encoded: Sequence[Encoded]) -> int:
    different = {id(one): one.context for one in encoded}
    return sum(tensor.numel() * tensor.element_size() for tensor in different.values())


def encode(texts: Sequence[str], encoders: Sequence[TextEncoder], words: Words) -> list[Encoded]:
    """The texts that one prompt goes through with the steps. As in the webui they have a part in
    each other: all get as many chunks as the longest, and attention keeps the mean of all. Raises
    JobFailure for a prompt that changes too often for its length."""
    different = list(dict.fromkeys(texts))
    counts = [texts.count(text) for text in different]
    chunks = [cut_chunks(text, encoders[0].tokenizer, words) for text in different]
    most = max(map(len, chunks))
    if most * len(different) > MOST_CHUNKS:
        raise JobFailure(
            f"prompt: {len(different)} different texts of up to {most} chunks of {CHUNK} tokens,"
            f" allowed are {MOST_CHUNKS} chunks in all; make it shorter or change it less often"
        )
    rows = [[*some, *[Chunk([], [])] * (most - len(some))] for some in chunks]
    outputs = [_encode_chunks(rows, counts, encoder, words) for encoder in encoders]
    contexts = torch.cat([states for states, _ in outputs], -1).flatten(1, 2)
    pooled = next((pooled for _, pooled in outputs if pooled is not None), [None] * len(different))
    encoded = dict(zip(different, map(Encoded, contexts, pooled), strict=True))
    return [encoded[text] for text in texts]


def cut_chunks(text: str, tokenizer: Any, words: Words) -> list[Chunk]:
    """At least one chunk, so that an empty text has an embedding, too."""
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    chunks: list[Chunk] = []
    current = Chunk([], [], [])
    last_comma = -1

    def close(upto: int) -> None:
        nonlocal current, last_comma
        kept = [(at, word) for at, word in current.vectors if at < upto]
        chunks.append(Chunk(current.tokens[:upto], current.weights[:upto], kept))
        rest = [(at - upto, word) for at, word in current.vectors if at >= upto]
        current = Chunk(current.tokens[upto:], current.weights[upto:], rest)
        last_comma = -1

    names = _names(words.embeddings, tokenizer)
    for token, word, weight in _read(text, tokenizer, names, words.emphasis):
        length = len(current.tokens)
        if token is None:
            close(length)
            continue
        if token == comma:
            last_comma = length
        elif length == CHUNK and last_comma != -1 and CHUNK - last_comma <= words.comma_near:
            close(last_comma + 1)
        if len(current.tokens) == CHUNK:
            close(CHUNK)
        if word is None:
            current.tokens.append(token)
            current.weights.append(weight)
            continue
        count = words.embeddings[word].count
        if len(current.tokens) + count > CHUNK:
            close(len(current.tokens))
        current.vectors.append((len(current.tokens), word))
        current.tokens.extend([0] * count)
        current.weights.extend([weight] * count)
    if current.tokens or not chunks:
        close(len(current.tokens))
    return chunks


def words_in(
    texts: Iterable[str], tokenizer: Any, words: Sequence[str], emphasis: Emphasis = "Original"
) -> list[str]:
    """Those of the words that stand for vectors in a text: where their tokens are, so a part of
    another word is none of them, and signs that are escaped or have a meaning are read as ever."""
    names, found = _names(words, tokenizer), set[str]()
    for text in dict.fromkeys(texts):
        if len(found) == len(words):
            break
        read = _read(text, tokenizer, names, emphasis)
        found |= {word for _, word, _ in read if word is not None}
    return [word for word in words if word in found]


_Names = Mapping[int, Sequence[tuple[list[int], str]]]
"""Words and their tokens, by the first of these; those of several tokens go before their parts."""


def _names(words: Iterable[str], tokenizer: Any) -> _Names:
    names: dict[int, list[tuple[list[int], str]]] = {}
    for word in words:
        tokens = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
        if tokens:
            names.setdefault(tokens[0], []).append((tokens, word))
    for alike in names.values():
        alike.sort(key=lambda name: -len(name[0]))
    return names


def _read(
    text: str, tokenizer: Any, names: _Names, emphasis: Emphasis
) -> Iterator[tuple[int | None, str | None, float]]:
    """A text's tokens and their attention; of a word that stands for vectors its first token, and
    the word. A BREAK has no token."""
    for part in parse_attention(text, emphasis):
        if part.text is None:
            yield None, None, part.weight
            continue
        encoded = tokenizer(part.text, truncation=False, add_special_tokens=False, verbose=False)
        tokens, position = encoded.input_ids, 0
        while position < len(tokens):
            word, taken = _word_at(tokens, position, names)
            yield tokens[position], word, part.weight
            position += taken


def _word_at(tokens: list[int], position: int, names: _Names) -> tuple[str | None, int]:
    """The word, and how many tokens it takes."""
    for name, word in names.get(tokens[position], ()):
        if tokens[position : position + len(name)] == name:
            return word, len(name)
    return None, 1


@torch.no_grad()
def _encode_chunks(
    rows: list[list[Chunk]], counts: list[int], encoder: TextEncoder, words: Words
) -> tuple[Tensor, Tensor | None]:
    """`rows`: the chunks of each text, which comes so often as `counts` says. ((texts, chunks, 77,
    width), (texts, width) or None)"""
    start, end = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    chunks = [chunk for row in rows for chunk in row]
    tokens = [
        [start, *chunk.tokens, end, *[encoder.pad] * (CHUNK - len(chunk.tokens))]
        for chunk in chunks
    ]
    parts = []
    for first in range(0, len(tokens), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        parts.append(_encode_tokens(tokens[some], chunks[some], encoder, words))
    states = torch.cat([states for states, _ in parts])
    by_text = torch.unflatten(states, 0, (len(rows), -1))
    weighted = [
        _weigh(by_text[:, number], [chunk.weights for chunk in column], counts, words.emphasis)
        for number, column in enumerate(zip(*rows, strict=True))
    ]
    if not encoder.pooled:
        return torch.stack(weighted, 1), None
    pooled = torch.cat([pooled for _, pooled in parts if pooled is not None])
    return torch.stack(weighted, 1), torch.unflatten(pooled, 0, (len(rows), -1))[:, 0]


def _encode_tokens(
    tokens: list[list[int]], chunks: list[Chunk], encoder: TextEncoder, words: Words
) -> tuple[Tensor, Tensor | None]:
    """((chunks, 77, width), (chunks, width) or None)"""
    token_ids = torch.tensor(tokens, device=encoder.model.device)
    skip = words.clip_skip if encoder.skips else 1
    with _vectors_in_place(chunks, encoder, words):
        output = encoder.model(token_ids, output_hidden_states=skip > 1 or encoder.penultimate)
    pooled = output.text_embeds if encoder.pooled else None
    if encoder.penultimate:
        return output.hidden_states[-2], pooled
    if skip > 1:
        layer = max(-skip, -len(output.hidden_states))
        return encoder.core.final_layer_norm(output.hidden_states[layer]), pooled
    return output[0], pooled


@contextmanager
def _vectors_in_place(chunks: list[Chunk], encoder: TextEncoder, words: Words) -> Iterator[None]:
    places = [
        (row, at + 1, words.embeddings[word].vectors_for(encoder))
        for row, chunk in enumerate(chunks)
        for at, word in chunk.vectors
    ]
    if not places:
        yield
        return

    def put(_: object, __: object, embedded: Tensor) -> Tensor:
        embedded = embedded.clone()
        for row, at, vectors in places:
            if vectors is not None:
                embedded[row, at : at + len(vectors)] = vectors.to(embedded)
        return embedded

    hook = encoder.core.embeddings.token_embedding.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


def _weigh(
    states: Tensor, weights: list[list[float]], counts: list[int], emphasis: Emphasis
) -> Tensor:
    """(texts, 77, width) -> the same, with each token's attention on it and the old mean."""
    if all(weight == 1 for row in weights for weight in row):
        return states
    rows = [[1.0, *row, *[1.0] * (states.shape[1] - 1 - len(row))] for row in weights]
    changed = states * torch.tensor(rows, dtype=states.dtype, device=states.device)[..., None]
    if emphasis == "No norm":
        return changed
    shares = torch.tensor(counts, device=states.device) / sum(counts)
    before, after = ((each.mean((1, 2)) * shares).sum() for each in (states, changed))
    return changed * (before / after)
