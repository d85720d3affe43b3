"""Files of weights, whole, broken and hostile, as they are read before anybody loads them."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shared.weights import BrokenFile, UnsafeFile
from shared.weights.headers import MAX_HEADER, Header, TensorSpec, is_pickle, read_header
from shared.weights.kinds import Kind, describe
from shared.weights.onnx import check_onnx
from shared.weights.pickles import MAX_PICKLE, read_pickle
from tests.weights import TENSORS, weights, with_header

QUANT_CONV = "quant_conv.weight"
LORA = "lora_unet_down_blocks_0_attentions_0_attn2_to_k.lora_down.weight"


def header_of(data: bytes) -> Header:
    return read_header(io.BytesIO(data), len(data))


# Safetensors


def test_a_header_tells_what_the_library_tells(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.float16),
        "b.c": torch.zeros(7, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4),
        "one": torch.zeros((), dtype=torch.int64),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"ss_note": "é"})
    with path.open("rb") as file:
        header = read_header(file, path.stat().st_size)
    assert header.metadata == {"ss_note": "é"}
    assert {name: spec.shape for name, spec in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert header.parameters == 15 + 7 + 0 + 1
    assert sum(spec.size for spec in header.tensors.values()) == 30 + 14 + 8


def entry(begin: int, end: int, shape: Any = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [end - begin], "data_offsets": [begin, end]}


LYING: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no safetensors file"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "no safetensors file"),
    "a web page": (b"<!DOCTYPE html><html>" * 100, "no safetensors file"),
    "header longer than the file": (with_header({}, b"", 50)[:-1], "no safetensors file"),
    "header of 2^63 bytes": (b"\xff" * 7 + b"\x7f" + b"{}", "no safetensors file"),
    "no JSON": (with_header("{" * 100, b""), "can't be read"),
    "JSON of another kind": (with_header("[1, 2]", b""), "can't be read"),
    "deep JSON": (with_header('{"a":' * 100_000, b"", 0), "can't be read"),
    "no UTF-8": (with_header("", b"")[:8] + b"\xff" * 1024, "can't be read"),
    "numbers for metadata": (with_header({"__metadata__": {"a": 1}}, b""), "can't be read"),
    "offsets that are text": (
        with_header({"a": {"dtype": "U8", "shape": [1], "data_offsets": ["0", "1"]}}, b"x"),
        "can't be read",
    ),
    "offsets that are missing": (with_header({"a": {"dtype": "U8", "shape": []}}, b"x"), "read"),
    "a float for a side": (
        with_header({"a": {"dtype": "U8", "shape": [1.5], "data_offsets": [0, 1]}}, b"x"),
        "can't be read",
    ),
    "an unknown type": (with_header({"a": entry(0, 4, dtype="Q4_K")}, b"xxxx"), "unknown type"),
    "a negative side": (with_header({"a": entry(0, 4, [-4])}, b"xxxx"), "impossible shape"),
    "a huge side": (with_header({"a": entry(0, 4, [2**62, 4])}, b"xxxx"), "its shape needs"),
    "offsets that go back": (with_header({"a": entry(4, 0, [4])}, b"xxxx"), "bytes where"),
    "negative offsets": (with_header({"a": entry(-4, 0, [4])}, b"xxxx"), "bytes where"),
    "overlapping tensors": (
        with_header({"a": entry(0, 4), "b": entry(2, 6)}, b"xxxxxx"),
        "share bytes at 2",
    ),
    "the same bytes twice": (
        with_header({"a": entry(0, 4), "b": entry(0, 4)}, b"xxxx"),
        "share bytes at 0",
    ),
    "a gap": (with_header({"a": entry(0, 4), "b": entry(6, 8)}, b"x" * 8), "a gap at 4"),
    "a gap at the beginning": (with_header({"a": entry(4, 8)}, b"x" * 8), "a gap at 0"),
    "a name without end": (
        with_header({"attn2.to_k" * 1_000_000: entry(0, 4)}, b"xxxx"),
        "10000000 characters",
    ),
    "bytes too few": (weights("Lora")[:-1], "upload it again"),
    "bytes too many": (weights("Lora") + b"x", "upload it again"),
    "a pickle behind it": (weights("Lora") + pickle.dumps({}), "upload it again"),
}


@pytest.mark.parametrize("what", LYING)
def test_a_header_that_lies_is_found_out(what: str) -> None:
    data, told = LYING[what]
    with pytest.raises(BrokenFile, match=told):
        header_of(data)
    assert not is_pickle(data[:9])


def test_no_header_is_too_large_to_be_refused() -> None:
    class Huge(io.BytesIO):
        def read(self, count: int | None = -1) -> bytes:
            assert count == 8, "reads more than the length"
            return (MAX_HEADER + 1).to_bytes(8, "little")

    with pytest.raises(BrokenFile, match="larger than"):
        read_header(Huge(), 50 * 1024**3)


def test_what_is_taken_for_whole_the_library_takes_too(tmp_path: Path) -> None:
    """Damaged anywhere in its header, a file is refused by us or read by it."""
    whole, chance, path = weights("Lora"), random.Random(0), tmp_path / "x.safetensors"
    taken = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 2, 4))):
            damaged[chance.randrange(0, 250)] = chance.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(BrokenFile):
            header_of(bytes(damaged))
            taken += 1
            with safe_open(path, "pt") as file:
                assert set(file.keys()) == set(header_of(bytes(damaged)).tensors)
    assert 0 < taken < 300


# Pickles

MODEL = {
    "state_dict": {
        "model.diffusion_model.input_blocks.0.0.weight": torch.randn(4, 4, 3, 3).half(),
        "first_stage_model.decoder.conv_in.weight": torch.randn(8, 4),
    },
    "epoch": 3,
    "callbacks": OrderedDict(a=[1.5, None, True, (1, 2), {3}]),
}


def saved(what: Any, *, old: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(what, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def read(data: bytes) -> Header:
    assert is_pickle(data[:9])
    return read_pickle(io.BytesIO(data)).header


@pytest.mark.parametrize("old", [False, True])
def test_the_tensors_of_a_pickle_are_told_without_running_it(old: bool) -> None:
    header = read(saved(MODEL, old=old))
    assert header.format == "pickle"
    assert header.tensors == {
        "model.diffusion_model.input_blocks.0.0.weight": TensorSpec("F16", (4, 4, 3, 3)),
        "first_stage_model.decoder.conv_in.weight": TensorSpec("F32", (8, 4)),
    }


@pytest.mark.parametrize("old", [False, True])
def test_all_that_training_writes_is_understood(old: bool) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    shared = torch.arange(24.0)
    whole = {
        "params": {
            "weight": weight,
            "part": shared[4:12].view(2, 4),
            "turned": torch.randn(2, 5).t(),
            "brain": torch.randn(3).bfloat16(),
            "flag": torch.tensor([True]),
            "alone": torch.tensor(3),
        }
    }
    header = read(saved(whole, old=old))
    assert {name: (spec.dtype, spec.shape) for name, spec in header.tensors.items()} == {
        "weight": ("F64", (3, 3)),
        "part": ("F32", (2, 4)),
        "turned": ("F32", (5, 2)),
        "brain": ("BF16", (3,)),
        "flag": ("BOOL", (1,)),
        "alone": ("I64", ()),
    }
    embedding = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}}
    assert read(saved(embedding, old=old)).tensors == {
        "string_to_param.*": TensorSpec("F32", (2, 768))
    }


class Calls:
    """Pickles itself as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


