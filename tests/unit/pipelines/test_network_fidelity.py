"""What is put on a checkpoint: LoRA and its kin, another VAE, ControlNets.

A network is compared with what it says it is: layers beside the layers of the model, whose outputs
are added up. The engine puts it into the weights instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.models import layouts
from services.inference.worker.pipelines.models.files import ModelFile
from services.inference.worker.pipelines.models.networks import NetworkFile, Worn
from tests.unit.pipelines import by_hand, tiny
from tests.unit.pipelines.bench import USUAL, Bench, Seen, base64_of, photo, worst
from tests.unit.pipelines.by_hand import Predict
from tests.unit.pipelines.conftest import Checkpoints, Same
from tests.unit.pipelines.test_families import load, modules_of
from tests.unit.pipelines.tiny import Parts, Tensors, Tiny

PROMPT, NEGATIVE = USUAL["prompt"], USUAL["negative_prompt"]


# Networks, as layers beside layers


def beside(layer: Any, x: Tensor, form: str, parts: Parts) -> Tensor:
    """What a network of a form adds to what a layer makes of `x`."""

    def through(weight: Tensor, bias: Tensor | None = None, seen: Tensor = x) -> Tensor:
        if isinstance(layer, nn.Linear):
            return linear(seen, weight.reshape(layer.weight.shape), bias)
        return conv2d(seen, weight.reshape(layer.weight.shape), bias, layer.stride, layer.padding)

    alpha = float(parts.get("alpha", torch.ones(())))
    match form:
        case "lora":
            up, down = parts["lora_up.weight"], parts["lora_down.weight"]
            if isinstance(layer, nn.Linear):
                return linear(linear(x, down), up) * (alpha / len(down))
            inner = conv2d(x, down, None, layer.stride, layer.padding)
            return conv2d(inner, up) * (alpha / len(down))
        case "lora_mid":
            up, down = parts["lora_up.weight"], parts["lora_down.weight"]
            inner = conv2d(x, down)
            inner = conv2d(inner, parts["lora_mid.weight"], None, layer.stride, layer.padding)
            return conv2d(inner, up) * (alpha / len(down))
        case "loha":
            one, two = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
            return through(one * two) * (alpha / len(parts["hada_w1_b"]))
        case "loha_core":
            one, two = (
                torch.tensordot(
                    parts[f"hada_w{n}_a"].T,
                    torch.tensordot(parts[f"hada_t{n}"], parts[f"hada_w{n}_b"], ([1], [0])),
                    ([1], [0]),
                ).movedim(3, 1)
                for n in (1, 2)
            )
            return through(one * two) * (alpha / len(parts["hada_w1_b"]))
        case "lokr":
            small = parts["lokr_w1"].numpy()
            if "lokr_w2" in parts:  # nothing here has a rank, so alpha means nothing
                large = parts["lokr_w2"].numpy()
                small = small[:, :, None, None]
                return through(torch.from_numpy(np.kron(small, large)))
            large = (parts["lokr_w2_a"] @ parts["lokr_w2_b"]).numpy()
            delta = torch.from_numpy(np.kron(small, large))
            return through(delta) * (alpha / len(parts["lokr_w2_b"]))
        case "ia3":
            return through(layer.weight) * parts["weight"]
        case "ia3_on_input":
            return through(layer.weight, None, x * parts["weight"])
        case "full":
            return through(parts["diff"], parts["diff_b"])
    raise KeyError(form)


def decomposed(layer: Any, x: Tensor, form: str, parts: Parts) -> Tensor:
    """What DoRA adds: the form's change of the weight is found out by what the layer makes of one
    input at a time, and each row, or column, of the sum gets its magnitude."""
    bare = layer.weight
    changed = bare + beside(layer, torch.eye(bare.shape[1]), form, parts).T
    along = 0 if parts["dora_scale"].shape[0] == 1 else 1
    lengths = torch.linalg.vector_norm(changed, dim=along, keepdim=True)
    return linear(x, changed / lengths * parts["dora_scale"] - bare)


@contextmanager
def wearing(
    model: Tiny, form: str, parts: Mapping[str, Parts], text: float = 1.0, unet: float = 1.0
) -> Iterator[None]:
    """The model with a network on the layers that `parts` names."""
    hooks = []
    for name, some in parts.items():
        component, _, layer = name.partition(".")
        weight = unet if component == "unet" else text

        def add(
            layer: Any, given: Any, out: Tensor, some: Parts = some, weight: float = weight
        ) -> Tensor:
            added = decomposed if "dora_scale" in some else beside
            return out + weight * added(layer, given[0], form, some)

        hooks.append(getattr(model, component).get_submodule(layer).register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layers_of(model: Tiny, names: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        component, _, layer = name.partition(".")
        found[name] = getattr(model, component).get_submodule(layer)
    return found


BLOCK = "unet.down_blocks.0.attentions.0"
LINEAR = [
    f"{BLOCK}.transformer_blocks.0.attn1.to_q",
    f"{BLOCK}.transformer_blocks.0.attn2.to_k",
    f"{BLOCK}.transformer_blocks.0.ff.net.0.proj",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "unet.up_blocks.0.resnets.1.time_emb_proj",
    "text_encoder.encoder.layers.0.self_attn.q_proj",
    "text_encoder.encoder.layers.1.mlp.fc2",
    "text_encoder.encoder.layers.2.self_attn.out_proj",
]
CONVOLUTIONS = [
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.down_blocks.0.downsamplers.0.conv",
    "unet.down_blocks.1.resnets.0.conv2",
    "unet.up_blocks.0.upsamplers.0.conv",
]
SMALL_CONVOLUTIONS = [f"{BLOCK}.proj_in", "unet.down_blocks.1.resnets.0.conv_shortcut"]
FORMS: dict[str, tuple[Callable[[Tensor, int], Parts], list[str]]] = {
    "lora": (tiny.lora, [*LINEAR, *SMALL_CONVOLUTIONS, *CONVOLUTIONS]),
    "lora_mid": (tiny.lora_mid, CONVOLUTIONS),
    "loha": (tiny.loha, [*LINEAR, *CONVOLUTIONS]),
    "loha_core": (tiny.loha_core, CONVOLUTIONS),
    "lokr": (tiny.lokr, [*LINEAR, *CONVOLUTIONS]),
    "ia3": (tiny.ia3, LINEAR),
    "ia3_on_input": (tiny.ia3_on_input, LINEAR),
    "full": (
        tiny.full,
        [name for name in (*LINEAR, *CONVOLUTIONS) if not name.endswith(("to_q", "to_k", "to_v"))],
    ),
}


def kohya(name: str) -> str:
    """For SD 1.x and SD 2.x, which have one text encoder."""
    component, _, layer = name.partition(".")
    prefix = "lora_unet" if component == "unet" else "lora_te_text_model"
    return f"{prefix}_{layer.replace('.', '_')}"


def painted(model: Tiny) -> Tensor:
    return by_hand.run(model, by_hand.usually_guided(model), by_hand.noise())


DORA: dict[str, tuple[str, Callable[[Tensor, int], Parts], str]] = {
    "LoRA, by inputs": ("lora", tiny.lora, "inputs"),
    "LoRA, by outputs": ("lora", tiny.lora, "outputs"),
    "LoHa, by inputs": ("loha", tiny.loha, "inputs"),
    "LoKr, by outputs": ("lokr", tiny.lokr, "outputs"),
    "full, by inputs": ("full", tiny.full, "inputs"),
}


@pytest.mark.parametrize("what", DORA)
def test_dora_gives_a_changed_weight_the_magnitudes_that_were_learned(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path, what: str
) -> None:
    """At a lower weight it goes a part of the way, as in the webui."""
    model, path = checkpoints["SD 1.x"]
    form, make, of = DORA[what]
    names = [
        name for name in LINEAR if form != "full" or not name.endswith(("to_q", "to_k", "to_v"))
    ]
    tensors, parts = tiny.network(layers_of(model, names), tiny.dora(make, of=of), kohya)
    if form == "full":  # its bias is no part of the weight
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("diff_b")}
        parts = {k: {**v, "diff_b": torch.zeros_like(v["diff_b"])} for k, v in parts.items()}
    file = tiny.save(tmp_path / "style.safetensors", tensors)
    with wearing(model, form, parts, 0.7, 0.7):
        theirs = painted(model)
    seen = bench.paint(path, prompt=f"{PROMPT}<lora:style:0.7>", beside={file: "Lora"})
    assert not seen.result.warnings
    same(f"DoRA, {what}", seen.latents[0], theirs)


@pytest.mark.parametrize("form", FORMS)
def test_a_network_adds_what_its_layers_would(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path, form: str
) -> None:
    model, path = checkpoints["SD 1.x"]
    make, names = FORMS[form]
    tensors, parts = tiny.network(layers_of(model, names), make, kohya)
    file = tiny.save(tmp_path / "style.safetensors", tensors)
    for call, text, unet in (("style:0.7", 0.7, 0.7), ("style:0.5:-0.8", 0.5, -0.8)):
        with wearing(model, form, parts, text, unet):
            theirs = painted(model)
        seen = bench.paint(path, prompt=f"{PROMPT}<lora:{call}>", beside={file: "Lora"})
        assert not seen.result.warnings
        same(f"network, {form}", seen.latents[0], theirs)
    assert worst(seen.pixels[0], bench.paint(path).pixels[0]) > 5


# Names


def peft(name: str) -> str:
    return name.replace("text_encoder.", "text_encoder.text_model.")


def as_peft(tensors: Tensors) -> Tensors:
    """Alpha is not told then: it is the rank."""
    renamed = {"lora_down": "lora_A", "lora_up": "lora_B", "magnitude": "magnitude"}
    return {
        key.replace(old, new): tensor
        for key, tensor in tensors.items()
        for old, new in renamed.items()
        if old in key
    }


def as_attention_processors(tensors: Tensors) -> Tensors:
    """As diffusers' first scripts saved LoRAs."""
    renamed = {}
    for key, tensor in as_peft(tensors).items():
        layer, _, end = key.replace(".to_out.0.", ".to_out.").rpartition(".lora_")
        side = "down" if end.startswith("A") else "up"
        if key.startswith("unet."):
            block, _, target = layer.rpartition(".")
            renamed[f"{block}.processor.{target}_lora.{side}.weight"] = tensor
        else:
            renamed[f"{layer}.lora_linear_layer.{side}.weight"] = tensor
    return renamed


