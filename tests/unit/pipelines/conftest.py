"""Engines for all tests of the pipelines, and each tiny checkpoint made once."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.pipelines import tiny
from tests.unit.pipelines.bench import Bench, worst
from tests.unit.pipelines.easel import Easel
from tests.unit.pipelines.tiny import Tiny

ROUNDING = 5e-5
"""Both sides compute in float32, but sum up in another order: the engine asks for all texts in one
batch. Guidance multiplies what comes of that, and so does each step."""


@contextmanager
def at_once(seconds: float) -> Iterator[None]:
    """Asserts that what is done within takes no more processor time: far more than it needs, and
    far less than with the square of its length. What other tests left to collect has no part."""
    gc.disable()
    try:
        began = time.process_time()
        yield
        assert time.process_time() - began < seconds
    finally:
        gc.enable()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("bench"))


class Checkpoints:
    """Of each kind one, with its file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, tuple[Tiny, Path]] = {}

    def __getitem__(self, kind: str) -> tuple[Tiny, Path]:
        if kind not in self._made:
            model = tiny.CHECKPOINTS[kind]()
            path = self.folder / f"{kind.lower().replace(' ', '-')}.safetensors"
            self._made[kind] = model, model.save(path)
        return self._made[kind]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


class Same:
    """Asserts that the engine made what was computed without it, and notes how far it was off."""

    def __init__(self) -> None:
        self.noted: dict[str, float] = {}

    def __call__(
        self, what: str, ours: Tensor, theirs: Tensor, *, within: float = ROUNDING
    ) -> None:
        """`within`: the largest difference, in standard deviations of what it should be."""
        assert theirs.std() > 0
        off = worst(ours, theirs) / float(theirs.std())
        self.noted[what] = max(off, self.noted.get(what, 0.0))
        assert off <= within, what


@pytest.fixture(scope="session")
def same() -> Iterator[Same]:
    """With `-s` a table of the differences is printed at the end."""
    same = Same()
    yield same
    print("\n\nworst differences of latents, in their standard deviations")
    for what, off in same.noted.items():
        print(f"{what:<60} {off:.1e}")


@pytest.fixture(scope="session")
def easel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Easel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Easel(tmp_path_factory.mktemp("cache"))
