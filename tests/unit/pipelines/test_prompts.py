"""What a prompt asks for, read as the webui reads it, and the embeddings that it comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.models.checkpoints import Checkpoint
from services.inference.worker.pipelines.models.components import TextEncoder
from services.inference.worker.pipelines.models.embeddings import Embedding
from services.inference.worker.pipelines.prompts import encoding
from services.inference.worker.pipelines.prompts.encoding import (
    Encodings,
    Words,
    cut_chunks,
    encode,
    words_in,
)
from services.inference.worker.pipelines.prompts.syntax import (
    BadPrompt,
    Network,
    Part,
    parse_attention,
    plan_phases,
    split_parts,
    take_networks,
    text_at,
)
from tests.unit.pipelines import small
from tests.unit.pipelines.conftest import at_once
from tests.unit.pipelines.easel import Easel

# Networks


@pytest.mark.parametrize(
    ("prompt", "text", "networks"),
    [
        ("a cat", "a cat", []),
        ("a <lora:ink>cat", "a cat", [Network("lora", "ink")]),
        ("<lora:ink:0.8>", "", [Network("lora", "ink", 0.8, 0.8)]),
        ("<lora:ink:0.8:0.3> x", " x", [Network("lora", "ink", 0.8, 0.3)]),
        ("<lora: ink : -0.5 >", "", [Network("lora", "ink", -0.5, -0.5)]),
        ("<lora:ink:te=0.2>", "", [Network("lora", "ink", 0.2, 0.2)]),
        ("<lora:ink:unet=0.2>", "", [Network("lora", "ink", 1, 0.2)]),
        ("<lora:ink:0.5:unet=0.2:te=0.1>", "", [Network("lora", "ink", 0.1, 0.2)]),
        ("<lora:ink:1:0.5:dyn=4>", "", [Network("lora", "ink", 1, 0.5, ("dyn=",))]),
        ("<lora:ink:1:1:8>", "", [Network("lora", "ink", 1, 1, ("a third number",))]),
        (
            "<lyco:b:2>a<lora:a:1>",
            "a",
            [Network("lyco", "b", 2, 2), Network("lora", "a", 1, 1)],
        ),
        ("<hypernet:x:strong>", "", [Network("hypernet", "x")]),
        ("1 < 2 and <3", "1 < 2 and <3", []),
        ("<lora:a <lora:b:1>", "<lora:a ", [Network("lora", "b")]),
        ("<lora:>", "<lora:>", []),
    ],
)
def test_networks_are_taken_out_of_a_prompt(
    prompt: str, text: str, networks: list[Network]
) -> None:
    assert take_networks(prompt) == (text, networks)


@pytest.mark.parametrize("weight", ["strong", "1:x", "te=x", "1:unet=", "nan", "inf", "1e999"])
def test_a_weight_that_is_no_number_is_told_without_the_prompt(weight: str) -> None:
    with pytest.raises(BadPrompt, match=r"^prompt: <lora:ink:…> has a weight that is no number$"):
        take_networks(f"secret <lora:ink:{weight}>")


# Several prompts at once


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [Part("a cat")]),
        ("a cat AND a dog", [Part("a cat"), Part(" a dog")]),
        ("a cat :1.2 AND a dog: -0.5 ", [Part("a cat", 1.2), Part(" a dog", -0.5)]),
        ("a:.5AND b:2.", [Part("a:.5AND b", 2)]),
        ("a\nb :3 AND\nc", [Part("a\nb", 3), Part("\nc")]),
        ("a cat :1e5", [Part("a cat :1e5")]),
        ("ratio 16:9", [Part("ratio 16", 9)]),
        ("a :1 :2", [Part("a :1", 2)]),
        ("AND", [Part(""), Part("")]),
        ("BRAND and SAND", [Part("BRAND and SAND")]),
        ("5", [Part("5")]),
        (":5", [Part("", 5)]),
        ("", [Part("")]),
    ],
)
def test_and_joins_prompts_with_weights(prompt: str, parts: list[Part]) -> None:
    assert split_parts(prompt) == parts


# Texts that change with the steps


def phases(prompt: str, steps: int = 10, done_before: int | None = None) -> list[tuple[int, str]]:
    planned = plan_phases(prompt, steps, done_before=done_before)
    return [(phase.until, phase.text) for phase in planned]


@pytest.mark.parametrize(
    ("prompt", "planned"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [b:3 ]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a [b:c:3]", [(3, "a b"), (10, "a c")]),
        ("a [b::3] c", [(3, "a b c"), (10, "a  c")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [b:0.25] c", [(2, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", [(10, "a [{b|d{:.5] c")]),  # "not handling this right now", it says
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", [(n, ("(b:1.1)", "a")[n % 2]) for n in range(1, 11)]),
        ("[a|b|c]", [(n, "cab"[n % 3]) for n in range(1, 11)]),
        ("[fe|]male", [(n, ("male", "female")[n % 2]) for n in range(1, 11)]),
        ("[fe|||]male", [(n, "female" if n % 4 == 1 else "male") for n in range(1, 11)]),
        ("[a:b:20]", [(10, "a")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-3]", [(10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:" + "9" * 400 + "]", [(10, "a")]),
        ("[a:b:-" + "9" * 400 + ".]", [(10, "b")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("[a:b:1.2.3]", [(10, "[a:b:1.2.3]")]),
        ("[a|b:3]", [(10, "[a|b:3]")]),
        (r"[a\:b:3]", [(3, ""), (10, r"a\:b")]),
        (r"\[a:b:3\]", [(10, r"\[a:b:3\]")]),
        ("", [(10, "")]),
    ],
)
def test_texts_change_with_the_steps_as_the_webui_documents_it(
    prompt: str, planned: list[tuple[int, str]]
) -> None:
    assert phases(prompt) == planned


PLAIN_TEXT: list[tuple[int, str]] = []
"""Nothing in it changes, and it is what it is."""


@pytest.mark.parametrize(
    ("prompt", "planned"),
    [
        ("[a:b:3] | c", PLAIN_TEXT),
        ("| [a:b:3]", PLAIN_TEXT),
        ("[a:b:3] (c|d)", PLAIN_TEXT),
        ("[(a|b)|c]", PLAIN_TEXT),
        ("[(x|y):b:3]", PLAIN_TEXT),
        ("[a:b:3] \\| c", [(3, "a \\| c"), (4, "b \\| c")]),
        ("[[a|b]:c:3]", [(1, "a"), (2, "b"), (3, "a"), (4, "c")]),
        ("[a|[b|c]]", [(1, "a"), (2, "c"), (3, "a"), (4, "c")]),
        ("[[a:b]|c]", PLAIN_TEXT),
        ("[[a:b]:c:3]", PLAIN_TEXT),
        ("[a:b|c] [d:3]", PLAIN_TEXT),
        ("[a:b:3]\\", PLAIN_TEXT),
        ("[a:b:3]\\\\", [(3, "a\\\\"), (4, "b\\\\")]),
        ("[a:b:3] \\ c", [(3, "a \\ c"), (4, "b \\ c")]),
        ("[a:b:3] c\\\nd", PLAIN_TEXT),
        ("\\[a:b:3]", PLAIN_TEXT),
        ("[a\\]:b:3]", [(3, "a\\]"), (4, "b")]),
        ("a: [b:3]", [(3, "a: "), (4, "a: b")]),
        ("a) [b:3]", [(3, "a) "), (4, "a) b")]),
        ("[[a:b:3]", [(3, "[a"), (4, "[b")]),
        ("([a:b:3]:1.2)", [(3, "(a:1.2)"), (4, "(b:1.2)")]),
        ("(([a:b:3]", [(3, "((a"), (4, "((b")]),
        ("([a:b:3]:1:2)", [(3, "(a:1:2)"), (4, "(b:1:2)")]),
        ("[(a:1.2):3]", [(3, ""), (4, "(a:1.2)")]),
        ("[(a:1:2):3]", PLAIN_TEXT),
        ("[(a:b:3]", PLAIN_TEXT),
        ("[a):b:3]", PLAIN_TEXT),
        ("[a:b:1e1]", [(4, "a")]),
        ("[a:b:+3]", [(3, "a"), (4, "b")]),
        ("[a:b:3.]", [(4, "a")]),
        ("[a:b:٣]", PLAIN_TEXT),
        ("[a:b:3\n]", [(3, "a"), (4, "b")]),
        ("[:3]", [(3, ""), (4, "")]),
        ("[|]", [(1, ""), (2, ""), (3, ""), (4, "")]),
        ("[a|]", [(1, "a"), (2, ""), (3, "a"), (4, "")]),
        ("[a||b]", [(1, "a"), (2, ""), (3, "b"), (4, "a")]),
        ("[a (b] c) [d:3]", [(3, "[a (b] c) "), (4, "[a (b] c) d")]),
        ("[(a [b:3]) | c]", [(1, "(a ) "), (2, " c"), (3, "(a ) "), (4, " c")]),
        ("[a:b:3] [x|y", PLAIN_TEXT),
        ("[a [b:3]", [(3, "[a "), (4, "[a b")]),
        ("{a|b} [c:3]", PLAIN_TEXT),
    ],
)
def test_what_is_odd_is_decided_by_the_webui_s_grammar(
    prompt: str, planned: list[tuple[int, str]]
) -> None:
    """Each as its parser decides it, whatever the seed of its hashes; but for the one with two
    weights, where it decides now this way and now that."""
    assert phases(prompt, 4) == (planned or [(4, prompt)])


def test_the_example_in_the_webui_s_own_source() -> None:
    prompt = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75]"
        "[ in foreground::0.6][: in background:0.25] [shoddy:masterful:0.5]"
    )
    assert phases(prompt, 100) == [
        (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (75, "fantasy landscape with a lake and an oak in background masterful"),
        (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
    ]


@pytest.mark.parametrize(
    ("prompt", "planned"),
    [
        ("a [b:.5] c", [(10, "a b c")]),
        ("a [b:1.5] c", [(5, "a  c"), (10, "a b c")]),
        ("[a:b:12]", [(2, "a"), (10, "b")]),
        ("[a:b:10]", [(10, "b")]),
        ("[a:b:2.0]", [(10, "a")]),
        ("[a|b]", [(n, "ba"[n % 2]) for n in range(1, 11)]),
    ],
)
def test_the_second_pass_counts_on(prompt: str, planned: list[tuple[int, str]]) -> None:
    """Steps of hires fix follow those of the first pass, and shares run from 1 to 2."""
    assert phases(prompt, 10, done_before=10) == planned


def test_a_text_holds_until_its_step_has_been_called() -> None:
    planned = plan_phases("[a:b:3]", 10)
    assert [planned[text_at(planned, call)].text for call in range(11)] == [*"aaaabbbbbbb"]
    assert text_at(planned, 11) == 0  # more calls than there were to be: as in the webui


# Attention


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("plain, text", [("plain, text", 1)]),
        ("a (red:1.3) [ball]", [("a ", 1), ("red", 1.3), (" ", 1), ("ball", 1 / 1.1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("((deep)) word", [("deep", 1.1 * 1.1), (" word", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (r"\(literal\) \[too\]", [("(literal) [too]", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"a \\ b \c", [(r"a \ b c", 1)]),
        ("(never closed", [("never closed", 1.1)]),
        ("[never (closed", [("never ", 1 / 1.1), ("closed", 1)]),
        ("never) opened]", [("never) opened]", 1)]),
        ("night:city (x:1.2.3)", [("night:city ", 1), ("x:1.2.3)", 1.1)]),
        ("(x:.)", [("x:.)", 1.1)]),
        ("(x:-0.5) (y:+2) (z:0)", [("x", -0.5), (" ", 1), ("y", 2), (" ", 1), ("z", 0)]),
        ("(x: 1.5 )", [("x", 1.5)]),
        ("x:1.5)", [("x:1.5)", 1)]),
        ("(x:" + "9" * 400 + ")", [("x:" + "9" * 400 + ")", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
        ("one BREAK two", [("one", 1), (None, 1), ("two", 1)]),
        ("one\nBREAK\ntwo BREAKER", [("one", 1), (None, 1), ("two BREAKER", 1)]),
        ("(one BREAK two)", [("one", 1.1), ("BREAK", -1.1), ("two", 1.1)]),
        ("[one] BREAK (two", [("one", 1 / 1.1), ("", 1), (None, 1), ("", 1), ("two", 1.1)]),
        ("(one BREAK two:1)", [("one", 1), (None, 1), ("two", 1)]),
        ("(one BREAK two:0)", [("oneBREAKtwo", 0)]),
        ("one\\", [("one", 1)]),
        ("one | two", [("one | two", 1)]),
        ("BREAK", [("", 1), (None, 1), ("", 1)]),
        ("", [("", 1)]),
        ("()", [("", 1)]),
    ],
)
def test_attention_is_read_as_the_webui_reads_it(
    prompt: str, parts: list[tuple[str | None, float]]
) -> None:
    parsed = parse_attention(prompt)
    assert [part.text for part in parsed] == [text for text, _ in parts]
    assert [part.weight for part in parsed] == pytest.approx([weight for _, weight in parts])


# Whatever is written

READ: dict[str, Callable[[str], object]] = {
    "networks": take_networks,
    "parts": split_parts,
    "phases": lambda text: plan_phases(text, 20),
    "attention": parse_attention,
}
PIECES = [*"()[]:|\\<>.,-+ 0129ab\n\0é猫", "BREAK", "AND", "<lora:", ":1]"]
SIGNS = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=60) | SIGNS, st.integers(1, 30), st.none() | st.integers(0, 30))
def test_any_text_is_a_prompt(text: str, steps: int, done_before: int | None) -> None:
    try:
        text, _ = take_networks(text)
    except BadPrompt:
        return
    for part in split_parts(text):
        planned = plan_phases(part.text, steps, done_before=done_before)
        assert planned[-1].until == steps
        assert [phase.until for phase in planned] == sorted({phase.until for phase in planned})
        for phase in planned:
            assert parse_attention(phase.text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from([*"()[]abc:,. 123"]), max_size=60))
def test_text_without_changes_is_what_it_was(text: str) -> None:
    """Nothing but brackets with a `:` or `|` in them takes anything out of a prompt."""
    calm = text.replace(":", "")
    assert phases(calm) == [(10, calm)]


LONG = 20_000
"""Characters that a prompt may have."""


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize(
    "piece",
    [
        *("(", "[", ")", "]", "([", "(a", "[a", "[a|", "[a:", ":", "|", "\\", "<", "<a:", " ", "1"),
        *("AND ", "BREAK ", "[a|b]", "[a:b:1]", "(a:1)", "a:1 AND ", "<lora:a:1>", " : ", ",猫"),
    ],
)
def test_long_prompts_are_read_at_once(read: str, piece: str) -> None:
    text = (piece * LONG)[:LONG]
    closed = text[: LONG // 2] + text[: LONG // 2][::-1].translate(str.maketrans("([", ")]"))
    for prompt in (text, closed, f"a{text[2:]}b", f"[a:{text[7:]}x]"):
        with at_once(seconds=3):
            READ[read](prompt)


@pytest.mark.parametrize("closing", ["]", ":1]", ":b:1]", "|b]", "|]", ")"])
def test_prompts_may_be_nested_as_deep_as_they_are_long(closing: str) -> None:
    for depth in (10, 49, 50, 51, 200, LONG // (1 + len(closing))):
        text = ("(" if closing == ")" else "[") * depth + closing * depth
        with at_once(seconds=3):
            for read in READ.values():
                read(text)


def test_prompts_nested_fifty_deep_still_change() -> None:
    assert phases("[" * 50 + "a" + ":3]" * 50) == [(3, ""), (10, "a")]
    deeper = phases("[" * 60 + "a" + ":3]" * 60)
    assert [text.count("a") for _, text in deeper] == [0, 1]
    assert phases("(" * 300 + "[a:3]") == [(3, "(" * 300), (10, "(" * 300 + "a")]


# Embeddings


@pytest.fixture(scope="module")
def random(easel: Easel, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint whose text encoder has three layers."""
    path = small.write_random(tmp_path_factory.mktemp("models") / "random.safetensors")
    library = easel.engine.library
    return library.checkpoint(library.open(path, path.name))