ATTENTION = [name for name in LINEAR if "attn" in name]
IN_UNET = [
    name for name in (*LINEAR, *SMALL_CONVOLUTIONS, *CONVOLUTIONS) if name.startswith("unet.")
]
LAYOUTS: dict[str, tuple[Callable[[str], str], Callable[[Tensors], Tensors], list[str]]] = {
    "kohya": (kohya, lambda tensors: tensors, [*LINEAR, *SMALL_CONVOLUTIONS, *CONVOLUTIONS]),
    "PEFT": (peft, as_peft, [*LINEAR, *CONVOLUTIONS]),
    "PEFT, DoRA": (peft, as_peft, IN_UNET),  # transformers loses the magnitudes of its encoders
    "attention processors": (peft, as_attention_processors, ATTENTION),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_does_what_diffusers_does_with_it(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path, layout: str
) -> None:
    """Of the same file."""
    _, path = checkpoints["SD 1.x"]
    model = tiny.sd1()
    key_of, rename, names = LAYOUTS[layout]
    dora = layout.endswith("DoRA")
    make = tiny.dora(tiny.lora, of="PEFT") if dora else tiny.lora
    tensors = rename(tiny.network(layers_of(model, names), make, key_of)[0])
    file = tiny.save(tmp_path / "style.safetensors", tensors)
    pipeline = by_hand.pipeline(model)
    pipeline.load_lora_weights(dict(tensors), adapter_name="style")
    strength = 1 if dora else 0.7  # PEFT weakens what is added before it takes its length
    pipeline.set_adapters("style", strength)
    body: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 6.5}
    theirs = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        latents=by_hand.noise(),
        height=64,
        width=64,
        output_type="latent",
        **body,
    ).images
    seen = bench.paint(path, prompt=f"{PROMPT} <lora:style:{strength}>", beside={file: "Lora"})
    assert not seen.result.warnings
    same(f"LoRA, {layout}, diffusers", seen.latents[0], theirs)


