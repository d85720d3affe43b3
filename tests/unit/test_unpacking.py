"""Archives that strangers upload in place of a model file."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable

import pytest

from services.models import unpacking
from services.models.domain import Unfit
from shared.contracts.models import CheckpointFile
from tests.weights import weights

MODEL = b"the bytes of a model"


def plain(name: str, body: bytes = MODEL) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    return info, body


def special(name: str, kind: bytes, to: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info, b""


def packed(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as archive:
        for info, body in members:
            archive.addfile(info, io.BytesIO(body))
    return target.getvalue()


def members_of(archive: bytes) -> list[unpacking.Member]:
    file = CheckpointFile(filename="x.safetensors", key="a/b/x.safetensors", size=len(archive))
    return unpacking._list_members(io.BytesIO(archive), file)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_models_are_found_whatever_their_folder(form: int) -> None:
    archive = packed(
        special("models", tarfile.DIRTYPE),
        plain("models/Stable-diffusion/ä.safetensors", b"first" * 200),
        plain("models/Stable-diffusion/ä.yaml"),
        plain("./" + "long/" * 18 + "second.CKPT", b"2"),
        form=form,
    )
    found = members_of(archive)
    assert [member.filename for member in found] == ["ä.safetensors", "second.CKPT"]
    texts = [archive[member.offset : member.offset + member.size] for member in found]
    assert texts == [b"first" * 200, b"2"]


def test_what_is_no_archive_is_left_alone() -> None:
    assert members_of(weights("Lora")) == []
    assert members_of(b"") == []
    assert members_of(b"ustar" * 200) == []


def test_an_archive_without_its_end_is_whole_if_its_files_are() -> None:
    archive = packed(plain("a.pt", b"x" * 512))
    assert members_of(archive[:1536])[0].size == 512


def with_long_header(kind: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 2**20
    return info.tobuf() + b"1" * info.size + packed(plain("a.pt"))


NEGATIVE = tarfile.TarInfo("a.pt")
NEGATIVE.size = -1024


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: packed(plain("/etc/x.pt")), "a path that leads out of it: '/etc/x.pt'"),
        (lambda: packed(plain("a/../../x.pt")), "a path that leads out of it"),
        (lambda: packed(plain("a\\..\\x.pt")), "a path that leads out of it"),
        (lambda: packed(special("x.pt", tarfile.SYMTYPE, "/etc/passwd")), "no plain file: 'x.pt'"),
        (lambda: packed(special("x.pt", tarfile.LNKTYPE, "y.pt")), "no plain file"),
        (lambda: packed(special("x.pt", tarfile.CHRTYPE)), "no plain file"),
        (lambda: packed(special("x.pt", tarfile.FIFOTYPE)), "no plain file"),
        (lambda: packed(special("x.pt", tarfile.GNUTYPE_SPARSE)), "no plain file"),
        (lambda: packed(plain("run.sh")), "'run.sh', which is no model file (.safetensors"),
        (lambda: packed(plain("inner.tar")), "'inner.tar', which is no model file"),
        (lambda: packed(plain("a.pt"), plain("b/a.pt")), "two files named a.pt"),
        (lambda: packed(plain("a\n.pt")), "no usable name"),
        (lambda: packed(plain("e.pt", b"")), "an empty file: 'e.pt'"),
        (lambda: packed(plain("only.yaml")), "without a model file in it"),
        (lambda: packed(special("folder", tarfile.DIRTYPE)), "without a model file in it"),
        (lambda: packed(*[plain(f"{n}.pt") for n in range(101)]), "more than 100 members"),
        (lambda: packed(plain("a.pt", b"x" * 2000))[:1800], "ends in the middle of a.pt"),
        (lambda: packed(plain("a.pt"))[:1024] + b"garbage " * 64, "damaged at byte 1024"),
        (lambda: packed(plain("a.pt"), plain("b.pt"))[:1300], "damaged at byte 1024"),
        (lambda: with_long_header(tarfile.XHDTYPE), "a header of 1048576 bytes, allowed are 8192"),
        (lambda: with_long_header(tarfile.GNUTYPE_LONGNAME), "a header of 1048576 bytes"),
        (lambda: NEGATIVE.tobuf(tarfile.GNU_FORMAT) * 3, "an empty file"),
    ],
)
def test_what_an_archive_must_not_hold_is_told(make: Callable[[], bytes], told: str) -> None:
    with pytest.raises(Unfit) as failure:
        members_of(make())
    assert str(failure.value).startswith("x.safetensors is a tar archive ")
    assert told in str(failure.value)
