"""All model files of a worker: opened, loaded when needed, kept while there is room."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor, nn

from services.inference.worker.hashes import Hashes
from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.memory import Memory, total_ram
from services.inference.worker.pipelines.models import components
from services.inference.worker.pipelines.models.checkpoints import Checkpoint, size_of_file
from services.inference.worker.pipelines.models.components import Place
from services.inference.worker.pipelines.models.embeddings import Embedding
from services.inference.worker.pipelines.models.files import ModelFile, identity_of
from services.inference.worker.pipelines.models.image_models import load_image_model
from services.inference.worker.pipelines.models.networks import NetworkFile
from services.inference.worker.pipelines.models.parts import Parts
from services.inference.worker.pipelines.models.shelf import Shelf
from services.inference.worker.pipelines.prompts.encoding import Encodings
from services.inference.worker.settings import EngineOptions
from shared.contracts.inference import RunJob
from shared.webui import titles
from shared.weights.kinds import alias_of

T = TypeVar("T")

_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")


class Library:
    """`on_device`: what computes, with its weights. `in_memory`: networks and embeddings, which are
    read from there when they are put on, and what onnxruntime runs. Without a GPU they are one.

    What is kept is known by the content of its file and by all else that it was loaded for, and has
    nothing of the file's name: that is another one for another job."""

    def __init__(self, place: Place, cache: Path, memory: Memory, options: EngineOptions) -> None:
        """`cache`: a folder for what is costly to find out again."""
        self.place = place
        self.hashes = Hashes(cache)
        self.encodings = Encodings()
        self.in_memory = Shelf(options.ram_bytes or total_ram() // 2, memory.release)
        self.on_device = self.in_memory
        if place.device.type == "cuda":
            self.on_device = Shelf(options.gpu_bytes or memory.total() // 2, memory.release)
        self._parts = Parts()
        self._headers: dict[tuple[object, ...], ModelFile] = {}
        self._names: dict[object, str] = {}

    def open(self, path: Path, name: str) -> ModelFile:
        """Its header alone. Raises JobFailure for what is no harmless, complete model file."""
        key = (name, *identity_of(path))
        if key not in self._headers:
            if len(self._headers) >= 256:
                self._headers.clear()
            self._headers[key] = ModelFile(path, name)
        return self._headers[key]

    def checkpoint(self, file: ModelFile) -> Checkpoint:
        return self._keep(
            self.on_device,
            "checkpoint",
            file,
            size_of_file(file, self.place),
            lambda: Checkpoint(file, self.place, self._parts),
            Checkpoint.tensors,
        )

    def vae(self, file: ModelFile, config: Mapping[str, Any]) -> Any:
        """`config`: that of the checkpoint it is used with."""

        def load() -> Any:
            with file.reading(self.place.device) as opened:
                tensors = components.Tracked(opened)
                vae = components.load_vae(file, tensors, config, self.place)
                vae.unused = tensors.unused()
            return self._parts.share(vae)

        size = size_of_file(file, self.place)
        kind = ("vae", msgspec.json.encode(config, order="deterministic"))
        return self._keep(self.on_device, kind, file, size, load, self._tensors_of)

    def controlnet(self, file: ModelFile) -> Any:
        return self._keep(
            self.on_device,
            ("controlnet", components.pools_conditions(file)),
            file,
            size_of_file(file, self.place),
            lambda: components.load_controlnet(file, self.place),
            self._tensors_of,
        )

    def network(self, file: ModelFile) -> NetworkFile:
        return self._keep(
            self.in_memory,
            "network",
            file,
            file.size,
            lambda: NetworkFile(file),
            NetworkFile.tensors,
        )

    def embedding(self, file: ModelFile) -> Embedding:
        return self._keep(
            self.in_memory,
            "embedding",
            file,
            file.size,
            lambda: Embedding(file.read(), file.name, file.identity()),
            Embedding.tensors,
        )

    def image_model(self, file: ModelFile) -> Any:
        """An upscaler, or what restores faces: a descriptor of spandrel's."""
        return self._keep(
            self.on_device,
            "image model",
            file,
            file.size,
            lambda: load_image_model(file, self.place.device),
            lambda loaded: loaded.model.parameters(),
        )

    def _keep(
        self,
        shelf: Shelf,
        kind: object,
        file: ModelFile,
        size: int,
        load: Callable[[], T],
        tensors: Callable[[T], Iterable[Tensor]],
    ) -> T:
        key = (kind, file.identity())
        thing = shelf.get(key, size, load, tensors)
        self._names[key] = file.name
        return thing

    @property
    def loaded(self) -> list[str]:
        """The names of the models that are kept."""
        shelves = self.on_device, self.in_memory
        self._names = {
            key: name for key, name in self._names.items() if any(key in shelf for shelf in shelves)
        }
        return sorted(set(self._names.values()))

    def forget(self) -> None:
        """Gives all memory back, after the device had not enough of it."""
        self.encodings.clear()
        self.on_device.clear()
        if self.in_memory is not self.on_device:
            self.in_memory.clear()

    def _tensors_of(self, model: nn.Module) -> list[Tensor]:
        return self._parts.tensors([model])


class Shelved(msgspec.Struct, frozen=True):
    """A model that a job names, and its file. `sha256`: as it was registered, or empty.
    `from_params`: only the params name it."""

    type: str
    name: str
    path: Path
    sha256: str
    library: Library
    from_params: bool = False

    @property
    def stem(self) -> str:
        return titles.stem_of(self.name)

    @property
    def alias(self) -> str:
        """Of a LoRA, as the webui reads it. A file that can't be opened has none."""
        try:
            header = self.library.open(self.path, self.name).header
        except JobFailure:
            return ""
        return alias_of(header)


class Models:
    """The models of one job, found by the names that people use for them."""

    def __init__(self, job: RunJob, files: Mapping[str, Path], library: Library) -> None:
        self.all = [
            Shelved(
                model.type,
                model.name,
                files[model.content],
                model.sha256,
                library,
                model.from_params,
            )
            for model in job.models
            if model.content in files
        ]
        self.used: list[Shelved] = []

    def of(self, type_: str) -> list[Shelved]:
        return [model for model in self.all if model.type == type_]

    def listed(self, type_: str) -> list[Shelved]:
        """Those that the job itself names: what its params name besides is nobody's default."""
        return [model for model in self.of(type_) if not model.from_params]

    def find(self, type_: str, title: str) -> Shelved | None:
        """See `shared.webui.titles`."""
        found = titles.find(type_, title, self.of(type_))
        return found and self.use(found)

    def get(self, type_: str, title: str, field: str) -> Shelved:
        """Raises JobFailure if the job names none like this."""
        found = self.find(type_, title)
        if found is None:
            known = ", ".join(model.name for model in self.of(type_)) or "none"
            raise JobFailure(
                f"{field}: {title[:60]} is no checkpoint of type {type_} that the job names;"
                f' it names {known}. Name it in models: {{"{type_}": ["{title[:60]}"]}}'
            )
        return found

    def use(self, model: Shelved) -> Shelved:
        """Notes that it has a part in the result."""
        if model not in self.used:
            self.used.append(model)
        return model


def receipt(models: Models, library: Library, **more: object) -> dict[str, Any]:
    """What it takes to make the same pictures again."""
    return {
        "weights": [
            {
                "type": model.type,
                "name": model.name,
                "bytes": model.path.stat().st_size,
                "sha256": library.hashes.sha256(model.path),
            }
            for model in models.used
        ],
        "libraries": _versions(),
        "device": describe(library.place),
        **more,
    }


@lru_cache(1)
def _versions() -> dict[str, str]:
    found = {}
    for name in ("darkroom", *_LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def describe(place: Place) -> dict[str, str]:
    """The device by name and the precision of the weights on it."""
    return {
        "name": name_of(place.device),
        "type": place.device.type,
        "precision": str(place.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()) if place.device.type == "cpu" else "",
        "host": os.uname().machine,
    }
