"""Builds the CLIP tokenizer files that `transformers.CLIPTokenizer` reads.

The only input is OpenAI's merge list `bpe_simple_vocab_16e6.txt.gz` (MIT licence), which the
open_clip_torch wheel carries:

    pip download --no-deps open_clip_torch==3.3.0
    python make_tokenizer.py open_clip_torch-3.3.0-py3-none-any.whl <output directory>

The construction follows `SimpleTokenizer.__init__` of https://github.com/openai/CLIP.
"""

import argparse
import gzip
import hashlib
import json
import zipfile
from pathlib import Path

BPE_NAME = "bpe_simple_vocab_16e6.txt.gz"
BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
VOCABULARY_SIZE = 49_408
MERGE_COUNT = 49_152 - 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"


def read_merge_list(source: Path) -> bytes:
    """The compressed merge list, from the file itself or from a wheel that holds it."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(BPE_NAME))
            packed = wheel.read(name)
    else:
        packed = source.read_bytes()
    if hashlib.sha256(packed).hexdigest() != BPE_SHA256:
        raise ValueError(f"{source} does not hold the merge list OpenAI published")
    return packed


def byte_symbols() -> list[str]:
    """One printable character per byte value, in the order CLIP numbers them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable_count = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + n) for n in range(unprintable_count)]


def build_tokenizer(packed_merges: bytes, target: Path, pad_token: str = END) -> None:
    """Writes vocab.json, merges.txt and the two config files into `target`.

    `pad_token` is `<|endoftext|>` for SD 1.x and the first SDXL encoder, `!` for SD 2.x and the
    second SDXL encoder.
    """
    lines = gzip.decompress(packed_merges).decode("utf-8").split("\n")
    merges = [line.split() for line in lines[1 : MERGE_COUNT + 1]]

    symbols = byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    tokens += ["".join(pair) for pair in merges] + [START, END]
    if len(set(tokens)) != VOCABULARY_SIZE:
        raise ValueError(f"expected {VOCABULARY_SIZE} different tokens, got {len(set(tokens))}")

    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    target.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    write_text(target / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(target / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    write_text(target / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text(target / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the CLIP tokenizer files.")
    parser.add_argument("source", type=Path, help=f"{BPE_NAME}, or a wheel that holds it")
    parser.add_argument("target", type=Path, help="directory to write into")
    parser.add_argument("--pad-token", default=END)
    arguments = parser.parse_args()
    build_tokenizer(read_merge_list(arguments.source), arguments.target, arguments.pad_token)


if __name__ == "__main__":
    main()
