"""Jobs side by side: as if each had run alone, in a fair order, and none at another's cost."""

from __future__ import annotations

import gc
import io
import json
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from deploy.local.demo import CHECKPOINT
from services.inference.worker.pipelines import JobFailure, Listener, Result, denoising
from services.inference.worker.pipelines import engine as engine_module
from services.inference.worker.pipelines.compiling import CompiledUNets, Shape, parse_shapes
from services.inference.worker.pipelines.denoising import Evaluator, Rows
from services.inference.worker.pipelines.engine import Engine
from services.inference.worker.pipelines.memory import Memory
from services.inference.worker.pipelines.painting import PaintingPlan
from services.inference.worker.settings import EngineOptions
from shared.contracts.inference import RunJob
from shared.weights.kinds import SD1
from tests.weights import files_of, used

NAME = CHECKPOINT.name


class Record(Listener):
    """Everything that an engine says, in order."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []
        self.results: dict[str, Result] = {}
        self.reasons: dict[str, str] = {}

    def begun(self, job_id: str) -> None:
        self.said.append(("begun", job_id))

    def step(self, job_id: str, step: int, steps: int) -> None:
        self.said.append(("step", job_id, step, steps))

    def preview(self, job_id: str, media_type: str, picture: bytes) -> None:
        self.said.append(("preview", job_id, media_type, picture))

    def done(self, job_id: str, result: Result) -> None:
        self.said.append(("done", job_id))
        self.results[job_id] = result

    def unfit(self, job_id: str, reason: str) -> None:
        self.said.append(("unfit", job_id))
        self.reasons[job_id] = reason

    def gone(self, job_id: str) -> None:
        self.said.append(("gone", job_id))

    def order(self, what: str) -> list[str]:
        return [said[1] for said in self.said if said[0] == what]

    @property
    def ended(self) -> set[str]:
        return {said[1] for said in self.said if said[0] in ("done", "unfit", "gone")}


class Bench:
    """An engine, and short ways to ask it for things."""

    def __init__(self, cache: Path, **options: Any) -> None:
        self.record = Record()
        self.engine = Engine("cpu", cache, self.record, EngineOptions(**options))

    def submit(self, job_id: str, *, alone: bool = False, may_go: bool = True, **body: Any) -> None:
        job = RunJob(
            job_id=job_id,
            endpoint_id="endpoint",
            task_type="txt2img",
            models=[used(CHECKPOINT)],
            bucket="",
            params_key="",
            result_prefix="",
        )
        asked = {"prompt": "a red heart", "steps": 3, "width": 64, "height": 64, "seed": 7, **body}
        self.engine.submit(
            job, json.dumps(asked).encode(), files_of(job), alone=alone, may_go=may_go
        )

    def finish(self, *job_ids: str, rounds: int = 500) -> None:
        for _ in range(rounds):
            if self.record.ended >= set(job_ids):
                return
            if self.engine.idle:
                time.sleep(0.01)  # something goes on beside
            self.engine.advance()
        raise AssertionError(f"not ended: {set(job_ids) - self.record.ended}")

    def pixels(self, job_id: str) -> np.ndarray[Any, np.dtype[np.int16]]:
        packed = self.record.results[job_id].images[0].data
        return np.asarray(Image.open(io.BytesIO(packed)), dtype=np.int16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield tmp_path_factory.mktemp("cache")


@pytest.fixture
def bench(cache: Path) -> Bench:
    return Bench(cache, preview_seconds=0)


Predict = Callable[..., torch.Tensor]


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of a UNet."""
    sizes: list[int] = []
    real = denoising.predict

    def counted(rows: Rows, *more: Any) -> torch.Tensor:
        sizes.append(len(rows))
        return real(rows, *more)

    monkeypatch.setattr(denoising, "predict", counted)
    return sizes


DIFFERENT: dict[str, dict[str, Any]] = {
    "plain": {},
    "more steps": {"steps": 6, "seed": 1},
    "another sampler": {"sampler_name": "Heun", "steps": 4, "cfg_scale": 3},
    "ancestral": {"sampler_name": "Euler a", "steps": 5, "negative_prompt": "blue"},
    "two pictures": {"batch_size": 2, "sampler_name": "DPM++ 2M SDE Karras"},
    "at its own pace": {"sampler_name": "DPM adaptive"},
    "changing": {"prompt": "a [red:blue:2] [heart|ring] AND a ball :0.5"},
    "without guidance": {"cfg_scale": 1},
}


