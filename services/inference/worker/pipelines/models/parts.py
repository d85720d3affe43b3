"""Parts of checkpoints that are equal lie in memory once: many checkpoints have the same VAE, and
text encoders that were not trained.

Each checkpoint keeps modules of its own, since networks put other tensors into them; it is the
tensors of its file that are shared. They are compared, not hashed: two parts that differ do so in
their first tensor, so that looking costs next to nothing, and a hash would have to read all of the
others' bytes, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Parts:
    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()

    def share(self, model: M) -> M:
        """The model, just loaded; if one that lives has the same tensors, with those."""
        own = {name: parameter.data for name, parameter in model.named_parameters()}
        for known in list(self._known.values()):
            if _are_equal(own, known):
                for name, parameter in model.named_parameters():
                    parameter.data = known[name]
                own = known
                break
        self._known[model] = own
        return model

    def tensors(self, models: Iterable[nn.Module]) -> list[Tensor]:
        """All that lies in memory for these: what they compute with, and what their files had."""
        return [
            tensor
            for model in models
            for tensor in (
                *(parameter.data for parameter in model.parameters()),
                *model.buffers(),
                *self._known.get(model, {}).values(),
            )
        ]


def _are_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    if some.keys() != others.keys() or any(
        (one.shape, one.dtype, one.device, one.stride())
        != (other.shape, other.dtype, other.device, other.stride())
        for one, other in ((some[name], others[name]) for name in some)
    ):
        return False
    return all(torch.equal(some[name], others[name]) for name in some)
