"""Models that make a picture from a picture: upscalers, and those that restore faces."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from typing import Any

import torch

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.memory import is_out_of_memory
from services.inference.worker.pipelines.models.files import ModelFile
from shared.weights.kinds import FACE_RESTORATION, recognise

EXTRA_ARCHITECTURES = "spandrel_extra_arches"
"""A package with architectures whose licences are for non-commercial use, CodeFormer's among them.
It is used where somebody has installed it."""


def load_image_model(file: ModelFile, device: torch.device) -> Any:
    """spandrel's descriptor of a model of three channels, whatever it knows by its tensors. Raises
    JobFailure."""
    spandrel = import_spandrel()
    faces = recognise(file.header).type == FACE_RESTORATION
    kind = "model that restores faces" if faces else "upscaler"
    try:
        tensors = spandrel.canonicalize_state_dict(file.read())
        model = spandrel.ModelLoader(device).load_from_state_dict(tensors)
    except spandrel.UnsupportedModelError:
        raise JobFailure(f"{file.name} is no {kind} of a form that is known here") from None
    except Exception as error:
        # A file that has the right names may make the library stumble anywhere.
        if isinstance(error, JobFailure) or is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())
        said = re.sub(r"^Error\(s\) in loading state_dict for \w+: ", "", said)[:200]
        raise JobFailure(
            f"broken checkpoint: {file.name}: its tensors make up no {kind}: {said}"
        ) from error
    if not isinstance(model, spandrel.ImageModelDescriptor):
        raise JobFailure(f"{file.name} ({model.architecture.name}) needs more than a picture")
    if (model.input_channels, model.output_channels) != (3, 3):
        raise JobFailure(f"{file.name} is for pictures without colors")
    return model.eval()


def has_extra_architectures() -> bool:
    return importlib.util.find_spec(EXTRA_ARCHITECTURES) is not None


def import_spandrel() -> Any:
    """spandrel imports torchvision for two architectures that need it for nothing that is done
    here. Its wheels fit one build of torch each, so it is not installed: an empty one stands in."""
    if "spandrel" in sys.modules:
        return sys.modules["spandrel"]
    stand_ins = {}
    if importlib.util.find_spec("torchvision") is None:
        names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
        stand_ins = {name: types.ModuleType(name) for name in names}
        for name in ("InterpolationMode", "rotate", "normalize"):
            setattr(stand_ins[names[-1]], name, None)
    sys.modules |= stand_ins
    try:
        spandrel = importlib.import_module("spandrel")
        if has_extra_architectures():
            importlib.import_module(EXTRA_ARCHITECTURES).install(ignore_duplicates=True)
    finally:
        for name in stand_ins:
            del sys.modules[name]
    return spandrel