def test_jobs_side_by_side_are_as_if_each_had_run_alone(bench: Bench, predict: list[int]) -> None:
    """Up to rounding in the last digit: larger batches are computed in another order."""
    for name, body in DIFFERENT.items():
        bench.submit(f"alone {name}", **body)
        bench.finish(f"alone {name}")
    alone, predict[:] = len(predict), []
    for name, body in DIFFERENT.items():
        bench.submit(name, **body)
    bench.finish(*DIFFERENT)
    assert predict[0] == 18, "two rows of each, three for AND, four for two pictures, one without"
    assert len(predict) < alone
    for name in DIFFERENT:
        difference = abs(bench.pixels(name) - bench.pixels(f"alone {name}"))
        # DPM adaptive chooses its steps by its error: rounding decides where they are.
        assert difference.max() <= (16 if name == "at its own pace" else 1), name


def test_a_batch_that_does_not_fit_is_tried_again_in_halves(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.submit("alone")
    bench.finish("alone")
    sizes: list[int] = []
    real = denoising.predict

    def small_memory(rows: Rows, *more: Any) -> torch.Tensor:
        sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(rows, *more)

    monkeypatch.setattr(denoising, "predict", small_memory)
    for name in "abcd":
        bench.submit(name)
    bench.finish(*"abcd")
    assert sizes[:3] == [8, 4, 2]
    assert max(sizes[3:]) == 2, "it is remembered"
    assert abs(bench.pixels("d") - bench.pixels("alone")).max() <= 1


def test_what_fits_at_once_follows_from_the_memory_that_a_batch_takes() -> None:
    class Measured(Memory):
        """A device of 1000 bytes, of which a row takes 100."""

        def __init__(self) -> None: ...

        def measure(self, work: Callable[[], Any]) -> tuple[Any, int]:
            result = work()
            return result, 100 * len(result)

        def free(self) -> int:
            return 1000

    def of(count: int) -> Rows:
        return Rows(None, torch.zeros(count, 4, 8, 8), [1.0] * count, torch.zeros(count, 77, 8))  # type: ignore[arg-type]

    seen: list[int] = []

    def predict(rows: Rows, *_: Any) -> torch.Tensor:
        seen.append(len(rows))
        return rows.x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising, "predict", predict)
        patch.setattr(denoising, "_shape", lambda rows: "shape")
        patch.setattr(Rows, "key", "key")
        evaluator = Evaluator(Measured(), 64)
        patch.setattr(denoising.Net, "put_in_place", lambda self: None)
        net = denoising.Net(None)  # type: ignore[arg-type]
        evaluator.evaluate([msgspec.structs.replace(of(4), net=net)])
        answers = evaluator.evaluate([msgspec.structs.replace(of(25), net=net)])
    assert seen == [4, 10, 10, 5]
    assert len(answers[0]) == 25