@pytest.fixture(scope="module")
def tokenizer(random: Checkpoint) -> Any:
    return random.text_encoders[0].tokenizer


PLAIN = Words()


def embedding(vectors: Tensor) -> Embedding:
    return Embedding({"emb_params": vectors}, "zorb.pt", vectors)


def context_of(text: str, encoders: Sequence[TextEncoder], words: Words = PLAIN) -> Tensor:
    (encoded,) = encode([text], encoders, words)
    return encoded.context


def lengths(text: str, tokenizer: Any, words: Words = PLAIN) -> list[int]:
    return [len(chunk.tokens) for chunk in cut_chunks(text, tokenizer, words)]


def test_long_prompts_are_cut_at_a_comma(tokenizer: Any) -> None:
    far, near = "cat " * 20 + ", " + "dog " * 70, "cat " * 60 + ", " + "dog " * 30
    assert lengths(far, tokenizer) == [75, 16]
    assert lengths(near, tokenizer) == [61, 30]
    assert lengths(near, tokenizer, Words(comma_near=10)) == [75, 16]
    assert lengths(near, tokenizer, Words(comma_near=0)) == [75, 16]
    assert lengths("cat " * 75 + ", dog", tokenizer) == [75, 2]
    assert lengths("cat " * 74 + ", dog", tokenizer) == [75, 1]
    # A comma of the chunk before does not count.
    assert lengths("cat " * 60 + ", " + "dog " * 100, tokenizer) == [61, 75, 25]


