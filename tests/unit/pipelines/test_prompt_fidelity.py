"""Prompts: what the webui's syntax does, done by hand to tokens, embeddings and steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import Tensor

from tests.unit.pipelines import by_hand, tiny
from tests.unit.pipelines.bench import USUAL, Bench, worst
from tests.unit.pipelines.by_hand import Predict, Text
from tests.unit.pipelines.conftest import Checkpoints, Same
from tests.unit.pipelines.tiny import Tiny

NEGATIVE = USUAL["negative_prompt"]


def painted(model: Tiny, positive: Any, negative: Text | None = None) -> Tensor:
    """4 steps of Euler by texts that do not change."""
    negative = negative or by_hand.encode(model, NEGATIVE)
    return by_hand.run(model, by_hand.guided(model, positive, negative), by_hand.noise())


# Attention


@pytest.mark.parametrize("kind", ["SD 1.x", "SD 2.x", "SDXL"])
@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a (red:1.5) ball", [("a", 1), ("red", 1.5), ("ball", 1)]),
        ("a (red), round [ball]", [("a", 1), ("red", 1.1), (", round", 1), ("ball", 1 / 1.1)]),
        ("((deep)) [(dark) sea]", [("deep", 1.21), ("dark", 1), ("sea", 1 / 1.1)]),
        ("(a (b:0.5) c:1.4)", [("a", 1.4), ("b", 0.7), ("c", 1.4)]),
        (r"a \(round\) ball \[red\]", [("a (round) ball [red]", 1)]),
        ("a (never closed", [("a", 1), ("never closed", 1.1)]),
        ("night:city", [("night:city", 1)]),
        ("a (ball:-0.5)", [("a", 1), ("ball", -0.5)]),
    ],
)
def test_attention_is_put_on_tokens(
    bench: Bench,
    checkpoints: Checkpoints,
    same: Same,
    kind: str,
    prompt: str,
    pieces: list[tuple[str, float]],
) -> None:
    model, path = checkpoints[kind]
    theirs = painted(model, weighted(model, pieces))
    same(f"attention, {kind}", bench.paint(path, prompt=prompt).latents[0], theirs)


def weighted(model: Tiny, pieces: Sequence[tuple[str, float]]) -> Text:
    tokens = [(token, weight) for piece, weight in pieces for token in by_hand.words(piece)]
    return by_hand.encode(
        model, [token for token, _ in tokens], weights=[weight for _, weight in tokens]
    )


@pytest.mark.parametrize("kind", ["SD 1.x", "SDXL"])
def test_emphasis_may_be_another(
    bench: Bench, checkpoints: Checkpoints, same: Same, kind: str
) -> None:
    """The webui's setting of 1.8, and what 1.7 has in place of it."""
    model, path = checkpoints[kind]
    prompt, pieces = "a (ball:1.5) [sea]", [("a", 1.0), ("ball", 1.5), ("sea", 1 / 1.1)]
    tokens = [(token, weight) for piece, weight in pieces for token in by_hand.words(piece)]
    ids, weights = zip(*tokens, strict=True)
    plain = by_hand.encode(model, "a ball sea")
    literal = by_hand.encode(model, prompt)
    unnormed = by_hand.encode(model, ids, weights=weights, restores_mean=False)
    for settings, text in (
        ({"emphasis": "No norm"}, unnormed),
        ({"emphasis": "Ignore"}, plain),
        ({"emphasis": "None"}, literal),
        ({"enable_emphasis": False}, literal),
        ({"emphasis": "Original"}, weighted(model, pieces)),
    ):
        seen = bench.paint(path, prompt=prompt, override_settings=settings)
        same(f"emphasis, {kind}", seen.latents[0], painted(model, text))
        told = {"enable_emphasis": "None"}.get(*settings) or settings["emphasis"]
        assert (f"Emphasis: {told}" in seen.info["infotexts"][0]) is (told != "Original")


# Long texts