Q = "transformer_blocks.0.attn1.to_q"
FLAT = Q.replace(".", "_")
SPELLINGS = {
    "kohya": f"lora_unet_mid_block_attentions_0_{FLAT}.lora_down.weight",
    "kohya, original names": f"lora_unet_middle_block_1_{FLAT}.lora_down.weight",
    "kohya, parts of PEFT": f"lora_unet_mid_block_attentions_0_{FLAT}.lora_A.weight",
    "kohya with dots": f"lora_unet_mid_block_attentions_0_{FLAT[:-5]}.to_q.lora_A.weight",
    "diffusers": f"unet.mid_block.attentions.0.{Q}.lora_A.weight",
    "diffusers, first": f"unet.mid_block.attentions.0.{Q}.lora.down.weight",
    "diffusers, no prefix": f"mid_block.attentions.0.{Q}.lora_A.weight",
    "processors": f"unet.mid_block.attentions.0.{Q[:-5]}.processor.to_q_lora.down.weight",
    "processors, no prefix": f"mid_block.attentions.0.{Q[:-5]}.processor.to_q_lora.down.weight",
    "PEFT": f"base_model.model.mid_block.attentions.0.{Q}.lora_A.weight",
    "PEFT with an adapter": f"base_model.model.mid_block.attentions.0.{Q}.lora_A.default_0.weight",
    "PEFT in diffusers": f"unet.base_model.model.mid_block.attentions.0.{Q}.lora_A.weight",
    "ComfyUI": f"diffusion_model.middle_block.1.{Q}.lora_A.weight",
}
ENCODER_SPELLINGS = {
    "kohya": "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    "kohya, as for SDXL": "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    "diffusers": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "diffusers, first": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    ".lora_linear_layer.down.weight",
    "transformers of late": "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "PEFT": "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
}


@pytest.mark.parametrize(
    ("key", "at"),
    [
        *((key, f"unet.mid_block.attentions.0.{Q}") for key in SPELLINGS.values()),
        *(
            (key, "text_encoder.encoder.layers.0.self_attn.q_proj")
            for key in ENCODER_SPELLINGS.values()
        ),
    ],
    ids=[*SPELLINGS, *(f"text, {name}" for name in ENCODER_SPELLINGS)],
)
def test_a_layer_is_found_by_all_names_that_it_has(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path, key: str, at: str
) -> None:
    _, path = checkpoints["SD 1.x"]
    checkpoint = load(bench, path)
    component, _, layer = at.partition(".")
    weight = modules_of(checkpoint)[component].get_submodule(layer).weight
    bare = weight.clone()
    parts = tiny.lora(weight, 7)
    up = key.replace("lora_A", "lora_B").replace("down.weight", "up.weight")
    tensors = {key: parts["lora_down.weight"], up: parts["lora_up.weight"]}
    file = ModelFile(tiny.save(tmp_path / "style.safetensors", tensors), "style.safetensors")
    network = NetworkFile(file)
    assert not checkpoint.wardrobe.unplaced(network)
    assert not network.unknown
    checkpoint.wardrobe.wear([Worn(network, file.name, 1.0, 1.0)])
    try:
        worn = modules_of(checkpoint)[component].get_submodule(layer).weight
        added = parts["lora_up.weight"] @ parts["lora_down.weight"]
        torch.testing.assert_close(worn, bare + added)
    finally:
        checkpoint.wardrobe.take_off()


SGM = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ),
    "unet.down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_v": (
        "lora_unet_input_blocks_5_1_transformer_blocks_1_attn2_to_v"
    ),
    "unet.mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj": (
        "lora_unet_middle_block_1_transformer_blocks_1_ff_net_0_proj"
    ),
    "unet.up_blocks.0.attentions.2.proj_out": "lora_unet_output_blocks_2_1_proj_out",
    "unet.down_blocks.0.resnets.1.conv1": "lora_unet_input_blocks_2_0_in_layers_2",
    "unet.down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
    "unet.up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
    "unet.up_blocks.1.resnets.2.conv_shortcut": "lora_unet_output_blocks_5_0_skip_connection",
    "unet.time_embedding.linear_1": "lora_unet_time_embed_0",
    "unet.add_embedding.linear_2": "lora_unet_label_emb_0_2",
    "text_encoder.encoder.layers.0.self_attn.q_proj": (
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    ),
    "text_encoder_2.text_model.encoder.layers.1.mlp.fc1": (
        "lora_te2_text_model_encoder_layers_1_mlp_fc1"
    ),
}
"""Some layers of SDXL and what kohya's scripts call them."""