def test_break_begins_a_chunk(tokenizer: Any) -> None:
    assert lengths("cat BREAK dog", tokenizer) == [1, 1]
    assert lengths("cat BREAK", tokenizer) == [1]
    assert lengths("BREAK BREAK cat", tokenizer) == [0, 0, 1]
    assert lengths("", tokenizer) == [0]
    assert lengths("cat " * 75, tokenizer) == [75]


def test_tokens_carry_the_attention_of_their_words(tokenizer: Any) -> None:
    (chunk,) = cut_chunks("a (red:1.5) [ball]", tokenizer, PLAIN)
    assert chunk.weights == pytest.approx([1, 1.5, 1 / 1.1])


def test_words_that_stand_for_vectors(tokenizer: Any) -> None:
    short, long = embedding(torch.ones(3, 32)), embedding(torch.ones(70, 32))
    words = Words(embeddings={"zorb": short, "zorb-xl": long})

    def vectors(text: str) -> list[list[tuple[int, str]]]:
        chunks = cut_chunks(text, tokenizer, words)
        assert all(len(chunk.tokens) == len(chunk.weights) <= 75 for chunk in chunks)
        return [chunk.vectors for chunk in chunks]

    assert vectors("a zorb") == [[(1, "zorb")]]
    assert vectors("ZORB, zorb") == [[(0, "zorb"), (4, "zorb")]]
    assert vectors("zorb-xl") == [[(0, "zorb-xl")]]  # the longer name, where both begin alike
    assert vectors("zorbs") == [[]]
    # One that has no room left goes to the next chunk as a whole.
    assert vectors("cat " * 72 + "zorb") == [[(72, "zorb")]]
    assert vectors("cat " * 73 + "zorb") == [[], [(0, "zorb")]]
    assert vectors("zorb-xl " * 3) == [[(0, "zorb-xl")]] * 3
    # One behind the comma that a chunk is cut at goes along.
    assert vectors("cat " * 60 + ", zorb " + "dog " * 20) == [[], [(0, "zorb")]]
    assert lengths("cat " * 60 + ", zorb " + "dog " * 20, tokenizer, words) == [61, 23]
    (chunk,) = cut_chunks("(zorb:1.5)", tokenizer, words)
    assert chunk.weights == [1.5] * 3