ATTACKS: dict[str, Callable[[str], Any]] = {
    "a shell": lambda at: Calls(os.system, f"touch {at}"),
    "a process": lambda at: Calls(subprocess.Popen, ["touch", at]),
    "eval": lambda at: Calls(eval, f"open({at!r}, 'w')"),
    "exec": lambda at: Calls(exec, f"open({at!r}, 'w')"),
    "open": lambda at: Calls(open, at, "w"),
    "copy": lambda at: Calls(shutil.copyfile, __file__, at),
    "getattr": lambda at: Calls(getattr, Calls(__import__, "os"), "system"),
    "torch itself": lambda at: Calls(torch.save, {}, at),
    "a module of ours": lambda at: Calls(weights, "Lora"),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", ["whole", "beside the tensors", "as a tensor", "old layout"])
def test_a_pickle_that_would_run_something_is_refused(
    attack: str, place: str, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    evil = ATTACKS[attack](str(marker))
    made = {
        "whole": lambda: pickle.dumps(evil, 2),
        "beside the tensors": lambda: saved({**MODEL, "callbacks": evil}),
        "as a tensor": lambda: saved({"state_dict": {"x": evil}}),
        "old layout": lambda: saved({**MODEL, "callbacks": evil}, old=True),
    }[place]()
    with pytest.raises(UnsafeFile, match=r"^would run \S+ when it is opened$"):
        read_pickle(io.BytesIO(made))
    assert not marker.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02cos\nsystem\n(S'x'\ntR.",
        b"(S'x'\nios\nsystem\n.",  # INST
        b"\x80\x02(cos\nsystem\nS'x'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\ncos\nsystem\n\x85R.",
        b"\x80\x02cbuiltins\neval\n.",  # only named, and never called
        b"\x80\x02c__builtin__\ngetattr\n.",
    ],
)
def test_no_way_of_naming_a_function_gets_through(code: bytes) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", code)
    for data in (archive.getvalue(), pickle.dumps(0x1950A86A20F9469CFC6C, 2) + code * 3):
        with pytest.raises(UnsafeFile, match=r"would run|uses (INST|OBJ|EXT1)"):
            read_pickle(io.BytesIO(data))


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return archive.getvalue()


def entries_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def without(entries: dict[str, bytes], ending: str) -> dict[str, bytes]:
    return {name: data for name, data in entries.items() if not name.endswith(ending)}


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "no ZIP": (lambda: b"PK" + bytes(100), "its ZIP can't be read"),
    "cut off": (lambda: saved(MODEL)[:-50], "its ZIP can't be read"),
    "cut off in the middle": (lambda: saved(MODEL)[:300], "its ZIP can't be read"),
    "cut off, old layout": (lambda: saved(MODEL, old=True)[:-50], "cut off"),
    "cut off early, old layout": (lambda: saved(MODEL, old=True)[:90], "can't be followed|not end"),
    "another ZIP": (lambda: zipped({"word/document.xml": b"<w/>"}), "not one of tensors"),
    "two programs": (
        lambda: zipped({"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}."}),
        "not one of tensors",
    ),
    "a second pickle": (
        lambda: zipped({"a/data.pkl": b"\x80\x02}.", "a/constants.pkl": b"\x80\x02}."}),
        "not one of tensors",
    ),
    "a ZIP bomb": (
        lambda: zipped({"a/data.pkl": bytes(MAX_PICKLE + 1)}, zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "a huge program": (lambda: zipped({"a/data.pkl": bytes(MAX_PICKLE + 1)}), "larger than"),
    "no storages": (lambda: zipped(without(entries_of(saved(MODEL)), "data/0")), "are not there"),
    "a short storage": (
        lambda: zipped({**entries_of(saved(MODEL)), "archive/data/0": b"x"}),
        "are not there",
    ),
    "no names": (lambda: saved([torch.zeros(3)]), "no tensors by name"),
    "a name without end": (lambda: saved({"a" * 501: torch.zeros(3)}), "501 characters"),
    "a pickle of something else": (lambda: pickle.dumps({"a": 1}, 2), "as torch writes them"),
    "a bomb of references": (
        lambda: zipped({"a/data.pkl": b"\x80\x02]q\x00" + b"h\x00a" * 1000 + b"."}),
        "no tensors by name",
    ),
    "no end": (lambda: zipped({"a/data.pkl": b"\x80\x02}q\x00"}), "not end|exhausted|followed"),
    "an empty stack": (lambda: zipped({"a/data.pkl": b"\x80\x020."}), "can't be followed"),
    "an unknown opcode": (lambda: zipped({"a/data.pkl": b"\x80\x02\xff."}), "can't be followed"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_pickle_is_found_out(what: str) -> None:
    make, told = BROKEN[what]
    with pytest.raises(BrokenFile, match=told):
        read(make())


def test_a_tensor_may_not_reach_out_of_its_storage() -> None:
    whole = torch.zeros(4)
    for view in (whole.as_strided((4,), (1,), 0), whole.as_strided((2, 2), (2, 1), 0)):
        assert read(saved({"a": view})).tensors["a"].count == 4
    entries = entries_of(saved({"a": torch.zeros(1000)}))
    program = entries["archive/data.pkl"].replace(b"M\xe8\x03\x85", b"M\xe9\x03\x85")
    assert program != entries["archive/data.pkl"]
    with pytest.raises(BrokenFile, match="are not there"):
        read(zipped({**entries, "archive/data.pkl": program}))


def test_whatever_a_pickle_holds_it_is_told_or_refused() -> None:
    """Never an error of another type, which would be a fault of ours."""
    chance = random.Random(1)
    wholes = saved(MODEL), saved(MODEL, old=True)
    for number in range(400):
        damaged = bytearray(wholes[number % 2])
        for _ in range(chance.choice((1, 2, 5))):
            damaged[chance.randrange(2, 700)] = chance.randrange(256)
        with contextlib.suppress(BrokenFile, UnsafeFile):
            read_pickle(io.BytesIO(bytes(damaged)))


def test_reading_a_pickle_needs_no_torch() -> None:
    code = (
        "import sys, shared.weights.pickles, shared.weights.kinds;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ONNX


def test_an_onnx_model_is_told_from_something_else() -> None:
    graph = b"\x3a\x03abc"  # field 7, three bytes
    whole = b"\x08\x08" + b"\x12\x07pytorch" + graph
    check_onnx(io.BytesIO(whole), len(whole))
    for data in (
        b"",
        graph,  # no version
        b"\x08\x08",  # no graph
        whole[:-1],
        whole + b"\x00",
        b"<html>" * 10,
        weights("Lora"),
        saved(MODEL),
        b"\x08" + b"\xff" * 20,
        b"\x3a\xff\xff\xff\xff\x0f",  # a graph of four gigabytes
    ):
        with pytest.raises(BrokenFile, match="no ONNX model"):
            check_onnx(io.BytesIO(data), len(data))


# Kinds


@pytest.mark.parametrize("type_", [name for name, tensors in TENSORS.items() if tensors])
def test_a_type_is_told_from_the_tensors(type_: str) -> None:
    assert describe(header_of(weights(type_))).type == type_


WIDTHS = {"SD 1.x": 768, "SD 2.x": 1024, "SDXL": 2048, "SDXL refiner": 1280}
K = "transformer_blocks.0.attn2.to_k"
FLAT = K.replace(".", "_")
NETWORK_LAYOUTS: dict[str, Callable[[int], dict[str, tuple[int, ...]]]] = {
    "kohya": lambda width: {
        f"lora_unet_mid_block_attentions_0_{FLAT}.lora_down.weight": (8, width)
    },
    "kohya, original names": lambda width: {
        f"lora_unet_middle_block_1_{FLAT}.lora_down.weight": (8, width)
    },
    "kohya with te1": lambda width: {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (8, 768),
        f"lora_unet_mid_block_attentions_0_{FLAT}.lora_down.weight": (8, width),
    },
    "self attention first": lambda width: {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k.lora_down.weight": (
            (8, 640)
        ),
        f"lora_unet_mid_block_attentions_0_{FLAT}.lora_down.weight": (8, width),
    },
    "LoHa": lambda width: {f"lora_unet_middle_block_1_{FLAT}.hada_w1_b": (8, width)},
    "LoKr": lambda width: {
        f"lora_unet_middle_block_1_{FLAT}.lokr_w1": (16, 16),
        f"lora_unet_middle_block_1_{FLAT}.lokr_w2": (80, width // 16),
    },
    "LoKr, factored": lambda width: {
        f"lora_unet_middle_block_1_{FLAT}.lokr_w1_b": (4, 16),
        f"lora_unet_middle_block_1_{FLAT}.lokr_w2_b": (4, width // 16),
    },
    "full": lambda width: {f"lora_unet_middle_block_1_{FLAT}.diff": (1280, width)},
    "diffusers": lambda width: {f"unet.mid_block.attentions.0.{K}.lora_A.weight": (8, width)},
    "diffusers, no prefix": lambda width: {f"mid_block.attentions.0.{K}.lora_A.weight": (8, width)},
    "diffusers, first": lambda width: {
        f"unet.mid_block.attentions.0.{K}.lora.down.weight": (8, width)
    },
    "processors": lambda width: {
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": (
            8,
            width,
        )
    },
    "PEFT": lambda width: {
        f"base_model.model.mid_block.attentions.0.{K}.lora_A.default.weight": (8, width)
    },
}


@pytest.mark.parametrize("layout", NETWORK_LAYOUTS)
@pytest.mark.parametrize("family", WIDTHS)
def test_the_family_of_a_network_is_told_in_every_layout(family: str, layout: str) -> None:
    shapes = NETWORK_LAYOUTS[layout](WIDTHS[family])
    kind = describe(Header({name: TensorSpec("F16", shape) for name, shape in shapes.items()}))
    assert (kind.type, kind.family, kind.title) == ("Lora", family, f"a LoRA for {family}")


@pytest.mark.parametrize(
    ("names", "family", "title"),
    [
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "", "a LoRA"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "", "a LoRA"),
        (["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"], "", "a LoRA"),
        (["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "SDXL", ""),
        (["text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"], "SDXL", ""),
        (
            ["lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q.lora_down.weight"],
            "SDXL",
            "",
        ),
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "", "a LoRA"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "", "a LoRA for Flux"),
        (["lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_down.weight"], "", ""),
    ],
)
def test_the_family_of_a_network_without_the_width_of_a_text(
    names: list[str], family: str, title: str
) -> None:
    kind = describe(Header({name: TensorSpec("F16", (8, 768)) for name in names}))
    assert (kind.type, kind.family) == ("Lora", family)
    assert kind.title.startswith(title or "a LoRA for S")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("task_embedding", "a ControlNet Union"),
        ("control_model.control_add_embedding.linear_1.weight", "a ControlNet Union"),
        ("lora_controlnet", "a Control-LoRA"),
        ("lllite_unet_middle_block_1_to_q.cond_emb.0.weight", "a ControlNet-LLLite"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("adapter.body.0.block1.weight", "a T2I-Adapter"),
    ],
)
def test_what_steers_in_another_way_is_no_controlnet(name: str, title: str) -> None:
    names = (name, "input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight")
    kind = describe(Header({each: TensorSpec("F16", (8, 8)) for each in names}))
    assert (kind.type, kind.title) == ("", f"{title}, which can't be used here yet")


@pytest.mark.parametrize(
    ("written", "alias"),
    [
        ("my style", "my style"),
        (" my style ", "my style"),
        ("", ""),
        ("a\0b", ""),
        ("x" * 256, ""),
    ],
)
def test_a_lora_has_the_alias_that_its_author_wrote_down(written: str, alias: str) -> None:
    tensors = {LORA: TensorSpec("F16", (4, 768))}
    assert describe(Header(tensors, {"ss_output_name": written})).alias == alias
    embedding = {"emb_params": TensorSpec("F16", (2, 768))}
    assert describe(Header(embedding, {"ss_output_name": "x"})).alias == ""


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("GFPGAN", ["toRGB.0.weight", "stylegan_decoder.style_mlp.1.weight"]),
        # A VAE has the first name of this one, too.
        ("RestoreFormer", ["encoder.conv_in.weight", "quantize.embedding.weight", QUANT_CONV]),
        ("CodeFormer", ["encoder.blocks.0.weight", "quantize.embedding.weight", "position_emb"]),
    ],
)
def test_models_that_restore_faces_are_told_apart(family: str, names: list[str]) -> None:
    kind = describe(Header({name: TensorSpec("F32", (4, 4)) for name in names}))
    assert (kind.type, kind.family) == ("FaceRestoration", family)
    assert kind.title == f"a {family} model that restores faces"


def test_all_that_a_file_tells_is_told() -> None:
    def described(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Kind:
        return describe(Header({name: TensorSpec(*spec) for name, spec in tensors.items()}))

    lora = described(
        {
            LORA: ("BF16", (16, 768)),
            LORA.replace("down.w", "up.w"): ("BF16", (320, 16)),
            LORA.replace("lora_down.weight", "alpha"): ("F32", ()),
        }
    )
    assert (lora.type, lora.family, lora.rank) == ("Lora", "SD 1.x", 16)
    assert (lora.precision, lora.parameters) == ("bf16", 16 * 768 + 320 * 16 + 1)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting = described(
        {first: ("F16", (320, 9, 3, 3)), "conditioner.embedders.1.x": ("F16", (1,))}
    )
    assert (inpainting.family, inpainting.inpainting, inpainting.precision) == (
        "SDXL",
        True,
        "fp16",
    )
    assert inpainting.title == "a SDXL inpainting checkpoint"
    embedding = described({"clip_l": ("F32", (3, 768)), "clip_g": ("F32", (3, 1280))})
    assert (embedding.vectors, embedding.widths) == (3, [768, 1280])
    unknown = described({"a": ("F32", (3,)), "b": ("F32", (3,))})
    assert (unknown.type, unknown.title) == ("", "no model that is known here")
    assert describe(Header({})).type == ""
    told = msgspec.to_builtins(unknown)
    assert told == {
        "type": "",
        "title": "no model that is known here",
        "format": "safetensors",
        "precision": "fp32",
        "parameters": 6,
    }
