"""What is loaded: kept by its use under a budget, in memory once, and given up when there is too
little."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from deploy.local.demo import CHECKPOINT
from services.inference.worker.pipelines import JobFailure, denoising
from services.inference.worker.pipelines.library import Library
from services.inference.worker.pipelines.memory import Memory, total_ram
from services.inference.worker.pipelines.models import components
from services.inference.worker.pipelines.models.components import Place
from services.inference.worker.pipelines.models.shelf import Shelf
from services.inference.worker.pipelines.painting import Painting
from services.inference.worker.settings import EngineOptions
from tests.bench.switching import resident_after_switches
from tests.unit.pipelines import small
from tests.unit.pipelines.bench import Bench


class Thing:
    """Something that takes memory."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors


def bytes_of(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.uint8)


class Loads:
    """Loads things of 100 bytes onto a shelf, and knows which."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.loaded: list[str] = []

    def get(self, name: str) -> Thing:
        def load() -> Thing:
            self.loaded.append(name)
            return Thing(bytes_of(100))

        return self.shelf.get(name, 100, load, lambda thing: thing.tensors)


@pytest.fixture
def released() -> list[str]:
    return []


@pytest.fixture
def loads(released: list[str]) -> Loads:
    return Loads(Shelf(300, lambda: released.append("released")))


def test_what_was_used_longest_ago_makes_room(loads: Loads, released: list[str]) -> None:
    for name in "abcab":
        loads.get(name)
    assert (loads.loaded, loads.shelf.size, released) == (["a", "b", "c"], 300, [])
    loads.get("d")
    assert (loads.shelf.size, released) == (300, ["released"])
    for name in "abd":
        loads.get(name)
    assert loads.loaded == ["a", "b", "c", "d"], "c has gone, and nothing else"


def test_what_a_job_uses_is_found_again_however_little_room_there_is(loads: Loads) -> None:
    """And counted, though giving it up would give nothing back."""
    used = [loads.get("a"), loads.get("b")]
    for name in "cdef":
        loads.get(name)
    assert loads.shelf.size == 300
    assert [loads.get("a"), loads.get("b")] == used
    used += [loads.get("g"), loads.get("h")]
    assert loads.shelf.size == 400, "the jobs that run need so much"
    loads.shelf.clear()
    assert (loads.get("a"), loads.shelf.size) == (used[0], 400), "it is not there twice"
    used.clear()
    loads.get("i")
    assert loads.shelf.size <= 300
    assert loads.loaded == list("abcdefghi")


def test_tensors_that_several_things_have_count_once() -> None:
    shelf, common = Shelf(250), bytes_of(100)
    kept = [
        shelf.get(n, 150, lambda: Thing(common, bytes_of(50)), lambda thing: thing.tensors)
        for n in range(3)
    ]
    assert (shelf.size, len(kept)) == (250, 3)


def test_what_can_not_be_loaded_leaves_no_trace(loads: Loads) -> None:
    def fail() -> Thing:
        raise JobFailure("broken")

    with pytest.raises(JobFailure):
        loads.shelf.get("a", 100, fail)
    assert loads.shelf.size == 0
    loads.get("a")


def test_each_kind_of_memory_has_its_own_budget(tmp_path: Path) -> None:
    class Gpu(Memory):
        def total(self) -> int:
            return 80

    def of(device: str, options: EngineOptions) -> Library:
        where = torch.device(device)
        return Library(Place(where, torch.float16), tmp_path, Gpu(where), options)

    told = EngineOptions(ram_bytes=1000, gpu_bytes=2000)
    library = of("cuda", told)
    assert (library.in_memory.budget, library.on_device.budget) == (1000, 2000)
    library = of("cuda", EngineOptions())
    assert (library.in_memory.budget, library.on_device.budget) == (total_ram() // 2, 40)
    library = of("cpu", told)
    assert library.in_memory is library.on_device
    assert library.in_memory.budget == 1000


# --- real checkpoints -----------------------------------------------------------------------------


def write_variant(path: Path, seed: int) -> Path:
    """The demo checkpoint with another UNet."""
    generator = torch.Generator().manual_seed(seed)
    with safe_open(CHECKPOINT, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name, tensor in tensors.items():
        if name.startswith("model.diffusion_model."):
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = (tensor + noise * 0.01).to(tensor.dtype)
    save_file(tensors, path, metadata)
    return path


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("variants")
    return [write_variant(folder / f"variant-{seed}.safetensors", seed) for seed in range(4)]


@pytest.fixture
def own_bench(tmp_path: Path) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path)


def places(*models: nn.Module) -> set[int]:
    return {parameter.data_ptr() for model in models for parameter in model.parameters()}


def test_parts_that_checkpoints_have_in_common_are_in_memory_once(
    own_bench: Bench, variants: list[Path]
) -> None:
    library = own_bench.engine.library
    one, other = (library.checkpoint(library.open(path, path.name)) for path in variants[:2])
    assert places(one.vae) == places(other.vae)
    assert places(one.text_encoders[0].model) == places(other.text_encoders[0].model)
    assert not places(one.unet) & places(other.unet)
    once = components.size_of(one.unet, other.unet, one.vae, one.text_encoders[0].model)
    assert once <= library.on_device.size <= 1.001 * once, "with some buffers"


def test_a_network_on_one_checkpoint_does_not_show_on_another_with_the_same_text_encoder(
    own_bench: Bench, variants: list[Path], tmp_path: Path
) -> None:
    first, second, *_ = variants
    lora = small.write_lora(tmp_path / "style.safetensors", strength=0.5)
    wearing: dict[str, Any] = {"prompt": "a red ball <lora:style:1>", "beside": {lora: "Lora"}}
    plain = own_bench.paint(second)
    worn = own_bench.paint(first, **wearing)
    assert torch.equal(own_bench.paint(second).latents[0], plain.latents[0])
    own_bench.engine.library.encodings.clear()
    assert torch.equal(own_bench.paint(second).latents[0], plain.latents[0])
    assert torch.equal(own_bench.paint(first, **wearing).latents[0], worn.latents[0])
    assert not torch.equal(own_bench.paint(first).latents[0], worn.latents[0])


def test_weights_that_a_network_has_changed_count_as_well(
    own_bench: Bench, variants: list[Path], tmp_path: Path
) -> None:
    lora = small.write_lora(tmp_path / "style.safetensors")
    shelf = own_bench.engine.library.on_device
    own_bench.paint(variants[0])
    before = shelf.size
    own_bench.paint(variants[0], prompt="a ball <lora:style:1>", beside={lora: "Lora"})
    changed = 4 * (48 * 192 + 96 * 96)
    assert shelf.size == before + changed + sum(t.nbytes for t in tensors_in(lora))
    own_bench.paint(variants[0])
    assert shelf.size == before + sum(t.nbytes for t in tensors_in(lora))


def tensors_in(path: Path) -> list[torch.Tensor]:
    with safe_open(path, "pt") as file:
        return [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118


def test_a_checkpoint_that_is_given_up_is_gone(own_bench: Bench, variants: list[Path]) -> None:
    """Its modules are in no circle that waits for a collection."""
    library = own_bench.engine.library
    checkpoint = library.checkpoint(library.open(variants[0], "a"))
    parts = (checkpoint.unet, checkpoint.vae, checkpoint.text_encoders[0].model)
    seen = [weakref.ref(one) for one in parts]
    del checkpoint, parts
    gc.collect()
    gc.disable()
    try:
        library.on_device.clear()
        assert [one() for one in seen] == [None] * 3
        assert library.on_device.size == 0
    finally:
        gc.enable()


# --- too little memory ----------------------------------------------------------------------------


Load = Callable[..., Any]


def short_of_memory(load: Load, times: int) -> tuple[Load, list[str]]:
    """`load`, failing for the first so many times; and what happened."""
    happened: list[str] = []

    def short(*args: Any, **more: Any) -> Any:
        if len(happened) < times:
            happened.append("short")
            raise torch.OutOfMemoryError("CUDA out of memory")
        happened.append("loaded")
        return load(*args, **more)

    return short, happened


@pytest.mark.parametrize("where", ["load_unet", "load_vae", "load_text_encoders"])
def test_a_load_that_finds_too_little_memory_is_tried_again_with_all_of_it(
    own_bench: Bench, variants: list[Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    alone = own_bench.paint(variants[1])
    own_bench.engine.library.forget()
    own_bench.paint(variants[0])
    shelf = own_bench.engine.library.on_device
    load, happened = short_of_memory(getattr(components, where), 1)
    monkeypatch.setattr(components, where, load)
    seen = own_bench.paint(variants[1])
    assert happened == ["short", "loaded"]
    assert torch.equal(seen.latents[0], alone.latents[0])
    assert [key for key in shelf._kept if "variant-0" in str(key)] == [], "it made room"


def test_a_load_that_never_finds_enough_memory_fails_its_job_and_no_other(
    own_bench: Bench, variants: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        load, happened = short_of_memory(components.load_unet, 99)
        patch.setattr(components, "load_unet", load)
        with pytest.raises(JobFailure, match="not enough memory on cpu"):
            own_bench.paint(variants[0])
        assert happened == ["short", "short"]
    own_bench.paint(variants[0])


@pytest.mark.parametrize("times", [1, 99])
def test_decoding_that_finds_too_little_memory_is_tried_again_once(
    own_bench: Bench, variants: list[Path], monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    alone = own_bench.paint(variants[0])
    decode, happened = short_of_memory(Painting._decode, times)
    monkeypatch.setattr(Painting, "_decode", lambda self, latents: decode(self, latents))
    if times == 1:
        again = own_bench.paint(variants[0])
        assert again.pixels[0].tolist() == alone.pixels[0].tolist()
        assert happened == ["short", "loaded"]
    else:
        with pytest.raises(JobFailure, match="not enough memory"):
            own_bench.paint(variants[0])
        assert happened == ["short", "short"]


def test_steps_that_find_too_little_memory_are_tried_again_once_models_have_made_room(
    own_bench: Bench, variants: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_bench.paint(variants[1])
    shelf, real = own_bench.engine.library.on_device, denoising.predict
    kept: list[int] = []

    def predict(*args: Any) -> torch.Tensor:
        kept.append(len(shelf._kept))
        if shelf._kept:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(denoising, "predict", predict)
    own_bench.paint(variants[0])
    assert kept[0] == 2
    assert set(kept[-4:]) == {0}


@pytest.mark.timeout(400)
def test_memory_does_not_grow_with_switches_between_checkpoints(variants: list[Path]) -> None:
    """Nor with the holes that tensors of many sizes leave in the heap. There is room for one of
    four."""
    size = variants[0].stat().st_size
    resident = resident_after_switches(variants, switches=32, ram_bytes=int(2.5 * size))
    first_round, end = resident[len(variants) - 1], resident[-1]
    assert end < 1.1 * first_round
