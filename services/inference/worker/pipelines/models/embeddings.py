"""Textual inversion: words of a prompt that stand for vectors instead of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.models.components import TextEncoder
from services.inference.worker.pipelines.models.files import ModelFile


class Embedding:
    """The vectors that a word stands for, for each text encoder that they fit.

    Raises JobFailure for a file that is no embedding."""

    def __init__(self, file: ModelFile) -> None:
        self.file = file
        tensors = {name: tensor for name, tensor in file.read().items() if tensor.ndim in (1, 2)}
        named = {name: tensors[name] for name in ("clip_l", "clip_g") if name in tensors}
        if not named and len(tensors) != 1:
            raise JobFailure(f"{file.name} is no textual inversion embedding")
        self._vectors = {
            name: tensor if tensor.ndim == 2 else tensor[None]
            for name, tensor in (named or tensors).items()
        }
        counts = {len(vectors) for vectors in self._vectors.values()}
        if len(counts) != 1 or not 1 <= (count := counts.pop()) <= 75:
            raise JobFailure(f"{file.name} has no 1 to 75 vectors for each text encoder")
        self.count = count

    def tensors(self) -> list[Tensor]:
        return list(self._vectors.values())

    @property
    def word(self) -> str:
        return self.file.stem

    def vectors_for(self, encoder: TextEncoder) -> Tensor | None:
        """(count, width), if there are some of this encoder's width."""
        found = self._vectors.get(encoder.name)
        if found is None and len(self._vectors) == 1:
            (found,) = self._vectors.values()
        return found if found is not None and found.shape[1] == encoder.width else None

    def check_fits(self, encoders: Sequence[TextEncoder], checkpoint: str) -> None:
        """Raises JobFailure if a text encoder of the checkpoint finds nothing in it."""
        for encoder in encoders:
            if self.vectors_for(encoder) is None:
                widths = ", ".join(str(v.shape[1]) for v in self._vectors.values())
                raise JobFailure(
                    f"{self.file.name} does not fit {checkpoint}: its vectors have {widths}"
                    f" numbers, the text encoder {encoder.name} takes {encoder.width}"
                )
