"""What a checkpoint is, what may be done with it, and what its files may be called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from datetime import datetime
from itertools import pairwise
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec.structs import replace

from shared.contracts.models import (
    CREATING,
    CheckpointFile,
    MultipartUpload,
    PartTag,
    UploadFile,
)
from shared.errors import Rejected
from shared.weights.kinds import Kind

CHECKPOINT_TYPES = (
    "Stable-diffusion",
    "Lora",
    "VAE",
    "embeddings",
    "ControlNet",
    "hypernetworks",
    "rembg",
    "Upscaler",
    "FaceRestoration",
)

INITIAL, ACTIVE, DISABLED, FAILED = "Initial", "Active", "Disabled", "Failed"

MAX_NAME_BYTES = 255
MAX_PARTS = 10_000
MIN_PART_BYTES = 5 * 1024**2
"""S3 puts no file together whose parts, other than the last, are smaller."""


class Unfit(Exception):
    """A file that can't be used, now or later. The text is for the user."""


class Harmful(Exception):
    """A file that would do harm when it is opened. The text is for the user."""


class UploadedPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part as the object store has it; `size` in bytes."""

    number: int
    etag: str
    size: int


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """`urls` is kept only until the files are there, and never told: a URL may hold a token."""

    checkpoint_id: str
    type: str
    names: list[str]
    status: str
    s3_location: str
    bucket: str
    files: list[CheckpointFile]
    creator: str
    created_at: datetime
    multipart_upload: dict[str, MultipartUpload] = {}
    urls: list[str] = []
    message: str = ""
    params: dict[str, msgspec.Raw] = {}
    allowed_roles_or_users: list[str] = []
    error: str | None = None
    version: int = 1
    deleted: bool = False

    def check_tags(self, tags: Mapping[str, Sequence[PartTag]]) -> None:
        """Raises Rejected unless this is being uploaded and `tags` speaks of each of its files."""
        if self.status != INITIAL:
            raise Rejected(
                "models.not_uploading", checkpoint_id=self.checkpoint_id, status=self.status
            )
        for filename in tags:
            if filename not in self.multipart_upload:
                raise Rejected(
                    "models.unknown_file",
                    filename=filename,
                    checkpoint_id=self.checkpoint_id,
                    known=", ".join(self.multipart_upload),
                )
        for filename in self.multipart_upload:
            if filename not in tags:
                raise Rejected("models.missing_file", filename=filename)

    def complete(self, files: list[CheckpointFile]) -> Checkpoint:
        """All is uploaded; it is looked at next."""
        return replace(self, status=CREATING, files=files, version=self.version + 1)

    def activate(self, files: list[CheckpointFile]) -> Checkpoint:
        return replace(
            self,
            status=ACTIVE,
            names=[file.filename for file in files],
            files=files,
            urls=[],
            version=self.version + 1,
        )

    def refuse(self, files: list[CheckpointFile], error: str) -> Checkpoint:
        """For good: it stays there to be looked at, and can only be deleted."""
        return replace(self.activate(files), status=DISABLED, error=error)

    def fail(self, error: str) -> Checkpoint:
        """The URLs stay, so that it can be tried again."""
        return replace(self, status=FAILED, error=error, files=[], version=self.version + 1)

    def retry(self) -> Checkpoint:
        if self.status != FAILED:
            detail = f"it is {self.status}; only a Failed one can be"
            raise Rejected("models.not_retriable", checkpoint_id=self.checkpoint_id, detail=detail)
        if not self.urls:
            detail = "it was uploaded; upload it once more as a new one"
            raise Rejected("models.not_retriable", checkpoint_id=self.checkpoint_id, detail=detail)
        return replace(
            self,
            status=CREATING,
            names=likely_names(self.urls),
            error=None,
            version=self.version + 1,
        )

    def rename(self, name: str) -> Checkpoint:
        """The bytes stay under the key that they have."""
        self._check_complete()
        if len(self.files) != 1:
            raise Rejected(
                "models.not_renamable", checkpoint_id=self.checkpoint_id, count=len(self.files)
            )
        return replace(
            self,
            names=[check_filename(name, field="name")],
            files=[replace(self.files[0], filename=name)],
            version=self.version + 1,
        )

    def switch(self, status: str) -> Checkpoint:
        self._check_complete()
        if status not in (ACTIVE, DISABLED):
            raise Rejected("models.invalid", field="status", detail=f"it is {ACTIVE} or {DISABLED}")
        if self.error and status == ACTIVE:
            raise Rejected("models.refused", checkpoint_id=self.checkpoint_id, reason=self.error)
        return replace(self, status=status, version=self.version + 1)

    def delete(self, reason: str | None = None) -> Checkpoint:
        return replace(
            self, deleted=True, urls=[], error=reason or self.error, version=self.version + 1
        )

    def _check_complete(self) -> None:
        if self.status not in (ACTIVE, DISABLED):
            raise Rejected(
                "models.not_complete", checkpoint_id=self.checkpoint_id, status=self.status
            )


def check_type(checkpoint_type: str) -> str:
    if checkpoint_type not in CHECKPOINT_TYPES:
        known = ", ".join(CHECKPOINT_TYPES)
        raise Rejected("models.invalid", field="checkpoint_type", detail=f"it is one of {known}")
    return checkpoint_type


def check_id(checkpoint_id: str) -> str:
    """The id is part of the keys in the object store: it must never reach into another's."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", checkpoint_id):
        detail = "it has 1 to 64 letters, digits, - and _"
        raise Rejected("models.invalid", field="checkpoint_id", detail=detail)
    return checkpoint_id


