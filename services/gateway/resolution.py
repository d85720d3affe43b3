"""Models that a job's params name: found among what its owner may use, as the job is started.

What the job itself lists goes first: a name that means one of those needs nothing else.
"""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import msgspec
from msgspec.structs import replace

from services.gateway.auth import Person
from services.gateway.errors import ApiError
from services.gateway.views import Views
from shared.contracts.inference import UsedModel
from shared.contracts.models import Checkpoint, CheckpointFile
from shared.objects import StoredParams
from shared.webui import titles
from shared.webui.body_names import (
    EMBEDDING,
    MOST_NAMED,
    PAINTING,
    BodyNames,
    NamedModel,
    has_words,
    names_in,
    squeezed,
    words_of,
)
from shared.webui.settings import WebuiSettings
from shared.webui.titles import CHECKPOINT
from shared.weights.kinds import FACE_RESTORATION, embedding_fits

MOST_VALUES = 500_000
"""In params, a picture being one: while JSON is read, nobody else is served."""
MOST_MODELS = 200
"""That the params of a job may name."""
MOST_TOLD = 5
MOST_COMPARED = 2000
"""Names, for those that are close to one that is not found."""
_NOT_STORABLE = re.compile("[\0\ud800-\udfff]")


class FoundFile(msgspec.Struct, frozen=True):
    """A file of a checkpoint, by the names that `titles.find` asks for."""

    checkpoint: Checkpoint
    file: CheckpointFile
    name: str

    @property
    def sha256(self) -> str:
        return self.file.sha256

    @property
    def alias(self) -> str:
        return self.file.kind.alias if self.file.kind else ""

    def used(self, *, from_params: bool = False) -> UsedModel:
        return UsedModel(
            type=self.checkpoint.type,
            name=self.name,
            checkpoint_id=self.checkpoint.checkpoint_id,
            bucket=self.checkpoint.bucket,
            key=self.file.key,
            size=self.file.size,
            sha256=self.file.sha256,
            from_params=from_params,
        )


class NamedByParams(msgspec.Struct, frozen=True):
    """What goes with a StartJob, see there."""

    params_at: datetime | None = None
    models: list[UsedModel] = []
    checkpoints: list[Checkpoint] = []


def find_file(checkpoint: Checkpoint, name: str) -> FoundFile | None:
    """By its whole name, or the only one: it may have been renamed."""
    for file in checkpoint.files:
        if file.filename == name or len(checkpoint.files) == 1:
            return FoundFile(checkpoint, file, name)
    return None


async def resolve(
    task_type: str,
    params: StoredParams,
    listed: Sequence[FoundFile],
    owner: Person,
    views: Views,
    webui: WebuiSettings,
) -> NamedByParams:
    """What `params` name beside `listed`, the job's own models. Raises ApiError 404 for a name that
    the owner may use no file by, and 400 for pictures that nothing says a checkpoint of and for
    too many values or names."""
    named = await asyncio.to_thread(_read, task_type, params.body, webui)
    if named is None:
        return NamedByParams(params.written_at)
    _check_checkpoint(task_type, named, listed)
    wanted = await asyncio.to_thread(_not_listed, named.models, listed)
    if len(wanted) > MOST_MODELS:
        raise ApiError(400, f"params: they name {len(wanted)} models, allowed are {MOST_MODELS}")
    found = await _find(wanted, owner, views) if wanted else []
    found += await _find_embeddings(named.prompts, [*listed, *found], owner, views)
    models = [file.used(from_params=True) for file in found]
    checkpoints = {file.checkpoint.checkpoint_id: file.checkpoint for file in found}
    return NamedByParams(params.written_at, list(dict.fromkeys(models)), [*checkpoints.values()])


def _read(task_type: str, body: bytes, webui: WebuiSettings) -> BodyNames | None:
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > MOST_VALUES:
        raise ApiError(400, f"params: they have more than {MOST_VALUES} values")
    named = names_in(task_type, body, webui)
    if named and len(named.models) == MOST_NAMED:
        raise ApiError(
            400, f"params: they name {MOST_NAMED} models or more, allowed are {MOST_MODELS}"
        )
    return _storable(named) if named else None


def _not_listed(models: Iterable[NamedModel], listed: Iterable[FoundFile]) -> list[NamedModel]:
    by_type = _by_type(listed)
    return [
        one
        for one in models
        if not _meant(one, by_type.get(one.type, []))
        and not (one.by_default and one.type in by_type)
    ]