@pytest.mark.parametrize("kind", ["SD 1.x", "SD 2.x", "SDXL"])
@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a red ball BREAK on (grass:1.3)", [[("a red ball", 1)], [("on", 1), ("grass", 1.3)]]),
        ("cat " * 80, [[("cat " * 75, 1)], [("cat " * 5, 1)]]),
        # The comma is 14 tokens before the end of the chunk: what comes after it moves on.
        ("cat " * 60 + ", " + "dog " * 30, [[("cat " * 60 + ",", 1)], [("dog " * 30, 1)]]),
        # This one is 54 before: too far.
        (
            "cat " * 20 + ", " + "dog " * 60,
            [[("cat " * 20 + ", " + "dog " * 54, 1)], [("dog " * 6, 1)]],
        ),
    ],
)
def test_long_texts_are_encoded_in_chunks(
    bench: Bench,
    checkpoints: Checkpoints,
    same: Same,
    kind: str,
    prompt: str,
    chunks: list[list[tuple[str, float]]],
) -> None:
    """Each of 75 tokens, with a start and an end of its own."""
    model, path = checkpoints[kind]
    text = by_hand.one_after_the_other([weighted(model, pieces) for pieces in chunks])
    seen = bench.paint(path, prompt=prompt)
    same(f"chunks, {kind}", seen.latents[0], painted(model, text))


@pytest.mark.parametrize("kind", ["SD 1.x", "SDXL"])
def test_the_shorter_text_can_be_filled_up(
    bench: Bench, checkpoints: Checkpoints, same: Same, kind: str
) -> None:
    """`pad_cond_uncond`: by the embedding of an empty text, as often as it takes."""
    model, path = checkpoints[kind]
    halves = [by_hand.encode(model, "cat " * 75), by_hand.encode(model, "cat " * 5)]
    long, empty = by_hand.one_after_the_other(halves), by_hand.encode(model, "")
    short = by_hand.one_after_the_other([by_hand.encode(model, NEGATIVE), empty])
    settings = {"pad_cond_uncond": True}
    seen = bench.paint(path, prompt="cat " * 80, override_settings=settings)
    same("pad_cond_uncond", seen.latents[0], painted(model, long, short))
    other = bench.paint(
        path, prompt=NEGATIVE, negative_prompt="cat " * 80, override_settings=settings
    )
    same("pad_cond_uncond", other.latents[0], painted(model, short, long))


# Several texts


@pytest.mark.parametrize("kind", ["SD 1.x", "SD 2.x v", "SDXL"])
def test_and_adds_up_what_each_text_wants(
    bench: Bench, checkpoints: Checkpoints, same: Same, kind: str
) -> None:
    model, path = checkpoints[kind]
    texts = [("a cat", 1.0), ("a (dog:1.2) :0.6", 0.6), ("rain :-0.3", -0.3)]
    prompt = " AND ".join(text for text, _ in texts)
    wanted = [
        (by_hand.encode(model, "a cat"), 1.0),
        (weighted(model, [("a", 1), ("dog", 1.2)]), 0.6),
        (by_hand.encode(model, "rain"), -0.3),
    ]
    same(f"AND, {kind}", bench.paint(path, prompt=prompt).latents[0], painted(model, wanted))


def test_and_fills_the_shorter_text_up_with_its_last_vector(
    bench: Bench, checkpoints: Checkpoints, same: Same
) -> None:
    model, path = checkpoints["SD 1.x"]
    halves = [by_hand.encode(model, "cat " * 75), by_hand.encode(model, "cat " * 5)]
    short = by_hand.encode(model, "a dog").context
    stretched = Text(torch.cat([short, short[:, -1:].expand(-1, 77, -1)], 1))
    wanted = [(by_hand.one_after_the_other(halves), 1.0), (stretched, 1.0)]
    seen = bench.paint(path, prompt="cat " * 80 + "AND a dog")
    same("AND, lengths differ", seen.latents[0], painted(model, wanted))