def test_a_lora_for_sdxl_goes_by_the_names_of_the_original(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    model, path = checkpoints["SDXL"]
    tensors, parts = tiny.network(layers_of(model, [*SGM]), tiny.lora, SGM.__getitem__)
    file = tiny.save(tmp_path / "style.safetensors", tensors)
    with wearing(model, "lora", parts, 0.7, 0.7):
        theirs = painted(model)
    seen = bench.paint(path, prompt=f"{PROMPT}<lora:style:0.7>", beside={file: "Lora"})
    assert not seen.result.warnings
    same("LoRA, SDXL", seen.latents[0], theirs)


def test_a_lora_for_sd2_has_one_text_encoder(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    model, path = checkpoints["SD 2.x"]
    names = [
        f"{BLOCK}.transformer_blocks.0.attn2.to_k",
        "text_encoder_2.encoder.layers.1.self_attn.k_proj",
    ]
    tensors, parts = tiny.network(layers_of(model, names), tiny.lora, kohya)
    file = tiny.save(tmp_path / "style.safetensors", tensors)
    with wearing(model, "lora", parts):
        theirs = painted(model)
    seen = bench.paint(path, prompt=f"<lora:style:1>{PROMPT}", beside={file: "Lora"})
    same("LoRA, SD 2.x", seen.latents[0], theirs)


# On and off


def two_styles(model: Tiny, folder: Path) -> tuple[list[Path], list[dict[str, Parts]]]:
    files, parts = [], []
    for number, make in enumerate((tiny.lora, lambda w, seed: tiny.lora(w, seed + 50, rank=2))):
        tensors, some = tiny.network(layers_of(model, LINEAR), make, kohya)
        halved = {key: tensor.half() for key, tensor in tensors.items()}
        files.append(tiny.save(folder / f"style{number}.safetensors", halved))
        parts.append({k: {p: t.half().float() for p, t in v.items()} for k, v in some.items()})
    return files, parts


def test_networks_add_up_and_come_off_again(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    """Weights are then what they were, bit for bit, and so are pictures without a network."""
    model, path = checkpoints["SD 1.x"]
    files, (one, other) = two_styles(model, tmp_path)
    styles = dict.fromkeys(files, "Lora")
    before = bench.paint(path)
    for _ in range(2):
        with wearing(model, "lora", one, 0.7, 0.7), wearing(model, "lora", other, 0.4, 0.4):
            theirs = painted(model)
        both = f"{PROMPT}<lora:style0:0.7><lora:style1:0.4>"
        same("LoRA, two of them", bench.paint(path, prompt=both, beside=styles).latents[0], theirs)
        with wearing(model, "lora", other, 1.2, 1.2):
            theirs = painted(model)
        second = f"{PROMPT}<lora:style1:1.2>"
        same("LoRA, the other", bench.paint(path, prompt=second, beside=styles).latents[0], theirs)
    assert torch.equal(bench.paint(path).latents[0], before.latents[0])
    for name, module in modules_of(load(bench, path)).items():
        for key, tensor in getattr(model, name).state_dict().items():
            assert torch.equal(module.state_dict()[key], tensor), key


def test_the_second_pass_has_its_own_networks(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    model, path = checkpoints["SD 1.x"]
    files, (one, other) = two_styles(model, tmp_path)
    with wearing(model, "lora", one):
        first = painted(model)
    larger = torch.nn.functional.interpolate(first, (16, 16), mode="bilinear")
    drawn = by_hand.noise(height=16, width=16)
    with wearing(model, "lora", other):
        predict = by_hand.usually_guided(model)
        theirs = by_hand.run(model, predict, drawn, 10, picture=larger, last=4)
    seen = bench.paint(
        path,
        beside=dict.fromkeys(files, "Lora"),
        prompt=f"{PROMPT}<lora:style0:1>",
        hr_prompt=f"{PROMPT}<lora:style1:1>",
        enable_hr=True,
        hr_scale=2,
        denoising_strength=0.4,
    )
    same("LoRA, hires fix", seen.latents[-1], theirs)


LOW_RANK = {"attn1_to_q.lora_down.weight": (4, 16), "attn1_to_q.lora_up.weight": (16, 4)}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"attn1_to_q.lora_down.weight": (4, 16), "attn1_to_q.lora_up.weight": (8, 4)}, "size"),
        (
            {"attn1_to_q.lora_down.weight": (4, 768)},
            "is incomplete .* 1 of its tensors have no use",
        ),
        ({"attn1_to_q.lora_down.weight": (4, 4, 8), "attn1_to_q.lora_up.weight": (8, 4)}, "size"),
        (
            {
                "attn1_to_k.lora_down.weight": (4, 16),
                "attn1_to_k.lora_up.weight": (16, 4),
                "attn1_to_q.lora_down.weight": (4, 16),
                "attn1_to_q.lora_up.weight": (8, 4),
            },
            "attn1_to_q is of another size",
        ),
        (
            {"attn1_to_q.lokr_w1": (600, 600), "attn1_to_q.lokr_w2": (600, 600)},
            "attn1_to_q is of another size",
        ),
        (
            {
                "attn1_to_q.lora_down.weight": (1, 200_000),
                "attn1_to_q.lora_up.weight": (200_000, 1),
            },
            "attn1_to_q is of another size",
        ),
        ({"attn1_to_q.oft_blocks": (4, 4, 4)}, "of the form OFT"),
        ({**LOW_RANK, "attn1_to_q.dora_scale": (1, 17)}, "attn1_to_q is of another size"),
        (
            {
                **LOW_RANK,
                "attn1_to_q.dora_scale": (1, 16),
                "attn1_to_q.lora_magnitude_vector": (16,),
            },
            "2 of its tensors have no use",
        ),
        ({"attn1_to_q.dora_scale": (1, 16)}, "the dora_scale of .*attn1_to_q among them"),
        ({**LOW_RANK, "attn1_to_q.lora_B.bias": (16,)}, "the lora_B.bias of .*attn1_to_q among"),
        ({**LOW_RANK, "attn1_to_q.alpha": (2,)}, "the alpha of .*attn1_to_q is not one number"),
        ({**LOW_RANK, "attn1_to_q.lora_A.weight": (4, 16)}, "has the lora_down.weight of .* twice"),
        (
            {"attn2_to_k.lora_down.weight": (4, 2048), "attn2_to_k.lora_up.weight": (16, 4)},
            "is a LoRA for SDXL; sd-1.x.safetensors is",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_refused(
    bench: Bench,
    checkpoints: Checkpoints,
    tmp_path: Path,
    tensors: dict[str, tuple[int, ...]],
    reason: str,
) -> None:
    """And leaves the weights as they were."""
    _, path = checkpoints["SD 1.x"]
    before = bench.paint(path)
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
    given = {block + name: torch.ones(shape) for name, shape in tensors.items()}
    file = tiny.save(tmp_path / "style.safetensors", given)
    with pytest.raises(JobFailure, match=f"style.safetensors:? .*{reason}"):
        bench.paint(path, prompt=f"{PROMPT}<lora:style:1>", beside={file: "Lora"})
    assert torch.equal(bench.paint(path).latents[0], before.latents[0])


def test_what_nobody_understands_in_a_network_is_counted(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """What has no place in the checkpoint, too; the rest acts."""
    model, path = checkpoints["SD 1.x"]
    tensors, _ = tiny.network(layers_of(model, LINEAR), tiny.lora, kohya)
    elsewhere, _ = tiny.network(
        {"unet.down_blocks.7.proj_in": layers_of(model, LINEAR[:1])[LINEAR[0]]}, tiny.lora, kohya
    )
    strange = {"lora_prior_x.lora_down.weight": torch.ones(2, 2), "notes": torch.ones(1)}
    file = tiny.save(tmp_path / "style.safetensors", tensors)
    more = tiny.save(tmp_path / "more.safetensors", {**tensors, **elsewhere, **strange})
    bare = bench.paint(path, prompt=f"{PROMPT}<lora:style:1>", beside={file: "Lora"})
    seen = bench.paint(path, prompt=f"{PROMPT}<lora:more:1>", beside={more: "Lora"})
    assert torch.equal(seen.latents[0], bare.latents[0])
    assert seen.result.warnings == [
        "more.safetensors: 1 of its 10 parts have no place in sd-1.x.safetensors,"
        " unet:down_blocks_7_proj_in among them",
        f"more.safetensors: 2 of its {len(tensors) + 5} tensors have no part in what it makes here,"
        " lora_prior_x.lora_down.weight among them",
    ]


@pytest.mark.parametrize("form", ["lora", "loha", "full", "DoRA"])
def test_a_network_for_four_channels_fits_an_inpainting_checkpoint(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path, form: str
) -> None:
    """It leaves alone how the mask and the picture are seen."""
    model, path = checkpoints["SD 1.x inpainting"]
    first = model.unet.conv_in.weight[:, :4]
    make = {"DoRA": tiny.dora(tiny.lora, of="outputs"), "loha": tiny.loha, "full": tiny.full}
    parts = make.get(form, tiny.lora)(first, 3)
    file = tiny.save(
        tmp_path / "style.safetensors",
        {f"lora_unet_conv_in.{part}": tensor for part, tensor in parts.items()},
    )
    seen = bench.paint(path, prompt=f"{PROMPT}<lora:style:1>", beside={file: "Lora"})
    assert not seen.result.warnings
    changed = model.unet.conv_in.weight.clone()
    if form == "loha":
        one, two = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
        changed[:, :4] += 2 * (one * two).reshape(first.shape)
    elif form == "full":
        changed[:, :4] += parts["diff"]
    else:
        added = torch.einsum(
            "or,rikl->oikl", parts["lora_up.weight"][..., 0, 0], parts["lora_down.weight"]
        )
        changed[:, :4] += added / 2
    if form == "DoRA":
        changed *= parts["dora_scale"] / changed.flatten(1).norm(dim=1)[:, None, None, None]
    tensors = {**model.tensors(), f"{layouts.UNET}input_blocks.0.0.weight": changed}
    if form == "full":
        tensors[f"{layouts.UNET}input_blocks.0.0.bias"] = model.unet.conv_in.bias + parts["diff_b"]
    merged = model.save(tmp_path / "merged.safetensors", tensors)
    same(f"conv_in, inpainting, {form}", seen.latents[0], bench.paint(merged).latents[0])
    assert worst(seen.pixels[0], bench.paint(path).pixels[0]) > 1


# VAEs


def original(vae: Any, config: Any, path: Path) -> None:
    sources = layouts.vae_sources(config, "")
    tiny.save(path, layouts.to_original(vae.state_dict(), sources))


def of_diffusers(vae: Any, config: Any, path: Path) -> None:
    tiny.save(path, vae.state_dict())


def pickled(vae: Any, config: Any, path: Path) -> None:
    tensors = layouts.to_original(vae.state_dict(), layouts.vae_sources(config, ""))
    tensors |= {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.ones(())}
    torch.save({"state_dict": tensors, "epoch": 1}, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("other.safetensors", original),
        ("other.vae.safetensors", of_diffusers),
        ("other.vae.pt", pickled),
        ("misnamed.safetensors", pickled),
        ("misnamed.ckpt", original),
    ],
)
def test_another_vae_decodes_and_encodes(
    bench: Bench,
    checkpoints: Checkpoints,
    same: Same,
    tmp_path: Path,
    name: str,
    write: Callable[[Any, Any, Path], None],
) -> None:
    model, path = checkpoints["SD 1.x"]
    config = model.configs["vae"]
    other = Tiny(
        model.family, model.configs, model.unet, tiny.vae_of(config, 99), model.text_encoder
    )
    file = tmp_path / name
    write(other.vae, config, file)
    latents = by_hand.encode_picture(other, photo())
    predict = by_hand.usually_guided(model)
    theirs = by_hand.run(model, predict, by_hand.noise(), 10, picture=latents, last=6)
    body: dict[str, Any] = {
        "task_type": "img2img",
        "init_images": [base64_of(photo())],
        "steps": 10,
        "denoising_strength": 0.5,
    }
    seen = bench.paint(path, beside={file: "VAE"}, **body)
    same("another VAE", seen.latents[0], theirs)
    assert worst(seen.pixels[0], by_hand.decode(other, theirs)) <= 1
    own = bench.paint(path, beside={file: "VAE"}, override_settings={"sd_vae": "None"}, **body)
    assert torch.equal(own.latents[0], bench.paint(path, **body).latents[0])


# ControlNets


def unit(file: Path, picture: Image.Image | None = None, **more: Any) -> dict[str, Any]:
    image = {"image": base64_of(picture)} if picture else {}
    return {"model": file.stem, "module": "none", **image, **more}


def controlled(bench: Bench, path: Path, units: Mapping[Path, dict[str, Any]], **body: Any) -> Seen:
    scripts = {"controlnet": {"args": [*units.values()]}}
    files = dict.fromkeys(units, "ControlNet")
    return bench.paint(path, beside=files, alwayson_scripts=scripts, **body)


def saved(checkpoint: Tiny, path: Path, layout: str = "original", seed: int = 8) -> Any:
    model, config = tiny.controlnet(checkpoint, seed)
    tiny.save(path, tiny.controlnet_tensors(model, config, layout), config)
    return model


def hint_of(picture: Image.Image) -> Tensor:
    return (by_hand.tensor_of(picture) + 1) / 2


def by_hand_controlled(
    model: Tiny,
    nets: Sequence[tuple[Any, Tensor, Sequence[float]]],
    *,
    on_negative: bool = True,
    sizes: Sequence[float] = (64, 64, 0, 0, 64, 64),
    spread: Callable[[Tensor], Tensor] = lambda output: output,
) -> Predict:
    """`nets`: each with its hint, and how strongly each of its outputs acts."""
    texts = [by_hand.encode(model, text) for text in (PROMPT, NEGATIVE)]

    @torch.no_grad()
    def predict(x: Tensor, time: Any) -> Tensor:
        predictions = []
        for text, acts in zip(texts, (True, on_negative), strict=True):
            told: dict[str, Any] = {}
            if text.pooled is not None:
                ids = torch.tensor([list(sizes)], dtype=torch.float32)
                told["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": ids}
            more = dict(told)
            if acts and nets:
                sums: list[Any] = [0.0] * len(nets[0][2])
                for net, hint, scales in nets:
                    seen = x[:, :4]
                    down, middle = net(
                        seen, time, text.context, controlnet_cond=hint, return_dict=False, **told
                    )
                    outputs = zip(sums, (*down, middle), scales, strict=True)
                    sums = [total + scale * spread(output) for total, output, scale in outputs]
                more["down_block_additional_residuals"] = tuple(sums[:-1])
                more["mid_block_additional_residual"] = sums[-1]
            predictions.append(model.unet(x, time, text.context, return_dict=False, **more)[0])
        yes, no = predictions
        guided: Tensor = no + USUAL["cfg_scale"] * (yes - no)
        return guided

    return predict


OUTPUTS = {"SD 1.x": 5, "SD 2.x v": 5, "SDXL": 7}
"""Of a tiny ControlNet: of `conv_in`, of each layer, of what makes smaller, and of the middle."""


@pytest.mark.parametrize("layout", ["original", "bare", "diffusers"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_controlnet_adds_to_the_blocks_of_the_unet(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path, kind: str, layout: str
) -> None:
    model, path = checkpoints[kind]
    file = tmp_path / "canny.safetensors"
    net = saved(model, file, layout)
    scales = [0.8] * OUTPUTS[kind]
    predict = by_hand_controlled(model, [(net, hint_of(photo()), scales)])
    theirs = by_hand.run(model, predict, by_hand.noise())
    seen = controlled(bench, path, {file: unit(file, photo(), weight=0.8)})
    same(f"ControlNet, {kind}", seen.latents[0], theirs)
    assert worst(seen.pixels[0], bench.paint(path).pixels[0]) > 5


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_original_layout_of_controlnets_is_the_one_that_diffusers_reads(
    checkpoints: Checkpoints, kind: str
) -> None:
    model, config = tiny.controlnet(checkpoints[kind][0])
    tensors = tiny.controlnet_tensors(model, config, "original")
    theirs = single_file_utils.convert_controlnet_checkpoint(
        dict(tensors), {"class_embed_type": None, **model.config}
    )
    for name, tensor in model.state_dict().items():
        if not name.startswith("add_embedding."):  # of SDXL, which their converter leaves out
            assert torch.equal(theirs[name], tensor), name


SOFT = [0.825 ** (12 - number) for number in range(13)]


def test_the_prompt_or_the_controlnet_can_be_more_important(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    """Both act more weakly on the outer blocks; what is more important than the prompt does not
    act on the negative one."""
    model, path = checkpoints["SD 1.x"]
    file = tmp_path / "canny.safetensors"
    net = saved(model, file)
    scales = [1.5 * scale for scale in SOFT[: OUTPUTS["SD 1.x"]]]
    nets = [(net, hint_of(photo()), scales)]
    for mode, names, on_negative in (
        (1, ("My prompt is more important", "1"), True),
        (2, ("ControlNet is more important", 2), False),
    ):
        predict = by_hand_controlled(model, nets, on_negative=on_negative)
        theirs = by_hand.run(model, predict, by_hand.noise())
        for name in names:
            one = unit(file, photo(), weight=1.5, control_mode=name)
            seen = controlled(bench, path, {file: one})
            same(f"ControlNet, mode {mode}", seen.latents[0], theirs)


@pytest.mark.parametrize(("start", "end", "acts"), [(0.25, 0.4, "0010"), (0, 0.1, "1100")])
def test_a_controlnet_acts_for_a_part_of_the_steps(
    bench: Bench,
    checkpoints: Checkpoints,
    same: Same,
    tmp_path: Path,
    start: float,
    end: float,
    acts: str,
) -> None:
    """The webui tells ControlNets of a step after it: the first two calls are both at 0."""
    model, path = checkpoints["SD 1.x"]
    file = tmp_path / "canny.safetensors"
    net = saved(model, file)
    with_it = by_hand_controlled(model, [(net, hint_of(photo()), [1.0] * OUTPUTS["SD 1.x"])])
    without = by_hand_controlled(model, [])
    predict = by_hand.in_turn([with_it if act == "1" else without for act in acts])
    theirs = by_hand.run(model, predict, by_hand.noise())
    one = unit(file, photo(), guidance_start=start, guidance_end=end)
    seen = controlled(bench, path, {file: one})
    same("ControlNet, start and end", seen.latents[0], theirs)


def test_controlnets_add_up(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    model, path = checkpoints["SD 1.x"]
    canny, depth = tmp_path / "canny.safetensors", tmp_path / "depth.safetensors"
    outputs = OUTPUTS["SD 1.x"]
    nets = [
        (saved(model, canny), hint_of(photo()), [0.8] * outputs),
        (saved(model, depth, seed=80), hint_of(photo(seed=5)), [0.5] * outputs),
    ]
    theirs = by_hand.run(model, by_hand_controlled(model, nets), by_hand.noise())
    units = {
        canny: unit(canny, photo(), weight=0.8),
        depth: unit(depth, photo(seed=5), weight=0.5),
    }
    same("ControlNet, two", controlled(bench, path, units).latents[0], theirs)


def test_a_controlnet_looks_at_the_picture_that_is_painted_over(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    """If it has none of its own."""
    model, path = checkpoints["SD 1.x"]
    file = tmp_path / "tile.safetensors"
    net = saved(model, file)
    nets = [(net, hint_of(photo()), [1.0] * OUTPUTS["SD 1.x"])]
    latents = by_hand.encode_picture(model, photo())
    predict = by_hand_controlled(model, nets)
    theirs = by_hand.run(model, predict, by_hand.noise(), 10, picture=latents, last=6)
    seen = controlled(
        bench,
        path,
        {file: unit(file)},
        task_type="img2img",
        init_images=[base64_of(photo())],
        steps=10,
        denoising_strength=0.5,
    )
    same("ControlNet, img2img", seen.latents[0], theirs)


def test_a_controlnet_acts_on_both_passes_of_hires_fix(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    """Each with a hint of its own size."""
    model, path = checkpoints["SDXL"]
    file = tmp_path / "canny.safetensors"
    net = saved(model, file)
    scales = [1.0] * OUTPUTS["SDXL"]
    large = photo(128, 128)
    # A hint is made smaller by averaging.
    small = Image.fromarray(
        np.asarray(large).reshape(64, 2, 64, 2, 3).mean((1, 3)).round().astype(np.uint8)
    )
    first = by_hand.run(
        model, by_hand_controlled(model, [(net, hint_of(small), scales)]), by_hand.noise()
    )
    larger = torch.nn.functional.interpolate(first, (16, 16), mode="bilinear")
    nets = [(net, hint_of(large), scales)]
    predict = by_hand_controlled(model, nets, sizes=(128, 128, 0, 0, 128, 128))
    drawn = by_hand.noise(height=16, width=16)
    theirs = by_hand.run(model, predict, drawn, 10, picture=larger, last=4)
    body: dict[str, Any] = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.4}
    seen = controlled(bench, path, {file: unit(file, large)}, **body)
    # Averages of four are rounded to 256 levels, halves up or down.
    same("ControlNet, hires fix", seen.latents[-1], theirs, within=0.02)


def test_a_controlnet_that_shuffles_knows_no_places(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    """What it says is averaged over the picture, and acts on the prompt alone."""
    model, path = checkpoints["SD 1.x"]
    file = tmp_path / "control_v11e_sd15_shuffle.safetensors"
    net = saved(model, file)
    library = bench.engine.library
    library.controlnet(library.open(file, "another name of it.safetensors"))

    def spread(output: Tensor) -> Tensor:
        return output.mean((2, 3), keepdim=True).expand_as(output)

    nets = [(net, hint_of(photo()), [1.0] * OUTPUTS["SD 1.x"])]
    predict = by_hand_controlled(model, nets, on_negative=False, spread=spread)
    theirs = by_hand.run(model, predict, by_hand.noise())
    seen = controlled(bench, path, {file: unit(file, photo())})
    same("ControlNet, shuffle", seen.latents[0], theirs)


def test_edges_act_more_weakly_on_the_second_pass(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    """The webui's extension does so for Canny: edges of a larger picture are finer."""
    model, path = checkpoints["SD 1.x"]
    file = tmp_path / "canny.safetensors"
    net = saved(model, file)
    flat = Image.new("RGB", (128, 128), "white")  # without an edge at any size
    outputs = OUTPUTS["SD 1.x"]
    strong, soft = [1.0] * outputs, SOFT[:outputs]
    nets = [(net, torch.zeros(1, 3, 64, 64), strong)]
    first = by_hand.run(model, by_hand_controlled(model, nets), by_hand.noise())
    larger = torch.nn.functional.interpolate(first, (16, 16), mode="bilinear")
    predict = by_hand_controlled(model, [(net, torch.zeros(1, 3, 128, 128), soft)])
    drawn = by_hand.noise(height=16, width=16)
    theirs = by_hand.run(model, predict, drawn, 10, picture=larger, last=4)
    body: dict[str, Any] = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.4}
    seen = controlled(bench, path, {file: unit(file, flat, module="canny")}, **body)
    same("ControlNet, hires fix, Canny", seen.latents[-1], theirs)


def test_a_controlnet_for_inpainting_is_told_what_is_masked(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    """Its hint is -1 there; also beside an inpainting model, of which it sees the latents alone."""
    for kind in ("SD 1.x", "SD 1.x inpainting"):
        model, path = checkpoints[kind]
        file = tmp_path / f"inpaint-{len(kind)}.safetensors"
        net = saved(model, file)
        mask = Image.new("L", (64, 64))
        mask.paste(255, (16, 16, 48, 40))
        hint = hint_of(photo())
        hint[..., 16:40, 16:48] = -1
        predict = by_hand_controlled(model, [(net, hint, [1.0] * OUTPUTS["SD 1.x"])])
        if kind == "SD 1.x inpainting":
            predict = seeing_nothing(model, predict)
        theirs = by_hand.run(model, predict, by_hand.noise())
        one = unit(file, photo(), module="inpaint_global_harmonious", mask=base64_of(mask))
        seen = controlled(bench, path, {file: one})
        same("ControlNet, inpaint", seen.latents[0], theirs)


def seeing_nothing(model: Tiny, predict: Predict) -> Predict:
    """For an inpainting model that paints everything."""
    grey = by_hand.encode_picture(model, torch.zeros(1, 3, 64, 64))
    beside = torch.cat([torch.ones(1, 1, 8, 8), grey], 1)
    return lambda x, time: predict(torch.cat([x, beside], 1), time)


def masked_box(box: tuple[int, int, int, int], side: int = 64) -> Image.Image:
    mask = Image.new("L", (side, side))
    mask.paste(255, box)
    return mask


def test_what_is_not_masked_can_be_put_back(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """By inpaint_only, over a seam of a few pixels; its network sees what inpaint's does."""
    _, path = checkpoints["SD 1.x"]
    file = tmp_path / "inpaint.safetensors"
    saved(checkpoints["SD 1.x"][0], file)
    asked = {"mask": base64_of(masked_box((16, 16, 48, 48)))}
    painted = controlled(bench, path, {file: unit(file, photo(), module="inpaint", **asked)})
    put_back = controlled(bench, path, {file: unit(file, photo(), module="inpaint_only", **asked)})
    assert torch.equal(put_back.latents[0], painted.latents[0])
    inside, outside = np.s_[16:48, 16:48], np.ones((64, 64), bool)
    outside[10:54, 10:54] = False
    before = np.asarray(photo(), np.int16)
    assert worst(put_back.pixels[0][inside], painted.pixels[0][inside]) == 0
    assert worst(put_back.pixels[0][outside], before[outside]) == 0
    assert worst(painted.pixels[0][outside], before[outside]) > 20
    with pytest.raises(JobFailure, match=r"args\[0\].mask: got none, inpaint_only needs one"):
        controlled(bench, path, {file: unit(file, photo(), module="inpaint_only")})


@pytest.mark.parametrize("module", ["recolor_luminance", "recolor_intensity"])
def test_a_recolored_picture_is_as_light_as_before(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path, module: str
) -> None:
    model, path = checkpoints["SD 1.x"]
    file = tmp_path / "recolor.safetensors"
    saved(model, file)
    grey = photo().convert("L").convert("RGB")
    seen = controlled(bench, path, {file: unit(file, grey, module=module, processor_res=64)})

    def light(pixels: Any) -> Any:
        shown = Image.fromarray(np.asarray(pixels, np.uint8))
        if module == "recolor_intensity":
            return np.asarray(shown.convert("HSV"), np.int16)[..., 2]
        levels = np.asarray(shown, np.float64) / 255  # sRGB to CIE lightness
        even = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
        y = even @ (0.2126, 0.7152, 0.0722)
        return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27) * 2.55

    shown, wanted = light(seen.pixels[0]), light(grey)
    # Colors that RGB does not have at that lightness come out lighter or darker.
    assert np.median(np.abs(shown - wanted)) <= 2
    assert np.ptp(seen.pixels[0], axis=2).max() > 20


def test_units_see_the_picture_and_the_mask_of_img2img(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model, path = checkpoints["SD 1.x"]
    file = tmp_path / "inpaint.safetensors"
    saved(model, file)
    mask = base64_of(masked_box((16, 16, 48, 48)))
    body: dict[str, Any] = {
        "task_type": "img2img",
        "init_images": [base64_of(photo())],
        "mask": mask,
        "mask_blur": 0,
        "inpaint_full_res": False,
        "denoising_strength": 0.6,
    }
    told = controlled(bench, path, {file: unit(file, photo(), module="inpaint", mask=mask)}, **body)
    for module in ("inpaint", "inpaint_only"):
        seen = controlled(bench, path, {file: unit(file, module=module)}, **body)
        assert torch.equal(seen.latents[0], told.latents[0])
        assert worst(seen.pixels[0], told.pixels[0]) == 0


@pytest.mark.parametrize("own", [True, False])
def test_units_see_only_what_is_rendered(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path, own: bool
) -> None:
    """Where only what is masked is painted, units are shown that part of the picture too."""
    model, path = checkpoints["SD 1.x"]
    file = tmp_path / "control.safetensors"
    net = saved(model, file)
    whole, box = photo(128, 128), (24, 32, 88, 96)
    shown = photo(128, 128, seed=1) if own else whole
    keep = torch.ones(1, 1, 8, 8)
    keep[..., 3:5, 2:6] = 0
    start = by_hand.encode_picture(model, whole.crop(box))
    predict = by_hand_controlled(
        model, [(net, hint_of(shown.crop(box)), [1.0] * OUTPUTS["SD 1.x"])]
    )

    def put_back(denoised: Tensor) -> Tensor:
        return start * keep + denoised * (1 - keep)

    drawn = by_hand.noise()
    theirs = by_hand.run(model, predict, drawn, 10, picture=start, last=6, after=put_back)
    seen = controlled(
        bench,
        path,
        {file: unit(file, shown if own else None)},
        task_type="img2img",
        init_images=[base64_of(whole)],
        mask=base64_of(masked_box((40, 56, 72, 72), 128)),
        mask_blur=0,
        inpainting_fill=1,
        inpaint_full_res=True,
        inpaint_full_res_padding=16,
        steps=10,
        denoising_strength=0.5,
    )
    same("ControlNet, only masked", seen.latents[0], put_back(theirs))


def test_a_controlnet_of_another_family_is_refused(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    _, path = checkpoints["SD 1.x"]
    file = tmp_path / "xl.safetensors"
    block = "control_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    hint = "control_model.input_hint_block.0.weight"
    tiny.save(file, {block: torch.zeros(640, 2048), hint: torch.zeros(16, 3, 3, 3)})
    with pytest.raises(JobFailure, match=r"xl.safetensors is a ControlNet for SDXL; the checkp"):
        controlled(bench, path, {file: unit(file, photo())})


def test_a_controlnet_that_is_asked_otherwise_than_the_unet_is_refused(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    _, path = checkpoints["SD 1.x"]
    saved(checkpoints["SDXL"][0], file := tmp_path / "other.safetensors")
    with pytest.raises(JobFailure, match=r"other.safetensors does not fit .*cross_attention_dim"):
        controlled(bench, path, {file: unit(file, photo())})


def test_a_controlnet_union_is_refused_as_such(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """It holds a whole ControlNet, which alone would do something else."""
    model, path = checkpoints["SDXL"]
    net, config = tiny.controlnet(model)
    union = {
        **tiny.controlnet_tensors(net, config, "diffusers"),
        "task_embedding": torch.zeros(6, 8),
        "control_add_embedding.linear_1.weight": torch.zeros(8, 8),
        "transformer_layes.0.attn.in_proj_weight": torch.zeros(24, 8),
    }
    file = tiny.save(tmp_path / "union.safetensors", union, config)
    with pytest.raises(JobFailure, match=r"union.safetensors is a ControlNet Union, which can't"):
        controlled(bench, path, {file: unit(file, photo())})


def test_a_controlnet_may_not_ask_for_the_impossible(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model, path = checkpoints["SD 1.x"]
    net, config = tiny.controlnet(model)
    file = tmp_path / "huge.safetensors"
    tensors = tiny.controlnet_tensors(net, config, "original")
    tiny.save(file, tensors, {**config, "layers_per_block": 10**9})
    with pytest.raises(JobFailure, match=r"<= 64 - at `\$.*layers_per_block`"):
        controlled(bench, path, {file: unit(file, photo())})