def test_a_job_too_large_for_the_device_fails_and_the_next_one_runs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def no_memory(rows: Rows, *_: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(denoising, "predict", no_memory)
        bench.submit("large")
        bench.finish("large")
    assert bench.record.reasons["large"].startswith("not enough memory on cpu; try a smaller")
    bench.submit("next")
    bench.finish("next")
    assert "next" in bench.record.results


def test_a_job_that_can_not_be_done_does_not_harm_those_beside_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose network turns out not to fit when its weights are put in place."""
    real = Evaluator.evaluate

    def evaluate(self: Evaluator, batches: list[Rows]) -> list[torch.Tensor]:
        if any(rows.times[0] > 999.5 or len(rows) == 6 for rows in batches):
            raise JobFailure("it does not fit")
        return real(self, batches)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    bench.submit("good")
    bench.submit("bad", batch_size=3)
    bench.submit("also good", seed=8)
    bench.finish("good", "bad", "also good")
    assert bench.record.reasons == {"bad": "it does not fit"}
    assert set(bench.record.results) == {"good", "also good"}


def test_what_nobody_has_thought_of_ends_the_job_that_brought_it_and_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its plan, in its own code, and in the batch that it shares."""
    real = denoising.predict

    def predict(rows: Rows, *more: Any) -> torch.Tensor:
        if len(rows) >= 6:
            raise RuntimeError("sizes of tensors must match")
        return real(rows, *more)

    monkeypatch.setattr(denoising, "predict", predict)
    bench.submit("good", steps=6)
    bench.engine.advance()
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "PaintingPlan", lambda *_: 1 // 0)
        bench.submit("not planned")
    with monkeypatch.context() as patch:
        patch.setattr(PaintingPlan, "work", lambda *_: (1 // 0 for _ in "a"))
        bench.submit("stumbles")
        bench.engine.advance()
    bench.submit("bad rows", batch_size=3)
    bench.finish("good", "bad rows")
    stumble = "its params or models made the engine stumble: "
    assert bench.record.reasons == {
        "not planned": f"{stumble}ZeroDivisionError",
        "stumbles": f"{stumble}ZeroDivisionError",
        "bad rows": f"{stumble}RuntimeError",
    }
    assert "good" in bench.record.results


def test_a_broken_device_ends_the_engine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(*_: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(denoising, "predict", predict)
    bench.submit("job")
    with pytest.raises(RuntimeError, match="device-side assert"):
        bench.finish("job")


def test_nobody_is_looked_at_beside_a_job_that_is_to_run_alone(bench: Bench) -> None:
    """Whose own plan is made once it has begun: if the look at it is death, that is an attempt."""
    bench.submit("suspect", alone=True, may_go=False, steps=0)
    bench.engine.advance()
    bench.submit("wrong", steps=0)
    bench.engine.advance()
    assert bench.record.said == [("begun", "suspect")]
    bench.engine.go("suspect")
    bench.engine.advance()
    bench.engine.advance()
    assert [said[1] for said in bench.record.said] == ["suspect", "suspect", "wrong"]
    assert set(bench.record.reasons) == {"suspect", "wrong"}


def test_who_waits_longest_is_next_and_nobody_overtakes(bench: Bench) -> None:
    """a, then b and c of another size; d and e fit to a, but e came when b was waiting already."""
    bench.submit("a", steps=6, may_go=False)
    bench.submit("b", width=128, may_go=False)
    bench.submit("c", width=128, may_go=False)
    bench.submit("d", may_go=False)
    bench.engine.advance()
    assert bench.record.order("begun") == ["a", "d"], "d was there when a began"
    bench.submit("e", may_go=False)
    while not bench.record.ended >= set("abcde"):
        for begun in bench.record.order("begun"):
            bench.engine.go(begun)
        bench.engine.advance()
    assert bench.record.order("begun") == ["a", "d", "b", "c", "e"]


def test_who_fits_joins_while_nobody_else_waits(bench: Bench) -> None:
    bench.submit("first", steps=30)
    for _ in range(5):
        bench.engine.advance()
    bench.submit("joins")
    bench.finish("joins")
    assert "first" not in bench.record.ended
    bench.finish("first")


def test_a_job_that_is_to_run_alone_has_nobody_beside_it(bench: Bench) -> None:
    bench.submit("a", may_go=False)
    bench.submit("suspect", alone=True, may_go=False)
    bench.submit("b", may_go=False)
    bench.engine.advance()
    assert bench.record.order("begun") == ["a", "b"]
    for job_id in ("a", "b"):
        bench.engine.go(job_id)
    bench.finish("a", "b")
    bench.engine.advance()
    bench.submit("c", may_go=False)
    bench.engine.advance()
    assert bench.record.order("begun") == ["a", "b", "suspect"]
    bench.engine.go("suspect")
    bench.finish("suspect")


def test_a_job_begins_when_it_may(bench: Bench) -> None:
    bench.submit("job", may_go=False)
    for _ in range(3):
        bench.engine.advance()
    assert bench.record.said == [("begun", "job")]
    waiting = bench.engine.idle
    bench.engine.go("job")
    assert (waiting, bench.engine.idle) == (True, False)
    bench.finish("job")


def test_a_cancelled_job_ends_within_a_step_and_leaves_nothing_behind(bench: Bench) -> None:
    bench.submit("long", steps=100)
    bench.submit("other", steps=6)
    for _ in range(3):
        bench.engine.advance()
    (job,) = [job for job in bench.engine._running if job.job_id == "long"]
    assert isinstance(job.asked, list)
    latents = weakref.ref(job.asked[0].x)
    del job
    bench.engine.cancel("long")
    assert ("gone", "long") in bench.record.said
    gc.collect()
    assert latents() is None, "its tensors are free"
    steps = len(bench.record.order("step"))
    bench.finish("other")
    assert "long" not in bench.record.order("step")[steps:]


def test_only_what_waits_can_be_recalled(bench: Bench) -> None:
    bench.submit("runs", steps=4)
    bench.submit("waits", width=128)
    bench.engine.advance()
    bench.engine.recall("runs")
    bench.engine.recall("waits")
    assert bench.record.order("gone") == ["waits"]
    bench.finish("runs")
    assert "runs" in bench.record.results


def test_params_are_refused_before_the_job_has_a_turn(bench: Bench) -> None:
    bench.submit("running", steps=20)
    bench.engine.advance()
    bench.submit("wrong", steps=0)
    assert bench.record.reasons["wrong"].startswith("steps: got 0")
    bench.engine.cancel("running")


def test_a_text_is_encoded_once(bench: Bench) -> None:
    bench.submit("first")
    bench.finish("first")
    file = bench.engine.library.open(CHECKPOINT, NAME)
    (encoder,) = bench.engine.library.checkpoint(file).text_encoders
    calls: list[int] = []
    hook = encoder.model.register_forward_hook(lambda *_: calls.append(1))
    bench.submit("again", seed=8, negative_prompt="a text that is new")
    bench.finish("again")
    hook.remove()
    assert len(calls) == 1


def test_progress_and_previews_come_while_a_job_runs(cache: Path) -> None:
    bench = Bench(cache, preview_seconds=0.001)
    bench.submit("job", steps=4, n_iter=2)
    bench.finish("job")
    steps = [said[2:] for said in bench.record.said if said[0] == "step"]
    assert steps == [(number, 8) for number in range(1, 9)]
    previews = [said for said in bench.record.said if said[0] == "preview"]
    assert 1 <= len(previews) <= 8
    assert previews[0][2] == "image/jpeg"
    assert Image.open(io.BytesIO(previews[0][3])).size == (8, 8)


def test_pictures_are_finished_beside_the_steps_of_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where decoding has a stream of its own."""
    monkeypatch.setattr(engine_module, "_on_own_stream", lambda work, device: work)
    with ThreadPoolExecutor(2) as pool:
        bench.engine._aside = pool
        bench.submit("short", steps=2)
        bench.submit("long", steps=40)
        bench.finish("short")
        assert "long" not in bench.record.ended
        bench.finish("long")
    assert bench.pixels("short").shape == (64, 64, 3)


# --- compiling ahead ------------------------------------------------------------------------------


def test_shapes_to_compile_are_read(cache: Path) -> None:
    shapes = parse_shapes("sd1:512x512:16 sdxl:1024x1024:2")
    assert shapes == [Shape("SDXL", 1024, 1024, 2), Shape("SD 1.x", 512, 512, 16)]
    for wrong in ("sd9:512x512:2", "sd1:512:2", "sd1:500x512:2", "sd1:512x512:0"):
        with pytest.raises(ValueError, match=wrong):
            parse_shapes(wrong)


def test_what_is_compiled_gives_the_same(bench: Bench) -> None:
    """For any number of rows up to the compiled one, and for every checkpoint of the family."""
    file = bench.engine.library.open(CHECKPOINT, NAME)
    checkpoint = bench.engine.library.checkpoint(file)
    configs = {SD1: checkpoint.configs}
    shapes = parse_shapes("sd1:64x64:4")
    compiled = CompiledUNets(shapes, bench.engine.library.place, configs, backend="eager")
    compiled.warm_up()
    width = checkpoint.unet.config.cross_attention_dim
    x, context = torch.randn(3, 4, 8, 8), torch.randn(3, 77, width)
    shape = compiled.find(checkpoint.unet, SD1, x, context)
    assert shape == shapes[0]
    times = torch.tensor([500.0] * 3)
    with torch.no_grad():
        plain = checkpoint.unet(x, times, context, return_dict=False)[0]
    ours = compiled.predict(shape, checkpoint.unet, x, times, context, None)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert compiled.find(checkpoint.unet, SD1, torch.randn(5, 4, 8, 8), context) is None
    assert compiled.find(checkpoint.unet, SD1, x, torch.randn(3, 154, width)) is None