def find_fault(filename: str) -> str | None:
    """What is wrong with a file name, None if nothing is. No name may lead out of its folder."""
    if not filename.strip(". "):
        return "it is empty or only dots"
    if filename != filename.strip():
        return "it begins or ends with a space"
    if "/" in filename or "\\" in filename:
        return "it holds a path; give the bare file name"
    if not filename.isprintable():
        return "it holds characters that can't be printed"
    if len(filename.encode()) > MAX_NAME_BYTES:
        return f"it is longer than {MAX_NAME_BYTES} bytes"
    return None


def check_filename(filename: str, *, field: str) -> str:
    fault = find_fault(filename)
    if fault:
        raise Rejected("models.invalid", field=field, detail=f"{filename[:80]!r}: {fault}")
    return filename


def check_uploads(filenames: Sequence[UploadFile]) -> None:
    seen = set()
    for file in filenames:
        check_filename(file.filename, field="filenames")
        if file.filename in seen:
            raise Rejected("models.invalid", field="filenames", detail=f"{file.filename} twice")
        if not 1 <= file.parts_number <= MAX_PARTS:
            detail = f"{file.filename}: parts_number is 1 to {MAX_PARTS}"
            raise Rejected("models.invalid", field="filenames", detail=detail)
        seen.add(file.filename)


def check_urls(urls: Sequence[str], schemes: Set[str]) -> None:
    for url in urls:
        try:
            parts = urlsplit(url)
            fits = parts.scheme in schemes and bool(parts.hostname)
            parts.port  # noqa: B018  raises for what is no port
        except ValueError:
            fits = False
        if not fits:
            detail = (
                f"each begins with {' or '.join(f'{s}://' for s in sorted(schemes))} and a host"
            )
            raise Rejected("models.invalid", field="urls", detail=detail)
    if len(set(urls)) != len(urls):
        raise Rejected("models.invalid", field="urls", detail="one is there twice")


def filename_of(path: str) -> str:
    """The file name that a URL's path ends with; empty if it has none that may be used."""
    name = unquote(path.rsplit("/", 1)[-1])
    return "" if find_fault(name) else name


def likely_names(urls: Sequence[str]) -> list[str]:
    """What the files behind the URLs are probably called. The servers have the last word: of
    `…/download?id=7` nothing can be said before."""
    names = [filename_of(urlsplit(url).path) for url in urls]
    return [name for name in names if re.search(r"\.[A-Za-z][A-Za-z0-9]{1,15}$", name)]


def check_parts(
    filename: str, expected: int, tags: Sequence[PartTag], uploaded: Sequence[UploadedPart]
) -> list[PartTag]:
    """The tags that the file is put together from: those of parts without a byte are dropped, since
    clients that cut a file into more parts than it fills upload such.

    Raises Rejected, naming the part, unless `tags` are exactly the parts that were uploaded."""

    def mismatch(detail: str) -> Rejected:
        return Rejected("models.part_mismatch", filename=filename, detail=detail)

    for before, after in pairwise(tag.PartNumber for tag in tags):
        if after == before:
            raise mismatch(f"part {after} is listed twice")
        if after < before:
            raise mismatch(f"part {after} is listed after part {before}")
    there = {part.number: part for part in uploaded}
    empty = {part.number for part in uploaded if part.size == 0}
    for tag in tags:
        part = there.pop(tag.PartNumber, None)
        if part is None:
            raise mismatch(f"part {tag.PartNumber} was never uploaded")
        if tag.ETag.strip('"') != part.etag.strip('"'):
            given = tag.ETag[:80]
            raise mismatch(f"part {part.number} was uploaded with ETag {part.etag}, not {given}")
    for number in there.keys() - empty:
        raise mismatch(f"part {number} was uploaded but is not listed")
    listed = {tag.PartNumber for tag in tags} | empty
    for number in range(1, expected + 1):
        if number not in listed:
            raise mismatch(f"part {number} of {expected} is missing")
    full = [part for part in uploaded if part.size]
    if not full:
        raise mismatch("none of them has a byte")
    for part in full[:-1]:
        if part.size < MIN_PART_BYTES:
            needed = f"every part but the last needs {MIN_PART_BYTES}"
            raise mismatch(f"part {part.number} has {part.size} bytes; {needed}")
    return [tag for tag in tags if tag.PartNumber not in empty]


# What files are.

_KNOWN_BY_CONTENT = (
    "Stable-diffusion",
    "Lora",
    "VAE",
    "embeddings",
    "ControlNet",
    "FaceRestoration",
)
"""Types of which every file tells by its tensors that it is one."""


def find_mismatch(declared: str, kind: Kind) -> str | None:
    """What a file is that was declared as something else; None if it may be what it is said to."""
    if kind.type == declared or (not kind.type and declared not in _KNOWN_BY_CONTENT):
        return None
    found = f"{kind.title} (type {kind.type})" if kind.type else kind.title
    return f"it was declared as {declared} and is {found}"