@pytest.mark.parametrize(
    ("word", "text", "there"),
    [
        ("zorb", "a zorb on a mat", True),
        ("zorb", "ZORB", True),
        ("zorb", "a zorb-like thing", True),
        ("zorb", "(a zorb:1.2) AND [zorb]", True),
        ("zorb", "zorb.safetensors", True),
        ("zorb", "a zorbing cat", False),
        ("zorb", "", False),
        ("zorb (v2)", r"a zorb \(v2\)", True),
        ("zorb (v2)", r"a (zorb \(v2\):1.2)", True),
        ("zorb (v2)", "a zorb (v2)", False),  # attention on v2, as in the webui
        ("zorb [x]", r"a zorb \[x\]", True),
        ("zorb two words", "a zorb  two\nwords", True),
        ("zorb_ünï", "a zorb_ünï", True),
        ("zorb.v1.5", "a zorb.v1.5", True),
        ("Zorb花", "a zorb花", True),
        ("zorb", "a zo BREAK rb", False),
        ("  ", "a  b", False),
    ],
)
def test_words_are_looked_for_among_the_tokens(
    tokenizer: Any, word: str, text: str, there: bool
) -> None:
    assert words_in(["a cat", text], tokenizer, ["dog", word]) == [word] * there
    words = Words(embeddings={word: embedding(torch.ones(1, 32))})
    found = [found for chunk in cut_chunks(text, tokenizer, words) for _, found in chunk.vectors]
    assert set(found) == ({word} if there else set())


