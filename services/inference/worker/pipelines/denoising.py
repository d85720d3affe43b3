"""One step of guidance as rows for a UNet, and the evaluation of rows, whoever they belong to.

A job never calls its UNet: it yields rows and is sent what the UNet says of them. So rows of
several jobs become one batch where their weights and shapes agree (`Evaluator`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from services.inference.worker.pipelines.compiling import CompiledUNets
from services.inference.worker.pipelines.memory import Memory, is_out_of_memory
from services.inference.worker.pipelines.models.checkpoints import Checkpoint, set_tiling
from services.inference.worker.pipelines.models.networks import Worn
from services.inference.worker.pipelines.prompts.encoding import Encoded
from services.inference.worker.pipelines.prompts.syntax import Phase, text_at
from services.inference.worker.pipelines.sampling.samplers import Sampling


class Net(msgspec.Struct, frozen=True, eq=False):
    """A UNet with what it wears. Two nets of one `key` are the same function."""

    checkpoint: Checkpoint
    worn: Sequence[Worn] = ()
    tiling: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        worn = tuple(one.key for one in self.worn)
        return (self.checkpoint.file.identity(), worn, self.tiling)

    def put_in_place(self) -> None:
        """Makes the weights what this net needs. Raises JobFailure for a network that does not
        fit."""
        self.checkpoint.wardrobe.wear(self.worn)
        if self.checkpoint.tiling != self.tiling:
            set_tiling(self.checkpoint.unet, self.tiling)
            self.checkpoint.tiling = self.tiling


class ControlRows(msgspec.Struct, frozen=True, eq=False):
    """`hint`: (rows, 3, height, width) of pictures. `scales`: (rows, 13 or so), how strongly each
    of the ControlNet's outputs acts."""

    model: Any
    hint: Tensor
    scales: Tensor