def _storable(named: BodyNames) -> BodyNames:
    """With another sign for each that JSON may have and Postgres or UTF-8 has not; no file has one
    in its name."""
    return replace(
        named,
        models=[replace(one, title=_NOT_STORABLE.sub("\ufffd", one.title)) for one in named.models],
        prompts=[_NOT_STORABLE.sub("\ufffd", prompt) for prompt in named.prompts],
    )


def _check_checkpoint(task_type: str, named: BodyNames, listed: Iterable[FoundFile]) -> None:
    if task_type not in PAINTING or named.has_checkpoint:
        return
    if not any(file.checkpoint.type == CHECKPOINT for file in listed):
        raise ApiError(
            400,
            f'models: {task_type} needs {{"{CHECKPOINT}": ["NAME"]}}, or a name in the params:'
            " override_settings.sd_model_checkpoint",
        )


async def _find(wanted: Sequence[NamedModel], owner: Person, views: Views) -> list[FoundFile]:
    keys = {key for one in wanted for key in titles.keys_of(one.type, one.title)}
    keys |= {hash_[:10] for one in wanted if (hash_ := titles.hash_in(one.type, one.title))}
    types = sorted({one.type for one in wanted})
    known = _by_type(_files_of(await views.list_checkpoints_by_key(types, sorted(keys), owner)))
    found, missing = [], []
    for one in wanted:
        file = _meant(one, known.get(one.type, []))
        if file:
            found.append(file)
        else:
            missing.append(one)
    if missing:
        told = [await _about_missing(one, owner, views) for one in missing[:MOST_TOLD]]
        raise ApiError(404, "; ".join(told))
    return found


def _meant(named: NamedModel, files: Sequence[FoundFile]) -> FoundFile | None:
    if named.type == FACE_RESTORATION:
        kind = named.title.lower()
        of_kind = (one for one in files if one.file.kind and one.file.kind.family.lower() == kind)
        return next(of_kind, None) or titles.find(named.type, named.title, files)
    return titles.find(named.type, named.title, files)


async def _about_missing(missing: NamedModel, owner: Person, views: Views) -> str:
    """With the names that are close, among those that the owner may use."""
    names = await views.list_checkpoint_names(missing.type, owner, MOST_COMPARED)
    by_stem = {titles.stem_of(name).lower(): name for name in names}
    title = missing.title[:100]
    stem = titles.stem_of(title).lower()
    close = await asyncio.to_thread(difflib.get_close_matches, stem, by_stem)
    hint = f"; close to it: {', '.join(by_stem[one] for one in close)}" if close else ""
    return f"{missing.field}: checkpoint with name {title}, type {missing.type} is not found{hint}"


async def _find_embeddings(
    prompts: Sequence[str], others: Sequence[FoundFile], owner: Person, views: Views
) -> list[FoundFile]:
    """One of each name that stands in a prompt and is not listed. Where the families of the job's
    checkpoints are known, it is for one of those: a word means an embedding only there."""
    text = await asyncio.to_thread(lambda: "\n".join(map(squeezed, prompts)))
    if not text:
        return []
    known = _files_of(await views.list_embeddings_in(text, owner))
    return await asyncio.to_thread(_embeddings_in, prompts, known, others) if known else []


def _embeddings_in(
    prompts: Sequence[str], known: Sequence[FoundFile], others: Sequence[FoundFile]
) -> list[FoundFile]:
    words = "\n".join(map(words_of, prompts))
    families = {
        file.file.kind.family if file.file.kind else ""
        for file in others
        if file.checkpoint.type == CHECKPOINT
    }
    taken = {
        titles.stem_of(file.name).lower() for file in others if file.checkpoint.type == EMBEDDING
    }
    found = []
    for file in known:
        stem = titles.stem_of(file.name).lower()
        widths = file.file.kind.widths if file.file.kind else []
        if stem in taken or not embedding_fits(widths, families):
            continue
        if has_words(words, stem):
            taken.add(stem)
            found.append(file)
    return found


def _files_of(checkpoints: Iterable[Checkpoint]) -> list[FoundFile]:
    return [
        FoundFile(checkpoint, file, file.filename)
        for checkpoint in checkpoints
        for file in checkpoint.files
    ]


def _by_type(files: Iterable[FoundFile]) -> Mapping[str, list[FoundFile]]:
    by_type: dict[str, list[FoundFile]] = {}
    for file in files:
        by_type.setdefault(file.checkpoint.type, []).append(file)
    return by_type
