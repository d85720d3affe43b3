"""Textual inversion: words of a prompt that stand for vectors instead of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.models.components import TextEncoder


class Embedding:
    """The vectors that a word stands for, for each text encoder that they fit. It does not know the
    word: that is the name of the file, which may have several or change."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str, identity: object) -> None:
        """`name`: of the file, for the reason. `identity`: equal for equal vectors. Raises
        JobFailure for what is no embedding."""
        self.identity = identity
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.ndim in (1, 2)}
        named = {name: tensors[name] for name in ("clip_l", "clip_g") if name in tensors}
        if not named and len(tensors) != 1:
            raise JobFailure(f"{name} is no textual inversion embedding")
        self._vectors = {
            name: tensor if tensor.ndim == 2 else tensor[None]
            for name, tensor in (named or tensors).items()
        }
        counts = {len(vectors) for vectors in self._vectors.values()}
        if len(counts) != 1 or not 1 <= (count := counts.pop()) <= 75:
            raise JobFailure(f"{name} has no 1 to 75 vectors for each text encoder")
        self.count = count

    def tensors(self) -> list[Tensor]:
        return list(self._vectors.values())

    def vectors_for(self, encoder: TextEncoder) -> Tensor | None:
        """(count, width), if there are some of this encoder's width."""
        found = self._vectors.get(encoder.name)
        if found is None and len(self._vectors) == 1:
            (found,) = self._vectors.values()
        return found if found is not None and found.shape[1] == encoder.width else None

    def check_fits(self, encoders: Sequence[TextEncoder], name: str, checkpoint: str) -> None:
        """Raises JobFailure if a text encoder of the checkpoint finds nothing in it. `name`,
        `checkpoint`: what the job calls the two."""
        for encoder in encoders:
            if self.vectors_for(encoder) is None:
                widths = ", ".join(str(v.shape[1]) for v in self._vectors.values())
                raise JobFailure(
                    f"{name} does not fit {checkpoint}: its vectors have {widths}"
                    f" numbers, the text encoder {encoder.name} takes {encoder.width}"
                )