def test_vectors_take_the_place_of_tokens(random: Checkpoint) -> None:
    """A word that stands for the vectors of other words is these words."""
    encoder = random.text_encoders[0]
    cats = encoder.tokenizer("blue cat", add_special_tokens=False).input_ids
    vectors = encoder.core.embeddings.token_embedding.weight[cats]
    words = Words(embeddings={"zorb": embedding(vectors)})
    for text in ("a zorb on a mat", "a (zorb:1.3)", "dog " * 73 + "zorb", "zorb BREAK zorb"):
        ours = context_of(text, [encoder], words)
        assert torch.equal(ours, context_of(text.replace("zorb", "blue cat"), [encoder]))
    # They are not cut apart, as words are: a break has the same effect.
    ours = context_of("dog " * 74 + "zorb", [encoder], words)
    theirs = context_of("dog " * 74 + "BREAK blue cat", [encoder])
    assert torch.equal(ours, theirs)
    # The encoder is as it was.
    assert torch.equal(context_of("cat", [encoder], words), context_of("cat", [encoder]))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a": torch.ones(2, 32), "b": torch.ones(2, 32)}, "is no textual inversion embedding"),
        ({"emb_params": torch.ones(2, 2, 2)}, "is no textual inversion embedding"),
        ({"emb_params": torch.ones(76, 32)}, "has no 1 to 75 vectors"),
        ({"emb_params": torch.ones(0, 32)}, "has no 1 to 75 vectors"),
        ({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(3, 32)}, "has no 1 to 75 vectors"),
    ],
)
def test_what_is_no_embedding_is_refused(tensors: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(JobFailure, match=f"^x.safetensors {reason}"):
        Embedding(tensors, "x.safetensors", None)


def test_an_embedding_of_another_family_is_told(random: Checkpoint) -> None:
    other = embedding(torch.ones(2, 768))
    with pytest.raises(
        JobFailure, match=r"zorb\.pt does not fit random\.safetensors: its vectors have 768 numbers"
    ):
        other.check_fits(random.text_encoders, "zorb.pt", "random.safetensors")


def test_attention_changes_its_tokens_and_keeps_the_mean(random: Checkpoint) -> None:
    plain, strong = (context_of(text, random.text_encoders) for text in ("a cat", "a (cat:1.5)"))
    ratio = (strong / plain).mean(1)  # token by token
    assert ratio[2] == pytest.approx(1.5 * ratio[1].item(), rel=1e-4)
    assert ratio[3:].mean().item() == pytest.approx(ratio[1].item(), rel=1e-4)
    assert strong.mean().item() == pytest.approx(plain.mean().item(), rel=1e-4)


def test_every_chunk_is_encoded_for_itself(random: Checkpoint) -> None:
    both = context_of("a cat BREAK a (dog:1.2)", random.text_encoders)
    assert both.shape == (2 * 77, 32)
    one, two = (context_of(text, random.text_encoders) for text in ("a cat", "a (dog:1.2)"))
    assert torch.allclose(both, torch.cat([one, two]), atol=1e-5)


def test_clip_skip_takes_an_earlier_layer(random: Checkpoint) -> None:
    contexts = [
        context_of("a cat", random.text_encoders, Words(clip_skip=skip)) for skip in range(1, 7)
    ]
    for shallower, deeper in pairwise(contexts[:4]):
        assert not torch.allclose(shallower, deeper)
    # There are three layers, and before them the embeddings: more than that can't be skipped.
    assert torch.equal(contexts[3], contexts[4])
    assert torch.equal(contexts[3], contexts[5])
    encoder = random.text_encoders[0]
    output = encoder.model(
        torch.tensor([[49406, 320, 2368] + [49407] * 74]), output_hidden_states=True
    )
    normed = encoder.core.final_layer_norm(output.hidden_states[-2])
    assert torch.equal(contexts[1], normed[0])


def test_encodings_are_kept_for_as_long_as_they_are_right(
    random: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Sequence[str]] = []
    real = encoding.encode

    def counted(texts: Sequence[str], *rest: Any) -> list[encoding.Encoded]:
        made.append(texts)
        return real(texts, *rest)

    monkeypatch.setattr(encoding, "encode", counted)
    width = sum(encoder.width for encoder in random.text_encoders)
    monkeypatch.setattr(encoding, "KEPT_BYTES", 3 * 77 * width * 4)
    kept = Encodings()

    def ask(text: str, words: Words = PLAIN, weights: str = "bare") -> Tensor:
        (encoded,) = kept.encode([text], random.text_encoders, words, weights)
        return encoded.context

    assert torch.equal(ask("a"), ask("a"))
    assert made == [["a"]]
    ask("a", weights="with a LoRA")
    ask("a", Words(clip_skip=2))
    assert made == [["a"]] * 3
    ask("b")  # the oldest one goes: that of the bare weights
    ask("a", weights="with a LoRA")
    assert made == [["a"]] * 3 + [["b"]]
    ask("a")
    assert made == [["a"]] * 3 + [["b"], ["a"]]


def test_a_prompt_that_changes_too_often_for_its_length_is_refused(easel: Easel) -> None:
    """Its embeddings would take gigabytes."""
    words, options = " ".join(["heart"] * 3000), "|".join(map(str, range(30)))
    with pytest.raises(JobFailure, match="30 different texts of up to 41 chunks"):
        easel.paint(prompt=f"{words} [{options}]", steps=30)