class Rows(msgspec.Struct, frozen=True, eq=False):
    """What a UNet is asked: each row is one picture under one prompt. `x`: (rows, channels, height,
    width). `time`: the training time. `context`: (rows, tokens, width). `pooled`, `sizes`: of SDXL
    and its refiner. `guidance`: the scale, for models that are told it."""

    net: Net
    x: Tensor
    times: list[float]
    context: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    guidance: list[float] | None = None
    controls: tuple[ControlRows, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Rows of one key can be one batch."""
        models = tuple(id(control.model) for control in self.controls)
        shapes = self.x.shape[1:], self.context.shape[1:], self.guidance is None
        return (self.net.key, *shapes, models)

    def __len__(self) -> int:
        return len(self.x)

    def part(self, start: int, end: int) -> Rows:
        cut = slice(start, end)
        return msgspec.structs.replace(
            self,
            x=self.x[cut],
            times=self.times[cut],
            context=self.context[cut],
            pooled=None if self.pooled is None else self.pooled[cut],
            sizes=None if self.sizes is None else self.sizes[cut],
            guidance=None if self.guidance is None else self.guidance[cut],
            controls=tuple(ControlRows(c.model, c.hint[cut], c.scales[cut]) for c in self.controls),
        )


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of one key as one batch."""
    first = parts[0]
    if len(parts) == 1:
        return first
    return msgspec.structs.replace(
        first,
        x=torch.cat([rows.x for rows in parts]),
        times=[time for rows in parts for time in rows.times],
        context=torch.cat([rows.context for rows in parts]),
        pooled=_cat([rows.pooled for rows in parts]),
        sizes=_cat([rows.sizes for rows in parts]),
        guidance=None
        if first.guidance is None
        else [scale for rows in parts for scale in rows.guidance or ()],
        controls=tuple(
            ControlRows(
                control.model,
                torch.cat([rows.controls[number].hint for rows in parts]),
                torch.cat([rows.controls[number].scales for rows in parts]),
            )
            for number, control in enumerate(first.controls)
        ),
    )


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if there else None


Asking = Generator[list[Rows], list[Tensor], Tensor]
"""Yields rows, several batches at a time; is sent what the UNet predicts for each."""


class Prompted(msgspec.Struct, frozen=True, eq=False):
    """A text that changes with the steps: what it is in each phase, and its encoding then."""

    phases: Sequence[Phase]
    encoded: Sequence[Encoded]
    weight: float = 1.0

    def at(self, call: int) -> Encoded:
        return self.encoded[text_at(self.phases, call)]


class Control(msgspec.Struct, frozen=True, eq=False):
    """One ControlNet of a job. `scales`: of each of its outputs. It acts from `start` to `end`, in
    shares of all steps that are done; on the negative prompt's rows only if `on_negative`."""

    model: Any
    hint: Tensor
    scales: Sequence[float]
    start: float = 0.0
    end: float = 1.0
    on_negative: bool = True


class Mask(msgspec.Struct, frozen=True, eq=False):
    """What is kept: `init` where `keep` is 1, (pictures, 4, height, width) each."""

    init: Tensor
    keep: Tensor

    def apply(self, latents: Tensor, scale: float = 1.0) -> Tensor:
        """`scale`: of `latents`, compared with `init`."""
        return self.init * (self.keep * scale) + latents * (1 - self.keep)


class Skips(msgspec.Struct, frozen=True):
    """Where the negative prompt is left out, by the webui's settings. `s_min_uncond`: below this
    level at every second call, or at every one if `s_min_uncond_all`. `skip_early_cond`: at the
    first calls, up to this share of all."""

    s_min_uncond: float = 0.0
    s_min_uncond_all: bool = False
    skip_early_cond: float = 0.0

    def at(self, call: int, calls: int, level: float) -> bool:
        if self.skip_early_cond and call / calls <= self.skip_early_cond:
            return True
        return (call % 2 == 1 or self.s_min_uncond_all) and level < self.s_min_uncond


NO_SKIPS = Skips()
WHOLE = 1e-4
"""Times that are so near below a whole number are that number."""


class Guidance:
    """Classifier-free guidance for the pictures of one batch of one job.

    `calls`: how often it is expected to be asked in all, `a_step` times each step. `sizes`: what
    SDXL is told of sizes, for the positive and the negative prompt. `beside`: what inpainting
    models see beside the latents, (pictures, 5, height, width). `skips`: where the negative prompt
    is left out. `filler`: what makes the shorter of the positive and the negative prompt as long as
    the other (an empty text). `then`: who takes over, from which share of the calls on (a refiner);
    of the training times, if `then_by_time`. `by_time`: of samplers that go through training times;
    the webui gives their levels as times, and puts the mask on before it asks the model.
    """

    def __init__(
        self,
        net: Net,
        positive: Sequence[Prompted],
        negative: Prompted,
        *,
        scale: float,
        calls: int,
        a_step: int = 1,
        sizes: tuple[Sequence[float], Sequence[float]] | None = None,
        beside: Tensor | None = None,
        mask: Mask | None = None,
        skips: Skips = NO_SKIPS,
        controls: Sequence[Control] = (),
        filler: Encoded | None = None,
        then: tuple[float, Guidance] | None = None,
        then_by_time: bool = False,
        by_time: bool = False,
    ) -> None:
        self.net = net
        self.calls_made = 0
        self.calls = calls
        self._a_step = a_step
        self._positive, self._negative, self._scale = positive, negative, scale
        self._sizes, self._beside, self._mask = sizes, beside, mask
        self._skips, self._controls, self._filler = skips, controls, filler
        self._then, self._then_by_time, self._taken_over = then, then_by_time, False
        self._by_time = by_time
        self._told = net.checkpoint.unet.config.get("time_cond_proj_dim") is not None

    def denoise(self, x: Tensor, sigma: float, time: float | None = None) -> Asking:
        """(pictures, 4, height, width): what the pictures would be if all noise went at once.
        `time`: what the model is told, if not the time of `sigma`."""
        if self._then and (self._taken_over or self._done(sigma, time) >= self._then[0]):
            self._taken_over = True
            refiner = self._then[1]
            refiner.calls_made = self.calls_made
            self.calls_made += 1
            return (yield from refiner.denoise(x, sigma, time))
        call = self.calls_made
        self.calls_made += 1
        schedule = self.net.checkpoint.schedule
        if time is None:
            time = schedule.time_of(sigma)
        scale_in = math.sqrt(1 + sigma**2)
        seen = x
        if self._mask and self._by_time:
            seen = self._mask.apply(x, scale_in)
        positive = [part.at(call) for part in self._positive]
        plain = len(positive) == 1 and self._positive[0].weight == 1
        skipped = self._skips.at(call, self.calls, time if self._by_time else sigma)
        scale = 1.0 if skipped or self._told else self._scale
        negative = None if plain and scale == 1 else self._negative.at(call)
        if skipped:
            negative = None
        batches = self._batches(seen / scale_in, time, positive, negative, call)
        answers = yield batches
        predictions = torch.split(torch.cat(answers), len(x))
        level = schedule.sigmas[int(time + WHOLE)] if self._by_time else sigma
        denoised = [_denoised(schedule.prediction_type, seen, sigma, p, level) for p in predictions]
        result = self._combined(denoised, negative is not None, scale)
        if self._mask and self._by_time:
            return result + (x - seen)  # so that the noise that was found is that of `seen`
        return self._mask.apply(result) if self._mask else result

    def _done(self, sigma: float, time: float | None) -> float:
        """The share that is done, of calls or of training times."""
        if not self._then_by_time:
            return self.calls_made / self.calls
        if time is None or not self._by_time:
            time = self.net.checkpoint.schedule.nearest_time(sigma)
        return (999 - int(time + WHOLE)) / 1000

    def _combined(self, denoised: Sequence[Tensor], guided: bool, scale: float) -> Tensor:
        weights = [part.weight for part in self._positive]
        base = denoised[-1] if guided else denoised[0]
        if not guided and len(weights) == 1:
            return base
        result = base
        for weight, one in zip(weights, denoised, strict=False):
            result = result + (one - base) * (weight * scale)
        return result

    def _batches(
        self,
        x: Tensor,
        time: float,
        positive: Sequence[Encoded],
        negative: Encoded | None,
        call: int,
    ) -> list[Rows]:
        """One batch, or one per length of text where lengths differ."""
        longest = max(len(one.context) for one in positive)
        conditions = [(_stretched(one, longest), True) for one in positive]
        if negative is not None:
            conditions.append((negative, False))
        if self._filler is not None:
            longest = max(len(one.context) for one, _ in conditions)
            conditions = [(_filled_up(one, longest, self._filler), p) for one, p in conditions]
        groups: list[list[tuple[Encoded, bool]]] = []
        for condition in conditions:
            if groups and len(groups[-1][0][0].context) == len(condition[0].context):
                groups[-1].append(condition)
            else:
                groups.append([condition])
        return [self._rows(x, time, group, call) for group in groups]

    def _rows(
        self, x: Tensor, time: float, conditions: Sequence[tuple[Encoded, bool]], call: int
    ) -> Rows:
        pictures, count = len(x), len(conditions)
        seen = x if self._beside is None else torch.cat([x, self._beside.to(x)], 1)
        pooled = sizes = None
        if conditions[0][0].pooled is not None:
            assert self._sizes
            vectors = [one.pooled for one, _ in conditions if one.pooled is not None]
            pooled = torch.stack(vectors).repeat_interleave(pictures, 0)
            told = [
                self._sizes[0] if is_positive else self._sizes[1] for _, is_positive in conditions
            ]
            sizes = torch.tensor(told, device=x.device).repeat_interleave(pictures, 0)
        return Rows(
            net=self.net,
            x=seen.repeat(count, 1, 1, 1),
            times=[time] * (pictures * count),
            context=torch.stack([one.context for one, _ in conditions]).repeat_interleave(
                pictures, 0
            ),
            pooled=pooled,
            sizes=sizes,
            guidance=[self._scale] * (pictures * count) if self._told else None,
            controls=self._control_rows(pictures, conditions, call, x),
        )

    def _control_rows(
        self, pictures: int, conditions: Sequence[tuple[Encoded, bool]], call: int, x: Tensor
    ) -> tuple[ControlRows, ...]:
        # The webui counts a step as done after its first call, and tells the next call of it.
        share = max(0, (call - 1) // self._a_step) * self._a_step / self.calls
        rows = []
        for control in self._controls:
            if not control.start <= share <= control.end:
                continue
            acts = [is_positive or control.on_negative for _, is_positive in conditions]
            scales = torch.tensor([[scale * on for scale in control.scales] for on in acts])
            count = pictures * len(conditions)
            hint = control.hint.expand(count, -1, -1, -1)
            if len(control.hint) == pictures:
                hint = control.hint.repeat(len(conditions), 1, 1, 1)
            scales = scales.repeat_interleave(pictures, 0).to(x.device)
            rows.append(ControlRows(control.model, hint, scales))
        return tuple(rows)


def _stretched(encoded: Encoded, length: int) -> Encoded:
    """With its last vector repeated, as the webui fills up the shorter ones of several prompts."""
    lacking = length - len(encoded.context)
    if lacking <= 0:
        return encoded
    more = encoded.context[-1:].expand(lacking, -1)
    return Encoded(torch.cat([encoded.context, more]), encoded.pooled)


def _filled_up(encoded: Encoded, length: int, filler: Encoded) -> Encoded:
    times = (length - len(encoded.context)) // len(filler.context)
    return Encoded(torch.cat([encoded.context, *[filler.context] * times]), encoded.pooled)


def _denoised(
    prediction_type: str, x: Tensor, sigma: float, prediction: Tensor, level: float
) -> Tensor:
    """`level`: that of the whole training time below. For samplers that go through training times,
    the webui takes that one in place of `sigma` to find the noise in what a v model predicts."""
    if prediction_type == "epsilon":
        return x - sigma * prediction
    if level == sigma:
        square = sigma**2 + 1
        return x / square - prediction * (sigma / math.sqrt(square))
    noise = (prediction + x * (level / math.sqrt(sigma**2 + 1))) / math.sqrt(level**2 + 1)
    return x - sigma * noise


def sample(sampling: Sampling, guidance: Guidance, on_denoised: Callable[[Tensor], None]) -> Asking:
    """Runs a sampler with its guidance. Returns the last latents."""
    query = next(sampling)
    while True:
        denoised = yield from guidance.denoise(*query)
        on_denoised(denoised)
        try:
            query = sampling.send(denoised)
        except StopIteration as end:
            latents: Tensor = end.value
            return latents


def together(runs: Sequence[Asking]) -> Asking:
    """Several runs side by side, each at its own pace: their rows go out together. Returns their
    latents as one batch."""
    asked: dict[int, list[Rows]] = {}
    ended: dict[int, Tensor] = {}

    def go_on(number: int, answers: list[Tensor] | None) -> None:
        try:
            run = runs[number]
            asked[number] = next(run) if answers is None else run.send(answers)
        except StopIteration as end:
            asked.pop(number, None)
            ended[number] = end.value

    for number in range(len(runs)):
        go_on(number, None)
    while asked:
        pending = dict(asked)
        answers = yield [rows for batches in pending.values() for rows in batches]
        for number, batches in pending.items():
            mine, answers = answers[: len(batches)], answers[len(batches) :]
            go_on(number, mine)
    return torch.cat([ended[number] for number in range(len(runs))])


class Evaluator:
    """Runs rows through their UNets, as many at once as memory allows.

    How many rows fit is measured: the memory that a batch of a shape took tells what a row takes.
    What does not fit all the same is tried again in halves.
    """

    def __init__(
        self, memory: Memory, most_rows: int, compiled: CompiledUNets | None = None
    ) -> None:
        self._memory = memory
        self._compiled = compiled
        self._most_rows = most_rows
        self._bounds: dict[tuple[object, ...], int] = {}

    def evaluate(self, batches: Sequence[Rows]) -> list[Tensor]:
        """What the UNet predicts for each of the batches, float32, in their order. Raises an error
        that `is_out_of_memory` if not even one row fits."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for number, rows in enumerate(batches):
            groups.setdefault(rows.key, []).append(number)
        answers: dict[int, Tensor] = {}
        for numbers in groups.values():
            whole = joined([batches[number] for number in numbers])
            lengths = [len(batches[number]) for number in numbers]
            answers |= zip(numbers, torch.split(self._run(whole), lengths), strict=True)
        return [answers[number] for number in range(len(batches))]

    def bound_of(self, rows: Rows) -> int:
        return self._bounds.get(_shape(rows), self._most_rows)

    def _run(self, rows: Rows) -> Tensor:
        rows.net.put_in_place()
        done: list[Tensor] = []
        start = 0
        while start < len(rows):
            part = rows.part(start, start + self.bound_of(rows))
            try:
                done.append(self._measured(part))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                self._bounds[_shape(rows)] = len(part) // 2
                self._memory.release()
                continue
            start += len(part)
        return torch.cat(done)

    def _measured(self, rows: Rows) -> Tensor:
        shape = _shape(rows)
        if shape in self._bounds:
            return predict(rows, self._compiled)
        prediction, taken = self._memory.measure(lambda: predict(rows, self._compiled))
        fits = self._memory.free() // max(1, taken // len(rows))
        self._bounds[shape] = max(1, min(self._most_rows, fits))
        return prediction


def _shape(rows: Rows) -> tuple[object, ...]:
    checkpoint = rows.net.checkpoint
    size = sum(checkpoint.unet.config.block_out_channels)
    return (checkpoint.family, size, rows.x.shape[1:], rows.context.shape[1], len(rows.controls))


@torch.no_grad()
def predict(rows: Rows, compiled: CompiledUNets | None = None) -> Tensor:
    """What the UNet says, float32. Its weights must be in place."""
    checkpoint = rows.net.checkpoint
    unet, dtype = checkpoint.unet, checkpoint.place.dtype
    x, context = rows.x.to(dtype), rows.context.to(dtype)
    times = torch.tensor(rows.times, device=x.device)
    more: dict[str, Any] = {}
    if rows.pooled is not None and rows.sizes is not None:
        more["added_cond_kwargs"] = {
            "text_embeds": rows.pooled.to(dtype),
            "time_ids": rows.sizes.to(dtype),
        }
    controls = dict(more)
    if rows.guidance is not None:
        width = unet.config.time_cond_proj_dim
        more["timestep_cond"] = _guidance_embedding(rows.guidance, width).to(x)
    if rows.controls:
        more |= _residuals(rows, x, times, context, controls)
    plain = not rows.controls and rows.guidance is None and not rows.net.tiling
    shape = compiled.find(unet, checkpoint.family, x, context) if compiled and plain else None
    if compiled and shape:
        added = more.get("added_cond_kwargs")
        return compiled.predict(shape, unet, x, times, context, added).float()
    prediction: Tensor = unet(x, times, context, return_dict=False, **more)[0]
    return prediction.float()


def _residuals(
    rows: Rows, x: Tensor, times: Tensor, context: Tensor, more: dict[str, Any]
) -> dict[str, Any]:
    """What the ControlNets add to the UNet's blocks, summed up."""
    sums: list[Tensor] = []
    for control in rows.controls:
        down, middle = control.model(
            x[:, :4],
            times,
            context,
            controlnet_cond=control.hint.to(x.dtype),
            return_dict=False,
            **more,
        )
        outputs = [*down, middle]
        scaled = [
            output * control.scales[:, number, None, None, None].to(output)
            for number, output in enumerate(outputs)
        ]
        sums = [a + b for a, b in zip(sums, scaled, strict=True)] if sums else scaled
    return {
        "down_block_additional_residuals": tuple(sums[:-1]),
        "mid_block_additional_residual": sums[-1],
    }


def _guidance_embedding(scales: Sequence[float], width: int) -> Tensor:
    """Sines and cosines of the guidance scale, as latent consistency models are told it."""
    half = width // 2
    rates = torch.exp(torch.arange(half) * -(math.log(10_000.0) / (half - 1)))
    angles = (torch.tensor(scales) - 1)[:, None] * 1000 * rates[None]
    embedding = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(embedding, (0, width % 2))
