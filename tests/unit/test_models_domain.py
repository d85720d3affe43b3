"""The rules of checkpoints, and where downloads may not go."""

from __future__ import annotations

import pytest

from services.models.domain import (
    MIN_PART_BYTES,
    UploadedPart,
    check_parts,
    check_urls,
    filename_of,
    find_fault,
    likely_names,
)
from services.models.downloads import is_public
from shared.contracts.models import PartTag
from shared.errors import Rejected

UPLOADED = [
    UploadedPart(number=1, etag='"aaa"', size=MIN_PART_BYTES),
    UploadedPart(number=2, etag='"bbb"', size=MIN_PART_BYTES),
    UploadedPart(number=3, etag='"ccc"', size=1),
]


def tags(*pairs: tuple[int, str]) -> list[PartTag]:
    return [PartTag(PartNumber=number, ETag=etag) for number, etag in pairs]


def test_check_parts_takes_what_s3_said_with_or_without_its_quotes() -> None:
    check_parts("x", 3, tags((1, '"aaa"'), (2, "bbb"), (3, '"ccc"')), UPLOADED)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (tags((1, "aaa"), (2, "xxx"), (3, "ccc")), "part 2 was uploaded with ETag"),
        (tags((2, "bbb"), (1, "aaa"), (3, "ccc")), "part 1 is listed after part 2"),
        (tags((1, "bbb"), (2, "aaa"), (3, "ccc")), "part 1 was uploaded with ETag"),
        (tags((1, "aaa"), (2, "bbb")), "part 3 was uploaded but is not listed"),
        (tags((1, "aaa"), (1, "aaa"), (2, "bbb"), (3, "ccc")), "part 1 is listed twice"),
        (tags((1, "aaa"), (2, "bbb"), (3, "ccc"), (9, "d")), "part 9 was never uploaded"),
        ([], "part 1 was uploaded but is not listed"),
    ],
)
def test_check_parts_names_the_part_that_is_wrong(given: list[PartTag], told: str) -> None:
    with pytest.raises(Rejected, match=f"parts of x.safetensors do not match.*{told}"):
        check_parts("x.safetensors", 3, given, UPLOADED)


def test_check_parts_expects_as_many_as_were_announced() -> None:
    with pytest.raises(Rejected, match="part 4 of 4 is missing"):
        check_parts("x", 4, tags((1, "aaa"), (2, "bbb"), (3, "ccc")), UPLOADED)


def test_check_parts_finds_parts_that_s3_would_refuse_after_it_was_too_late() -> None:
    small = [UploadedPart(number=n, etag="a", size=1000) for n in (1, 2)]
    with pytest.raises(Rejected, match="part 1 has 1000 bytes"):
        check_parts("x", 2, tags((1, "a"), (2, "a")), small)


@pytest.mark.parametrize(
    "filename",
    [
        "",
        ".",
        "..",
        " ",
        "../x",
        "a/b",
        "a\\b",
        "/etc/passwd",
        "a\nb",
        "a\0",
        " x",
        "é" * 128,
        "x" * 10_000,
    ],
)
def test_file_names_that_lead_elsewhere_or_nowhere_are_faulty(filename: str) -> None:
    assert find_fault(filename)


@pytest.mark.parametrize(
    "filename",
    ["v1-5.safetensors", "模型 [v2] (final).ckpt", "100%.pt", ".hidden", "a..b", "x" * 255],
)
def test_file_names_that_people_use_are_fine(filename: str) -> None:
    assert find_fault(filename) is None


def test_names_are_guessed_from_urls_only_where_they_look_like_files() -> None:
    urls = ["https://h/a/x%20y.pth?token=1", "https://h/api/download/models/12", "https://h/"]
    assert likely_names(urls) == ["x y.pth"]
    assert filename_of("/a/..%2Fetc%2Fpasswd") == ""


@pytest.mark.parametrize(
    "url", ["http://h/x", "file:///etc/passwd", "https:///x", "x", "https://[", "https://h:port/x"]
)
def test_check_urls_takes_https_only(url: str) -> None:
    check_urls(["https://host/x"], {"https"})
    with pytest.raises(Rejected, match="urls is not valid"):
        check_urls([url], {"https"})


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "168.63.129.16",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1%eth0",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
def test_downloads_do_not_reach_inside(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "64:ff9b::101:101"])
def test_downloads_reach_the_internet(address: str) -> None:
    assert is_public(address)