# Texts that change: the webui counts calls of the model from 0 and compares them with steps
# counted from 1, so every text holds for one call more than it says.

SCHEDULES: dict[str, list[str]] = {
    "a [cat:dog:0.5]": ["a cat", "a cat", "a cat", "a dog"],
    "a [cat:dog:1]": ["a cat", "a cat", "a dog", "a dog"],
    "a [hat:0.5] cat": ["a cat", "a cat", "a cat", "a hat cat"],
    "a [hat::0.25] cat": ["a hat cat", "a hat cat", "a cat", "a cat"],
    "a [cat|dog|cow]": ["a cat", "a cat", "a dog", "a cow"],
    "a [[cat|cow]:dog:2]": ["a cat", "a cat", "a cow", "a dog"],
    "a [cat:dog:0]": ["a dog"] * 4,
}


@pytest.mark.parametrize("prompt", SCHEDULES)
def test_texts_change_with_the_steps(
    bench: Bench, checkpoints: Checkpoints, same: Same, prompt: str
) -> None:
    model, path = checkpoints["SD 1.x"]
    theirs = by_hand.run(model, scheduled(model, SCHEDULES[prompt]), by_hand.noise())
    same("prompt editing", bench.paint(path, prompt=prompt).latents[0], theirs)


def scheduled(model: Tiny, texts: Sequence[str], negatives: Sequence[str] = ()) -> Predict:
    negatives = negatives or [NEGATIVE] * len(texts)
    pairs = zip(texts, negatives, strict=True)
    return by_hand.in_turn(
        [by_hand.guided(model, *(by_hand.encode(model, text) for text in pair)) for pair in pairs]
    )


def test_negative_texts_change_too(bench: Bench, checkpoints: Checkpoints, same: Same) -> None:
    model, path = checkpoints["SDXL"]
    negatives = ["blue", "blue", "blue", "dark"]
    theirs = by_hand.run(model, scheduled(model, ["a cat"] * 4, negatives), by_hand.noise())
    seen = bench.paint(path, prompt="a cat", negative_prompt="[blue:dark:0.5]")
    same("prompt editing, negative", seen.latents[0], theirs)


def test_samplers_with_two_calls_a_step_count_calls(
    bench: Bench, checkpoints: Checkpoints, same: Same
) -> None:
    """Half of 4 steps of Heun are 4 of 8 calls, of which the last is never made."""
    model, path = checkpoints["SD 1.x"]
    predict = scheduled(model, ["a cat"] * 5 + ["a dog"] * 2)
    scheduler = HeunDiscreteScheduler(**by_hand.TRAINED, timestep_spacing="linspace")
    scheduler.set_timesteps(4)
    x = by_hand.noise() * scheduler.sigmas[0]
    for time in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, time), time), time, x)[0]
    seen = bench.paint(path, prompt="a [cat:dog:0.5]", sampler_name="Heun")
    same("prompt editing, Heun", seen.latents[0], x)


def test_the_second_pass_counts_on(bench: Bench, checkpoints: Checkpoints, same: Same) -> None:
    """Its shares run from 1 to 2, and its steps from where the first pass ended."""
    model, path = checkpoints["SD 1.x"]
    first = by_hand.run(model, scheduled(model, ["a cat"] * 4), by_hand.noise())
    larger = torch.nn.functional.interpolate(first, (16, 16), mode="bilinear")
    drawn = by_hand.noise(height=16, width=16)
    for prompt in ("a [cat:dog:1.5]", "a [cat:dog:6]"):
        predict = scheduled(model, ["a cat", "a cat", "a cat", "a dog"])
        theirs = by_hand.run(model, predict, drawn, 10, picture=larger, last=4)
        seen = bench.paint(path, prompt=prompt, enable_hr=True, hr_scale=2, denoising_strength=0.4)
        same("prompt editing, hires fix", seen.latents[-1], theirs)


