"""An image with this Python, its standard library and `worker.py`: made without a registry."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
LEFT_OUT = ("site-packages", "test", "tests", "idlelib", "ensurepip", "__pycache__", "lib2to3")


def make_image(url: str) -> str:
    """Its name. Made once for each Python and each version of the worker."""
    digest = hashlib.sha256(
        WORKER.read_bytes() + Path(__file__).read_bytes() + sys.version.encode()
    ).hexdigest()[:12]
    name = f"darkroom-test-worker:{digest}"
    docker = ["docker", "--host", url]
    if subprocess.run([*docker, "image", "inspect", name], capture_output=True).returncode:
        subprocess.run(
            [*docker, "import", "-", name], input=_tar(), check=True, capture_output=True
        )
    return name


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder in ("tmp", "run", "var/lib/darkroom/cache"):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o1777
            archive.addfile(info)
        python = Path(sys.executable).resolve()
        stdlib = Path(sysconfig.get_path("stdlib"))
        for file in _libraries(python):
            archive.add(file.resolve(), str(file))
        archive.add(python, str(python))
        archive.add(stdlib, str(stdlib), filter=_no_extras)
        archive.add(WORKER, "worker.py")
        link = tarfile.TarInfo("usr/bin/python")
        link.type, link.linkname = tarfile.SYMTYPE, str(python)
        archive.addfile(link)
    return buffer.getvalue()


def _no_extras(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if Path(info.name).name in LEFT_OUT or info.name.endswith(".a") else info


def _libraries(program: Path) -> Iterator[Path]:
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for match in re.finditer(r"(?:=> )?(/\S+) \(0x", listed):
        yield Path(match[1])