def test_what_a_text_changes_into_has_as_many_chunks(
    bench: Bench, checkpoints: Checkpoints, same: Same
) -> None:
    """All texts of one prompt are encoded together: the shorter is filled up with an empty chunk,
    and the mean that attention leaves as it was is that of all."""
    model, path = checkpoints["SD 1.x"]
    long, short = "cat " * 80, "a dog"
    empty = by_hand.encode(model, "")
    halves = [by_hand.encode(model, "cat " * 75), by_hand.encode(model, "cat " * 5)]
    texts = [
        by_hand.one_after_the_other(halves),
        by_hand.one_after_the_other([by_hand.encode(model, short), empty]),
    ]
    negative = by_hand.encode(model, NEGATIVE)
    one, other = (by_hand.guided(model, text, negative) for text in texts)
    theirs = by_hand.run(model, by_hand.in_turn([one, one, other, other]), by_hand.noise())
    seen = bench.paint(path, prompt=f"[{long}:{short}:1]")
    same("prompt editing, lengths differ", seen.latents[0], theirs)


@pytest.mark.parametrize(
    ("prompt", "order"), [("(a:2) [cat:dog:1]", "0011"), ("(a:2) [cat|dog]", "0010")]
)
def test_attention_keeps_the_mean_of_all_texts_of_a_prompt(
    bench: Bench, checkpoints: Checkpoints, same: Same, prompt: str, order: str
) -> None:
    model, path = checkpoints["SD 1.x"]
    plain = [by_hand.encode(model, text).context for text in ("a cat", "a dog")]
    factors = torch.ones(1, 77, 1)
    factors[:, 1] = 2
    strong = [context * factors for context in plain]
    ratio = torch.stack(plain).mean() / torch.stack(strong).mean()
    negative = by_hand.encode(model, NEGATIVE)
    predictions = [by_hand.guided(model, Text(text * ratio), negative) for text in strong]
    predict = by_hand.in_turn([predictions[int(number)] for number in order])
    theirs = by_hand.run(model, predict, by_hand.noise())
    same("prompt editing, attention", bench.paint(path, prompt=prompt).latents[0], theirs)


# Clip skip


@pytest.mark.parametrize("clip_skip", [2, 3])
def test_clip_skip_takes_an_earlier_layer(
    bench: Bench, checkpoints: Checkpoints, same: Same, clip_skip: int
) -> None:
    """And its last norm; attention works on it as ever."""
    model, path = checkpoints["SD 1.x"]
    tokens = by_hand.words("a red ball")
    positive = by_hand.encode(model, tokens, clip_skip=clip_skip, weights=[1, 1.3, 1])
    negative = by_hand.encode(model, NEGATIVE, clip_skip=clip_skip)
    settings = {"CLIP_stop_at_last_layers": clip_skip}
    seen = bench.paint(path, prompt="a (red:1.3) ball", override_settings=settings)
    same("clip skip", seen.latents[0], painted(model, positive, negative))


@pytest.mark.parametrize("kind", ["SD 2.x", "SDXL"])
def test_clip_skip_is_of_sd1_alone(bench: Bench, checkpoints: Checkpoints, kind: str) -> None:
    _, path = checkpoints[kind]
    skipped = bench.paint(path, override_settings={"CLIP_stop_at_last_layers": 2})
    assert torch.equal(skipped.latents[0], bench.paint(path).latents[0])


# Textual inversion


def safetensors(path: Path, vectors: Tensor) -> None:
    tiny.save(path, {"emb_params": vectors})


def pickled(path: Path, vectors: Tensor) -> None:
    """As the webui saves it."""
    told = {"name": "zorp", "step": 100, "sd_checkpoint": "0123abcd", "sd_checkpoint_name": "x"}
    param = vectors.clone().requires_grad_()
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": param}, **told}, path)


def of_the_first_days(path: Path, vectors: Tensor) -> None:
    """As textual inversion's own scripts did."""
    params = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    tokens = {"*": torch.tensor(265)}
    torch.save({"string_to_token": tokens, "string_to_param": params}, path)


def of_diffusers(path: Path, vectors: Tensor) -> None:
    torch.save({"<zorp>": vectors[0] if len(vectors) == 1 else vectors}, path)


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".safetensors", safetensors),
        (".pt", pickled),
        (".pt", of_the_first_days),
        (".bin", of_diffusers),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_an_embedding_stands_for_its_vectors(
    bench: Bench,
    checkpoints: Checkpoints,
    same: Same,
    tmp_path: Path,
    suffix: str,
    write: Callable[[Path, Tensor], None],
    count: int,
) -> None:
    """In place of its name, in any form of file, with or without attention."""
    model, path = checkpoints["SD 1.x"]
    embedding = tmp_path / f"zorp{suffix}"
    vectors = torch.randn(count, 32, generator=torch.Generator().manual_seed(9))
    write(embedding, vectors)
    taught, tokens = with_words(model, {"text_encoder": vectors})
    seen = bench.paint(path, prompt="a (zorp:1.3) ball", beside={embedding: "embeddings"})
    positive = by_hand.encode(
        taught,
        [*by_hand.words("a"), *tokens, *by_hand.words("ball")],
        weights=[1, *[1.3] * count, 1],
    )
    same("textual inversion", seen.latents[0], painted(model, positive))
    assert not seen.result.warnings


def test_an_embedding_for_sdxl_has_vectors_for_both_encoders(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    model, path = checkpoints["SDXL"]
    generator = torch.Generator().manual_seed(9)
    small, large = (torch.randn(2, width, generator=generator) for width in (32, 48))
    embedding = tmp_path / "zorp.safetensors"
    tiny.save(embedding, {"clip_l": small, "clip_g": large})
    taught, tokens = with_words(model, {"text_encoder": small, "text_encoder_2": large})
    negative = by_hand.encode(taught, [*by_hand.words("dark"), *tokens])
    seen = bench.paint(path, negative_prompt="dark zorp", beside={embedding: "embeddings"})
    positive = by_hand.encode(model, USUAL["prompt"])
    same("textual inversion, SDXL", seen.latents[0], painted(model, positive, negative))


def with_words(model: Tiny, vectors: dict[str, Tensor]) -> tuple[Tiny, list[int]]:
    """The model with these vectors in the rows of tokens that nobody uses, and these tokens."""
    first, changed = 48_000, {}
    for name, rows in vectors.items():
        changed[name] = encoder = deepcopy(getattr(model, name))
        core = getattr(encoder, "text_model", encoder)
        core.embeddings.token_embedding.weight[first : first + len(rows)] = rows
    count = len(next(iter(vectors.values())))
    return msgspec.structs.replace(model, **changed), [*range(first, first + count)]


def test_an_embedding_moves_to_the_next_chunk_as_a_whole(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    model, path = checkpoints["SD 1.x"]
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(9))
    embedding = tmp_path / "zorp.safetensors"
    safetensors(embedding, vectors)
    taught, tokens = with_words(model, {"text_encoder": vectors})
    halves = [by_hand.encode(model, "cat " * 73), by_hand.encode(taught, tokens)]
    seen = bench.paint(path, prompt="cat " * 73 + "zorp", beside={embedding: "embeddings"})
    theirs = painted(model, by_hand.one_after_the_other(halves))
    same("textual inversion, next chunk", seen.latents[0], theirs)


def test_a_word_without_its_embedding_is_a_word(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Whatever the job before knew."""
    _, path = checkpoints["SD 1.x"]
    before = bench.paint(path, prompt="zorp")
    embedding = tmp_path / "zorp.safetensors"
    safetensors(embedding, torch.ones(2, 32))
    with_it = bench.paint(path, prompt="zorp", beside={embedding: "embeddings"})
    assert worst(with_it.pixels[0], before.pixels[0]) > 20
    assert torch.equal(bench.paint(path, prompt="zorp").latents[0], before.latents[0])
